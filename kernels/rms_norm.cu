// y = x / sqrt(mean x^2 + eps), rounded, times weight, rounded: as transformers' LlamaRMSNorm does. One
// block per row, which it holds in registers; the weight is read while the kernel before still runs.
//
// Compile-time: HIDDEN, THREADS (a multiple of 32), ACTIVATION_BF16. Shared: THREADS / 32 floats.

#define WARPS (THREADS / WARP)
#define VECTORS ((HIDDEN + 8 * THREADS - 1) / (8 * THREADS)) // of eight, per thread

DEVICE void load_eight(const u16 *row, int first, u16 *eight) {
    if (HIDDEN % 8 == 0) {
        quad v = first < HIDDEN ? *(const quad *)(row + first) : quad{0, 0, 0, 0};
        u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int i = 0; i < 8; ++i) eight[i] = (u16)(words[i / 2] >> (16 * (i & 1)));
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) eight[i] = first + i < HIDDEN ? row[first + i] : (u16)0;
    }
}

DEVICE void store_eight(u16 *row, int first, const u16 *eight) {
    if (HIDDEN % 8 == 0) {
        u32 words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) words[i] = eight[2 * i] | (u32)eight[2 * i + 1] << 16;
        if (first < HIDDEN) *(quad *)(row + first) = quad{words[0], words[1], words[2], words[3]};
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i)
            if (first + i < HIDDEN) row[first + i] = eight[i];
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
rms_norm(const u16 *x,      // [rows][HIDDEN]
         const u16 *weight, // [HIDDEN]
         u16 *y,            // [rows][HIDDEN]
         float eps) {
    DYNAMIC_SHARED(memory);
    float *sums = (float *)memory;
    let_next_start();
    int thread = (int)threadIdx.x;
    u16 scale[VECTORS][8], value[VECTORS][8];
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) load_eight(weight, 8 * (v * THREADS + thread), scale[v]);
    wait_for_previous();
    float sum = 0.0f;
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
        load_eight(x + (u64)blockIdx.x * HIDDEN, 8 * (v * THREADS + thread), value[v]);
#pragma unroll
        for (int i = 0; i < 8; ++i) sum += load_activation(value[v][i]) * load_activation(value[v][i]);
    }
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) sum += shuffle_xor(sum, lanes);
    if (thread % WARP == 0) sums[thread / WARP] = sum;
    __syncthreads();
    float total = 0.0f;
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) total += sums[warp];
    float inverse = inverse_root(total * (1.0f / HIDDEN) + eps);
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
        u16 result[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            float normal = load_activation(store_activation(load_activation(value[v][i]) * inverse));
            result[i] = store_activation(normal * load_activation(scale[v][i]));
        }
        store_eight(y + (u64)blockIdx.x * HIDDEN, 8 * (v * THREADS + thread), result);
    }
}
