// Four planes of a word as nibbles, and back. Nibble 4 h + 2 u + e of word 2 q + r is of row g + 8 r and of input
// 32 u + 8 t + 4 e + 2 q + h (common.cuh has where their bits are in planes). Of weights of equal steps and four planes or more, the
// four lowest bits are in memory as such words (NIBBLED), word 0 where the highest of the four planes would be; of eight
// planes the four highest are too.
#define NIBBLED (OFFSET == 2 && PLANES > 3)
#define NIBBLES 0x11111111u

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

// A word's planes, the highest bit first, from what is in memory: turning nibbles once more turns them back.
DEVICE void planes_of_stored(u32 *words) { // [PLANES]
#if NIBBLED
#pragma unroll
    for (int first = PLANES - 4; first >= 0; first -= PLANES == 8 ? 4 : 8) {
        u32 turned[4];
        nibbles_of<4>(turned, words + first);
#pragma unroll
        for (int bit = 0; bit < 4; ++bit) words[first + 3 - bit] = turned[bit];
    }
#endif
}
