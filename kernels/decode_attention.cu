// Attention of one new token per sequence: bias, norms of queries and keys, rotary positions, storing
// keys and values, attending and adding up, in one launch.
//
// A block has HEADS query heads of one key-value head and a part of the context: grid (splits, key-value
// heads * BLOCKS, batch). How many positions a part has follows from the position, which is on the
// device, so a captured launch fits every step; blocks without a part end at once. The last block with a
// part also has the new token, takes its key and value from shared memory, and adds up the parts.
// It waits for blocks of lower index only, which have started before it, and sees that a part is there by
// its mark: no step and layer share one. The order of all sums is fixed.
//
// Within a block each warp takes 16 positions, or twice as many, at a time to the tensor cores: scores are
// keys (16 positions x 16 dimensions) times queries (16 x 8 heads), sums are values (16 dimensions x
// 16 positions) times powers (16 x 8 heads). Which dimension is which row or column of a product is free,
// so 16 bytes of shared memory are operands of a lane; what is one product's result and the other's operand is
// transposed within the warp. Each warp has maxima and totals of its own, merged in the end, and a ring of
// its own, which it fills STAGES tiles ahead: no barrier but those of the warp.
//
// An int8 cache holds codes -127 to 127, and a scale per position and key-value head: the largest
// magnitude over 127. Codes become float16, exactly; scales multiply scores and powers.
//
// Compile-time: HEAD_DIM (a multiple of 8, up to 256), HEADS (up to 8), BLOCKS (HEADS * BLOCKS query
// heads per key-value head), QK_NORM, SHORTEST (positions of a part, at least), INT8_CACHE, WARPS, STAGES,
// BULK (copies by the copy engine, of rows of a multiple of 16 bytes), TILES (of positions, at once), RESIDENT (blocks of a multiprocessor), ACTIVATION_BF16.
// Shared: HEADS * QUERY_STRIDE halves, 2 * HEAD_DIM halves, 4 floats, and the larger of WARPS * STAGES
// stages, with two barriers each, and WARPS * HEADS * PART floats.

#if BULK
#include "hopper.cuh"
#endif

#define THREADS (WARPS * WARP)
#if INT8_CACHE
#define STORED signed char
#else
#define STORED u16
#endif
#define PER_LOAD (16 / (int)sizeof(STORED))               // numbers that a lane loads at once
#define PAIRS_LOADED (PER_LOAD / 2)
#define KEY_LOADS ((HEAD_DIM + 4 * PER_LOAD - 1) / (4 * PER_LOAD))   // of a row by 4 lanes
#define VALUE_LOADS ((HEAD_DIM + 8 * PER_LOAD - 1) / (8 * PER_LOAD)) // of a row by 8 lanes
#define TILE 16                                           // positions of a product
#define ROW_BYTES (HEAD_DIM * (int)sizeof(STORED))
#define FETCHED (ROW_BYTES % 16 ? 8 : 16)                 // bytes at once; rows lie at multiples of them
#define FETCHES (ROW_BYTES / FETCHED)                     // of a row
#define SLOT (TILES * TILE * (ROW_BYTES + (INT8_CACHE ? 4 : 0))) // bytes of one side: rows, then scales
#define STEP (WARPS * TILE * TILES)
#define QUERY_STRIDE (KEY_LOADS * 4 * PER_LOAD / 64 * 64 + 32) // lanes' loads then hit other banks
#define HALF (HEAD_DIM / 2)
#define PAIRS ((HALF + WARP - 1) / WARP)                 // rotated together, per lane
#define ROUNDS ((HEADS + 2 + WARPS - 1) / WARPS)         // rows of queries, key, value per warp
#define PART (HEAD_DIM + 2)            // sums, maximum, total
#define SPLITS_AT_ONCE (RESIDENT * WARPS > 8 ? 8 : 16)
#define NOTHING (-1e30f)
#define POWERS 64.0f                   // with scales of values, that small ones stay normal in float16

#if INT8_CACHE || !defined(ACTIVATION_BF16)
#define multiply_tile mma
#define operand float_to_half
#else
#define multiply_tile mma_bfloat
#define operand float_to_bfloat
#endif

