// y = x W^T for a W of equal steps (OFFSET 2) of two to four planes with groups of a multiple of 64 along in_features, blocks of 8 or
// 16 tokens (COLUMNS), or more. Codes (bit_plane_codes.cuh) are the A operand of mma.m16n8k16, exactly, x is the B operand as
// it stands in memory. Steps and centers are applied to sums of a segment, in float32: w = step * (code - middle + center).
//
// x of float16 is multiplied as it is; of bfloat16 it becomes float16 by a scale of each unit.
#include "bit_planes.cuh"
#include "bit_plane_codes.cuh"

#define TILES_OF_COLUMNS (COLUMNS / 8)
#define ACCUMULATORS (TILES_OF_COLUMNS * 4)
#define ROW_POWER (26 - PLANES) // codes are subnormals, the scale is that of the highest bit
#define UPPER_POWER ROW_POWER
#define X_BYTES 64 // of 32 inputs of a token, as they are
#define SEGMENT (GROUP % UNIT == 0 ? UNIT : UNIT % GROUP == 0 ? GROUP : 64) // inputs whose sums are scaled at once
#ifdef ACTIVATION_BF16
#define X_SCALED 1
#else
#define X_SCALED 0
#endif

// Two activations times a power of two, as float16.
DEVICE u32 scaled_pair(u32 pair, float factor) {
    u32 low = float_to_half(load_activation((u16)(pair & 0xffffu)) * factor);
    return low | (u32)float_to_half(load_activation((u16)(pair >> 16)) * factor) << 16;
}

// The B operands, and sums of x over segments, by a product with ones: a column is a block of 32 inputs.
DEVICE void stage_unit(quad v, int unit, int column, int, const Weight &, int lane, unsigned char *operands,
                       float *starts, float *factors) {
    if (X_SCALED) { // magnitudes below 2^15; what isn't finite stays so
        int exponent = exponent_of(v) - 14;
        float factor = power_of_two(-exponent);
        v.x = scaled_pair(v.x, factor), v.y = scaled_pair(v.y, factor);
        v.z = scaled_pair(v.z, factor), v.w = scaled_pair(v.w, factor);
        if (lane == 0) factors[unit * COLUMNS + column] = power_of_two(exponent);
    }
    *(quad *)(operands + ((unit * BLOCKS_PER_UNIT + lane / 4) * COLUMNS + column) * X_BYTES + lane % 4 * 16) = v;
    const u32 ones = 0x3c003c00u;
    float sums[4] = {};
    mma(sums, sums, ones, ones, ones, ones, v.x, v.y);
    mma(sums, sums, ones, ones, ones, ones, v.z, v.w);
    float sum = sums[0] + sums[1]; // of 64 inputs: lane t has the t-th
#pragma unroll
    for (int lanes = 1; lanes < SEGMENT / 64; lanes *= 2) sum += shuffle_xor(sum, lanes);
    if (lane < UNIT / 64 && lane % (SEGMENT / 64) == 0)
        starts[(unit * BLOCKS_PER_UNIT + 2 * lane) * COLUMNS + column] = power_of_two(-24) * sum;
}

DEVICE float half_of(u32 pair, int upper) { return half_to_float((u16)(upper ? pair >> 16 : pair & 0xffffu)); }

// sums += step * (codes' sums + (center - middle) * sum of x), of a segment.
DEVICE void flush(float *sums, const float (*c)[2][4], const u32 *scales, const float *start, int t) {
    const float middle = 0.5f * (float)((1 << PLANES) - 1);
    u32 step = scales[0], center = scales[PLANES];
#pragma unroll
    for (int tile = 0; tile < TILES_OF_COLUMNS; ++tile)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float sum = c[tile][0][i] + power_of_two(-4) * c[tile][1][i];
            sum += (half_of(center, i / 2) - middle) * start[tile * 8 + 2 * t + i % 2];
            sums[tile * 4 + i] += half_of(step, i / 2) * sum;
        }
}

// acc += one unit's product.
DEVICE void multiply_unit(float *acc, const unsigned char *stage, const unsigned char *operands, const float *starts,
                          const float *factors, int, int unit, const Weight &weight, int lane) {
    int g = lane / 4, t = lane % 4;
    u32 words[PLANES][4];
    load_words(words, stage, lane);
    const u32 *scales = (const u32 *)(stage + SCALES_AT) + g * PARAMETERS;
    const unsigned char *x = operands + (unit * BLOCKS_PER_UNIT * COLUMNS + g) * X_BYTES + 16 * t;
    const float zeros[4] = {}, *start = starts + unit * BLOCKS_PER_UNIT * COLUMNS;
    float c[TILES_OF_COLUMNS][2][4], sums[ACCUMULATORS] = {}; // c: of an operand's first place, of its second
#pragma unroll
    for (int word = 0; word < 4; ++word) {
        bool begins = word * 64 % SEGMENT == 0;
        u32 planes[PLANES], nibbles[4];
#pragma unroll
        for (int plane = 0; plane < PLANES; ++plane) planes[plane] = words[PLANES - 1 - plane][word]; // the lowest bit first
        nibbles_of<PLANES>(nibbles, planes);
#pragma unroll
        for (int upper = 0; upper < 2; ++upper) {
            u32 a[2][4];
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int second = 0; second < 2; ++second)
                    a[second][i] = code_pair<PLANES>(upper ? nibbles[i] >> 8 : nibbles[i], second);
#pragma unroll
            for (int tile = 0; tile < TILES_OF_COLUMNS; ++tile) {
                quad b = *(const quad *)(x + ((word * 2 + upper) * COLUMNS + tile * 8) * X_BYTES);
                float *first = c[tile][0], *second = c[tile][1];
                bool empty = begins && upper == 0;
                mma(first, empty ? zeros : first, a[0][0], a[0][1], a[0][2], a[0][3], b.x, b.y);
                mma(second, empty ? zeros : second, a[1][0], a[1][1], a[1][2], a[1][3], b.z, b.w);
            }
        }
        if ((word + 1) * 64 % SEGMENT != 0) continue;
        int from = (word + 1) * 64 - SEGMENT, before = (weight.first + unit) * UNIT;
        int group = REGULAR ? from / GROUP : (before + from) / GROUP - before / GROUP;
        flush(X_SCALED ? sums : acc, c, scales + group * 8 * PARAMETERS, start + from / 32 * COLUMNS, t);
    }
    if (X_SCALED)
#pragma unroll
        for (int i = 0; i < ACCUMULATORS; ++i)
            acc[i] += sums[i] * factors[unit * COLUMNS + i / 4 * 8 + 2 * t + i % 2];
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
