// y = x W^T for a binary-coded W with groups of a multiple of 64 along in_features, 1, 2, 4 or 8
// tokens (COLUMNS). Raw bit planes are the A operand of mma.m16n8k32 on bytes: a bit at position p of a byte
// is 2^p, so one AND per register makes an operand of *four* bits, half as many as in
// bit_plane_mma.cuh. x becomes an integer of 23 bits, shifted left so that the positions cancel, and
// its four signed bytes are four columns of B: all sums of a group are exact integers. What turns
// {0, 1} into {-1, +1} is a product with the sum of x, beside the offset's.
//
// Of equal steps (OFFSET 2), nibbles (bit_plane_nibbles.cuh) are the operand in place of bits: all of four planes are one product.
#include "bit_planes.cuh"

#define PAIRS (COLUMNS > 2 ? COLUMNS / 2 : 1) // of tokens, that a product has columns for
#define ACCUMULATORS (2 * PAIRS)
#define BY_TOKENS 0
#if OFFSET == 2
#define SETS (PLANES > 4 ? 2 : 1)   // of nibbles, the lower first: what is multiplied by itself
#define ROW_POWER (-2 - PLANES)     // the scale is that of the highest bit
#define UPPER_POWER ROW_POWER
#define PAIR_SHIFT(r) ((r) < 2 ? 4 : 0)
#define START 16.0f
#else
#define SETS PLANES
#define ROW_POWER (-5)
#define START 32.0f
#endif
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
    if (lane % 4 == 0) starts[(unit * BLOCKS_PER_UNIT + lane / 4) * COLUMNS + column] = total * START;
    if (lane == 0)
        factors[unit * COLUMNS + column] =
            exponent < 128 ? power_of_two(exponent - 21) : float_of_bits(0x7fc00000u);
}

#if OFFSET == 2
// sums += step * (the numbers of the nibbles - zero point * sum of x), two limbs at once; the latter at the first limb.
DEVICE void flush(float *sums, const int (*c)[4], float sum, const u32 *scales) {
    const float middle = 0.5f * (float)((1 << PLANES) - 1);
    u32 step = scales[0], center = scales[PLANES];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float number = (float)(c[0][2 * r + 1] * 256 + c[0][2 * r]);
        if (SETS == 2) number += 16.0f * (float)(c[SETS - 1][2 * r + 1] * 256 + c[SETS - 1][2 * r]);
        number += (half_to_float((u16)(r ? center >> 16 : center & 0xffffu)) - middle) * sum;
        sums[r] += half_to_float((u16)(r ? step >> 16 : step & 0xffffu)) * number;
    }
}

// The A operands of a word's set, inputs of b.x and b.y, then of b.z and b.w.
DEVICE void operands_of(u32 (&a)[2][4], const u32 (*words)[4], int word, int set) {
    u32 stored[PLANES], nibbles[4];
#pragma unroll
    for (int i = 0; i < PLANES; ++i) stored[i] = words[i][word];
    const int bits = set ? MORE_PLANES : LOW_PLANES;
    if (set) nibbles_of<MORE_PLANES ? MORE_PLANES : 1>(nibbles, stored);
    else nibbles_of<LOW_PLANES>(nibbles, stored + MORE_PLANES);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const u32 mask = ((1u << bits) - 1) * 0x01010101u;
        a[0][i] = nibbles[i] & mask, a[1][i] = nibbles[i] & mask << 4;
    }
}
#else
// sums += scale * C for each plane of a group, two limbs of C at once; (offset - sum of the scales) *
// sum of x, at the first limb.
DEVICE void flush(float *sums, const int (*c)[4], float sum, const u32 *scales) {
    float low_rest = 0.0f, high_rest = 0.0f;
    if (OFFSET) {
        u32 pair = scales[PLANES];
        low_rest = half_to_float((u16)(pair & 0xffffu)), high_rest = half_to_float((u16)(pair >> 16));
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

DEVICE void operands_of(u32 (&a)[2][4], const u32 (*words)[4], int word, int plane) {
    u32 w = words[plane][word];
#pragma unroll
    for (int i = 0; i < 4; ++i) a[0][i] = w & 0x01010101u << i, a[1][i] = w & 0x10101010u << i;
}
#endif

// acc += one unit's product.
DEVICE void multiply_unit(float *acc, const unsigned char *stage, const unsigned char *operands,
                          const float *starts, const float *factors, int units, int unit,
                          const Weight &weight, int lane) {
    int g = lane / 4, t = lane % 4, token = COLUMNS == 1 ? 0 : g / LIMBS;
    u32 words[PLANES][4];
    load_stored(words, stage, lane);
    const u32 *scales = (const u32 *)(stage + PLANES * PLANE_BYTES) + g * PARAMETERS, *current = scales;
    const unsigned char *row = operands + (token * units + unit) * UNIT_BYTES + g % LIMBS * 64 + t * 16;
    const int zeros[4] = {0, 0, 0, 0};
    int c[PAIRS][SETS][4];
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
                    for (int set = 0; set < SETS; ++set)
#pragma unroll
                        for (int i = 0; i < 4; ++i) c[pair][set][i] = 0;
            }
        }
        u32 a[SETS][2][4];
#pragma unroll
        for (int set = 0; set < SETS; ++set) operands_of(a[set], words, word, set);
#pragma unroll
        for (int pair = 0; pair < PAIRS; ++pair) {
            quad b = *(const quad *)(row + pair * 2 * units * UNIT_BYTES + word * WORD_BYTES);
#pragma unroll
            for (int set = 0; set < SETS; ++set) {
                int *d = c[pair][set];
                mma_bytes(d, begins && REGULAR ? zeros : d, a[set][0][0], a[set][0][1], a[set][0][2], a[set][0][3], b.x, b.y);
                mma_bytes(d, d, a[set][1][0], a[set][1][1], a[set][1][2], a[set][1][3], b.z, b.w);
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