// What a warp has attended to: lane 4 g + t has of heads 2 t and 2 t + 1 the maximum of the scores (base
// 2), its share of the total of their powers, and the values weighted by them: of the dimensions
// PER_LOAD * (8 i + g) + 2 k and the next one.
struct Attended { float most[2], total[2], sum[VALUE_LOADS][PAIRS_LOADED][4]; };

DEVICE float rounded(float value) { return load_activation(store_activation(value)); }

// One side of the cache, of a sequence and a key-value head.
struct Side { const STORED *rows; const float *scales; };

// In shared memory sixteen bytes of a row change places, where rows would meet in the same banks: eight
// lanes that load together take two neighbouring keys, or every second value of eight.
DEVICE int keys_turned(int position) { return BULK || ROW_BYTES % 128 ? 0 : position % 2 * 4; }
DEVICE int values_turned(int position) { return BULK || ROW_BYTES % 128 ? 0 : position % 8 / 2 * 2; }

// Sixteen bytes of a row; zeros for what isn't there.
DEVICE quad load_row(const Side &side, int position, int end, int sixteenth, int turned) {
    int dimension = PER_LOAD * sixteenth;
    const STORED *row = side.rows + position * HEAD_DIM + PER_LOAD * (sixteenth ^ turned);
    bool there = position < end && dimension < HEAD_DIM;
#if INT8_CACHE && HEAD_DIM % 16 // a row may end after eight of them, and lies at a multiple of eight
    u64 low = there ? ((const u64 *)row)[0] : 0, high = 0;
    if (there && dimension + 8 < HEAD_DIM) high = ((const u64 *)row)[1];
    return quad{(u32)low, (u32)(low >> 32), (u32)high, (u32)(high >> 32)};
#else
    return there ? *(const quad *)row : quad{0, 0, 0, 0};
#endif
}
DEVICE float load_scale(const Side &side, int position, int end) {
    return INT8_CACHE && position < end ? side.scales[position] : 0.0f;
}

// Ask for one side of the positions from `first` on; what isn't there stays what it was.
template <bool VALUES>
DEVICE void fetch_slot(unsigned char *slot, const Side &side, int first, int end, int lane, u64 *full) {
    const unsigned char *from = (const unsigned char *)(side.rows + (u64)first * HEAD_DIM);
#if BULK
    int count = end - first < TILES * TILE ? end - first : TILES * TILE;
    if (lane == 0 && count > 0) {
        barrier_expect(full, count * ROW_BYTES);
        copy_bulk(slot, from, count * ROW_BYTES, full);
    }
#else
#pragma unroll 4
    for (int k = 0; k < (TILES * TILE * FETCHES + WARP - 1) / WARP; ++k) {
        int i = k * WARP + lane, part = i % FETCHES;
        int row = WARP % FETCHES ? i / FETCHES : k * (WARP / FETCHES) + lane / FETCHES;
        if (first + row >= end || row >= TILES * TILE) continue;
        int turned = VALUES ? values_turned(row) : keys_turned(row);
        fetch<FETCHED>(slot + row * ROW_BYTES + FETCHED * (part ^ turned), from + row * ROW_BYTES + FETCHED * part);
    }
#endif
#if INT8_CACHE
    if (lane < TILES * TILE && first + lane < end)
        fetch<4>(slot + TILES * TILE * ROW_BYTES + 4 * lane, side.scales + first + lane);
#endif
    end_of_fetches();
}
// Wait for the oldest slot that was asked for, of all lanes; the barrier's phase has this parity.
DEVICE void wait_for_slot(u64 *full, int parity) {
#if BULK
    barrier_wait(full, (u32)parity);
#endif
#if INT8_CACHE || !BULK
    fetched<2 * STAGES - 1>();
#endif
    sync_warp();
}
DEVICE Side side_of(const unsigned char *slot) {
    return {(const STORED *)slot, (const float *)(slot + TILES * TILE * ROW_BYTES)};
}

#if INT8_CACHE
// Two of four codes + 128, as float16: 0x6400 | c is 1024 + c.
DEVICE u32 codes_to_halves(u32 codes, u32 pick) {
    return add_half2(permute_bytes(codes, 0x64646464u, pick), 0xe480e480u); // - 1152
}
#endif

