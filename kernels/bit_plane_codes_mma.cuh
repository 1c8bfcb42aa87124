// y = x W^T for a W of equal steps (OFFSET 2) of two to four planes with groups of a multiple of 64 along in_features, blocks of 8 or
// 16 tokens (COLUMNS), or more. Codes less their zero points (bit_plane_codes.cuh), whole numbers, are the A operand of mma.m16n8k16,
// x is the B operand as it stands in memory. Steps are applied to sums of a segment, in float32: nothing is rounded before that.
#include "bit_planes.cuh"
#include "bit_plane_codes.cuh"

#define TILES_OF_COLUMNS (COLUMNS / 8)
#define ACCUMULATORS (TILES_OF_COLUMNS * 4)
#define ROW_POWER (2 - PLANES) // the scale is that of the highest bit
#define UPPER_POWER ROW_POWER
#define X_BYTES 64 // of 32 inputs of a token, as they are
#define X_NUMBERS 0
#define SEGMENT (GROUP % UNIT == 0 ? UNIT : UNIT % GROUP == 0 ? GROUP : 64) // inputs whose sums are scaled at once

DEVICE void stage_unit(quad v, int unit, int column, int, const Weight &, int lane, unsigned char *operands, float *, float *) {
    *(quad *)(operands + ((unit * BLOCKS_PER_UNIT + lane / 4) * COLUMNS + column) * X_BYTES + lane % 4 * 16) = v;
}

DEVICE void multiply_16_bit(float *d, const float *c, const u32 *a, u32 b0, u32 b1) {
#ifdef ACTIVATION_BF16
    mma_bfloat(d, c, a[0], a[1], a[2], a[3], b0, b1);
#else
    mma(d, c, a[0], a[1], a[2], a[3], b0, b1);
#endif
}

// acc += one unit's product.
DEVICE void multiply_unit(float *acc, const unsigned char *stage, const unsigned char *operands, const float *, const float *,
                          int, int unit, const Weight &weight, int lane) {
    int g = lane / 4, t = lane % 4;
    u32 words[PLANES][4];
    load_stored(words, stage, lane);
    const u32 *scales = (const u32 *)(stage + SCALES_AT) + g * PARAMETERS;
    const unsigned char *x = operands + (unit * BLOCKS_PER_UNIT * COLUMNS + g) * X_BYTES + 16 * t;
    const float zeros[4] = {};
    const u32 exponent = in_register(EXPONENT);
    float c[TILES_OF_COLUMNS][4];
    Zeros of[2]; // rows g and g + 8
    float step[2];
#pragma unroll
    for (int word = 0; word < 4; ++word) {
        bool begins = word * 64 % SEGMENT == 0;
        if (begins) {
            int before = (weight.first + unit) * UNIT;
            int group = REGULAR ? word * 64 / GROUP : (before + word * 64) / GROUP - before / GROUP;
            const u32 *own = scales + group * 8 * PARAMETERS;
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                step[r] = half_of(own[0], r);
                of[r] = zeros_of(1.0f, half_of(own[PLANES], r));
            }
        }
        u32 planes[PLANES], nibbles[4];
#pragma unroll
        for (int plane = 0; plane < PLANES; ++plane) planes[plane] = words[plane][word];
        nibbles_of<PLANES>(nibbles, planes);
#pragma unroll
        for (int upper = 0; upper < 2; ++upper) {
            u32 a[2][4];
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int second = 0; second < 2; ++second)
                    a[second][i] = number_pair<PLANES>(upper ? nibbles[i] >> 8 : nibbles[i], second, 1.0f, of[i % 2].zero[second], exponent);
#pragma unroll
            for (int tile = 0; tile < TILES_OF_COLUMNS; ++tile) {
                quad b = *(const quad *)(x + ((word * 2 + upper) * COLUMNS + tile * 8) * X_BYTES);
                multiply_16_bit(c[tile], begins && upper == 0 ? zeros : c[tile], a[0], b.x, b.y);
                multiply_16_bit(c[tile], c[tile], a[1], b.z, b.w);
            }
        }
        if ((word + 1) * 64 % SEGMENT != 0) continue;
#pragma unroll
        for (int i = 0; i < ACCUMULATORS; ++i) acc[i] += step[i / 2 % 2] * c[i / 4][i % 4];
    }
}

// What a warp has of a tile, to where it is summed: [16 rows][COLUMNS], as floats or marked floats.
DEVICE void put_part(const float *acc, float *shared, u64 *exchange, int lane) {
#pragma unroll
    for (int i = 0; i < ACCUMULATORS; ++i) {
        int index = (lane / 4 + i % 4 / 2 * 8) * COLUMNS + i / 4 * 8 + 2 * (lane % 4) + i % 2;
        if (exchange) store_marked(exchange + index, acc[i], 1);
        else shared[index] = acc[i];
    }
}

#include "bit_planes_multiply.cuh"
