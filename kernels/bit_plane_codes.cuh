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
#define ADDED (PLANES > 4 ? 0.0f : LEAST) // 128 and a zero point of eight bits are too much: then the latter is added last
#define fma_pairs fma_bfloat2
#else
#define EXPONENT 0x64006400u
#define LEAST 1024.0f
#define SHIFTED 0
#define ADDED LEAST
#define fma_pairs fma_half2
#endif

DEVICE float half_of(u32 pair, int upper) { return half_to_float((u16)(upper ? pair >> 16 : pair & 0xffffu)); }
DEVICE u32 twice(u32 value) { return permute_bytes(value, 0, 0x1010u); } // a 16-bit number in both halves
DEVICE u32 twice(float value) { return twice((u32)store_activation(value)); }

#define MIDDLE (0.5f * (float)((1 << PLANES) - 1))

// What is to be added to a row's and group's numbers of either nibble, times `factor`, a power of two: from the centers of
// rows g and g + 8. All of it is exact.
struct Zeros { u32 zero[2]; };
DEVICE Zeros zeros_of(float factor, u32 centers, int upper) {
    Zeros found;
#ifdef ACTIVATION_BF16
    found.zero[0] = permute_bytes(bits_of_float(factor * (half_of(centers, upper) - (MIDDLE + ADDED))), 0, 0x3232u);
#else
    u32 both = add_half2(add_half2(centers, twice(-MIDDLE)), twice(-LEAST));
    if (factor != 1.0f) both = multiply_half2(both, twice(factor));
    found.zero[0] = permute_bytes(both, 0, upper ? 0x3232u : 0x1010u);
#endif
    found.zero[1] = SHIFTED || ADDED == 0.0f ? found.zero[0] : add_pairs(found.zero[0], twice(factor * (LEAST - LEAST / 16.0f)));
    return found;
}

// Numbers of COUNT bits of two inputs, times `factor`, a power of two, plus what is to be added. `exponent`: EXPONENT, in a register.
template <int COUNT> DEVICE u32 number_pair(u32 nibbles, int second, float factor, u32 zero, u32 exponent) {
    const u32 mask = (1u << COUNT) - 1;
    bool high = second && !SHIFTED;
    u32 bits = (second && SHIFTED ? nibbles >> 4 : nibbles) & (high ? mask << 4 | mask << 20 : mask | mask << 16) | exponent;
    return fma_pairs(bits, twice(high ? factor / 16.0f : factor), zero);
}

// Nibbles of a word, from what is in memory.
struct Nibbles { u32 low[4], more[PLANES > 4 ? 4 : 1]; };
DEVICE Nibbles all_nibbles(const u32 *stored) {
    Nibbles found;
    nibbles_of<LOW_PLANES>(found.low, stored + MORE_PLANES);
#if PLANES > 4
    nibbles_of<MORE_PLANES>(found.more, stored);
#endif
    return found;
}

// Codes of two inputs, of the lower or the upper half of word `word`'s inputs, less what they are to have less; times `factor`.
DEVICE u32 code_pair(const Nibbles &nibbles, int word, int upper, int second, float factor, u32 zero, u32 exponent) {
    const float least = factor * (second && !SHIFTED ? LEAST / 16.0f : LEAST);
    u32 low = upper ? nibbles.low[word] >> 8 : nibbles.low[word];
    low = number_pair<LOW_PLANES>(low, second, factor, ADDED == 0.0f ? twice(-least) : zero, exponent);
#if PLANES > 4
    u32 more = upper ? nibbles.more[word] >> 8 : nibbles.more[word];
    low = add_pairs(low, number_pair<MORE_PLANES>(more, second, 16.0f * factor, twice(-16.0f * least), exponent));
    return ADDED == 0.0f ? add_pairs(low, zero) : low;
#else
    return low;
#endif
}