// Pairs of neighbouring dimensions.
DEVICE void unpack(const quad &loaded, u32 (&pairs)[PAIRS_LOADED]) {
    u32 words[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
#pragma unroll
    for (int k = 0; k < PAIRS_LOADED; ++k) {
#if INT8_CACHE
        pairs[k] = codes_to_halves(words[k / 2] ^ 0x80808080u, k % 2 ? 0x4342u : 0x4140u);
#else
        pairs[k] = words[k];
#endif
    }
}

// Of two rows the dimensions 2 k and 2 k + 1: of each a pair of positions.
DEVICE void transpose_pair(const quad &first, const quad &second, int k, u32 &lower, u32 &upper) {
    u32 ones[4] = {first.x, first.y, first.z, first.w};
    u32 others[4] = {second.x, second.y, second.z, second.w};
#if INT8_CACHE
    u32 codes = permute_bytes(ones[k / 2], others[k / 2], k % 2 ? 0x7362u : 0x5140u) ^ 0x80808080u;
    lower = codes_to_halves(codes, 0x4140u), upper = codes_to_halves(codes, 0x4342u);
#else
    lower = permute_bytes(ones[k], others[k], 0x5410u);
    upper = permute_bytes(ones[k], others[k], 0x7632u);
#endif
}

// Lane 4 g + t has of keys the positions g and g + 8 and of each 4 * PER_LOAD dimensions those from
// PER_LOAD * t on; of values the positions 2 t, 2 t + 1, 2 t + 8, 2 t + 9 and of each 8 * PER_LOAD
// dimensions those from PER_LOAD * g on; scales of the positions g and g + 8.

// score[n][2 r + j]: of position g + 8 r of tile n and head 2 t + j. Of a slot, or of the new token alone, the
// positions from 0 to `end`.
DEVICE void multiply_keys(float (&score)[TILES][4], const Side &side, int end, const u16 *query, int g, int t,
                          float scale) {
    float odd[TILES][4];
#pragma unroll
    for (int n = 0; n < TILES; ++n)
#pragma unroll
        for (int k = 0; k < 4; ++k) score[n][k] = odd[n][k] = 0.0f;
#pragma unroll
    for (int i = 0; i < KEY_LOADS; ++i) {
        u32 q[PAIRS_LOADED];
#pragma unroll
        for (int k = 0; k < PAIRS_LOADED; k += 4) {
            quad four = *(const quad *)(query + 4 * PER_LOAD * i + 2 * k);
            q[k] = four.x, q[k + 1] = four.y, q[k + 2] = four.z, q[k + 3] = four.w;
        }
#pragma unroll
        for (int n = 0; n < TILES; ++n) {
            u32 a[PAIRS_LOADED], b[PAIRS_LOADED];
            int lower = TILE * n + g, upper = lower + 8;
            unpack(load_row(side, lower, end, 4 * i + t, keys_turned(lower)), a);
            unpack(load_row(side, upper, end, 4 * i + t, keys_turned(upper)), b);
#pragma unroll
            for (int k = 0; k < PAIRS_LOADED; k += 2) { // two chains of dependent products
                float *d = k & 2 ? odd[n] : score[n];
                multiply_tile(d, d, a[k], b[k], a[k + 1], b[k + 1], q[k], q[k + 1]);
            }
        }
    }
#pragma unroll
    for (int n = 0; n < TILES; ++n)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float factor = INT8_CACHE ? scale * load_scale(side, TILE * n + 8 * r + g, end) : scale;
#pragma unroll
            for (int k = 2 * r; k < 2 * r + 2; ++k) score[n][k] = (score[n][k] + odd[n][k]) * factor;
        }
}

// Turn scores into powers, relative to the maximum with them. What isn't there has none.
DEVICE void weigh(Attended &so_far, float (&score)[TILES][4], int end, int g) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        float most = so_far.most[j], total = 0.0f;
#pragma unroll
        for (int n = 0; n < TILES; ++n)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float x = score[n][2 * r + j];
                if (TILE * n + 8 * r + g < end && !(x <= most)) most = x;
            }
#pragma unroll
        for (int lanes = 4; lanes < WARP; lanes *= 2) {
            float other = shuffle_xor(most, lanes);
            if (!(other <= most)) most = other;
        }
        float factor = exp2_fast(so_far.most[j] - most);
        so_far.most[j] = most;
