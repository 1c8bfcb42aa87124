// y = x W^T for groups along out_features, blocks of 8 or 16 tokens (COLUMNS). All rows of a tile have the
// scales of a column in common, so a lane makes two float16 weights at once: the offsets of two columns, plus or
// minus the scales of each plane, a sign being a bit of the plane. They are the A operand of mma.m16n8k16, x is the B
// operand. Weights are rounded once per plane, where dequantize.cu rounds them once.
#define KERNEL bit_panel_mma
#define BATCH_AHEAD 0
#define X_BYTES 64 // of a 32-input block as B operands: [column][t][pair 0..3] half2
#define SCALE_PLACE (BLOCKS_PER_UNIT * COLUMNS * X_BYTES) // [PARAMETERS][32] quads: minus scales, then offsets
#define FACTOR_PLACE (SCALE_PLACE + PARAMETERS * PLANE_BYTES) // [COLUMNS]: what undoes the scaling of x
#define OPERAND_BYTES (FACTOR_PLACE + COLUMNS * 4)
#define TILES_OF_COLUMNS (COLUMNS / 8)
#define LOADS 8 // tokens whose inputs a lane has under way
#define SIGNS 0x80008000u
#include "panel_inputs.cuh"

// Inputs as float16, and the factor that undoes it: bfloat16 has exponents that float16 hasn't.
DEVICE float to_halves(quad &v) {
#ifdef ACTIVATION_BF16
    int exponent = exponent_of(v) - 14; // below 2^15; what isn't finite stays what it is
    float factor = power_of_two(-exponent);
    u32 pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        u32 low = float_to_half(load_activation((u16)(pairs[i] & 0xffffu)) * factor);
        pairs[i] = low | (u32)float_to_half(load_activation((u16)(pairs[i] >> 16)) * factor) << 16;
    }
    v = quad{pairs[0], pairs[1], pairs[2], pairs[3]};
    return power_of_two(exponent);
#else
    return 1.0f;
#endif
}

// The offsets of eight columns from centers and the scales of the first plane.
DEVICE u32 offset_pair(const Ahead &ahead, int pair) {
    u32 found = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        float offset = column_offset(half_at(ahead.scales[PARAMETERS - 1], 2 * pair + i),
                                     half_at(ahead.scales[0], 2 * pair + i));
        found |= (u32)float_to_half(offset) << (16 * i);
    }
    return found;
}

DEVICE void stage_item(const Ahead &ahead, const u16 *x, int first, int in_features, int columns, int lane,
                       unsigned char *operands) {
    float *factors = (float *)(operands + FACTOR_PLACE);
#pragma unroll
    for (int from = 0; from < COLUMNS; from += LOADS) {
        quad v[LOADS]; // all on their way before the first is looked at
#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
            v[i] = quad{0, 0, 0, 0};
            if (from + i < columns) v[i] = load_inputs(x + (u64)(from + i) * in_features, first, in_features);
        }
#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
            float factor = to_halves(v[i]);
            *(quad *)(operands + (lane / 4 * COLUMNS + from + i) * X_BYTES + lane % 4 * 16) = v[i];
            if (lane == 0) factors[from + i] = factor;
        }
    }
    quad *scales = (quad *)(operands + SCALE_PLACE) + lane;
#pragma unroll
    for (int plane = 0; plane < PLANES; ++plane) {
        quad v = ahead.scales[plane];
        scales[plane * WARP] = quad{v.x ^ SIGNS, v.y ^ SIGNS, v.z ^ SIGNS, v.w ^ SIGNS};
    }
    if (OFFSET == 1) scales[PLANES * WARP] = ahead.scales[PARAMETERS - 1];
    if (OFFSET == 2)
        scales[PLANES * WARP] = quad{offset_pair(ahead, 0), offset_pair(ahead, 1), offset_pair(ahead, 2),
                                     offset_pair(ahead, 3)};
}

DEVICE u32 word_of(const quad &v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

DEVICE void multiply_tile(float *sums, const unsigned char *stage, const unsigned char *operands, int lane) {
    int g = lane / 4, t = lane % 4;
    u32 words[PLANES][4];
    load_words(words, stage, lane);
    float c[TILES_OF_COLUMNS][4] = {};
#pragma unroll
    for (int block = 0; block < BLOCKS_PER_UNIT; ++block) {
        const quad *places = (const quad *)(operands + SCALE_PLACE) + block * 4 + t;
        quad scales[PARAMETERS];
#pragma unroll
        for (int i = 0; i < PARAMETERS; ++i) scales[i] = places[i * WARP];
        u32 a[8]; // of pair i and row g + 8 r: 2 i + r
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            int position = 8 * (block & 1) + i; // of the bit of the pair's first column in its half of a word
            u32 value = 0;
#pragma unroll
            for (int plane = PLANES - 1; plane >= 0; --plane) { // the smallest first: what is rounded is small
                u32 sign = words[plane][block / 2] << (15 - position) & SIGNS;
                u32 scale = sign ^ word_of(scales[plane], i / 2);
                value = plane < PLANES - 1 ? add_half2(value, scale) : scale;
            }
            a[i] = OFFSET ? add_half2(value, word_of(scales[PARAMETERS - 1], i / 2)) : value;
        }
        const unsigned char *row = operands + (block * COLUMNS + g) * X_BYTES + 16 * t;
#pragma unroll
        for (int tile = 0; tile < TILES_OF_COLUMNS; ++tile) {
            quad b = *(const quad *)(row + tile * 8 * X_BYTES);
            mma(c[tile], c[tile], a[0], a[1], a[2], a[3], b.x, b.y);
            mma(c[tile], c[tile], a[4], a[5], a[6], a[7], b.z, b.w);
        }
    }
    const float *factors = (const float *)(operands + FACTOR_PLACE);
#pragma unroll
    for (int tile = 0; tile < TILES_OF_COLUMNS; ++tile)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            int column = tile * 8 + 2 * t + i % 2;
            sums[(g + i / 2 * 8) * COLUMNS + column] += c[tile][i] * factors[column];
        }
}

#include "bit_panels.cuh"
