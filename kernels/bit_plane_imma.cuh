// y = x W^T for a binary-coded W with groups of a multiple of 64 along in_features, 1 or 2 tokens
// (COLUMNS). Raw bit planes are the A operand of mma.m16n8k32 on bytes: a bit at position p of a byte
// is 2^p, so one AND per register makes an operand of *four* bits, half as many as in
// bit_plane_mma.cuh. x becomes an integer of 23 bits, shifted left so that the positions cancel, and
// its four signed bytes are four columns of B: all sums of a group are exact integers. What turns
// {0, 1} into {-1, +1} is a product with the sum of x, beside the offset's.
#include "bit_planes.cuh"

#define ACCUMULATORS 2
#define ROW_POWER (-5)
#define LIMBS 4
#define X_BYTES 128 // of a 32-input block, as half of a word's 64 inputs: [limb][t][16 bytes]
#define WORD_BYTES (2 * X_BYTES)
#define UNIT_BYTES (4 * WORD_BYTES)
#define MAGIC 0x4b400000u // 1.5 * 2^23 as a float: integers added to it can be read off its bits

// The four signed bytes of an integer, lowest first: value = sum of byte_i * 256^i.
DEVICE u32 signed_bytes(u32 value) { return (value + 0x80808080u) ^ 0x80808080u; }

// The B operands of all words, and the sum of x over each segment. Of a word's 64 inputs, lane t has
// 8 t .. 8 t + 7 in each half; pair r of them, of both halves, is register r. x becomes an integer of
// 23 bits, read off the bits of a float: see MAGIC.
DEVICE void stage_unit(quad v, int unit, int column, int units, const Weight &weight, int lane,
                       unsigned char *operands, float *starts, float *factors) {
    int exponent = exponent_of(v);
    float factor = power_of_two(21 - exponent); // magnitudes below 2^22
    bool upper = lane / 4 & 1; // half of a word's inputs
    u32 pairs[4] = {v.x, v.y, v.z, v.w}, kept[4], received[4], sum = 0;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
        u32 a = bits_of_float(load_activation((u16)(pairs[r] & 0xffffu)) * factor + 12582912.0f);
        u32 b = bits_of_float(load_activation((u16)(pairs[r] >> 16)) * factor + 12582912.0f);
        sum += a + b;
        a = signed_bytes((a - MAGIC) << (6 - 2 * r)), b = signed_bytes((b - MAGIC) << (6 - 2 * r));
        // Lanes of the lower half take limbs 0 and 1 of both halves, those of the upper 2 and 3.
        kept[r] = permute_bytes(a, b, upper ? 0x7362u : 0x5140u);
        received[r] = shuffle_xor(permute_bytes(a, b, upper ? 0x5140u : 0x7362u), 4);
    }
    unsigned char *place = operands + (column * units + unit) * UNIT_BYTES + lane / 8 * WORD_BYTES +
                           (upper ? 128 : 0) + lane % 4 * 16;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        // Lanes of the upper half store their second limb first: to other banks. Of the lower half's
        // pair, the upper's, then the second of each.
        u32 pick = upper ? (i ? 0x1504u : 0x3726u) : (i ? 0x7362u : 0x5140u);
        *(quad *)(place + (upper ? 1 - i : i) * 64) =
            quad{permute_bytes(kept[0], received[0], pick), permute_bytes(kept[1], received[1], pick),
                 permute_bytes(kept[2], received[2], pick), permute_bytes(kept[3], received[3], pick)};
    }
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
    int c[PLANES][4];
    float sum = 0.0f, sums[2] = {0.0f, 0.0f};
#pragma unroll
    for (int word = 0; word < 4; ++word) {
        int k = (weight.first + unit) * UNIT + word * 64;
        bool begins = word == 0 || (REGULAR ? word * 64 % GROUP == 0 : k % GROUP == 0);
        if (begins) {
            if (word > 0) flush(sums, c, sum, current);
            current = scales + (REGULAR ? word * 64 / GROUP
                                        : k / GROUP - (k - word * 64) / GROUP) * 8 * PARAMETERS;
            // Columns 2 t and 2 t + 1 are limbs of one token; its lowest are lane t = 0 or 2's.
            sum = starts[(unit * BLOCKS_PER_UNIT + word * 2) * COLUMNS + (COLUMNS == 1 ? 0 : t / 2)];
            if (t & 1) sum = 0.0f;
            if (!REGULAR)
#pragma unroll
                for (int plane = 0; plane < PLANES; ++plane)
#pragma unroll
                    for (int i = 0; i < 4; ++i) c[plane][i] = 0;
        }
        quad b = *(const quad *)(row + word * WORD_BYTES);
#pragma unroll
        for (int plane = 0; plane < PLANES; ++plane) {
            u32 w = words[plane][word];
            int *d = c[plane];
            mma_bytes(d, begins && REGULAR ? zeros : d, w & 0x01010101u, w & 0x02020202u,
                      w & 0x04040404u, w & 0x08080808u, b.x, b.y);
            mma_bytes(d, d, w & 0x10101010u, w & 0x20202020u, w & 0x40404040u, w & 0x80808080u, b.z,
                      b.w);
        }
    }
    flush(sums, c, sum, current);
    float factor = factors[unit * COLUMNS + (COLUMNS == 1 ? 0 : t / 2)];
    acc[0] += sums[0] * factor;
    acc[1] += sums[1] * factor;
}

// What a warp has of a tile, its limbs put together: [16 rows][COLUMNS], as floats or marked floats.
DEVICE void put_part(const float *acc, float *shared, u64 *exchange, int lane) {
    int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float value = acc[half] + 65536.0f * shuffle_xor(acc[half], 1); // of use where t is even
        int index = (g + 8 * half) * COLUMNS + t / 2;
        if (t % 2 == 1 || t / 2 >= COLUMNS) continue;
        if (exchange) store_marked(exchange + index, value, 1);
        else shared[index] = value;
    }
}

#include "bit_planes_multiply.cuh"
