// y = x W^T for groups along out_features, 1 or 2 tokens: each warp stages for itself.
#define KERNEL bit_panel_imma
#include "panel_limbs.cuh"

DEVICE void multiply_tile(float *sums, const unsigned char *stage, const unsigned char *operands, int lane) {
    int g = lane / 4, t = lane % 4, c[4];
    multiply_planes(c, stage, operands, lane);
    // Put together where t is even.
    const float *numbers = numbers_of(operands, lane);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float value = (float)c[2 * half + 1] * 256.0f + (float)c[2 * half];
        value += 65536.0f * shuffle_xor(value, 1);
        if (t % 2 == 1 || t / 2 >= COLUMNS) continue;
        sums[(g + 8 * half) * COLUMNS + t / 2] += value * (numbers[0] * (half ? 0.5f : 1.0f)) + numbers[1];
    }
}

#include "bit_panels.cuh"
