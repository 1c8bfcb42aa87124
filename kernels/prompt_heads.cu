// What attention takes of the tokens of prompts: bias, norms of queries and keys, rotary positions. Keys
// and values go into the cache, queries stay where they are. A warp has one head of one token; grid
// (tokens, heads of all three kinds / WARPS).
//
// Compile-time: HEAD_DIM (even, up to 256), QK_NORM, ACTIVATION_BF16. No shared memory.

#define THREADS 128
#define WARPS (THREADS / WARP)
#define HALF (HEAD_DIM / 2)
#define PAIRS ((HALF + WARP - 1) / WARP) // rotated together, per lane

DEVICE float rounded(float value) { return load_activation(store_activation(value)); }

extern "C" __global__ void __launch_bounds__(THREADS)
prompt_heads(u16 *qkv,              // [tokens][(heads + 2 kv_heads) * HEAD_DIM]
             const u16 *bias,       // [(heads + 2 kv_heads) * HEAD_DIM] or null
             const u16 *query_norm, // [HEAD_DIM], if QK_NORM
             const u16 *key_norm,   // the same
             const float *rotary,   // [max_length][HEAD_DIM]: cosines, then sines
             const int *positions,  // [tokens]
             const int *slots,      // [tokens]
             u16 *keys,             // [slots][kv_heads][max_length][HEAD_DIM]
             u16 *values,           // the same
             float eps, int heads, int kv_heads, int max_length) {
    let_next_start();
    int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP, token = (int)blockIdx.x;
    int head = (int)blockIdx.y * WARPS + warp;
    wait_for_previous();
    if (head >= heads + 2 * kv_heads) return;
    bool is_query = head < heads, is_value = head >= heads + kv_heads;
    u16 *row = qkv + ((u64)token * (heads + 2 * kv_heads) + head) * HEAD_DIM;
    float lower[PAIRS], upper[PAIRS], sum = 0.0f;
#pragma unroll
    for (int pair = 0; pair < PAIRS; ++pair) {
        int i = pair * WARP + lane;
        bool mine = i < HALF;
        lower[pair] = mine ? load_activation(row[i]) : 0.0f;
        upper[pair] = mine ? load_activation(row[i + HALF]) : 0.0f;
        if (bias && mine) {
            const u16 *added = bias + (u64)head * HEAD_DIM;
            lower[pair] = rounded(lower[pair] + load_activation(added[i]));
            upper[pair] = rounded(upper[pair] + load_activation(added[i + HALF]));
        }
        sum += lower[pair] * lower[pair] + upper[pair] * upper[pair];
    }
    float inverse = 1.0f;
    if (QK_NORM) {
#pragma unroll
        for (int lanes = 16; lanes > 0; lanes /= 2) sum += shuffle_xor(sum, lanes);
        inverse = inverse_root(sum * (1.0f / HEAD_DIM) + eps);
    }
    int position = positions[token];
    u16 *target = row;
    if (!is_query) {
        u64 kept = (u64)slots[token] * kv_heads + (head - heads) % kv_heads;
        target = (is_value ? values : keys) + (kept * max_length + position) * HEAD_DIM;
    }
    const u16 *weight = is_query ? query_norm : key_norm;
    const float *angle = rotary + (u64)position * HEAD_DIM;
#pragma unroll
    for (int pair = 0; pair < PAIRS; ++pair) {
        int i = pair * WARP + lane;
        if (i >= HALF) continue;
        float x = lower[pair], y = upper[pair];
        if (!is_value) {
            if (QK_NORM) {
                x = rounded(rounded(x * inverse) * load_activation(weight[i]));
                y = rounded(rounded(y * inverse) * load_activation(weight[i + HALF]));
            }
            float cosine = angle[i], sine = angle[i + HALF], turned = y * cosine + x * sine;
            x = x * cosine - y * sine, y = turned;
        }
        target[i] = store_activation(x), target[i + HALF] = store_activation(y);
    }
}
