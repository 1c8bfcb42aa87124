// Ends a decoding step on the device: the likeliest token of each sequence is its next one, at the
// next position. Of equal logits the first wins; NaN wins over all, as in torch. One block per sequence.
//
// Compile-time: ACTIVATION_BF16. Shared: 32 words of 64 bits.

#define THREADS 1024
#define WARPS (THREADS / WARP)
#define AT_ONCE 4 // loads of 16 bytes in flight

// Larger for a larger logit, then for a smaller index.
DEVICE u64 rank(u16 logit, int index) {
    float value = load_activation(logit);
    u32 bits = bits_of_float(value);
    if (value == 0.0f) bits = 0; // -0 is no less than 0
    u32 ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    if (value != value) ordered = 0xffffffffu;
    return (u64)ordered << 32 | (0xffffffffu - (u32)index);
}

DEVICE u64 larger(u64 a, u64 b) { return a > b ? a : b; }

DEVICE u64 largest_of_eight(quad v, int first) {
    u32 words[4] = {v.x, v.y, v.z, v.w};
    u64 best = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) best = larger(best, rank((u16)(words[i / 2] >> (16 * (i & 1))), first + i));
    return best;
}

DEVICE u64 largest_of_warp(u64 best) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) {
        u32 high = bits_of_float(shuffle_xor(float_of_bits((u32)(best >> 32)), lanes));
        u32 low = bits_of_float(shuffle_xor(float_of_bits((u32)best), lanes));
        best = larger(best, (u64)high << 32 | low);
    }
    return best;
}

extern "C" __global__ void __launch_bounds__(THREADS)
greedy(const u16 *logits,   // [batch][vocabulary]
       long long *tokens,   // [batch]
       int *positions,      // [batch]
       long long *history,  // [batch][width], the token of each position
       u32 *steps,          // [1]
       int vocabulary, int width) {
    DYNAMIC_SHARED(memory);
    u64 *best_of_warp = (u64 *)memory;
    let_next_start();
    int thread = (int)threadIdx.x, sequence = (int)blockIdx.x;
    const u16 *row = logits + (u64)sequence * vocabulary;
    wait_for_previous();
    u64 best = 0;
    if (vocabulary % 8 == 0) {
        for (int first = 8 * thread; first < vocabulary; first += 8 * THREADS * AT_ONCE) {
            quad loaded[AT_ONCE];
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) {
                int place = first + i * 8 * THREADS;
                if (place < vocabulary) loaded[i] = *(const quad *)(row + place);
            }
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) {
                int place = first + i * 8 * THREADS;
                if (place < vocabulary) best = larger(best, largest_of_eight(loaded[i], place));
            }
        }
    } else {
        for (int index = thread; index < vocabulary; index += THREADS)
            best = larger(best, rank(row[index], index));
    }
    best = largest_of_warp(best);
    if (thread % WARP == 0) best_of_warp[thread / WARP] = best;
    __syncthreads();
    if (thread >= WARP) return;
    best = largest_of_warp(best_of_warp[thread]);
    if (thread > 0) return;
    long long token = (long long)(0xffffffffu - (u32)best);
    int position = positions[sequence] + 1;
    tokens[sequence] = token;
    positions[sequence] = position;
    history[(u64)sequence * width + position] = token;
    if (sequence == 0) steps[0] += 1;
}
