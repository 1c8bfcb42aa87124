// Inputs as a weight has its columns: in an order of its own, or in groups that are padded. One thread per
// column and token; where it is may be read before the inputs exist.
//
// Compile-time: nothing.

#define THREADS 256

extern "C" __global__ void __launch_bounds__(THREADS)
place_inputs(const u16 *x,           // [tokens][in_features]
             const long long *order, // [columns], an input, or in_features: none
             u16 *y,                 // [tokens][columns]; zero where there is none
             int in_features, int columns) {
    let_next_start();
    int column = (int)blockIdx.x * THREADS + (int)threadIdx.x;
    int input = column < columns ? (int)order[column] : in_features;
    wait_for_previous();
    u16 value = 0;
    if (input < in_features) value = x[(u64)blockIdx.y * in_features + input];
    if (column < columns) y[(u64)blockIdx.y * columns + column] = value;
}
