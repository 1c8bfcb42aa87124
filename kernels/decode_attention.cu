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
// Within a block each group of ROW_LANES lanes reads one position at a time, eight dimensions per lane,
// with a maximum and a sum of its own; those are merged within the warp, then among the warps.
//
// Compile-time: HEAD_DIM (a multiple of 8, up to 256), HEADS, BLOCKS (HEADS * BLOCKS query heads per
// key-value head), QK_NORM, SHORTEST (positions of a part, at least), ACTIVATION_BF16.
// Shared: HEADS * HEAD_DIM floats, 2 * HEAD_DIM halves, WARPS * HEADS * (HEAD_DIM + 2) floats.

#define THREADS 256
#define WARPS (THREADS / WARP)
#define VECTORS (HEAD_DIM / 8)
#define ROW_LANES (VECTORS > 16 ? 32 : VECTORS > 8 ? 16 : VECTORS > 4 ? 8 : VECTORS > 2 ? 4 : VECTORS)
#define ROWS (WARP / ROW_LANES)        // positions that a warp reads at once
#define MOST (HEADS > 4 ? 2 : 4)       // what registers hold
#define AT_ONCE (8 / ROWS > MOST ? MOST : 8 / ROWS > 0 ? 8 / ROWS : 1)
#define HALF (HEAD_DIM / 2)
#define PAIRS ((HALF + WARP - 1) / WARP)                 // rotated together, per lane
#define ROUNDS ((HEADS + 2 + WARPS - 1) / WARPS)         // rows of queries, key, value per warp
#define PART (HEAD_DIM + 2)            // sums, maximum, total
#define SPLITS_AT_ONCE 8
#define NOTHING (-1e30f)

// What a group of lanes has attended to: of each head the maximum of the scores (base 2), the total of
// their powers, and the values weighted by them, this lane's dimensions.
struct Attended { float most[HEADS], total[HEADS], sum[HEADS][8]; };

DEVICE void eight(quad v, float *values) {
    u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = load_activation((u16)(words[i / 2] >> (16 * (i & 1))));
}

DEVICE float rounded(float value) { return load_activation(store_activation(value)); }

// Attend to N positions; what isn't there has key and value zero.
template <int N>
DEVICE void attend(Attended &so_far, const float (&query)[HEADS][8], const quad (&key)[N],
                   const quad (&value)[N], const bool (&there)[N]) {
    float score[N][HEADS];
#pragma unroll
    for (int n = 0; n < N; ++n) {
        float k[8];
        eight(key[n], k);
#pragma unroll
        for (int h = 0; h < HEADS; ++h) {
            score[n][h] = 0.0f;
#pragma unroll
            for (int i = 0; i < 8; ++i) score[n][h] += query[h][i] * k[i];
        }
    }
#pragma unroll
    for (int lanes = ROW_LANES / 2; lanes > 0; lanes /= 2)
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int h = 0; h < HEADS; ++h) score[n][h] += shuffle_xor(score[n][h], lanes);
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
        float most = so_far.most[h];
#pragma unroll
        for (int n = 0; n < N; ++n)
            if (there[n] && !(score[n][h] <= most)) most = score[n][h];
        float factor = exp2_fast(so_far.most[h] - most);
        so_far.most[h] = most;
        so_far.total[h] *= factor;
#pragma unroll
        for (int i = 0; i < 8; ++i) so_far.sum[h][i] *= factor;
#pragma unroll
        for (int n = 0; n < N; ++n) {
            score[n][h] = there[n] ? exp2_fast(score[n][h] - most) : 0.0f;
            so_far.total[h] += score[n][h];
        }
    }
#pragma unroll
    for (int n = 0; n < N; ++n) {
        float v[8];
        eight(value[n], v);
#pragma unroll
        for (int h = 0; h < HEADS; ++h)
#pragma unroll
            for (int i = 0; i < 8; ++i) so_far.sum[h][i] += score[n][h] * v[i];
    }
}