#pragma unroll
        for (int n = 0; n < TILES; ++n)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float &x = score[n][2 * r + j];
                x = TILE * n + 8 * r + g < end ? exp2_fast(x - most) : 0.0f;
                total += x;
            }
        so_far.total[j] = so_far.total[j] * factor + total;
#pragma unroll
        for (int i = 0; i < VALUE_LOADS; ++i)
#pragma unroll
            for (int k = 0; k < PAIRS_LOADED; ++k)
                so_far.sum[i][k][j] *= factor, so_far.sum[i][k][2 + j] *= factor;
    }
}

DEVICE void add_values(Attended &so_far, const float (&power)[TILES][4], const Side &side, int end, int g, int t) {
#pragma unroll
    for (int n = 0; n < TILES; ++n) {
        u32 b[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float scale = INT8_CACHE ? POWERS * load_scale(side, TILE * n + 8 * r + g, end) : 1.0f;
            u32 pair = operand(power[n][2 * r] * scale) | (u32)operand(power[n][2 * r + 1] * scale) << 16;
            b[r] = transpose_pairs(pair);
        }
#pragma unroll
        for (int i = 0; i < VALUE_LOADS; ++i) {
            quad row[4];
#pragma unroll
            for (int m = 0; m < 4; ++m) {
                int position = TILE * n + m / 2 * 8 + 2 * t + m % 2;
                row[m] = load_row(side, position, end, 8 * i + g, values_turned(position));
            }
#pragma unroll
            for (int k = 0; k < PAIRS_LOADED; ++k) {
                u32 a[4];
                transpose_pair(row[0], row[1], k, a[0], a[1]);
                transpose_pair(row[2], row[3], k, a[2], a[3]);
                float *d = so_far.sum[i][k];
                multiply_tile(d, d, a[0], a[1], a[2], a[3], b[0], b[1]);
            }
        }
    }
}

// Of a head and two neighbouring dimensions.
struct Two { float most, total, a, b; };

DEVICE void merge(Two &so_far, float most, float total, float a, float b) {
    float larger = most > so_far.most ? most : so_far.most;
    float mine = exp2_fast(so_far.most - larger), theirs = exp2_fast(most - larger);
    so_far.most = larger;
    so_far.total = so_far.total * mine + total * theirs;
    so_far.a = so_far.a * mine + a * theirs;
    so_far.b = so_far.b * mine + b * theirs;
}

// Add the parts of other blocks, in order, as soon as they are there; `dimension` is within a head.
DEVICE void merge_parts(Two &so_far, const u64 *parts, int head, int dimension, int count, u32 mark) {
    for (int first = 0; first < count; first += SPLITS_AT_ONCE) {
        float most[SPLITS_AT_ONCE], total[SPLITS_AT_ONCE], a[SPLITS_AT_ONCE], b[SPLITS_AT_ONCE];
        bool missing;
        do {
            missing = false;
#pragma unroll
            for (int i = 0; i < SPLITS_AT_ONCE; ++i) {
                if (first + i >= count) continue;
                const u64 *part = parts + ((u64)(first + i) * HEADS + head) * PART;
                bool there = load_marked(part + dimension, &a[i]) == mark;
                there &= load_marked(part + dimension + 1, &b[i]) == mark;
                there &= load_marked(part + HEAD_DIM, &most[i]) == mark;
                there &= load_marked(part + HEAD_DIM + 1, &total[i]) == mark;
                missing |= !there;
            }
        } while (missing);
#pragma unroll
        for (int i = 0; i < SPLITS_AT_ONCE; ++i)
            if (first + i < count) merge(so_far, most[i], total[i], a[i], b[i]);
    }
}

DEVICE float magnitude(float value) { return float_of_bits(bits_of_float(value) & 0x7fffffffu); }

