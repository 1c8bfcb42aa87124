// Planes of a word as nibbles: nibble 4 h + 2 u + e of word 2 q + r is of row g + 8 r and of input 32 u + 8 t + 4 e + 2 q + h
// (common.cuh has where their bits are in planes). Weights of equal steps (OFFSET 2) are in memory so that nibbles take few
// instructions: the lowest four planes, then what is above them, each COUNT planes as COUNT words, in place of the same planes.
//   4: words 0 to 3.   3: words 0 to 2; the fourth bit of a nibble of word i is bit i of that of word 3.
//   2: words 0 and 1, with words 2 and 3 two bits higher.   1: the plane.
#define NIBBLED (OFFSET == 2)
#define NIBBLES 0x11111111u
#define LOW_PLANES (PLANES < 4 ? PLANES : 4) // of the lower nibble
#define MORE_PLANES (PLANES - LOW_PLANES)    // of the higher

// From what is in memory; what is above a nibble's COUNT bits is to be masked.
template <int COUNT> DEVICE void nibbles_of(u32 (&nibbles)[4], const u32 *stored) {
    const u32 a = stored[0], b = stored[COUNT > 1 ? 1 : 0], c = stored[COUNT > 2 ? 2 : 0], d = stored[COUNT > 3 ? 3 : 0];
    nibbles[0] = a;
    nibbles[1] = COUNT == 1 ? a >> 1 : b;
    nibbles[2] = COUNT == 1 || COUNT == 2 ? a >> 2 : c;
    nibbles[3] = COUNT == 1   ? a >> 3
                 : COUNT == 2 ? b >> 2
                 : COUNT == 3 ? either(NIBBLES, a >> 3, either(2 * NIBBLES, b >> 2, c >> 1))
                              : d;
}

// Exchanges bits: the lower of b's and the higher of a's, of each two blocks of `shift` bits, of which `mask` has the lower.
DEVICE void exchange_bits(u32 &a, u32 &b, u32 mask, int shift) {
    u32 first = either(mask, a, b << shift);
    b = either(mask, a >> shift, b);
    a = first;
}

// COUNT planes, the highest bit first, from what is in memory in their place.
template <int COUNT> DEVICE void planes_of_nibbles(u32 *words) {
    u32 n[4];
    nibbles_of<COUNT>(n, words);
    exchange_bits(n[0], n[2], 3 * NIBBLES, 2), exchange_bits(n[1], n[3], 3 * NIBBLES, 2);
    exchange_bits(n[0], n[1], 5 * NIBBLES, 1), exchange_bits(n[2], n[3], 5 * NIBBLES, 1);
#pragma unroll
    for (int bit = 0; bit < COUNT; ++bit) words[COUNT - 1 - bit] = n[bit];
}

// All planes of a word.
DEVICE void planes_of_stored(u32 *words) { // [PLANES]
#if OFFSET == 2
    planes_of_nibbles<LOW_PLANES>(words + MORE_PLANES);
#if PLANES > 4
    planes_of_nibbles<MORE_PLANES>(words);
#endif
#endif
}
