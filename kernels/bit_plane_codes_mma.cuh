// y = x W^T for a W of equal steps (OFFSET 2) with groups along in_features, blocks of 1, 8 or 16 tokens (COLUMNS), or more. Codes
// less their zero points (bit_plane_codes.cuh), whole numbers, are the A operand of mma.m16n8k16, x is the B operand as it stands in
// memory. Steps are applied to sums of a segment, in float32: nothing is rounded before that. bit_plane_imma.cuh is for 1 or 2 tokens.
#include "bit_planes.cuh"
#include "bit_plane_codes.cuh"

#define TILES_OF_COLUMNS (COLUMNS > 8 ? COLUMNS / 8 : 1)
#define ACCUMULATORS (TILES_OF_COLUMNS * 4)
#define BY_TOKENS (COLUMNS > 8)
#define ROW_POWER 0
#define UPPER_POWER 0
#define X_BYTES 64 // of 32 inputs of a token, as they are
#define X_NUMBERS 0
#define SEGMENT (GROUP % UNIT == 0 ? UNIT : UNIT % GROUP == 0 ? GROUP : GROUP % 64 ? 32 : 64) // inputs whose sums are scaled at once

DEVICE void stage_unit(quad v, int unit, int column, int, const Weight &, int lane, unsigned char *operands, float *, float *) {
    *(quad *)(operands + ((unit * BLOCKS_PER_UNIT + lane / 4) * COLUMNS + column) * X_BYTES + lane % 4 * 16) = v;
}

// acc += one unit's product.
DEVICE void multiply_unit(float *acc, const unsigned char *stage, const unsigned char *operands, const float *, const float *,
                          int, int unit, const Weight &weight, int lane) {
    int g = lane / 4, t = lane % 4;
    u32 words[PLANES][4];
    load_stored(words, stage, lane);
    const u32 *scales = (const u32 *)(stage + SCALES_AT) + g * PARAMETERS;
    const unsigned char *x = operands + (unit * BLOCKS_PER_UNIT * COLUMNS + (COLUMNS == 1 ? 0 : g)) * X_BYTES + 16 * t;
    const float zeros[4] = {};
    const u32 exponent = in_register(EXPONENT);
    float c[TILES_OF_COLUMNS][4];
    Zeros of[2]; // rows g and g + 8
    float step[2];
    Nibbles nibbles;
#pragma unroll
    for (int block = 0; block < BLOCKS_PER_UNIT; ++block) { // of 32 inputs, half a word
        bool begins = block * 32 % SEGMENT == 0;
        if (begins) {
            int before = (weight.first + unit) * UNIT;
            int group = REGULAR ? block * 32 / GROUP : (before + block * 32) / GROUP - before / GROUP;
            const u32 *own = scales + group * 8 * PARAMETERS;
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                step[r] = half_of(own[0], r) * per_center(PLANES); // the scale is that of the highest bit
                of[r] = zeros_of(1.0f, own[PLANES], r);
            }
        }
        if (block % 2 == 0) {
            u32 stored[PLANES];
#pragma unroll
            for (int i = 0; i < PLANES; ++i) stored[i] = words[i][block / 2];
            nibbles = all_nibbles(stored);
        }
        u32 a[2][4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int second = 0; second < 2; ++second)
                a[second][i] = code_pair(nibbles, i, block % 2, second, 1.0f, of[i % 2].zero[second], exponent);
#pragma unroll
        for (int tile = 0; tile < TILES_OF_COLUMNS; ++tile) {
            quad b = *(const quad *)(x + (block * COLUMNS + tile * 8) * X_BYTES);
            mma_activations(c[tile], begins ? zeros : c[tile], a[0][0], a[0][1], a[0][2], a[0][3], b.x, b.y);
            mma_activations(c[tile], c[tile], a[1][0], a[1][1], a[1][2], a[1][3], b.z, b.w);
        }
        if ((block + 1) * 32 % SEGMENT != 0) continue;
#pragma unroll
        for (int i = 0; i < ACCUMULATORS; ++i) acc[i] += step[i / 2 % 2] * c[i / 4][i % 4];
    }
}

// What a warp has of a tile, to where it is summed: [16 rows][COLUMNS], as floats or marked floats.
DEVICE void put_part(const float *acc, float *shared, u64 *exchange, int lane) {
    if (COLUMNS == 1 && lane % 4 != 0) return;
#pragma unroll
    for (int i = 0; i < ACCUMULATORS; ++i) {
        if (COLUMNS == 1 && i % 2 == 1) continue;
        int column = COLUMNS == 1 ? 0 : i / 4 * 8 + 2 * (lane % 4) + i % 2;
        int index = PLACE_OF(lane / 4 + i % 4 / 2 * 8, column);
        if (exchange) store_marked(exchange + index, acc[i], 1);
        else shared[index] = acc[i];
    }
}

#include "bit_planes_multiply.cuh"
