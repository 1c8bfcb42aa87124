// y = x W^T as published (LUT-GEMM, arXiv 2206.09557): eight signs are a key into a table of the 256
// signed sums of eight inputs, built in shared memory. Other than there, tables and sums are float32,
// and splits of in_features write partial sums that are added in a fixed order: no atomics.
//
// Compile-time: PLANES, GROUP (multiple of 32), OFFSET, TILE (inputs per table set: divides GROUP, a
// multiple of 32, at most 128), ACTIVATION_BF16. Batch 1 per grid.z.
//
// Grid (row blocks, splits, batch), 256 threads, TILE / 8 * 1024 + 4 bytes of shared memory.

#define THREADS 256
#define ROWS_PER_THREAD 4
#define ROWS (THREADS * ROWS_PER_THREAD)
#define KEYS (TILE / 8)
#define PARAMETERS (PLANES + OFFSET)

extern "C" __global__ void __launch_bounds__(THREADS)
lut_gemm(const u32 *keys,   // [in_features / 32, padded][PLANES][rows, padded to ROWS]
         const u16 *scales, // [groups][PARAMETERS][rows, padded to ROWS]
         const u16 *x,      // [batch][in_features]
         float *partial,    // [splits][batch][rows, padded to ROWS]
         int in_features, int padded, int batch, int tiles, int tiles_per_split) {
    DYNAMIC_SHARED(shared);
    float *table = (float *)shared; // [KEYS][256]
    float *total = table + KEYS * 256;
    int thread = (int)threadIdx.x, token = (int)blockIdx.z;
    const u16 *input = x + (u64)token * in_features;
    int first = (int)blockIdx.y * tiles_per_split;
    int last = first + tiles_per_split < tiles ? first + tiles_per_split : tiles;
    float acc[ROWS_PER_THREAD] = {};
    for (int tile = first; tile < last; ++tile) {
        // Each thread fills one entry of every table: key = its number.
        for (int key = 0; key < KEYS; ++key) {
            float sum = 0.0f;
            for (int i = 0; i < 8; ++i) {
                int k = tile * TILE + key * 8 + i;
                float value = k < in_features ? load_activation(input[k]) : 0.0f;
                sum += (thread >> i) & 1 ? value : -value;
            }
            table[key * 256 + thread] = sum;
        }
        __syncthreads();
        if (OFFSET && thread == 0) { // the key of eight +1 is the sum of its inputs
            float sum = 0.0f;
            for (int key = 0; key < KEYS; ++key) sum += table[key * 256 + 255];
            *total = sum;
        }
        __syncthreads();
        int group = tile * TILE / GROUP;
        for (int i = 0; i < ROWS_PER_THREAD; ++i) {
            int row = (int)blockIdx.x * ROWS + i * THREADS + thread;
            for (int plane = 0; plane < PLANES; ++plane) {
                float sum = 0.0f;
                for (int word = 0; word < TILE / 32; ++word) {
                    u64 place = ((u64)(tile * (TILE / 32) + word) * PLANES + plane) * padded + row;
                    u32 four = keys[place];
                    for (int key = 0; key < 4; ++key)
                        sum += table[(word * 4 + key) * 256 + ((four >> (8 * key)) & 255u)];
                }
                acc[i] += sum * half_to_float(scales[((u64)group * PARAMETERS + plane) * padded + row]);
            }
            if (OFFSET)
                acc[i] += *total * half_to_float(scales[((u64)group * PARAMETERS + PLANES) * padded + row]);
        }
        __syncthreads();
    }
    for (int i = 0; i < ROWS_PER_THREAD; ++i) {
        int row = (int)blockIdx.x * ROWS + i * THREADS + thread;
        partial[((u64)blockIdx.y * batch + token) * padded + row] = acc[i];
    }
}
