// y = x W^T by the definition, from the parts as a checkpoint stores them: the oracle on the device, and
// what runs shapes that no other kernel takes. One warp per output row; both group dimensions.
//
// Compile-time: ACTIVATION_BF16. Everything else is a run-time argument.

#define WARPS 8
#define THREADS (WARPS * WARP)

extern "C" __global__ void __launch_bounds__(THREADS)
sign_flip(const u32 *planes,     // [num_bits][out_features][words], bit 0 = lowest input
          const u16 *scales,     // [num_bits][parameters of one plane]
          const u16 *offsets,    // [parameters of one plane]; null: symmetric
                                 // centered: centers of an affine weight, see per_center
          const u16 *x,          // [batch][in_features]
          u16 *y,                // [batch][out_features]
          int out_features, int in_features, int words, int num_bits, int group_size, int num_groups,
          int centered, int along_inputs) { // 1: groups along in_features, parameters [out_features][num_groups];
                                 // 0: along out_features, parameters [num_groups][in_features]
    let_next_start();
    wait_for_previous();
    int row = (int)blockIdx.x * WARPS + (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP;
    int token = (int)blockIdx.y;
    u64 per_plane = along_inputs ? (u64)out_features * num_groups : (u64)num_groups * in_features;
    float sum = 0.0f;
    if (row < out_features)
        for (int k = lane; k < in_features; k += WARP) {
            u64 at = along_inputs ? (u64)row * num_groups + k / group_size
                                  : (u64)(row / group_size) * in_features + k;
            float weight = offsets ? half_to_float(offsets[at]) : 0.0f;
            if (centered) weight *= half_to_float(scales[at]) * per_center(num_bits);
            for (int plane = 0; plane < num_bits; ++plane) {
                u32 word = planes[((u64)plane * out_features + row) * words + k / 32];
                float scale = half_to_float(scales[plane * per_plane + at]);
                weight += (word >> (k % 32)) & 1u ? scale : -scale;
            }
            sum += weight * load_activation(x[(u64)token * in_features + k]);
        }
    for (int lanes = 16; lanes > 0; lanes >>= 1) sum += shuffle_xor(sum, lanes);
    if (row < out_features && lane == 0)
        y[(u64)token * out_features + row] = store_activation(sum);
}
