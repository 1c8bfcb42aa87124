// The sum over ranks of x, each rank on a card of its own: every rank writes what it has into the memory of
// all others and adds up what comes to its own, in the order of the ranks, so all get the same bits.
// Every four bytes travel with the number of the round: who sees the number has them, and no barrier
// is needed. Two places per sender suffice: it sends for round n + 2 when it has what this block sent
// for round n + 1, and that was sent after round n was read.
//
// Compile-time: RANKS, ACTIVATION_BF16. A block takes 4 * THREADS numbers a round, the same ones on each
// rank; all its threads take part in all its rounds, also beyond the end.

#define THREADS 256

extern "C" __global__ void __launch_bounds__(THREADS)
peer_sum(const u16 *x,      // [count], a multiple of four
         u16 *y,            // [count]
         const u64 *boxes,  // [RANKS] addresses, of a box of each rank: [blocks][2][RANKS][THREADS] of 16 bytes
         int *rounds,       // [blocks], those that ended on this rank
         int rank, int count) {
    let_next_start();
    wait_for_previous();
    int thread = (int)threadIdx.x, block = (int)blockIdx.x, stride = 4 * THREADS * (int)gridDim.x;
    u32 round = (u32)rounds[block];
    quad *box[RANKS]; // asked for with the round and x, so that all of it comes after one wait
#pragma unroll
    for (int other = 0; other < RANKS; ++other) box[other] = (quad *)boxes[other];
    const quad *mine = (const quad *)boxes[rank];
    u64 begin = (u64)block * 2 * RANKS * THREADS + thread;
    for (int start = 4 * block * THREADS; start < count; start += stride) {
        int first = start + 4 * thread;
        u32 low = 0, high = 0;
        if (first < count) low = *(const u32 *)(x + first), high = *(const u32 *)(x + first + 2);
        u64 place = begin + (++round & 1u) * RANKS * THREADS;
        float sum[4] = {};
#pragma unroll
        for (int other = 0; other < RANKS; ++other) {
            if (other != rank) store_far(box[other] + place + rank * THREADS, quad{low, round, high, round});
        }
#pragma unroll
        for (int from = 0; from < RANKS; ++from) {
            quad got = {low, round, high, round};
            if (from != rank) {
                do got = load_far(mine + place + from * THREADS);
                while (got.y != round || got.w != round);
            }
            sum[0] += load_activation((u16)(got.x & 0xffffu)), sum[1] += load_activation((u16)(got.x >> 16));
            sum[2] += load_activation((u16)(got.z & 0xffffu)), sum[3] += load_activation((u16)(got.z >> 16));
        }
        if (first >= count) continue;
        *(u32 *)(y + first) = store_activation(sum[0]) | (u32)store_activation(sum[1]) << 16;
        *(u32 *)(y + first + 2) = store_activation(sum[2]) | (u32)store_activation(sum[3]) << 16;
    }
    __syncthreads(); // all have read the round
    if (thread == 0) rounds[block] = (int)round;
}
