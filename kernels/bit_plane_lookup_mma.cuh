// y = x W^T for a binary-coded W of up to four planes with groups along in_features, blocks of 8 or 16 tokens (COLUMNS), or
// more. Weights are looked up in registers, in 16 bit (bit_plane_lookup.cuh), and are the A operand of mma.m16n8k16: one product
// for all planes, where bit_plane_mma.cuh has one for each. x is the B operand as it stands in memory, unscaled.
//
// Half h of a word of indices is of 64 inputs: nibble 2 u + e of word 2 q + r is of row g + 8 r and of input
// 32 u + 8 t + 4 e + 2 q + h, so pairs are of inputs four apart, and so is x where it is staged. Where a word of 64 inputs has
// several groups, its bytes are turned (TURNED): then a half is of 32 inputs, nibble 2 h + e of the lower, or upper,
// half of input 8 t + 4 e + 2 q + h, so pairs are of neighbouring inputs, their bits 16 apart in the plane.
//
// Each warp makes the tables of its unit where the unit's planes were, which are in registers by then.
#define MIRRORED 1 // of four planes, the last is a sign
#define SCALES_AT (PLANES * PLANE_BYTES > SPAN * TILE_ROWS * TABLE_BYTES ? PLANES * PLANE_BYTES : SPAN * TILE_ROWS * TABLE_BYTES)
#include "bit_plane_lookup.cuh"
#include "bit_planes.cuh"

#define TILES_OF_COLUMNS (COLUMNS / 8)
#define ACCUMULATORS (TILES_OF_COLUMNS * 4)
#define BY_TOKENS 1
#define ROW_POWER 0
#define UPPER_POWER 0
#define X_BYTES 64 // of 32 inputs of a token, as they are
#define X_NUMBERS 0
#define INDEX_PLANES (PLANES < 3 ? PLANES : 3)
#define TURNED HALVED

DEVICE void stage_unit(quad v, int unit, int column, int, const Weight &, int lane, unsigned char *operands, float *, float *) {
    if (!TURNED)
        v = quad{permute_bytes(v.x, v.z, 0x5410u), permute_bytes(v.x, v.z, 0x7632u), permute_bytes(v.y, v.w, 0x5410u),
                 permute_bytes(v.y, v.w, 0x7632u)};
    *(quad *)(operands + ((unit * BLOCKS_PER_UNIT + lane / 4) * COLUMNS + column) * X_BYTES + lane % 4 * 16) = v;
}

DEVICE u32 turn(u32 word) { return TURNED ? permute_bytes(word, 0, 0x3120u) : word; }

// A row's four weights: two pairs. `signs`: of the half, as `nibbles_to_bytes` has them, bit `word` of each nibble; ones are minus.
DEVICE void look_up_pairs(u32 &first, u32 &second, u32 index, u32 signs, int word, const Table<PLANES> &table) {
    u32 low = bytes_of<PLANES>(table.low, index, 0), high = bytes_of<PLANES>(table.high, index, 0);
    if (MIRRORS) high ^= signs_of(signs, word);
    first = permute_bytes(low, high, TURNED ? 0x6240u : 0x5140u);
    second = permute_bytes(low, high, TURNED ? 0x7351u : 0x7362u);
#if MIRRORS
    if (OFFSET) first = add_pairs(first, table.center), second = add_pairs(second, table.center);
#endif
}

// Tables of all groups of a unit, in place of its planes.
DEVICE void make_unit_tables(unsigned char *stage, int lane) {
    const u32 *scales = (const u32 *)(stage + SCALES_AT);
    sync_warp(); // all lanes have their words
#pragma unroll
    for (int first = 0; first < SPAN * TILE_ROWS; first += WARP) {
        int index = first + lane, row = index % TILE_ROWS;
        if (SPAN * TILE_ROWS % WARP == 0 || index < SPAN * TILE_ROWS)
            make_tables(stage + index * TABLE_BYTES, scales + (index / TILE_ROWS * 8 + row % 8) * PARAMETERS, row / 8);
    }
    sync_warp();
}

