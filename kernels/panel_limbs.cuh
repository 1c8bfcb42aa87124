// Products for groups along out_features with 1 or 2 tokens (COLUMNS). Each is that of bit_plane_imma.cuh: planes as
// bytes, numbers as four signed bytes. These are x times the scales of a plane, so all planes of a unit add up to one
// integer, and what turns {0, 1} into {-1, +1} is, with the offsets, one number for all rows of a panel.
#define BATCH_AHEAD COLUMNS
#define OPERAND_BYTES (PLANES * COLUMNS * UNIT_BYTES + 16) // limbs, then factors and rests of the tokens
#include "byte_limbs.cuh"
#include "panel_inputs.cuh"

DEVICE float sum_of_warp(float sum) {
#pragma unroll
    for (int lanes = 1; lanes < WARP; lanes *= 2) sum += shuffle_xor(sum, lanes);
    return sum;
}

DEVICE void stage_item(const Ahead &ahead, const u16 *, int, int, int columns, int lane,
                       unsigned char *operands) {
    float *numbers = (float *)(operands + PLANES * COLUMNS * UNIT_BYTES);
    float largest_scale[8]; // of a column; above zero, so that x times the factor below is always finite
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        largest_scale[i] = power_of_two(-24);
#pragma unroll
        for (int plane = 0; plane < PLANES; ++plane)
            largest_scale[i] = larger(largest_scale[i], fabsf(half_at(ahead.scales[plane], i)));
    }
#pragma unroll
    for (int column = 0; column < COLUMNS; ++column) {
        if (column >= columns) continue; // nobody reads other columns' sums
        const quad &v = ahead.x[column];
        u32 largest = 0;
        float x[8], rest = 0.0f;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            x[i] = load_activation(bits_at(v, i));
            u32 bits = bits_of_float(fabsf(x[i]) * largest_scale[i]); // NaN is larger than infinity
            largest = bits > largest ? bits : largest;
            float last = half_at(ahead.scales[PARAMETERS - 1], i);
            if (OFFSET) rest += column_offset(last, half_at(ahead.scales[0], i)) * x[i];
        }
        if (OFFSET) rest = sum_of_warp(rest);
        int exponent = (int)(warp_largest(largest) >> 23) - 127;
        if (exponent < -100) exponent = -100;
        float factor = power_of_two(exponent < 128 ? 21 - exponent : 0); // magnitudes below 2^22
#pragma unroll
        for (int i = 0; i < 8; ++i) x[i] *= factor;
        u32 sum = 0; // of all integers of the lane
#pragma unroll
        for (int plane = 0; plane < PLANES; ++plane) {
            float values[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) values[i] = half_at(ahead.scales[plane], i);
            sum += put_limbs(values, x, operands + (plane * COLUMNS + column) * UNIT_BYTES, lane);
        }
        sum -= (u32)PLANES * 8u * MAGIC;
        u32 high = warp_sum((u32)((int)sum >> 8)), low = warp_sum(sum & 0xffu); // 33 bits in all
        float total = (float)(int)high * 256.0f + (float)low;
        if (lane == 0) {
            numbers[2 * column] = exponent < 128 ? power_of_two(exponent - 26) : float_of_bits(0x7fc00000u);
            numbers[2 * column + 1] = rest - total * power_of_two(exponent < 128 ? exponent - 21 : 0);
        }
    }
}

// A unit of a tile, in a lane rows g and g + 8 of columns 2 t and 2 t + 1: limbs of token t / 2, lowest first.
DEVICE void multiply_planes(int (&sums)[4], const unsigned char *stage, const unsigned char *operands, int lane) {
    int g = lane / 4, t = lane % 4, token = COLUMNS == 1 ? 0 : g / LIMBS;
    u32 words[PLANES][4];
    load_words(words, stage, lane);
    const unsigned char *row = operands + token * UNIT_BYTES + g % LIMBS * 64 + t * 16;
    const int zeros[4] = {0, 0, 0, 0};
    int c[PLANES][4];
#pragma unroll
    for (int word = 0; word < 4; ++word)
#pragma unroll
        for (int plane = 0; plane < PLANES; ++plane) { // sums of their own: none waits for the one before
            quad b = *(const quad *)(row + plane * COLUMNS * UNIT_BYTES + word * WORD_BYTES);
            u32 w = words[plane][word];
            int *d = c[plane];
            mma_bytes(d, word == 0 ? zeros : d, w & 0x01010101u, w & 0x02020202u, w & 0x04040404u,
                      w & 0x08080808u, b.x, b.y);
            mma_bytes(d, d, w & 0x10101010u, w & 0x20202020u, w & 0x40404040u, w & 0x80808080u, b.z, b.w);
        }
#pragma unroll
    for (int plane = 1; plane < PLANES; ++plane)
#pragma unroll
        for (int i = 0; i < 4; ++i) c[0][i] += c[plane][i];
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[i] = c[0][i];
}

// Factor and rest of a lane's token.
DEVICE const float *numbers_of(const unsigned char *operands, int lane) {
    return (const float *)(operands + PLANES * COLUMNS * UNIT_BYTES) + (COLUMNS == 1 ? 0 : lane % 4 / 2 * 2);
}
