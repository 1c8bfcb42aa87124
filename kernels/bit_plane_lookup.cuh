// Bit planes to 16-bit weights by tables in registers: four planes have at most 16 values per row and group,
// each the float32 sum of the definition rounded once, as dequantize.cu does. A table is kept as its low and
// its high bytes, so that one byte permutation looks up four weights. More than four planes have
// a second table, which has the offset; the two are added in 16 bit, so rounded twice.
//
// A word (common.cuh) becomes four words of nibbles, `indices`: nibble n of word 2 q + r is what the planes have of row
// g + 8 r and, n being 4 h + 2 u + e, of input 32 u + 8 t + 4 e + 2 q + h. So one half of
// such a word is what a product of 16 inputs needs of a row, see order_inputs.cuh.
//
// Compile-time: PLANES, GROUP, OFFSET, ACTIVATION_BF16, MIRRORED (below). OFFSET 2 is of up to three planes, which are nibbles in
// memory (bit_plane_nibbles.cuh).
#include "bit_plane_groups.cuh"

#define LOW_PLANES (PLANES < 4 ? PLANES : 4)
#define MORE_PLANES (PLANES - LOW_PLANES)
#define NIBBLES 0x11111111u
#define HALVED (GROUP % 64 != 0) // a word may be of two groups, of 32 inputs each

// Four planes have half as many values up to a sign, which is the fourth's: of 8 that are looked up by the others
// where they differ from it, to which their center is added in 16 bit, so that is rounded twice.
#define MIRRORS (MIRRORED && PLANES == 4)

#define WORDS_OF(planes) ((planes) == 4 ? MIRRORS ? 2 : 4 : (planes) == 3 ? 2 : 1) // of either half of a table

// The values of COUNT planes, of one row and group.
template <int COUNT> struct Table { u32 low[WORDS_OF(COUNT)], high[WORDS_OF(COUNT)]; };
template <> struct Table<0> {};
#if MIRRORS
template <> struct Table<4> { u32 low[2], high[2], center; };
#endif
// Indices of a word: of three planes, and the fourth's bit as bit 2 of its nibbles; MIRRORS: where it is missing, as
// `nibbles_to_bytes` has it of either half.
template <int COUNT> struct Indices { u32 of[4], fourth[COUNT == 4 ? 4 : 1]; };

// Four nibbles, of a half of a word, into the upper halves of bytes: a shift then has one bit of each where the high byte of a
// 16-bit weight has its sign.
DEVICE u32 nibbles_to_bytes(u32 word, int upper) {
    u32 pairs = permute_bytes(word, 0, upper ? 0x3322u : 0x1100u);
    return either(0x00ff00ffu, pairs << 4, pairs);
}
DEVICE u32 signs_of(u32 nibbles, int bit) { return nibbles << (3 - bit) & 0x80808080u; }

#define LOW_BYTES (MIRRORS ? 32 : 8 * WORDS_OF(LOW_PLANES))
#define TABLE_BYTES (LOW_BYTES + (MORE_PLANES ? 8 * WORDS_OF(MORE_PLANES) : 0))

template <int COUNT> DEVICE Indices<COUNT> indices_of(const u32 *words) {
    Indices<COUNT> found;
    const u32 even = 5 * NIBBLES, low = 3 * NIBBLES;
    u32 a = words[0], b = COUNT > 1 ? words[COUNT > 1 ? 1 : 0] : 0, c = COUNT > 2 ? words[COUNT > 2 ? 2 : 0] : 0;
    if (MIRRORS && COUNT == 4) {
        u32 d = words[COUNT == 4 ? 3 : 0];
        a = ~(a ^ d), b = ~(b ^ d), c = ~(c ^ d);
        found.fourth[0] = nibbles_to_bytes(~d, 0), found.fourth[COUNT == 4 ? 1 : 0] = nibbles_to_bytes(~d, 1);
    }
    if (COUNT == 1) {
#pragma unroll
        for (int q = 0; q < 4; ++q) found.of[q] = a >> q & NIBBLES;
        return found;
    }
    u32 ab0 = either(even, a, b << 1), ab1 = either(even, a >> 1, b);
    if (COUNT == 2) {
        found.of[0] = ab0 & low, found.of[1] = ab1 & low, found.of[2] = ab0 >> 2 & low, found.of[3] = ab1 >> 2 & low;
        return found;
    }
    u32 c0 = either(even, c, 0), c1 = either(even, c >> 1, 0);
    found.of[0] = either(low, ab0, c0 << 2), found.of[2] = either(low, ab0 >> 2, c0);
    found.of[1] = either(low, ab1, c1 << 2), found.of[3] = either(low, ab1 >> 2, c1);
    if (COUNT == 4 && !MIRRORS) {
        u32 d = words[COUNT == 4 ? 3 : 0];
        const u32 third = 4 * NIBBLES;
        found.fourth[0] = d << 2 & third, found.fourth[COUNT == 4 ? 1 : 0] = d << 1 & third;
        found.fourth[COUNT == 4 ? 2 : 0] = d & third, found.fourth[COUNT == 4 ? 3 : 0] = d >> 1 & third;
    }
    return found;
}

