// y = x W^T for a binary-coded W with groups of a multiple of 64 along in_features, 1, 2, 4 or 8
// tokens (COLUMNS). Raw bit planes are the A operand of mma.m16n8k32 on bytes: a bit at position p of a byte
// is 2^p, so one AND per register makes an operand of *four* bits, half as many as in
// bit_plane_mma.cuh. x becomes an integer of 23 bits, shifted left so that the positions cancel, and
// its four signed bytes are four columns of B: all sums of a group are exact integers. What turns
// {0, 1} into {-1, +1} is a product with the sum of x, beside the offset's.
#include "bit_planes.cuh"

#define PAIRS (COLUMNS > 2 ? COLUMNS / 2 : 1) // of tokens, that a product has columns for
#define ACCUMULATORS (2 * PAIRS)
#define BY_TOKENS 0
#define ROW_POWER (-5)
#include "byte_limbs.cuh"

// The B operands of all words, and the sum of x over each segment.
DEVICE void stage_unit(quad v, int unit, int column, int units, const Weight &weight, int lane,
                       unsigned char *operands, float *starts, float *factors) {
    int exponent = exponent_of(v);
    float factor = power_of_two(21 - exponent); // magnitudes below 2^22
    u32 pairs[4] = {v.x, v.y, v.z, v.w};
    float values[8], shifts[8];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
        shifts[2 * r] = shifts[2 * r + 1] = factor;
        values[2 * r] = load_activation((u16)(pairs[r] & 0xffffu));
        values[2 * r + 1] = load_activation((u16)(pairs[r] >> 16));
    }
    u32 sum = put_limbs(values, shifts, operands + (column * units + unit) * UNIT_BYTES, lane);
    float total = (float)(int)segment_total(sum - 8u * MAGIC, weight.first + unit, lane);
    if (lane % 4 == 0) starts[(unit * BLOCKS_PER_UNIT + lane / 4) * COLUMNS + column] = total * 32.0f;
    if (lane == 0)
        factors[unit * COLUMNS + column] =
            exponent < 128 ? power_of_two(exponent - 21) : float_of_bits(0x7fc00000u);
}

// sums += scale * C for each plane of a group, two limbs of C at once; (offset - sum of the scales) *
// sum of x, at the first limb.
DEVICE void flush(float *sums, const int (*c)[4], float sum, const u32 *scales) {
    float low_rest = 0.0f, high_rest = 0.0f;
    if (OFFSET) {
        u32 pair = scales[PLANES];
        low_rest = half_to_float((u16)(pair & 0xffffu)), high_rest = half_to_float((u16)(pair >> 16));
    }
    if (OFFSET == 2) {
        u32 pair = scales[0];
        low_rest *= half_to_float((u16)(pair & 0xffffu)) * per_center(PLANES);
        high_rest *= half_to_float((u16)(pair >> 16)) * per_center(PLANES);
    }
#pragma unroll
    for (int plane = 0; plane < PLANES; ++plane) {
        u32 pair = scales[plane];
        float low = half_to_float((u16)(pair & 0xffffu)), high = half_to_float((u16)(pair >> 16));
        low_rest -= low, high_rest -= high;
        sums[0] += low * (float)(c[plane][1] * 256 + c[plane][0]);
        sums[1] += high * (float)(c[plane][3] * 256 + c[plane][2]);
    }
    sums[0] += low_rest * sum;
    sums[1] += high_rest * (sum + sum); // rows 8 .. 15: a bit higher
}

// acc += one unit's product.
DEVICE void multiply_unit(float *acc, const unsigned char *stage, const unsigned char *operands,
                          const float *starts, const float *factors, int units, int unit,
                          const Weight &weight, int lane) {
    int g = lane / 4, t = lane % 4, token = COLUMNS == 1 ? 0 : g / LIMBS;
    u32 words[PLANES][4];
    load_words(words, stage, lane);
    const u32 *scales = (const u32 *)(stage + PLANES * PLANE_BYTES) + g * PARAMETERS, *current = scales;
    const unsigned char *row = operands + (token * units + unit) * UNIT_BYTES + g % LIMBS * 64 + t * 16;
    const int zeros[4] = {0, 0, 0, 0};
    int c[PAIRS][PLANES][4];
    float sum[PAIRS] = {}, sums[ACCUMULATORS] = {};
#pragma unroll
    for (int word = 0; word < 4; ++word) {
        int k = (weight.first + unit) * UNIT + word * 64;
        bool begins = word == 0 || (REGULAR ? word * 64 % GROUP == 0 : k % GROUP == 0);
        if (begins) {
#pragma unroll
            for (int pair = 0; pair < PAIRS; ++pair)
                if (word > 0) flush(sums + 2 * pair, c[pair], sum[pair], current);
            current = scales + (REGULAR ? word * 64 / GROUP
                                        : k / GROUP - (k - word * 64) / GROUP) * 8 * PARAMETERS;
#pragma unroll
            for (int pair = 0; pair < PAIRS; ++pair) {
                // Columns 2 t and 2 t + 1 are limbs of one token; its lowest are lane t = 0 or 2's.
                const float *start = starts + (unit * BLOCKS_PER_UNIT + word * 2) * COLUMNS + 2 * pair;
                sum[pair] = t & 1 ? 0.0f : start[COLUMNS == 1 ? 0 : t / 2];
                if (!REGULAR)
#pragma unroll
                    for (int plane = 0; plane < PLANES; ++plane)
#pragma unroll
                        for (int i = 0; i < 4; ++i) c[pair][plane][i] = 0;
            }
        }
#pragma unroll
        for (int pair = 0; pair < PAIRS; ++pair) {
            quad b = *(const quad *)(row + pair * 2 * units * UNIT_BYTES + word * WORD_BYTES);
#pragma unroll
            for (int plane = 0; plane < PLANES; ++plane) {
                u32 w = words[plane][word];
                int *d = c[pair][plane];
                mma_bytes(d, begins && REGULAR ? zeros : d, w & 0x01010101u, w & 0x02020202u,
                          w & 0x04040404u, w & 0x08080808u, b.x, b.y);
                mma_bytes(d, d, w & 0x10101010u, w & 0x20202020u, w & 0x40404040u, w & 0x80808080u,
                          b.z, b.w);
            }
        }
    }
#pragma unroll
    for (int pair = 0; pair < PAIRS; ++pair) {
        flush(sums + 2 * pair, c[pair], sum[pair], current);
        float factor = factors[unit * COLUMNS + 2 * pair + (COLUMNS == 1 ? 0 : t / 2)];
        acc[2 * pair] += sums[2 * pair] * factor;
        acc[2 * pair + 1] += sums[2 * pair + 1] * factor;
    }
}

// What a warp has of a tile, its limbs put together: PLACE_OF, as floats or marked floats.
DEVICE void put_part(const float *acc, float *shared, u64 *exchange, int lane) {
    int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < ACCUMULATORS; ++i) {
        float value = acc[i] + 65536.0f * shuffle_xor(acc[i], 1); // of use where t is even
        int column = i / 2 * 2 + t / 2, index = PLACE_OF(g + i % 2 * 8, column);
        if (t % 2 == 1 || column >= COLUMNS) continue;
        if (exchange) store_marked(exchange + index, value, 1);
        else shared[index] = value;
    }
}

#include "bit_planes_multiply.cuh"
