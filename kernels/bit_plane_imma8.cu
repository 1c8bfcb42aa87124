// y = x W^T for a binary-coded W with groups of a multiple of 64 along in_features, blocks of 8 tokens.
// As in bit_plane_imma.cu bits are the A operand of mma.m16n8k32 on bytes, but here the columns of B
// are tokens and each of x's limbs has sums of its own. There are three: a bit is shifted to the lowest
// place of its byte, or the one above, by one shift for two rows, so that x, an integer of 23 bits,
// needs no room for positions. All sums over 128 inputs are exact, and turn into floats by a start
// value that is the bits of a float whose last place is 1.
#include "bit_planes.cuh"

#define KERNEL bit_plane_imma8
#define ACCUMULATORS 4
#define ROW_POWER 1
#define LIMBS 3
#define X_BYTES 96 // of a 32-input block and token: a word's 64 inputs are [limb][token][t][16 bytes]
#define LIMB_BYTES (COLUMNS * 64)
#define WORD_BYTES (LIMBS * LIMB_BYTES)
#define UNIT_BYTES (4 * WORD_BYTES)
#define X_BITS 21        // magnitudes of x are below 2^(X_BITS + 1)
#define MAGIC 0x4b400000 // 1.5 * 2^23 as a float: integers added to it can be read off its bits
#define MAGIC_VALUE 12582912.0f
static_assert(COLUMNS == 8, "columns of B are tokens");

// Which 64 bytes of a limb are a token's: stores of one token to neighbouring limbs and words, and
// loads of all tokens, are to fall on different banks.
DEVICE int slot_of(int column, int word, int limb) { return (column ^ word ^ limb) & 1 | column & 6; }

// The B operands of all words, and the sum of x over each segment. Of a word's 64 inputs, lane t has
// 8 t .. 8 t + 7 in each half; pair r of them, of both halves, is register r. x becomes an integer that
// is read off the bits of a sum: d0 + 2^8 d1 + 2^16 d2, the d signed bytes.
DEVICE void stage_unit(quad v, int unit, int column, int, const Weight &weight, int lane,
                       unsigned char *operands, float *starts, float *factors) {
    int exponent = exponent_of(v), word = lane / 8;
    float factor = power_of_two(X_BITS - exponent);
    bool upper = lane / 4 & 1; // half of a word's inputs
    u32 pairs[4] = {v.x, v.y, v.z, v.w}, low[4], high[4], sum = 0;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
        u32 a = bits_of_float(load_activation((u16)(pairs[r] & 0xffffu)) * factor + (MAGIC_VALUE + 128.0f));
        u32 b = bits_of_float(load_activation((u16)(pairs[r] >> 16)) * factor + (MAGIC_VALUE + 128.0f));
        sum += a + b;
        // Bytes are d + 128: the lowest ones already, the others, 16 bits of each number, from here.
        low[r] = permute_bytes(a, b, 0x4040u);
        high[r] = permute_bytes(a, b, 0x6521u) + 0x40804080u;
    }
    sum -= 8u * (MAGIC + 128u);
    // Lanes of the lower half take limb 1 of both halves, those of the upper limb 2; of limb 0 each has
    // two registers.
    u32 give = upper ? 0x6420u : 0x7531u;
    u32 got[2] = {shuffle_xor(permute_bytes(high[0], high[1], give), 4),
                  shuffle_xor(permute_bytes(high[2], high[3], give), 4)};
    u32 even = upper ? 0x3514u : 0x5240u, odd = upper ? 0x3716u : 0x7260u;
    unsigned char *place = operands + unit * UNIT_BYTES + word * WORD_BYTES + lane % 4 * 16;
    const u32 signs = 0x80808080u;
    *(quad *)(place + (upper ? 2 : 1) * LIMB_BYTES + slot_of(column, word, upper ? 2 : 1) * 64) =
        quad{permute_bytes(high[0], got[0], even) ^ signs, permute_bytes(high[1], got[0], odd) ^ signs,
             permute_bytes(high[2], got[1], even) ^ signs, permute_bytes(high[3], got[1], odd) ^ signs};
    u32 first = permute_bytes(low[0], low[1], 0x5410u), second = permute_bytes(low[2], low[3], 0x5410u);
    u32 kept = upper ? second : first, other = shuffle_xor(upper ? first : second, 4);
    u64 pair = (permute_bytes(kept, other, upper ? 0x1504u : 0x5140u) ^ signs) |
               (u64)(permute_bytes(kept, other, upper ? 0x3726u : 0x7362u) ^ signs) << 32;
    *(u64 *)(place + slot_of(column, word, 0) * 64 + (upper ? 8 : 0)) = pair;
    float total = (float)(int)segment_total(sum, weight.first + unit, lane);
    if (lane % 4 == 0) starts[(unit * BLOCKS_PER_UNIT + lane / 4) * COLUMNS + column] = total * 0.5f;
    if (lane == 0)
        factors[unit * COLUMNS + column] =
            exponent < 128 ? power_of_two(exponent - X_BITS) : float_of_bits(0x7fc00000u);
}

// Two neighbouring floats.
DEVICE void load_pair(const float *place, float *pair) {
    u64 both = *(const u64 *)place;
    pair[0] = float_of_bits((u32)both), pair[1] = float_of_bits((u32)(both >> 32));
}