// acc += the product of 32 inputs, which are the lower or the upper half of words.
DEVICE void multiply_half(float *acc, const Indices<INDEX_PLANES> &indices, u32 signs, int upper, const Table<PLANES> *tables,
                          const unsigned char *operands) {
    quad b[TILES_OF_COLUMNS];
#pragma unroll
    for (int tile = 0; tile < TILES_OF_COLUMNS; ++tile) b[tile] = *(const quad *)(operands + tile * 8 * X_BYTES);
    u32 a[2][4]; // of the first eight inputs' halves, of the second's: what b has beside one another
#pragma unroll
    for (int q = 0; q < 2; ++q)
#pragma unroll
        for (int r = 0; r < 2; ++r)
            look_up_pairs(a[0][2 * q + r], a[1][2 * q + r], upper ? indices.of[2 * q + r] >> 16 : indices.of[2 * q + r], signs, 2 * q + r, tables[r]);
#pragma unroll
    for (int tile = 0; tile < TILES_OF_COLUMNS; ++tile) {
        float *d = acc + tile * 4;
        mma_activations(d, d, a[0][0], a[0][1], a[0][2], a[0][3], b[tile].x, b[tile].y);
        mma_activations(d, d, a[1][0], a[1][1], a[1][2], a[1][3], b[tile].z, b[tile].w);
    }
}

// acc += the product of a word's 64 inputs, which are of one group. `signs`: of either half.
DEVICE void multiply_word(float *acc, const Indices<INDEX_PLANES> &indices, const u32 *signs, const Table<PLANES> *tables, const unsigned char *operands) {
    quad b[TILES_OF_COLUMNS][2]; // of the lower and the upper 32 inputs
#pragma unroll
    for (int tile = 0; tile < TILES_OF_COLUMNS; ++tile)
#pragma unroll
        for (int u = 0; u < 2; ++u) b[tile][u] = *(const quad *)(operands + (u * COLUMNS + tile * 8) * X_BYTES);
#pragma unroll
    for (int q = 0; q < 2; ++q) {
        u32 a[2][4];
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
            for (int r = 0; r < 2; ++r)
                look_up_pairs(a[0][2 * h + r], a[1][2 * h + r], h ? indices.of[2 * q + r] >> 16 : indices.of[2 * q + r], signs[h], 2 * q + r, tables[r]);
#pragma unroll
        for (int tile = 0; tile < TILES_OF_COLUMNS; ++tile)
#pragma unroll
            for (int u = 0; u < 2; ++u) {
                float *d = acc + tile * 4;
                quad x = b[tile][u];
                mma_activations(d, d, a[u][0], a[u][1], a[u][2], a[u][3], q ? x.z : x.x, q ? x.w : x.y);
            }
    }
}

// acc += one unit's product.
DEVICE void multiply_unit(float *acc, unsigned char *stage, const unsigned char *operands, const float *, const float *, int,
                          int unit, const Weight &weight, int lane) {
    int g = lane / 4, t = lane % 4;
    u32 words[PLANES][4];
    load_words(words, stage, lane);
    make_unit_tables(stage, lane);
    const unsigned char *x = operands + (unit * BLOCKS_PER_UNIT * COLUMNS + g) * X_BYTES + 16 * t;
    Table<PLANES> tables[2];
#pragma unroll
    for (int word = 0; word < 4; ++word) {
        u32 turned[INDEX_PLANES], minus = MIRRORS ? ~words[PLANES - 1][word] : 0;
#pragma unroll
        for (int plane = 0; plane < INDEX_PLANES; ++plane) turned[plane] = turn(words[plane][word] ^ minus);
        u32 signs[2] = {nibbles_to_bytes(turn(minus), 0), nibbles_to_bytes(turn(minus), 1)};
        Indices<INDEX_PLANES> indices = indices_of<INDEX_PLANES>(turned);
#pragma unroll
        for (int upper = 0; upper < 2; ++upper) {
            int k = word * 64 + upper * 32, first = (weight.first + unit) * UNIT;
            if (k == 0 || !REGULAR || k % GROUP == 0) {
                int group = REGULAR ? k / GROUP : (first + k) / GROUP - first / GROUP;
#pragma unroll
                for (int r = 0; r < 2; ++r)
                    tables[r] = load_table<PLANES>(stage + (group * TILE_ROWS + g + 8 * r) * TABLE_BYTES);
            }
            if (TURNED) multiply_half(acc, indices, signs[upper], upper, tables, x + (word * 2 + upper) * COLUMNS * X_BYTES);
            else if (upper == 0) multiply_word(acc, indices, signs, tables, x + word * 2 * COLUMNS * X_BYTES);
        }
    }
}

// What a warp has of a tile, to where it is summed: PLACE_OF, as floats or marked floats.
DEVICE void put_part(const float *acc, float *shared, u64 *exchange, int lane) {
#pragma unroll
    for (int i = 0; i < ACCUMULATORS; ++i) {
        int index = PLACE_OF(lane / 4 + i % 4 / 2 * 8, i / 4 * 8 + 2 * (lane % 4) + i % 2);
        if (exchange) store_marked(exchange + index, acc[i], 1);
        else shared[index] = acc[i];
    }
}

#include "bit_planes_multiply.cuh"
