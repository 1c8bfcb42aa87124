// y = x W^T for a binary-coded W with groups along in_features, blocks of 1, 8 or 16 tokens (COLUMNS).
// Raw bit planes are the A operand of mma.m16n8k16: a bit at position p of a float16 *is* the
// subnormal 2^(p - 24), so one AND per register makes an operand of two bits. The position's power of
// two is folded into x, the start value of the accumulator turns {0, 1} into {-1, +1}, and a plane's
// scale is applied once per group, in float32. bit_plane_imma.cuh needs half the ANDs, for 1 or 2
// tokens. kernels/README.md has the measurements behind the choices.
#include "bit_planes.cuh"

#define TILES_OF_COLUMNS (COLUMNS > 8 ? COLUMNS / 8 : 1)
#define ACCUMULATORS (TILES_OF_COLUMNS * 4)
#define BY_TOKENS (COLUMNS > 8)
#define ROW_POWER 17
#define X_BYTES 64 // of a 32-input block as B operands: [column][t][pair 0..3] half2

// Two activations times 2^power, rounded to float16: what the tensor cores will see.
DEVICE u32 scaled(u32 pair, int power) {
#ifdef ACTIVATION_BF16
    float factor = power_of_two(power);
    u32 low = float_to_half(load_activation((u16)(pair & 0xffffu)) * factor);
    return low | (u32)float_to_half(load_activation((u16)(pair >> 16)) * factor) << 16;
#else // a power may be beyond float16's range, its halves aren't
    u32 half = (u32)(power / 2 + 15) << 10, other = (u32)(power - power / 2 + 15) << 10;
    return multiply_half2(multiply_half2(pair, half | half << 16), other | other << 16);
#endif
}

// The B operands of all blocks, and the start value of the accumulators at each segment.
DEVICE void stage_unit(quad v, int unit, int column, int, const Weight &weight, int lane,
                       unsigned char *operands, float *starts, float *factors) {
    // Below 2^7: times 2^8, the most that a position needs, still below float16's end. What isn't
    // finite stays what it is.
    int exponent = exponent_of(v) - 6;
#ifndef ACTIVATION_BF16
    exponent = exponent < -30 ? -30 : exponent > 9 ? 9 : exponent; // of zeros, of what isn't finite
#endif
    v.x = scaled(v.x, -exponent), v.y = scaled(v.y, -exponent);
    v.z = scaled(v.z, -exponent), v.w = scaled(v.w, -exponent);
    float sum = sum_half2(v.x) + sum_half2(v.y) + (sum_half2(v.z) + sum_half2(v.w));
    // Positions of the four pairs: 2^(8, 6, 4, 2) in the lower half of a word's 64 inputs,
    // 2^(0, 8, 6, 4) in the upper.
    bool upper = lane / 4 & 1;
    v.x = multiply_half2(v.x, upper ? 0x3c003c00u : 0x5c005c00u);
    v.y = multiply_half2(v.y, upper ? 0x5c005c00u : 0x54005400u);
    v.z = multiply_half2(v.z, upper ? 0x54005400u : 0x4c004c00u);
    v.w = multiply_half2(v.w, upper ? 0x4c004c00u : 0x44004400u);
    int block = unit * BLOCKS_PER_UNIT + lane / 4;
    *(quad *)(operands + (block * COLUMNS + column) * X_BYTES + lane % 4 * 16) = v;
    sum += shuffle_xor(sum, 1);
    sum += shuffle_xor(sum, 2); // of the block of 32
    float total = segment_sum(sum, weight.first + unit, lane);
    if (lane % 4 == 0) starts[block * COLUMNS + column] = -0.5f * power_of_two(-16) * total;
    if (lane == 0) factors[unit * COLUMNS + column] = power_of_two(exponent);
}

DEVICE u32 operand(u32 word, int position) { // 0 .. 15; two bits of one row, as float16 subnormals
    u32 shifted = position < 10 ? word : word >> 10;
    return shifted & (0x00010001u << (position < 10 ? position : position - 10));
}

// sums += scale * C for each plane of a group, and the offset by way of the start values.
DEVICE void flush(float *sums, const float (*c)[TILES_OF_COLUMNS][4], const float (*start)[4],
                  const u32 *scales) {
#pragma unroll
    for (int i = 0; i < PARAMETERS; ++i) {
        u32 pair = scales[i];
        float low = half_to_float((u16)(pair & 0xffffu)), high = half_to_float((u16)(pair >> 16));
        if (OFFSET == 2 && i == PLANES) {
            u32 first = scales[0];
            low *= half_to_float((u16)(first & 0xffffu)) * per_center(PLANES);
            high *= half_to_float((u16)(first >> 16)) * per_center(PLANES);
        }
#pragma unroll
        for (int tile = 0; tile < TILES_OF_COLUMNS; ++tile) {
            const float *value = i < PLANES ? c[i < PLANES ? i : 0][tile] : start[tile];
            float sign = i < PLANES ? 1.0f : -1.0f; // a start value is -sum(x), in C's units
            sums[tile * 4] += sign * low * value[0];
            sums[tile * 4 + 2] += sign * high * value[2];
            if (COLUMNS > 1) {
                sums[tile * 4 + 1] += sign * low * value[1];
                sums[tile * 4 + 3] += sign * high * value[3];
            }
        }
    }
}

