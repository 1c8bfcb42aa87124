// Weights of equal steps (OFFSET 2): planes become codes, the whole numbers that their bits spell, less a zero point. No tables.
//
// The two of a pair are the nibbles 16 bits apart (bit_plane_nibbles.cuh), of inputs beside one another.
//
// A code's bits below the exponent of 1024 (bfloat16: 128) are the number 1024 + code or, one nibble higher, 1024 + 16 code: one
// AND with an OR. One fused multiplication and addition makes (code - zero point) of it, or that times a power of two, exactly.
// The file that includes this has included bit_plane_groups.cuh and bit_plane_nibbles.cuh.

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
