// y = step * sum over groups of scale * (integers of W x codes of x), for many tokens, on compute
// capability 9.0. W is the A operand of wgmma, from registers, so 4-bit codes become bytes on their
// way; x is the B operand, in shared memory as quantize_rows.cu writes it.
//
// A block: a producer warpgroup, of which one thread starts copies, and two consumers of 64 outputs
// x 128 tokens, which ask for products by turns: while those of one are on the tensor cores, the sums
// of the other are scaled. Blocks take tile after tile. CLUSTER blocks have
// neighbouring outputs and the same tokens: each fetches a part of x for all.
//
// W: [tiles of 128 outputs][blocks of 128 inputs] of TILE bytes (qtool/runtime/backends/cuda/int_tiles.py): for
// each consumer, codes as its threads load them, then 128 float scales, then 128 words, of bytes
// that are 128 less the zero point.
//
// Compile-time: BITS (4: codes 0 to 15 less a zero point; 8: signed bytes), SPAN (blocks of a
// group; 0: one group is the row), STAGES, CLUSTER (1, 2), ACTIVATION_BF16. 384 threads.
#include "hopper.cuh"

#define BLOCK 128
#define X_BYTES (BLOCK * BLOCK)
#define CODES (64 * BLOCK * BITS / 8) // bytes of one consumer
#define TILE (2 * CODES + 1024)
#define STAGE (X_BYTES + TILE)
#define Y_STRIDE 72 // outputs of a token in shared memory: 64, and as many as keep banks apart
#define Y_BYTES (BLOCK * Y_STRIDE * 2)
#define RING (STAGES * STAGE)
#define ALONG 2048 // bytes between core matrices, see `core_matrices`
#define ACROSS 128
#define SUPER 16 // tiles of tokens that are multiplied before the next outputs

// Which tile comes when: tokens first, so that weights are read from memory once.
struct place { int rows, tokens; };
DEVICE place place_of(int tile, int row_tiles, int token_tiles) {
    int first = tile / (SUPER * row_tiles) * SUPER;
    int span = token_tiles - first < SUPER ? token_tiles - first : SUPER;
    int left = tile - first * row_tiles;
    return place{left / span, first + left % span};
}

// Where in the ring, and the parity of its turn.
struct turn { int stage; u32 parity; };
DEVICE void next(turn &t) {
    if (++t.stage == STAGES) t.stage = 0, t.parity ^= 1;
}

// Four nibbles less the zero point, as signed bytes. `middle` is 128 less the zero point, four times: no byte carries
// into the next one.
DEVICE u32 centered(u32 nibbles, u32 middle) { return (nibbles & 0x0f0f0f0fu) + middle ^ 0x80808080u; }
// Integer sums run on over the groups of a chunk, S_1, S_2, ..., so each y is the sum of (scale_g -
// scale_(g + 1)) S_g, the last with its whole scale. Where these stay small (15 * 127 or 128 * 127 times the
// inputs) they begin with ZERO, so are positive, and as the bits of a float, a subnormal one, they are 2^-149 of
// themselves: that takes no instruction. What ZERO adds to y, (scale_1 - scale_last) ZERO, goes with the
// last of a chunk. In between y is rounded in steps of 2^-24 of that, the smaller the shorter a chunk is:
// less than a 100th of what rounding x to int8 does.
#if SPAN >= 1 && SPAN <= (BITS == 4 ? 17 : 2)
#define CHUNK ((BITS == 4 ? 17 : 2) / SPAN * SPAN) // blocks
#define ZERO (1 << 22) // 17 * 128 * 15 * 127 and 2 * 128 * 128 * 127 are less
#define UP 1.2676506e30f // 2^100, for scales
#define DOWN 5.6294995e14f // 2^49, after it
DEVICE float float_of(int sum) { return float_of_bits((u32)sum); }
#else
#define CHUNK SPAN // a group, or none
#define ZERO 0
#define UP 1.0f
#define DOWN 1.0f
DEVICE float float_of(int sum) { return (float)sum; }
#endif

// What a consumer's thread needs of W for one block of inputs.
struct part { quad codes[CODES / 2048]; float scales[2]; u32 middles[2]; };

DEVICE part load_part(const unsigned char *tile, int consumer, int thread, int row) {
    part p;
    const quad *codes = (const quad *)(tile + consumer * CODES) + thread;
#pragma unroll
    for (int i = 0; i < CODES / 2048; ++i) p.codes[i] = codes[i * WARPGROUP];
    const float *scales = (const float *)(tile + 2 * CODES) + consumer * 64 + row;
    const u32 *middles = (const u32 *)(tile + 2 * CODES + 512) + consumer * 64 + row;
    p.scales[0] = scales[0] * UP, p.scales[1] = scales[8] * UP;
    p.middles[0] = middles[0], p.middles[1] = middles[8];
    return p;
}

