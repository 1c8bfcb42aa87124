// Codes of equal steps (bit_plane_codes.cuh) to 16-bit weights, step * (code - zero point), each rounded once; of bfloat16 and
// more than four planes, twice. The same names as bit_plane_lookup.cuh, which is for planes of any scales: a
// table is the step and the zero point of a row and group. Numbers are times 2^(2 - PLANES), so the step is the scale of the highest plane.
//
// Operand e of `step` 2 q + e is nibble e of words 2 q + r: x is in the order PAIRED of order_inputs.cuh.
#include "bit_plane_groups.cuh"
#include "bit_plane_nibbles.cuh"
#include "bit_plane_codes.cuh"

#define HALVED (GROUP % 64 != 0) // a word may be of two groups, of 32 inputs each
#define TABLE_BYTES 8

// From a row's and group's scales: [PARAMETERS], rows g and g + 8. The scale, what bfloat16 loses of it, and what to add.
DEVICE void make_tables(unsigned char *to, const u32 *pairs, int upper) {
    float scale = half_of(pairs[0], upper);
    u16 rounded = store_activation(scale);
    ((u32 *)to)[0] = rounded | (u32)store_activation(scale - load_activation(rounded)) << 16;
    ((u32 *)to)[1] = zeros_of(per_center(PLANES), pairs[PLANES], upper).zero[0];
}

// Of a lane's two rows.
struct Tables { u32 scale[2], rest[2], zero[2][2], exponent; }; // zero: of either nibble

DEVICE Tables load_tables(const unsigned char *tables, int g) { // of a group: [16 rows][TABLE_BYTES]
    Tables loaded;
    loaded.exponent = in_register(EXPONENT);
    u32 apart = twice(per_center(PLANES) * (LEAST - LEAST / 16.0f));
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const u32 *from = (const u32 *)(tables + (g + 8 * r) * TABLE_BYTES);
        loaded.scale[r] = twice(from[0]), loaded.rest[r] = permute_bytes(from[0], 0, 0x3232u);
        loaded.zero[r][0] = from[1], loaded.zero[r][1] = SHIFTED ? from[1] : add_pairs(from[1], apart);
    }
    return loaded;
}

typedef Nibbles WordIndices;
DEVICE Nibbles word_indices(const u32 *words) { return all_nibbles(words); }

// The A operand of a product, 16 rows x 16 inputs: number `step` of the four of a word.
DEVICE void expand_step(u32 (&a)[16], const WordIndices &indices, int step, const Tables &tables, const Tables &upper) {
    int second = step % 2;
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int u = 0; u < 2; ++u) {
            const Tables &of = u ? upper : tables;
            int word = step / 2 * 2 + r;
            u32 number = code_pair(indices, word, u, second, per_center(PLANES), of.zero[r][second], tables.exponent);
#ifdef ACTIVATION_BF16
            a[4 * step + r + 2 * u] = fma_pairs(number, of.scale[r], fma_pairs(number, of.rest[r], 0x80008000u));
#else
            a[4 * step + r + 2 * u] = multiply_half2(number, of.scale[r]);
#endif
        }
}