// A number as the cache has it: rounded to even as an integer, by the bits of 1.5 * 2^23 + x.
DEVICE STORED stored(float value, float per_code) {
#if INT8_CACHE
    return (STORED)(bits_of_float(multiply_rounded(value, per_code) + 12582912.0f) & 255u);
#else
    return store_activation(value);
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
decode_attention(const u16 *qkv,        // [batch][(heads + 2 kv_heads) * HEAD_DIM]
                 const u16 *bias,       // [(heads + 2 kv_heads) * HEAD_DIM] or null
                 const u16 *query_norm, // [HEAD_DIM], if QK_NORM
                 const u16 *key_norm,   // the same
                 const float *rotary,   // [max_length][HEAD_DIM]: cosines, then sines
                 const int *positions,  // [batch]
                 const u32 *steps,      // [1]
                 STORED *keys,          // [batch][kv_heads][max_length][HEAD_DIM]
                 STORED *values,        // the same
                 float *key_scales,     // [batch][kv_heads][max_length], if INT8_CACHE
                 float *value_scales,   // the same
                 u64 *parts,            // [batch][kv_heads * BLOCKS][splits][HEADS][PART]
                 u16 *output,           // [batch][heads * HEAD_DIM]
                 float scale, float eps, int kv_heads, int max_length, int layer, int layers) {
    DYNAMIC_SHARED(memory);
    u16 *queries = (u16 *)memory;                                // [HEADS][QUERY_STRIDE]
    STORED *new_key = (STORED *)(queries + HEADS * QUERY_STRIDE); // [HEAD_DIM]
    STORED *new_value = new_key + HEAD_DIM;                      // [HEAD_DIM]
    float *new_scales = (float *)(queries + HEADS * QUERY_STRIDE + 2 * HEAD_DIM); // [2], of 4
    unsigned char *rings = (unsigned char *)(new_scales + 4);    // [WARPS][STAGES][keys, values][SLOT]
    float *of_warps = (float *)rings;                            // [WARPS][HEADS][PART], in the end
    u64 *full = (u64 *)(rings + WARPS * STAGES * 2 * SLOT);      // [WARPS][STAGES][keys, values], if BULK
    let_next_start();
    int thread = (int)threadIdx.x, warp = thread / WARP, lane = thread % WARP;
    int split = (int)blockIdx.x, splits = (int)gridDim.x, sequence = (int)blockIdx.z;
    int kv_head = (int)blockIdx.y / BLOCKS, block = (int)blockIdx.y % BLOCKS;
    int heads = kv_heads * HEADS * BLOCKS, first_head = (int)blockIdx.y * HEADS;
#if BULK
    full += warp * STAGES * 2;
    if (lane < STAGES * 2) barrier_init(full + lane, 1);
    barriers_are_ready();
    sync_warp();
#endif
    wait_for_previous();
    int position = positions[sequence], count = position + 1;
    u32 mark = steps[0] * (u32)layers + (u32)layer + 1u;

    // Rows of the new token: queries, then the key, then the value. Loaded before anything is known.
    float lower[ROUNDS][PAIRS], upper[ROUNDS][PAIRS];
#pragma unroll
    for (int round = 0; round < ROUNDS; ++round) {
        int row = round * WARPS + warp;
        int head = row < HEADS ? first_head + row : heads + (row - HEADS) * kv_heads + kv_head;
        const u16 *source = qkv + ((u64)sequence * (heads + 2 * kv_heads) + head) * HEAD_DIM;
#pragma unroll
        for (int pair = 0; pair < PAIRS; ++pair) {
            int i = pair * WARP + lane;
            bool mine = row < HEADS + 2 && i < HALF;
            lower[round][pair] = mine ? load_activation(source[i]) : 0.0f;
            upper[round][pair] = mine ? load_activation(source[i + HALF]) : 0.0f;
            if (bias && mine) {
                const u16 *added = bias + (u64)head * HEAD_DIM;
                lower[round][pair] = rounded(lower[round][pair] + load_activation(added[i]));
                upper[round][pair] = rounded(upper[round][pair] + load_activation(added[i + HALF]));
            }
        }
    }
    int length = ((count + splits - 1) / splits + WARP - 1) / WARP * WARP;
    if (length < SHORTEST) length = SHORTEST;
    int active = (count + length - 1) / length;
    if (split >= active) return;
    bool last = split == active - 1;
    int begin = split * length, end = last ? position : begin + length; // of what the cache holds
    u64 first_row = ((u64)sequence * kv_heads + kv_head) * max_length;
    Side key_side = {keys + first_row * HEAD_DIM, key_scales + (INT8_CACHE ? first_row : 0)};
    Side value_side = {values + first_row * HEAD_DIM, value_scales + (INT8_CACHE ? first_row : 0)};

    // The first keys and values are on their way while the queries are made.
    int g = lane / 4, t = lane % 4, place = begin + warp * TILE * TILES;
    unsigned char *ring = rings + warp * STAGES * 2 * SLOT;
#pragma unroll 1
    for (int stage = 0; stage < STAGES; ++stage) {
        unsigned char *slot = ring + stage * 2 * SLOT;
        fetch_slot<false>(slot, key_side, place + stage * STEP, end, lane, full + 2 * stage);
        fetch_slot<true>(slot + SLOT, value_side, place + stage * STEP, end, lane, full + 2 * stage + 1);
    }

    for (int i = HEAD_DIM + thread; i < HEADS * QUERY_STRIDE; i += THREADS) // dimensions that aren't there
        if (i % QUERY_STRIDE >= HEAD_DIM) queries[i] = 0;
#pragma unroll
    for (int round = 0; round < ROUNDS; ++round) {
        int row = round * WARPS + warp;
        float inverse = 1.0f;
        if (QK_NORM) {
            float sum = 0.0f;
#pragma unroll
            for (int pair = 0; pair < PAIRS; ++pair)
                sum += lower[round][pair] * lower[round][pair] + upper[round][pair] * upper[round][pair];
#pragma unroll
            for (int lanes = 16; lanes > 0; lanes /= 2) sum += shuffle_xor(sum, lanes);
            inverse = inverse_root(sum * (1.0f / HEAD_DIM) + eps);
        }
        const u16 *weight = row < HEADS ? query_norm : key_norm;
        bool is_key = row == HEADS;
        float a[PAIRS], b[PAIRS], largest = 0.0f;
#pragma unroll
        for (int pair = 0; pair < PAIRS; ++pair) {
            int i = pair * WARP + lane;
            float x = a[pair] = lower[round][pair], y = b[pair] = upper[round][pair];
            if (i >= HALF || row > HEADS) continue; // values stay what they are
            if (QK_NORM) {
                x = rounded(rounded(x * inverse) * load_activation(weight[i]));
                y = rounded(rounded(y * inverse) * load_activation(weight[i + HALF]));
            }
            const float *angle = rotary + (u64)position * HEAD_DIM + i;
            float cosine = angle[0], sine = angle[HALF];
            a[pair] = rounded(x * cosine - y * sine), b[pair] = rounded(y * cosine + x * sine);
        }
        if (row >= HEADS + 2 || (row >= HEADS && !last)) continue;
        if (INT8_CACHE && row >= HEADS) {
#pragma unroll
            for (int pair = 0; pair < PAIRS; ++pair) {
                float x = magnitude(a[pair]), y = magnitude(b[pair]);
                if (!(x <= largest)) largest = x; // NaN stays
                if (!(y <= largest)) largest = y;
            }
#pragma unroll
            for (int lanes = 16; lanes > 0; lanes /= 2) {
                float other = shuffle_xor(largest, lanes);
                if (!(other <= largest)) largest = other;
            }
            if (lane == 0) {
                float *kept = is_key ? key_scales : value_scales;
                new_scales[is_key ? 0 : 1] = largest / 127.0f;
                if (block == 0) kept[first_row + position] = largest / 127.0f;
            }
        }
        float per_code = largest == 0.0f ? 0.0f : 127.0f / largest;
#pragma unroll
        for (int pair = 0; pair < PAIRS; ++pair) {
            int i = pair * WARP + lane;
            if (i >= HALF) continue;
            if (row < HEADS) {
                queries[row * QUERY_STRIDE + i] = operand(a[pair]);
                queries[row * QUERY_STRIDE + i + HALF] = operand(b[pair]);
                continue;
            }
            STORED lower_one = stored(a[pair], per_code), upper_one = stored(b[pair], per_code);
            STORED *fresh = is_key ? new_key : new_value;
            fresh[i] = lower_one, fresh[i + HALF] = upper_one;
            STORED *kept = (is_key ? keys : values) + (first_row + position) * HEAD_DIM;
            if (block == 0) kept[i] = lower_one, kept[i + HALF] = upper_one;
        }
    }
    __syncthreads();

    Attended so_far;
#pragma unroll
    for (int j = 0; j < 2; ++j) so_far.most[j] = NOTHING, so_far.total[j] = 0.0f;
#pragma unroll
    for (int i = 0; i < VALUE_LOADS; ++i)
#pragma unroll
        for (int k = 0; k < 4 * PAIRS_LOADED; ++k) so_far.sum[i][k / 4][k % 4] = 0.0f;
    // Columns of the products without a head repeat the last one.
    const u16 *query = queries + (g < HEADS ? g : HEADS - 1) * QUERY_STRIDE + PER_LOAD * t;
    float score[TILES][4];
    for (int stage = 0, parity = 0; place < end; place += STEP) {
        unsigned char *slot = ring + stage * 2 * SLOT;
        int next = place + STAGES * STEP;
        wait_for_slot(full + 2 * stage, parity);
        multiply_keys(score, side_of(slot), end - place, query, g, t, scale);
        sync_warp(); // no lane reads them any more
        fetch_slot<false>(slot, key_side, next, end, lane, full + 2 * stage);
        weigh(so_far, score, end - place, g);
        wait_for_slot(full + 2 * stage + 1, parity);
        add_values(so_far, score, side_of(slot + SLOT), end - place, g, t);
        sync_warp();
        fetch_slot<true>(slot + SLOT, value_side, next, end, lane, full + 2 * stage + 1);
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
    if (last && warp == WARPS - 1) { // the new token; the last warp has the fewest others
        Side fresh_key = {new_key, new_scales}, fresh_value = {new_value, new_scales + 1};
        multiply_keys(score, fresh_key, 1, query, g, t, scale);
        weigh(so_far, score, 1, g);
        add_values(so_far, score, fresh_value, 1, g, t);
    }
    __syncthreads(); // the rings become room for sums
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int lanes = 4; lanes < WARP; lanes *= 2)
            so_far.total[j] += shuffle_xor(so_far.total[j], lanes);
        int head = 2 * t + j;
        if (head >= HEADS) continue;
        float *mine = of_warps + (warp * HEADS + head) * PART;
#pragma unroll
        for (int i = 0; i < VALUE_LOADS; ++i)
#pragma unroll
            for (int k = 0; k < PAIRS_LOADED; ++k) {
                int dimension = PER_LOAD * (8 * i + g) + 2 * k;
                if (dimension >= HEAD_DIM) continue;
                mine[dimension] = so_far.sum[i][k][j], mine[dimension + 1] = so_far.sum[i][k][2 + j];
            }
        if (g == 0) mine[HEAD_DIM] = so_far.most[j], mine[HEAD_DIM + 1] = so_far.total[j];
    }
    __syncthreads();

    u64 *of_splits = parts + ((u64)sequence * kv_heads * BLOCKS + blockIdx.y) * splits * HEADS * PART;
    for (int both = thread; both < HEADS * HALF; both += THREADS) {
        int head = both / HALF, dimension = 2 * (both % HALF);
        Two mine = {NOTHING, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            const float *part = of_warps + (w * HEADS + head) * PART;
            merge(mine, part[HEAD_DIM], part[HEAD_DIM + 1], part[dimension], part[dimension + 1]);
        }
        if (!last) {
            u64 *part = of_splits + ((u64)split * HEADS + head) * PART;
            store_marked(part + dimension, mine.a, mark);
            store_marked(part + dimension + 1, mine.b, mark);
            if (dimension == 0) {
                store_marked(part + HEAD_DIM, mine.most, mark);
                store_marked(part + HEAD_DIM + 1, mine.total, mark);
            }
            continue;
        }
        merge_parts(mine, of_splits, head, dimension, split, mark);
        float inverse = 1.0f / ((INT8_CACHE ? POWERS : 1.0f) * mine.total);
        u32 pair = store_activation(mine.a * inverse) | (u32)store_activation(mine.b * inverse) << 16;
        *(u32 *)(output + ((u64)sequence * heads + first_head + head) * HEAD_DIM + dimension) = pair;
    }
}
