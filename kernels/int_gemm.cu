// y = step * sum over groups of scale * (integers of W x codes of x), for many tokens, on compute
// capability 9.0. Both operands of wgmma are bytes in shared memory: x as quantize_rows.cu writes it, W in the
// same order, unpacked there from 4 bits by a warpgroup that does nothing else.
//
// A block: a producer warpgroup, and two consumers of 64 outputs x 128 tokens, of which one scales its sums while
// the products of the other are on the tensor cores. Blocks take tile after tile.
//
// W: [tiles of 128 outputs][blocks of 128 inputs] of TILE bytes (qtool/runtime/backends/cuda/int_tiles.py): codes,
// then 128 float scales, then 128 words, of bytes that are 128 less the zero point. Codes of 4 bits: [4 times 32
// inputs][128 outputs][16 bytes], a byte has an input and, above it, the one 16 further on; of 8: [8 times 16
// inputs][128 outputs][16].
//
// Compile-time: BITS (4: codes 0 to 15 less a zero point; 8: signed bytes), SPAN (blocks of a group; 0: one
// group is the row), STAGES, AHEAD (blocks of 4-bit codes on their way to registers), TURNS (1: consumers ask for
// products by turns), ACTIVATION_BF16. 384 threads.
#include "hopper.cuh"

#define BLOCK 128
#define BYTES (BLOCK * BLOCK) // of a block of x, or of W once unpacked
#define CODES (BYTES * BITS / 8)
#define TILE (CODES + 1024)
#define STAGE (2 * BYTES + 512) // x, W, scales
#define Y_STRIDE 72 // outputs of a token in shared memory: 64, and as many as keep banks apart
#define Y_BYTES (BLOCK * Y_STRIDE * 2)
#define RING (STAGES * STAGE)
#define ALONG 2048 // bytes between core matrices, see `core_matrices`
#define ACROSS 128
#define PRODUCER_REGISTERS (BITS == 4 ? 120 : 40)
#define CONSUMER_REGISTERS (BITS == 4 ? 192 : 232)
#define SUPER 16 // tiles of tokens that are multiplied before the next outputs

// Which tile comes when: tokens first, so that weights are read from memory once.
struct place { int rows, tokens; };
DEVICE place place_of(int tile, int row_tiles, int token_tiles) {
    int first = tile / (SUPER * row_tiles) * SUPER;
    int span = token_tiles - first < SUPER ? token_tiles - first : SUPER;
    int left = tile - first * row_tiles;
    return place{left / span, first + left % span};
}

// Blocks of inputs of all tiles of this block of threads, one after the other.
struct walk { int tile, block; place at; };
struct sizes { int row_tiles, token_tiles, blocks; };
DEVICE walk begin(sizes of) { return walk{(int)blockIdx.x, 0, place_of((int)blockIdx.x, of.row_tiles, of.token_tiles)}; }
DEVICE bool is_there(const walk &w, sizes of) { return w.tile < of.row_tiles * of.token_tiles; }
DEVICE void advance(walk &w, sizes of) {
    if (++w.block < of.blocks) return;
    w.block = 0, w.tile += (int)gridDim.x;
    w.at = place_of(w.tile, of.row_tiles, of.token_tiles);
}

// Where in the ring, and the parity of its turn.
struct turn { int stage; u32 parity; };
DEVICE void next(turn &t) {
    if (++t.stage == STAGES) t.stage = 0, t.parity ^= 1;
}

// What a thread of the producer unpacks: one output, 128 inputs.
struct packed { quad codes[4]; float scale; u32 middle; };

DEVICE packed load_packed(const unsigned char *tile, int row) {
    packed p;
#pragma unroll
    for (int i = 0; i < 4; ++i) p.codes[i] = load_stream((const quad *)tile + i * BLOCK + row);
    p.scale = ((const float *)(tile + CODES))[row];
    p.middle = ((const u32 *)(tile + CODES + 512))[row];
    return p;
}

// Four nibbles less the zero point, as signed bytes: 128 is added before, so no byte carries into the next one.
// `middle` is 128 less the zero point, four times.
DEVICE u32 centered(u32 nibbles, u32 middle) { return ((nibbles & 0x0f0f0f0fu) + middle) ^ 0x80808080u; }
DEVICE quad centered(quad q, int bits, u32 middle) {
    return quad{centered(q.x >> bits, middle), centered(q.y >> bits, middle), centered(q.z >> bits, middle),
                centered(q.w >> bits, middle)};
}

DEVICE void unpack(unsigned char *bytes, const packed &p, int row) {
    quad *to = (quad *)bytes + row;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        to[2 * i * BLOCK] = centered(p.codes[i], 0, p.middle);
        to[(2 * i + 1) * BLOCK] = centered(p.codes[i], 4, p.middle);
    }
    ((float *)(bytes + BYTES))[row] = p.scale;
}

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

DEVICE void load_scales(float (&scales)[2], const unsigned char *stage, int row) {
    const float *from = (const float *)(stage + 2 * BYTES) + row;
    scales[0] = from[0] * UP, scales[1] = from[8] * UP;
}

// 64 outputs x 128 tokens x 128 inputs.
DEVICE void multiply(int (&sums)[64], u64 w, u64 x) {
    products_begin();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
        u64 further = step * 2 * ALONG >> 4;
        multiply_add(sums, w + further, x + further);
    }
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