// The A fragments of four steps of 32 inputs.
DEVICE void expand(u32 (&a)[16], const part &p) {
#pragma unroll
    for (int step = 0; step < 4; ++step) {
        quad q = p.codes[BITS == 8 ? step : step / 2];
        if (BITS == 8) {
            a[4 * step] = q.x, a[4 * step + 1] = q.y, a[4 * step + 2] = q.z, a[4 * step + 3] = q.w;
        } else {
            u32 even = step % 2 ? q.z : q.x, odd = step % 2 ? q.w : q.y;
            a[4 * step] = centered(even, p.middles[0]), a[4 * step + 2] = centered(even >> 4, p.middles[0]);
            a[4 * step + 1] = centered(odd, p.middles[1]), a[4 * step + 3] = centered(odd >> 4, p.middles[1]);
        }
    }
}

// 64 outputs x 128 tokens x 128 inputs.
DEVICE void multiply(int (&sums)[64], const u32 (&a)[16], u64 x) {
    products_begin();
#pragma unroll
    for (int step = 0; step < 4; ++step) multiply_add(sums, a + 4 * step, x + (step * 2 * ALONG >> 4));
    end_of_products();
}

DEVICE void add_scaled(float (&y)[64], const int (&sums)[64], const float *by) {
#pragma unroll
    for (int i = 0; i < 64; ++i) y[i] += by[i / 2 % 2] * float_of(sums[i]);
}

// The last of a chunk, whose first scale was `first`; sums begin anew.
DEVICE void add_last(float (&y)[64], int (&sums)[64], const float *by, const float *first) {
    float low = (first[0] - by[0]) * float_of(ZERO), high = (first[1] - by[1]) * float_of(ZERO);
#pragma unroll
    for (int i = 0; i < 64; ++i) {
        y[i] = y[i] + by[i / 2 % 2] * (float_of(sums[i]) - float_of(ZERO)) - (i & 2 ? high : low);
        sums[i] = ZERO;
    }
}

// What all warps of a consumer have read may be overwritten, in all blocks of the cluster.
DEVICE void release(u64 *barrier, int lane) {
    sync_warp();
    if (CLUSTER == 1 ? lane == 0 : lane < CLUSTER) {
        if (CLUSTER == 1) barrier_arrive(barrier);
        else barrier_arrive(barrier, (u32)lane);
    }
}

// One consumer's outputs of a tile, by steps, rounded, to shared memory.
DEVICE void stage(u16 *staged, const float (&y)[64], const float *steps, int row, int column) {
#pragma unroll
    for (int i = 0; i < 64; ++i) {
        int token = i / 4 * 8 + column + i % 2;
        staged[token * Y_STRIDE + row + (i & 2 ? 8 : 0)] = store_activation(y[i] * (steps[token] * DOWN));
    }
}

DEVICE void store_staged(const u16 *staged, u16 *y, int thread, int rows, int tokens, int out_features) {
#pragma unroll 4
    for (int i = thread; i < BLOCK * 8; i += WARPGROUP) {
        int token = i / 8, first = i % 8 * 8;
        const u16 *from = staged + token * Y_STRIDE + first;
        u16 *to = y + (u64)token * out_features + first;
        if (token >= tokens) break;
        if (out_features % 8 == 0) {
            if (first < rows) *(quad *)to = *(const quad *)from;
        } else {
            for (int n = 0; n < 8 && first + n < rows; ++n) to[n] = from[n];
        }
    }
}

#if CLUSTER > 1
#define CLUSTERED __cluster_dims__(CLUSTER, 1, 1)
#else
#define CLUSTERED
#endif