// Add what the groups of a warp have attended to.
DEVICE void merge_groups(Attended &so_far) {
#pragma unroll
    for (int lanes = ROW_LANES; lanes < WARP; lanes *= 2)
#pragma unroll
        for (int h = 0; h < HEADS; ++h) {
            float other = shuffle_xor(so_far.most[h], lanes);
            float most = so_far.most[h] > other ? so_far.most[h] : other;
            float mine = exp2_fast(so_far.most[h] - most), theirs = exp2_fast(other - most);
            so_far.most[h] = most;
            so_far.total[h] = so_far.total[h] * mine + shuffle_xor(so_far.total[h], lanes) * theirs;
#pragma unroll
            for (int i = 0; i < 8; ++i)
                so_far.sum[h][i] =
                    so_far.sum[h][i] * mine + shuffle_xor(so_far.sum[h][i], lanes) * theirs;
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

extern "C" __global__ void __launch_bounds__(THREADS)
decode_attention(const u16 *qkv,        // [batch][(heads + 2 kv_heads) * HEAD_DIM]
                 const u16 *bias,       // [(heads + 2 kv_heads) * HEAD_DIM] or null
                 const u16 *query_norm, // [HEAD_DIM], if QK_NORM
                 const u16 *key_norm,   // the same
                 const float *rotary,   // [max_length][HEAD_DIM]: cosines, then sines
                 const int *positions,  // [batch]
                 const u32 *steps,      // [1]
                 u16 *keys,             // [batch][kv_heads][max_length][HEAD_DIM]
                 u16 *values,           // the same
                 u64 *parts,            // [batch][kv_heads * BLOCKS][splits][HEADS][PART]
                 u16 *output,           // [batch][heads * HEAD_DIM]
                 float scale, float eps, int kv_heads, int max_length, int layer, int layers) {
    DYNAMIC_SHARED(memory);
    float *queries = (float *)memory;                       // [HEADS][HEAD_DIM], scaled
    u16 *new_key = (u16 *)(queries + HEADS * HEAD_DIM);     // [HEAD_DIM]
    u16 *new_value = new_key + HEAD_DIM;                    // [HEAD_DIM]
    float *of_warps = (float *)(new_value + HEAD_DIM);      // [WARPS][HEADS][PART]
    let_next_start();
    int thread = (int)threadIdx.x, warp = thread / WARP, lane = thread % WARP;
    int split = (int)blockIdx.x, splits = (int)gridDim.x, sequence = (int)blockIdx.z;
    int kv_head = (int)blockIdx.y / BLOCKS, block = (int)blockIdx.y % BLOCKS;
    int heads = kv_heads * HEADS * BLOCKS, first_head = (int)blockIdx.y * HEADS;
    wait_for_previous();

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
    int position = positions[sequence], count = position + 1;
    u32 mark = steps[0] * (u32)layers + (u32)layer + 1u;
    int length = ((count + splits - 1) / splits + WARP - 1) / WARP * WARP;
    if (length < SHORTEST) length = SHORTEST;
    int active = (count + length - 1) / length;
    if (split >= active) return;
    bool last = split == active - 1;
    int begin = split * length, end = last ? position : begin + length; // of what the cache holds
    u64 cached = ((u64)sequence * kv_heads + kv_head) * max_length * HEAD_DIM;

    // The first keys and values are on their way while the queries are made.
    int vector = lane % ROW_LANES;
    int place = begin + warp * ROWS * AT_ONCE + lane / ROW_LANES;
    quad key[AT_ONCE], value[AT_ONCE];
    bool there[AT_ONCE];
#pragma unroll
    for (int n = 0; n < AT_ONCE; ++n) {
        int from = place + n * ROWS;
        there[n] = from < end;
        bool mine = there[n] && vector < VECTORS;
        u64 offset = cached + (u64)from * HEAD_DIM + 8 * vector;
        key[n] = mine ? *(const quad *)(keys + offset) : quad{0, 0, 0, 0};
        value[n] = mine ? *(const quad *)(values + offset) : quad{0, 0, 0, 0};
    }

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
#pragma unroll
        for (int pair = 0; pair < PAIRS; ++pair) {
            int i = pair * WARP + lane;
            if (i >= HALF || row >= HEADS + 2) continue;
            float x = lower[round][pair], y = upper[round][pair];
            if (QK_NORM && row <= HEADS) {
                x = rounded(rounded(x * inverse) * load_activation(weight[i]));
                y = rounded(rounded(y * inverse) * load_activation(weight[i + HALF]));
            }
            const float *angle = rotary + (u64)position * HEAD_DIM + i;
            float cosine = angle[0], sine = angle[HALF];
            float turned_x = x * cosine - y * sine, turned_y = y * cosine + x * sine;
            if (row < HEADS) {
                queries[row * HEAD_DIM + i] = turned_x * scale;
                queries[row * HEAD_DIM + i + HALF] = turned_y * scale;
            } else if (last) {
                bool is_key = row == HEADS;
                u16 a = store_activation(is_key ? turned_x : x), b = store_activation(is_key ? turned_y : y);
                u16 *fresh = is_key ? new_key : new_value;
                fresh[i] = a, fresh[i + HALF] = b;
                u16 *kept = (is_key ? keys : values) + cached + (u64)position * HEAD_DIM;
                if (block == 0) kept[i] = a, kept[i + HALF] = b;
            }
        }
    }
    __syncthreads();

    float query[HEADS][8];
    Attended so_far;
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
        so_far.most[h] = NOTHING, so_far.total[h] = 0.0f;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            so_far.sum[h][i] = 0.0f;
            query[h][i] = vector < VECTORS ? queries[h * HEAD_DIM + 8 * vector + i] : 0.0f;
        }
    }
    for (int at = begin; at < end; at += WARPS * ROWS * AT_ONCE) {
        place += WARPS * ROWS * AT_ONCE;
        quad next_key[AT_ONCE], next_value[AT_ONCE];
        bool next_there[AT_ONCE];
#pragma unroll
        for (int n = 0; n < AT_ONCE; ++n) {
            int from = place + n * ROWS;
            next_there[n] = from < end;
            bool mine = next_there[n] && vector < VECTORS;
            u64 offset = cached + (u64)from * HEAD_DIM + 8 * vector;
            next_key[n] = mine ? *(const quad *)(keys + offset) : quad{0, 0, 0, 0};
            next_value[n] = mine ? *(const quad *)(values + offset) : quad{0, 0, 0, 0};
        }
        attend<AT_ONCE>(so_far, query, key, value, there);
#pragma unroll
        for (int n = 0; n < AT_ONCE; ++n)
            key[n] = next_key[n], value[n] = next_value[n], there[n] = next_there[n];
    }
    if (last && warp == WARPS - 1) { // the new token; the last warp has the fewest others
        bool mine = vector < VECTORS;
        quad fresh_key[1] = {mine ? *(const quad *)(new_key + 8 * vector) : quad{0, 0, 0, 0}};
        quad fresh_value[1] = {mine ? *(const quad *)(new_value + 8 * vector) : quad{0, 0, 0, 0}};
        bool once[1] = {lane < ROW_LANES};
        attend<1>(so_far, query, fresh_key, fresh_value, once);
    }
    merge_groups(so_far);
    if (lane < VECTORS) {
#pragma unroll
        for (int h = 0; h < HEADS; ++h) {
            float *mine = of_warps + (warp * HEADS + h) * PART;
#pragma unroll
            for (int i = 0; i < 8; ++i) mine[8 * lane + i] = so_far.sum[h][i];
            if (lane == 0) mine[HEAD_DIM] = so_far.most[h], mine[HEAD_DIM + 1] = so_far.total[h];
        }
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
        float inverse = 1.0f / mine.total;
        u32 pair = store_activation(mine.a * inverse) | (u32)store_activation(mine.b * inverse) << 16;
        *(u32 *)(output + ((u64)sequence * heads + first_head + head) * HEAD_DIM + dimension) = pair;
    }
}