// sums += scale * C. Of the limbs' sums, 256 times the third and the second fit into the bits of a
// float, below 2^22: as x has at most 11 significant bits, 128 times 2^22 - 2^11, times 2, are the most.
DEVICE void add_scaled(float *sums, const int (*c)[4], u32 scale) {
    float low = half_to_float((u16)(scale & 0xffffu)), high = half_to_float((u16)(scale >> 16));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float upper = float_of_bits((u32)(c[2][i] * 256 + c[1][i]));
        // Both start values leave in one step, exactly.
        float value = (upper * 256.0f - 257.0f * MAGIC_VALUE) + float_of_bits((u32)c[0][i]);
        sums[i] += (i < 2 ? low : high) * value;
    }
}

// sums += (offset - sum of the scales) * sum of x, of a group.
DEVICE void add_rest(float *sums, const u32 *scales, const float *start) {
    float low = 0.0f, high = 0.0f, sum[2];
    load_pair(start, sum);
#pragma unroll
    for (int i = PARAMETERS - 1; i >= 0; --i) {
        float sign = i < PLANES ? -1.0f : 1.0f;
        low += sign * half_to_float((u16)(scales[i] & 0xffffu));
        high += sign * half_to_float((u16)(scales[i] >> 16));
    }
    sums[0] += low * sum[0], sums[1] += low * sum[1];
    sums[2] += high * (sum[0] + sum[0]); // rows 8 .. 15: a bit higher
    sums[3] += high * (sum[1] + sum[1]);
}

// C = or += a word's bits times x.
DEVICE void multiply_word(int (*c)[4], bool begins, u32 first, const quad *b) {
    const int zeros[4] = {0, 0, 0, 0}, magic[4] = {MAGIC, MAGIC, MAGIC, MAGIC};
    const u32 row = 0x01010101u, next = 0x02020202u; // rows g and g + 8
    u32 second = first >> 2, third = first >> 4, fourth = first >> 6;
#pragma unroll
    for (int limb = 0; limb < LIMBS; ++limb)
        mma_bytes(c[limb], begins ? (limb < 2 ? magic : zeros) : c[limb], first & row, first & next,
                  second & row, second & next, b[limb].x, b[limb].y);
#pragma unroll
    for (int limb = 0; limb < LIMBS; ++limb)
        mma_bytes(c[limb], c[limb], third & row, third & next, fourth & row, fourth & next, b[limb].z,
                  b[limb].w);
}

// acc += one unit's product, two words at a time.
DEVICE void multiply_unit(float *acc, const unsigned char *stage, const unsigned char *operands,
                          const float *starts, const float *factors, int, int unit,
                          const Weight &weight, int lane) {
    int g = lane / 4, t = lane % 4;
    u32 words[PLANES][4];
#pragma unroll
    for (int plane = 0; plane < PLANES; ++plane) {
        quad v = *(const quad *)(stage + plane * PLANE_BYTES + lane * 16);
        words[plane][0] = v.x, words[plane][1] = v.y, words[plane][2] = v.z, words[plane][3] = v.w;
    }
    const u32 *scales = (const u32 *)(stage + PLANES * PLANE_BYTES) + g * PARAMETERS;
    const unsigned char *slots[2] = {operands + unit * UNIT_BYTES + slot_of(g, 0, 0) * 64 + t * 16,
                                     operands + unit * UNIT_BYTES + slot_of(g, 0, 1) * 64 + t * 16};
    float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int half = 0; half < 4; half += 2) {
        quad b[2][LIMBS];
        const u32 *of_word[2];
        bool begins[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            int word = half + i, k = (weight.first + unit) * UNIT + word * 64;
            begins[i] = word == 0 || (REGULAR ? word * 64 % GROUP == 0 : k % GROUP == 0);
            of_word[i] = scales + (REGULAR ? word * 64 / GROUP
                                           : k / GROUP - (k - word * 64) / GROUP) * 8 * PARAMETERS;
            if (begins[i])
                add_rest(sums, of_word[i], starts + (unit * BLOCKS_PER_UNIT + word * 2) * COLUMNS + 2 * t);
#pragma unroll
            for (int limb = 0; limb < LIMBS; ++limb)
                b[i][limb] =
                    *(const quad *)(slots[(word ^ limb) & 1] + word * WORD_BYTES + limb * LIMB_BYTES);
        }
#pragma unroll
        for (int plane = 0; plane < PLANES; ++plane) {
            int c[LIMBS][4];
            multiply_word(c, true, words[plane][half], b[0]);
            if (begins[1]) {
                add_scaled(sums, c, of_word[0][plane]);
                multiply_word(c, true, words[plane][half + 1], b[1]);
            } else {
                multiply_word(c, false, words[plane][half + 1], b[1]);
            }
            add_scaled(sums, c, of_word[1][plane]);
            if (plane % 2) sync_warp();
        }
    }
    float factor[2];
    load_pair(factors + unit * COLUMNS + 2 * t, factor);
#pragma unroll
    for (int i = 0; i < 4; ++i) acc[i] += sums[i] * factor[i & 1];
}

// What a warp has of a tile, to where it is summed: [16 rows][COLUMNS], as floats or marked floats.
DEVICE void put_part(const float *acc, float *shared, u64 *exchange, int lane) {
    int first = 2 * just_now(lane); // row g, column 2 t
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        int index = first + i / 2 * (8 * COLUMNS) + i % 2;
        if (exchange) store_marked(exchange + index, acc[i], 1);
        else shared[index] = acc[i];
    }
}

#include "bit_planes_kernel.cuh"