// As permute_bytes; bit 3 of a nibble is 0, so nothing masks it.
DEVICE u32 pick_bytes(u32 a, u32 b, u32 pick) {
#ifdef QTOOL_HOST
    return permute_bytes(a, b, pick);
#else
    u32 found;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(found) : "r"(a), "r"(b), "r"(pick));
    return found;
#endif
}

// Two 16-bit weights: bytes of four looked up.
DEVICE u32 first_pair(u32 low, u32 high) { return permute_bytes(low, high, 0x5140u); }
DEVICE u32 second_pair(u32 low, u32 high) { return permute_bytes(low, high, 0x7362u); }

// The low or the high bytes of four weights.
template <int COUNT> DEVICE u32 bytes_of(const u32 *table, u32 index, u32 chosen) {
    if (COUNT < 3) return pick_bytes(table[0], table[0], index);
    u32 found = pick_bytes(table[0], table[COUNT < 3 ? 0 : 1], index);
    if (COUNT == 3 || MIRRORS) return found;
    return either(chosen, pick_bytes(table[COUNT == 4 ? 2 : 0], table[COUNT == 4 ? 3 : 0], index), found);
}

// The weights of one row and 16 inputs: what a lane has of the A operand, for inputs 0 to 7 and 8 to 15. `upper` is
// the table of the second eight, which are of the upper 32 of the word.
template <int COUNT>
DEVICE void look_up(u32 &first, u32 &second, const Indices<COUNT> &indices, int word, int half,
                    const Table<COUNT> &table, const Table<COUNT> &upper) {
    u32 index = half ? indices.of[word] >> 16 : indices.of[word], chosen = 0;
    if (COUNT == 4 && !MIRRORS) {
        u32 fourth = indices.fourth[COUNT == 4 ? word : 0];
        chosen = pick_bytes(0, 0xffffffffu, half ? fourth >> 16 : fourth);
    }
#if MIRRORS
    u32 signs = signs_of(indices.fourth[COUNT == 4 ? half : 0], word);
    first = bytes_of<COUNT>(table.low, index, 0), second = bytes_of<COUNT>(table.high, index, 0) ^ signs;
    u32 low_of_first = first, high_of_first = second;
    if (HALVED) first = bytes_of<COUNT>(upper.low, index, 0), second = bytes_of<COUNT>(upper.high, index, 0) ^ signs;
    u32 pair = second_pair(first, second);
    first = first_pair(low_of_first, high_of_first);
    second = pair;
    if (OFFSET) first = add_pairs(first, table.center), second = add_pairs(second, upper.center);
    return;
#endif
    u32 low = bytes_of<COUNT>(table.low, index, chosen), high = bytes_of<COUNT>(table.high, index, chosen);
    first = first_pair(low, high);
    if (HALVED) low = bytes_of<COUNT>(upper.low, index, chosen), high = bytes_of<COUNT>(upper.high, index, chosen);
    second = second_pair(low, high);
}

// Four values, rounded, to the words of a table.
DEVICE void put_values(u32 &low, u32 &high, const float *values, int count) {
    u32 pairs[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        u32 even = 2 * i < count ? store_activation(values[2 * i]) : 0;
        u32 odd = 2 * i + 1 < count ? store_activation(values[2 * i + 1]) : 0;
        pairs[i] = even | odd << 16;
    }
    low = permute_bytes(pairs[0], pairs[1], 0x6420u), high = permute_bytes(pairs[0], pairs[1], 0x7531u);
}