// acc += one unit's product.
DEVICE void multiply_unit(float *acc, const unsigned char *stage, const unsigned char *operands,
                          const float *starts, const float *factors, int, int unit,
                          const Weight &weight, int lane) {
    int g = lane / 4, t = lane % 4;
    u32 words[PLANES][4];
    load_words(words, stage, lane);
    const u32 *scales = (const u32 *)(stage + PLANES * PLANE_BYTES) + g * PARAMETERS, *current = scales;
    float c[PLANES][TILES_OF_COLUMNS][4], start[TILES_OF_COLUMNS][4], sums[ACCUMULATORS] = {};
#pragma unroll
    for (int block = 0; block < BLOCKS_PER_UNIT; ++block) {
        int k = ((weight.first + unit) * BLOCKS_PER_UNIT + block) * 32;
        bool begins = block == 0 || (REGULAR ? block * 32 % GROUP == 0 : k % GROUP == 0);
        if (begins) {
            if (block > 0) flush(sums, c, start, current);
            current = scales + (REGULAR ? block * 32 / GROUP
                                        : k / GROUP - (k - block * 32) / GROUP) * 8 * PARAMETERS;
            const float *place = starts + (unit * BLOCKS_PER_UNIT + block) * COLUMNS;
#pragma unroll
            for (int tile = 0; tile < TILES_OF_COLUMNS; ++tile) {
                float even = place[COLUMNS == 1 ? 0 : tile * 8 + 2 * t];
                float odd = place[COLUMNS == 1 ? 0 : tile * 8 + 2 * t + 1];
                start[tile][0] = even, start[tile][1] = odd;
                start[tile][2] = even + even, start[tile][3] = odd + odd; // rows 8 .. 15: a bit higher
                if (!REGULAR)
#pragma unroll
                    for (int plane = 0; plane < PLANES; ++plane)
#pragma unroll
                        for (int i = 0; i < 4; ++i) c[plane][tile][i] = start[tile][i];
            }
        }
        const unsigned char *row = operands + (unit * BLOCKS_PER_UNIT + block) * COLUMNS * X_BYTES;
        int p = 8 * (block & 1); // position of this half's first bit
#pragma unroll
        for (int tile = 0; tile < TILES_OF_COLUMNS; ++tile) {
            quad b = *(const quad *)(row + (COLUMNS == 1 ? 0 : tile * 8 + g) * X_BYTES + 16 * t);
#pragma unroll
            for (int plane = 0; plane < PLANES; ++plane) {
                u32 word = words[plane][block / 2];
                float *d = c[plane][tile];
                mma(d, begins && REGULAR ? start[tile] : d, operand(word, p), operand(word, p + 1),
                    operand(word, p + 2), operand(word, p + 3), b.x, b.y);
                mma(d, d, operand(word, p + 4), operand(word, p + 5), operand(word, p + 6),
                    operand(word, p + 7), b.z, b.w);
            }
        }
    }
    flush(sums, c, start, current);
    const float *factor = factors + unit * COLUMNS;
#pragma unroll
    for (int i = 0; i < ACCUMULATORS; ++i)
        acc[i] += sums[i] * factor[COLUMNS == 1 ? 0 : i / 4 * 8 + 2 * t + i % 2];
}

// What a warp has of a tile, to where it is summed: PLACE_OF, as floats or marked floats.
DEVICE void put_part(const float *acc, float *shared, u64 *exchange, int lane) {
    int g = lane / 4, t = lane % 4;
    if (COLUMNS == 1 && t != 0) return;
#pragma unroll
    for (int i = 0; i < ACCUMULATORS; ++i) {
        if (COLUMNS == 1 && i % 2 == 1) continue;
        int column = COLUMNS == 1 ? 0 : i / 4 * 8 + 2 * t + i % 2;
        int index = PLACE_OF(g + i % 4 / 2 * 8, column);
        if (exchange) store_marked(exchange + index, acc[i], 1);
        else shared[index] = acc[i];
    }
}

#include "bit_planes_multiply.cuh"
