// Codes of equal steps (bit_plane_codes.cuh) to 16-bit weights, step * (code - zero point), each rounded once; of bfloat16 and
// more than four planes, twice. The same names as bit_plane_lookup.cuh, which is for planes of any scales: a
// table is the step and the zero point of a row and group.
//
// A code's bits below the exponent of 1024 (bfloat16: 128) are the number 1024 + code, or, one nibble higher, 1024 + 16 code; one
// fused multiplication and addition, which is exact, makes (code - zero point) * 2^(2 - PLANES) of it, the scale of
// the highest plane the weight. Operand e of `step` 2 q + e is nibble e of words 2 q + r: x is in the order PAIRED of order_inputs.cu.
#include "bit_plane_codes.cuh"

#define MORE_PLANES (PLANES - LOW_PLANES) // of the second nibble, the higher
#define HALVED (GROUP % 64 != 0) // a word may be of two groups, of 32 inputs each
#define TABLE_BYTES 8
#ifdef ACTIVATION_BF16
#define EXPONENT 0x43004300u
#define LEAST 128.0f
#define SHIFTED (PLANES > 3) // a second nibble of four bits reaches the exponent
#define fma_pairs fma_bfloat2
#else
#define EXPONENT 0x64006400u
#define LEAST 1024.0f
#define SHIFTED 0
#define fma_pairs fma_half2
#endif

DEVICE float half_of(u32 pair, int upper) { return half_to_float((u16)(upper ? pair >> 16 : pair & 0xffffu)); }
DEVICE u32 twice(u32 value) { return permute_bytes(value, 0, 0x1010u); } // a 16-bit number in both halves
DEVICE u32 twice(float value) { return twice((u32)store_activation(value)); }

// From a row's and group's scales: [PARAMETERS], rows g and g + 8. The scale, what bfloat16 loses of it, and - (LEAST + zero point).
DEVICE void make_tables(unsigned char *to, const u32 *pairs, int upper) {
    const float middle = 0.5f * (float)((1 << PLANES) - 1);
    float scale = half_of(pairs[0], upper), zero = middle - half_of(pairs[PLANES], upper);
    u16 rounded = store_activation(scale);
    ((u32 *)to)[0] = rounded | (u32)store_activation(scale - load_activation(rounded)) << 16;
    ((u32 *)to)[1] = twice(-per_center(PLANES) * (LEAST + zero));
}

// Of a lane's two rows.
struct Tables { u32 scale[2], rest[2], zero[2][2]; }; // zero: of either nibble

DEVICE Tables load_tables(const unsigned char *tables, int g) { // of a group: [16 rows][TABLE_BYTES]
    Tables loaded;
    u32 apart = twice(per_center(PLANES) * (LEAST - LEAST / 16.0f));
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const u32 *from = (const u32 *)(tables + (g + 8 * r) * TABLE_BYTES);
        loaded.scale[r] = twice(from[0]), loaded.rest[r] = permute_bytes(from[0], 0, 0x3232u);
        loaded.zero[r][0] = from[1], loaded.zero[r][1] = SHIFTED ? from[1] : add_pairs(from[1], apart);
    }
    return loaded;
}

struct WordIndices {
    u32 low[4], more[4];
};

DEVICE WordIndices word_indices(const u32 *words) {
    WordIndices found;
    u32 reversed[PLANES];
#pragma unroll
    for (int plane = 0; plane < PLANES; ++plane) reversed[plane] = words[PLANES - 1 - plane]; // the lowest bit first
    nibbles_of<LOW_PLANES>(found.low, reversed);
#if PLANES > 4
    nibbles_of<MORE_PLANES>(found.more, reversed + LOW_PLANES);
#endif
    return found;
}

// (the number of a nibble's COUNT bits * 2^position - zero) * 2^(2 - PLANES) of two inputs; `zero` has the exponent's number too.
template <int COUNT> DEVICE u32 number_pair(u32 nibbles, int second, int position, u32 zero) {
    bool high = second && !SHIFTED;
    u32 bits = code_pair<COUNT>(second && SHIFTED ? nibbles >> 4 : nibbles, high) | EXPONENT;
    return fma_pairs(bits, twice(power_of_two(2 - PLANES + position - (high ? 4 : 0))), zero);
}

// The A operand of a product, 16 rows x 16 inputs: number `step` of the four of a word.
DEVICE void expand_step(u32 (&a)[16], const WordIndices &indices, int step, const Tables &tables, const Tables &upper) {
    int second = step % 2;
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int u = 0; u < 2; ++u) {
            const Tables &of = u ? upper : tables;
            int word = step / 2 * 2 + r;
            u32 number = number_pair<LOW_PLANES>(u ? indices.low[word] >> 8 : indices.low[word], second, 0, of.zero[r][second]);
#if PLANES > 4
            u32 nothing = twice(-per_center(PLANES) * 16.0f * (second && !SHIFTED ? LEAST / 16.0f : LEAST));
            number = add_pairs(number, number_pair<MORE_PLANES>(u ? indices.more[word] >> 8 : indices.more[word], second, 4, nothing));
#endif
#ifdef ACTIVATION_BF16
            a[4 * step + r + 2 * u] = fma_pairs(number, of.scale[r], fma_pairs(number, of.rest[r], 0x80008000u));
#else
            a[4 * step + r + 2 * u] = multiply_half2(number, of.scale[r]);
#endif
        }
}