// start + sums of COUNT signed scales, planes as in dequantize.cu one after the other.
template <int COUNT> DEVICE void build(u32 *to, float start, const float *scales) {
    const int size = 1 << COUNT, words = WORDS_OF(COUNT);
    float values[size];
    values[0] = start;
#pragma unroll
    for (int plane = 0; plane < COUNT; ++plane)
#pragma unroll
        for (int i = 0; i < size / 2; ++i) // a bound that is the same for all planes: else values are in memory
            if (i < 1 << plane) {
                values[i + (1 << plane)] = values[i] + scales[plane];
                values[i] -= scales[plane];
            }
#pragma unroll
    for (int word = 0; word < words; ++word)
        put_values(to[word], to[words + word], values + 4 * word, size - 4 * word);
}

DEVICE float half_of(u32 pair, int upper) { return half_to_float((u16)(upper ? pair >> 16 : pair & 0xffffu)); }

// The tables of one row and group, from its scales: [PARAMETERS], rows g and g + 8.
DEVICE void make_tables(unsigned char *to, const u32 *pairs, int upper) {
    float scales[PLANES], start = 0.0f;
#pragma unroll
    for (int plane = 0; plane < PLANES; ++plane) // of nibbles the lowest bit is first
        scales[plane] = half_of(pairs[OFFSET == 2 ? PLANES - 1 - plane : plane], upper);
    if (OFFSET) start = half_of(pairs[PARAMETERS - 1], upper);
    if (OFFSET == 2) start *= scales[PLANES - 1] * per_center(PLANES);
    u32 words[TABLE_BYTES / 4];
#if MIRRORS
    build<3>(words, scales[PLANES - 1], scales);
    u32 center = store_activation(start);
    words[4] = center | center << 16;
#else
    build<LOW_PLANES>(words, MORE_PLANES ? 0.0f : start, scales);
#endif
#if PLANES > 4
    build<MORE_PLANES>(words + LOW_BYTES / 4, start, scales + LOW_PLANES);
#endif
#pragma unroll
    for (int i = 0; i < (MIRRORS ? 5 : TABLE_BYTES / 4); ++i) ((u32 *)to)[i] = words[i];
}

template <int COUNT> DEVICE Table<COUNT> load_table(const unsigned char *from) {
    const int words = WORDS_OF(COUNT);
    Table<COUNT> table;
#pragma unroll
    for (int i = 0; i < words; ++i) table.low[i] = ((const u32 *)from)[i], table.high[i] = ((const u32 *)from)[words + i];
#if MIRRORS
    table.center = ((const u32 *)from)[4];
#endif
    return table;
}

// Tables of a lane's two rows, of a word's group or of its two groups.
struct Tables {
    Table<LOW_PLANES> low[2];
    Table<MORE_PLANES> more[2];
};

DEVICE Tables load_tables(const unsigned char *tables, int g) { // of a group: [16 rows][TABLE_BYTES]
    Tables loaded;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const unsigned char *from = tables + (g + 8 * r) * TABLE_BYTES;
        loaded.low[r] = load_table<LOW_PLANES>(from);
#if PLANES > 4
        loaded.more[r] = load_table<MORE_PLANES>(from + LOW_BYTES);
#endif
    }
    return loaded;
}

// Indices of all planes of a word.
struct WordIndices {
    Indices<LOW_PLANES> low;
#if PLANES > 4
    Indices<MORE_PLANES> more;
#endif
};

DEVICE WordIndices word_indices(const u32 *words) {
    WordIndices found;
#if OFFSET == 2 // nibbles in memory: bit_plane_nibbles.cuh
    nibbles_of<LOW_PLANES>(found.low.of, words);
#pragma unroll
    for (int i = 0; i < 4; ++i) found.low.of[i] &= ((1u << LOW_PLANES) - 1) * NIBBLES;
    return found;
#endif
    found.low = indices_of<LOW_PLANES>(words);
#if PLANES > 4
    found.more = indices_of<MORE_PLANES>(words + LOW_PLANES);
#endif
    return found;
}

// The A operand of a product, 16 rows x 16 inputs: number `step` of the four of a word.
DEVICE void expand_step(u32 (&a)[16], const WordIndices &indices, int step, const Tables &tables, const Tables &upper) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        look_up<LOW_PLANES>(a[4 * step + r], a[4 * step + 2 + r], indices.low, step / 2 * 2 + r, step % 2,
                            tables.low[r], upper.low[r]);
#if PLANES > 4
        u32 first, second;
        look_up<MORE_PLANES>(first, second, indices.more, step / 2 * 2 + r, step % 2, tables.more[r], upper.more[r]);
        a[4 * step + r] = add_pairs(a[4 * step + r], first);
        a[4 * step + 2 + r] = add_pairs(a[4 * step + 2 + r], second);
#endif
    }
}
