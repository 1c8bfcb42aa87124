// Weights of equal steps (OFFSET 2): planes become codes, the whole numbers that their bits spell. A code of up to four
// bits in the low bits of a float16 *is* a subnormal, code * 2^-24, so one AND makes an operand of two weights. No tables.
//
// Nibbles of a word are where bit_plane_lookup.cuh has its indices: nibble 4 h + 2 u + e of word 2 q + r is of row
// g + 8 r and of input 32 u + 8 t + 4 e + 2 q + h, so the two of an operand are of inputs beside one another.
#include "bit_plane_groups.cuh"

#define LOW_PLANES (PLANES < 4 ? PLANES : 4) // of the first nibble
#define NIBBLES 0x11111111u

// Bits of a where `mask` has ones, else of b.
DEVICE u32 either(u32 mask, u32 a, u32 b) { return a & mask | b & ~mask; }

// Nibbles of COUNT planes of a word, the lowest bit first; what is above their COUNT bits is to be masked.
template <int COUNT> DEVICE void nibbles_of(u32 (&nibbles)[4], const u32 *words) {
    const u32 even = 5 * NIBBLES, low = 3 * NIBBLES;
    u32 a = words[0], b = words[COUNT > 1 ? 1 : 0], c = words[COUNT > 2 ? 2 : 0], d = words[COUNT > 3 ? 3 : 0];
    if (COUNT == 1) {
#pragma unroll
        for (int q = 0; q < 4; ++q) nibbles[q] = a >> q;
        return;
    }
    u32 even_rows = either(even, a, b << 1), odd_rows = either(even, a >> 1, b);
    if (COUNT == 2) {
        nibbles[0] = even_rows, nibbles[1] = odd_rows, nibbles[2] = even_rows >> 2, nibbles[3] = odd_rows >> 2;
        return;
    }
    u32 even_more = COUNT == 3 ? c : either(even, c, d << 1), odd_more = COUNT == 3 ? c >> 1 : either(even, c >> 1, d);
    nibbles[0] = either(low, even_rows, even_more << 2), nibbles[2] = either(low, even_rows >> 2, even_more);
    nibbles[1] = either(low, odd_rows, COUNT == 3 ? c << 1 : odd_more << 2), nibbles[3] = either(low, odd_rows >> 2, odd_more);
}

// Codes of two inputs beside one another, in units of 2^-24, or of 2^-20 if `second`.
template <int COUNT> DEVICE u32 code_pair(u32 nibbles, int second) {
    const u32 mask = (1u << COUNT) - 1;
    return nibbles & (second ? mask << 4 | mask << 20 : mask | mask << 16);
}