// What all warps of a consumer have read may be overwritten.
DEVICE void release(u64 *barrier, int lane) {
    sync_warp();
    if (lane == 0) barrier_arrive(barrier);
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

// One thread copies x, and W if that isn't to be unpacked; the others wait here for nothing.
DEVICE void produce(unsigned char *memory, u64 *full, u64 *empty, const unsigned char *weight,
                    const unsigned char *codes, sizes of, int thread) {
    turn now = {0, 0};
    walk here = begin(of);
#if BITS == 4
    packed ahead[AHEAD];
    walk loads = here;
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
        if (!is_there(loads, of)) break;
        ahead[i] = load_packed(weight + ((u64)loads.at.rows * of.blocks + loads.block) * TILE, thread);
        advance(loads, of);
    }
#endif
    wait_for_previous(); // weights don't wait for the codes
    while (true) {
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            if (!is_there(here, of)) return;
            unsigned char *stage = memory + now.stage * STAGE;
            u64 *barrier = full + now.stage;
            if (BITS == 4 || thread == 0) barrier_wait(empty + now.stage, now.parity ^ 1);
            if (thread == 0) {
                barrier_expect(barrier, BYTES + (BITS == 8 ? CODES + 512 : 0));
                copy_bulk(stage, codes + ((u64)here.at.tokens * of.blocks + here.block) * BYTES, BYTES, barrier);
                if (BITS == 8) copy_bulk(stage + BYTES, weight + ((u64)here.at.rows * of.blocks + here.block) * TILE, CODES + 512, barrier);
            }
#if BITS == 4
            unpack(stage + BYTES, ahead[i], thread);
            written_for_products();
            release(barrier, thread % WARP);
            if (is_there(loads, of)) {
                ahead[i] = load_packed(weight + ((u64)loads.at.rows * of.blocks + loads.block) * TILE, thread);
                advance(loads, of);
            }
#endif
            advance(here, of), next(now);
        }
    }
}

extern "C" __global__ void __launch_bounds__(384, 1)
int_gemm(const unsigned char *weight, // [row_tiles][blocks][TILE]
         const unsigned char *codes,  // [token_tiles][blocks][BYTES]
         const float *steps,          // [token_tiles * 128]
         u16 *y,                      // [tokens][out_features]
         int out_features, int tokens, int row_tiles, int token_tiles, int blocks) {
    DYNAMIC_SHARED(memory);
    u64 *full = (u64 *)(memory + RING + 2 * Y_BYTES), *empty = full + STAGES;
    int thread = (int)threadIdx.x % WARPGROUP, consumer = (int)threadIdx.x / WARPGROUP - 1;
    let_next_start();
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; ++stage) {
            barrier_init(full + stage, BITS == 4 ? 5 : 1); // who copies, and warps that unpack
            barrier_init(empty + stage, 8);                // warps of the consumers
        }
        barriers_are_ready();
    }
    __syncthreads();
    sizes of = {row_tiles, token_tiles, blocks};
    if (consumer < 0) {
        fewer_registers<PRODUCER_REGISTERS>();
        produce(memory, full, empty, weight, codes, of, thread);
    } else {
        more_registers<CONSUMER_REGISTERS>();
        wait_for_previous();
        if (TURNS && consumer == 1) give_turn(3);
        int lane = thread % WARP, row = thread / WARP * 16 + lane / 4, column = lane % 4 * 2;
        u16 *staged = (u16 *)(memory + RING + consumer * Y_BYTES);
        turn now = {0, 0};
        for (int tile = (int)blockIdx.x; tile < row_tiles * token_tiles; tile += (int)gridDim.x) {
            place at = place_of(tile, row_tiles, token_tiles);
            float products[64] = {}, scales[2], first[2];
            int sums[64];
            barrier_wait(full + now.stage, now.parity);
            load_scales(scales, memory + now.stage * STAGE, consumer * 64 + row);
            first[0] = scales[0], first[1] = scales[1];
#pragma unroll
            for (int i = 0; i < 64; ++i) sums[i] = ZERO;
            int end = CHUNK > 0 && CHUNK < blocks ? CHUNK : blocks;
#pragma unroll 1
            for (int block = 0; block < blocks; ++block) {
                u64 x = core_matrices(shared_address(memory + now.stage * STAGE), ALONG, ACROSS);
                if (TURNS) take_turn(3 + consumer);
                multiply(sums, x + (BYTES + consumer * 1024 >> 4), x);
                if (TURNS) give_turn(4 - consumer);
                bool last = block + 1 == blocks, ends_chunk = block + 1 == end;
                bool ends_group = SPAN == 1 || last || SPAN > 1 && block % (SPAN + !SPAN) == SPAN - 1;
                float by[2] = {scales[0], scales[1]};
                turn after = now;
                next(after);
                if (!last) {
                    barrier_wait(full + after.stage, after.parity);
                    load_scales(scales, memory + after.stage * STAGE, consumer * 64 + row);
                }
                if (!ends_chunk) by[0] -= scales[0], by[1] -= scales[1];
                products_wait<0>(sums);
                release(empty + now.stage, lane);
                if (ends_chunk) {
                    add_last(products, sums, by, first);
                    first[0] = scales[0], first[1] = scales[1];
                    end = end + CHUNK < blocks ? end + CHUNK : blocks;
                } else if (ends_group) {
                    add_scaled(products, sums, by);
                }
                now = after;
            }
            sync_warpgroup(1 + consumer); // the last tile has been read
            stage(staged, products, steps + at.tokens * BLOCK, row, column);
            sync_warpgroup(1 + consumer);
            int row_first = (at.rows * 2 + consumer) * 64;
            u16 *to = y + (u64)at.tokens * BLOCK * out_features + row_first;
            store_staged(staged, to, thread, out_features - row_first, tokens - at.tokens * BLOCK, out_features);
        }
        if (TURNS && consumer == 0) take_turn(3);
    }
}
