// Weights of equal steps (OFFSET 2): planes become codes, the whole numbers that their bits spell, less a zero point. No tables.
//
// Nibbles of a word are where bit_plane_lookup.cuh has its indices: nibble 4 h + 2 u + e of word 2 q + r is of row
// g + 8 r and of input 32 u + 8 t + 4 e + 2 q + h, so the two of a pair, h apart, are of inputs beside one another.
//
// A code's bits below the exponent of 1024 (bfloat16: 128) are the number 1024 + code or, one nibble higher, 1024 + 16 code: one
// AND with an OR. One fused multiplication and addition makes (code - zero point) of it, or that times a power of two, exactly.
#include "bit_plane_groups.cuh"

#define LOW_PLANES (PLANES < 4 ? PLANES : 4) // of the first nibble
#define MORE_PLANES (PLANES - LOW_PLANES)    // of the second, the higher
#define NIBBLES 0x11111111u
#ifdef ACTIVATION_BF16
#define EXPONENT 0x43004300u
#define LEAST 128.0f
#define SHIFTED (PLANES > 3) // a second nibble of four bits would reach the exponent
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

// Of the planes of a word, of which the first are the highest bits: the lower nibbles.
DEVICE void nibbles_of_planes(u32 (&nibbles)[4], const u32 *planes) {
    u32 reversed[LOW_PLANES];
#pragma unroll
    for (int bit = 0; bit < LOW_PLANES; ++bit) reversed[bit] = planes[PLANES - 1 - bit];
    nibbles_of<LOW_PLANES>(nibbles, reversed);
}

#define MIDDLE (0.5f * (float)((1 << PLANES) - 1))

// What is to be added to a row's and group's numbers of either nibble, times `factor`; from the center of its codes.
struct Zeros { u32 zero[2]; };
DEVICE Zeros zeros_of(float factor, float center) {
    float zero = center - MIDDLE; // less the zero point
    Zeros found = {{twice(factor * (zero - LEAST)), 0}};
    found.zero[1] = SHIFTED ? found.zero[0] : add_pairs(found.zero[0], twice(factor * (LEAST - LEAST / 16.0f)));
    return found;
}

// Numbers of COUNT bits of two inputs, times `factor`, a power of two, plus what is to be added. `exponent`: EXPONENT, in a register.
template <int COUNT> DEVICE u32 number_pair(u32 nibbles, int second, float factor, u32 zero, u32 exponent) {
    const u32 mask = (1u << COUNT) - 1;
    bool high = second && !SHIFTED;
    u32 bits = (second && SHIFTED ? nibbles >> 4 : nibbles) & (high ? mask << 4 | mask << 20 : mask | mask << 16) | exponent;
    return fma_pairs(bits, twice(high ? factor / 16.0f : factor), zero);
}