extern "C" __global__ void CLUSTERED __launch_bounds__(384, 1)
int_gemm(const unsigned char *weight, // [row_tiles][blocks][TILE]
         const unsigned char *codes,  // [token_tiles][blocks][X_BYTES]
         const float *steps,          // [token_tiles * 128]
         u16 *y,                      // [tokens][out_features]
         int out_features, int tokens, int row_tiles, int token_tiles, int blocks) {
    DYNAMIC_SHARED(memory);
    u64 *full = (u64 *)(memory + RING + 2 * Y_BYTES), *empty = full + STAGES;
    int thread = (int)threadIdx.x % WARPGROUP, consumer = (int)threadIdx.x / WARPGROUP - 1;
    int rank = CLUSTER == 1 ? 0 : (int)cluster_rank(), clusters = (int)gridDim.x / CLUSTER;
    let_next_start();
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; ++stage) {
            barrier_init(full + stage, 1);
            barrier_init(empty + stage, 8 * CLUSTER); // warps of the consumers
        }
        barriers_are_ready();
    }
    if (CLUSTER == 1) __syncthreads();
    else sync_cluster();
    row_tiles /= CLUSTER; // of the cluster
    int tiles = row_tiles * token_tiles, first_tile = (int)blockIdx.x / CLUSTER, ahead = 0;
    if (threadIdx.x == 0 && first_tile < tiles) { // weights don't wait for the codes
        const unsigned char *w = weight + (u64)(place_of(first_tile, row_tiles, token_tiles).rows * CLUSTER + rank) * blocks * TILE;
        for (; ahead < STAGES && ahead < blocks; ++ahead) {
            barrier_expect(full + ahead, STAGE);
            copy_bulk(memory + ahead * STAGE + X_BYTES, w + (u64)ahead * TILE, TILE, full + ahead);
        }
    }
    wait_for_previous();
    turn now = {0, 0};
    if (consumer < 0) {
        fewer_registers<40>();
        if (thread == 0) {
            for (int tile = (int)blockIdx.x / CLUSTER; tile < tiles; tile += clusters) {
                place at = place_of(tile, row_tiles, token_tiles);
                const unsigned char *w = weight + (u64)(at.rows * CLUSTER + rank) * blocks * TILE;
                const unsigned char *x = codes + (u64)at.tokens * blocks * X_BYTES;
                for (int block = 0; block < blocks; ++block, next(now)) {
                    unsigned char *stage = memory + now.stage * STAGE;
                    u64 *barrier = full + now.stage;
                    if (tile != first_tile || block >= ahead) {
                        barrier_wait(empty + now.stage, now.parity ^ 1);
                        barrier_expect(barrier, STAGE);
                        copy_bulk(stage + X_BYTES, w + (u64)block * TILE, TILE, barrier);
                    }
                    const u32 share = X_BYTES / CLUSTER, offset = rank * share;
                    const unsigned char *from = x + (u64)block * X_BYTES + offset;
                    if (CLUSTER == 1) copy_bulk(stage, from, share, barrier);
                    else copy_bulk_to((1 << CLUSTER) - 1, stage + offset, from, share, barrier);
                }
            }
        }
        sync_warp();
    } else {
        more_registers<232>();
        if (consumer == 1) give_turn(3);
        int lane = thread % WARP, row = thread / WARP * 16 + lane / 4, column = lane % 4 * 2;
        u16 *staged = (u16 *)(memory + RING + consumer * Y_BYTES);
        for (int tile = (int)blockIdx.x / CLUSTER; tile < tiles; tile += clusters) {
            place at = place_of(tile, row_tiles, token_tiles);
            float products[64] = {}, first[2];
            int sums[64];
            u32 even[16], odd[16];
            unsigned char *here = memory + now.stage * STAGE;
            barrier_wait(full + now.stage, now.parity);
            part p = load_part(here + X_BYTES, consumer, thread, row);
            expand(even, p);
            first[0] = p.scales[0], first[1] = p.scales[1];
#pragma unroll
            for (int i = 0; i < 64; ++i) sums[i] = ZERO;
            int end = CHUNK > 0 && CHUNK < blocks ? CHUNK : blocks, block = 0;
            // Multiplies a block by the codes in `a`, and meanwhile expands those of the next into `b`. Two sets of
            // registers by turns: a copy from one to the other would be between products, or the assembler gives
            // both the same registers, and fences products apart that still read them.
            auto multiply_block = [&](const u32 (&a)[16], u32 (&b)[16]) __attribute__((always_inline)) {
                take_turn(3 + consumer);
                multiply(sums, a, core_matrices(shared_address(here), ALONG, ACROSS));
                give_turn(4 - consumer);
                bool last = block + 1 == blocks, ends_chunk = block + 1 == end;
                bool ends_group = SPAN == 1 || last || SPAN > 1 && block % (SPAN + !SPAN) == SPAN - 1;
                float by[2] = {p.scales[0], p.scales[1]};
                turn after = now;
                next(after);
                if (!last) {
                    here = memory + after.stage * STAGE;
                    barrier_wait(full + after.stage, after.parity);
                    p = load_part(here + X_BYTES, consumer, thread, row);
                    expand(b, p);
                }
                if (!ends_chunk) by[0] -= p.scales[0], by[1] -= p.scales[1];
                products_wait<0>(sums);
                keep(a);
                release(empty + now.stage, lane);
                if (ends_chunk) {
                    add_last(products, sums, by, first);
                    first[0] = p.scales[0], first[1] = p.scales[1];
                    end = end + CHUNK < blocks ? end + CHUNK : blocks;
                } else if (ends_group) {
                    add_scaled(products, sums, by);
                }
                now = after;
                ++block;
            };
#pragma unroll 1
            while (true) {
                multiply_block(even, odd);
                if (block == blocks) break;
                multiply_block(odd, even);
                if (block == blocks) break;
            }
            sync_warpgroup(1 + consumer); // the last tile has been read
            const float *their_steps = steps + at.tokens * BLOCK;
            stage(staged, products, their_steps, row, column);
            sync_warpgroup(1 + consumer);
            int row_first = ((at.rows * CLUSTER + rank) * 2 + consumer) * 64;
            u16 *to = y + (u64)at.tokens * BLOCK * out_features + row_first;
            store_staged(staged, to, thread, out_features - row_first, tokens - at.tokens * BLOCK, out_features);
        }
        if (consumer == 0) take_turn(3);
    }
    if (CLUSTER > 1) sync_cluster(); // others still copy to, and arrive at, this block
}
