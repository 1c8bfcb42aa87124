// y = x W^T from bit planes for 16 tokens and more, on compute capability 9.0. Planes become the A operand of
// wgmma in registers, by tables (bit_plane_lookup.cuh), so W meets shared memory once and packed; x is the B operand, in
// shared memory in an order that all blocks together bring it into first (order_inputs.cuh), while weights are on their way.
//
// A block: a producer warpgroup, of which a warp starts copies of W and another those of x, and GROUPS warpgroups of 64
// outputs x COLUMNS tokens. Two rings: of W by W_UNITS units of 256 inputs, and of x by X_BLOCKS blocks of 64 inputs. While
// one block of inputs is multiplied, the next one's weights are looked up.
//
// Blocks share W as those of bit_planes.cuh do: the units of all tiles are one stream, cut into equal shares. The tile that
// a block begins and doesn't end is done first. Sums of a tile of several blocks (*parts*) meet in memory: each of its
// blocks adds up a slice of its tokens, in a fixed order, but for one that has another tile to do after it. All
// blocks of the grid have to run at once, as they wait for one another: a multiprocessor takes one.
//
// Compile-time: PLANES 1..8, GROUP, OFFSET as in bit_planes.cuh, COLUMNS (tokens of a block, a multiple of 16, at most
// 256), GROUPS 1..4, W_STAGES, X_STAGES (2 or more), W_UNITS (1, 2), X_BLOCKS (1, 2: with 4 the compiler serializes products), EPILOGUE as in bit_planes.cuh, ACTIVATION_BF16,
// FINE
// (look up what one product needs, not what four do, before it), MIRRORED (bit_plane_lookup.cuh).
// (GROUPS + 1) * 128 threads.
#include "hopper.cuh"
#include "half_products.cuh"

#include "bit_plane_weights.cuh"
#include "order_inputs.cuh"

#define ROWS (64 * GROUPS)
#define ROW_TILES (4 * GROUPS)
#define CONSUMERS (WARPGROUP * GROUPS)
#define THREADS (CONSUMERS + WARPGROUP)
#define FEW_REGISTERS (GROUPS == 2 ? 40 : 32) // of a producer's thread
#define MANY_REGISTERS (GROUPS == 2 ? 232 : GROUPS == 3 ? 160 : 112)
#define PLANES_BYTES (PLANES * WARP * 16)         // of a row tile's unit
#define GROUP_BYTES (32 * PARAMETERS)             // scales of a row tile's group
#define SCALES_BYTES (W_UNITS * SPAN * GROUP_BYTES)
#define W_STAGE (ROW_TILES * (W_UNITS * PLANES_BYTES + SCALES_BYTES))
#define X_BLOCK (COLUMNS * 128)                   // of 64 inputs
#define X_STAGE (X_BLOCKS * X_BLOCK)
#define TABLES_BYTES (SPAN * TILE_ROWS * TABLE_BYTES) // of a warp
#define AT_ONCE (COLUMNS % 32 == 0 && COLUMNS > 96 ? 32 : 16) // tokens that are turned round together: a slice
#define SLICES (COLUMNS / AT_ONCE)
#define SLICE (AT_ONCE / 2)                       // sums of a thread
#define Y_STRIDE 72                               // outputs of a token there: 64, and what keeps banks apart
#define Y_BYTES (AT_ONCE * Y_STRIDE * 2)
#define X_RING (W_STAGES * W_STAGE)
#define TABLES_AT (X_RING + X_STAGES * X_STAGE)
#define Y_AT (TABLES_AT + ROW_TILES * TABLES_BYTES)
#define BARRIERS_AT (Y_AT + GROUPS * Y_BYTES)
#define SHARE_AT (BARRIERS_AT + 16 * (W_STAGES + X_STAGES))
#define OUTPUTS (EPILOGUE == 2 ? 32 : 64)         // of a warpgroup
#define ORDERED_BARRIER 5                         // 1 to 4 are of warpgroups
#define SAID_BARRIER 6

struct Weight {
    const unsigned char *planes, *scales;
    int row_tiles, units, groups, token_tiles;
};

// Units [begin, end) of the stream of `total`; the last `given` of them are of a tile that a later block ends, the first
// `late` of one that an earlier block began.
struct Share { int begin, end, given, late, total; };
// Units [first, first + count) of a tile.
struct Part { int tile, first, count; bool given; };

// In 32 bits: a division of 64 takes longer than a slice's sums.
DEVICE int begin_of(int block, int total) { return (int)((u32)total * (u32)block / gridDim.x); }
DEVICE int block_of(int unit, int total) { return (int)(((u32)(unit + 1) * gridDim.x - 1) / (u32)total); }

DEVICE Share share_of(int block, int total, int units) {
    Share share = {begin_of(block, total), begin_of(block + 1, total), 0, 0, total};
    int tile = share.end / units * units, next_tile = (share.begin + units - 1) / units * units;
    share.given = share.end - (share.begin > tile ? share.begin : tile);
    share.late = next_tile <= tile ? next_tile - share.begin : 0;
    return share;
}

// The part that comes after `at` units of work: first what is given, last what others have begun, so that nobody waits long.
DEVICE Part part_at(const Share &share, int at, int units) {
    bool given = at < share.given;
    int own = share.end - share.begin - share.late; // before the late ones
    int begin = given ? share.end - share.given : at < own ? share.begin + share.late + at - share.given : share.begin;
    Part part = {begin / units, begin % units, 0, given};
    part.count = given ? share.given : units - part.first;
    return part;
}

// Where in a ring, and the parity of its turn.
struct turn { int stage; u32 parity; };
DEVICE void next(turn &t, int stages) {
    if (++t.stage == stages) t.stage = 0, t.parity ^= 1;
}

// Start copying `units` units of a tile's weights, neighbours in memory: a warp, each lane a row tile's. Without a stage: into
// the L2 cache.
DEVICE void copy_weights(unsigned char *stage, u64 *barrier, const Weight &weight, int tile, int unit, int units, int lane) {
    int first = tile / weight.token_tiles * ROW_TILES, group = unit * UNIT / GROUP;
    int count = weight.row_tiles - first < ROW_TILES ? weight.row_tiles - first : ROW_TILES;
    int span = units * SPAN < weight.groups - group ? units * SPAN : weight.groups - group;
    u32 bytes = (u32)units * PLANES_BYTES, of_scales = (u32)span * GROUP_BYTES;
    if (stage && lane == 0) barrier_expect(barrier, (u32)count * (bytes + of_scales));
    sync_warp();
    if (lane >= count) return;
    u64 row_tile = (u64)(first + lane);
    const unsigned char *planes = weight.planes + (row_tile * weight.units + unit) * PLANES_BYTES;
    const unsigned char *scales = weight.scales + (row_tile * weight.groups + group) * GROUP_BYTES;
    if (stage) {
        copy_bulk(stage + lane * W_UNITS * PLANES_BYTES, planes, bytes, barrier);
        copy_bulk(stage + ROW_TILES * W_UNITS * PLANES_BYTES + lane * SCALES_BYTES, scales, of_scales, barrier);
    } else {
        prefetch_bulk(planes, bytes);
        prefetch_bulk(scales, of_scales);
    }
}

DEVICE int units_at(const Part &part, int i) { return part.count - i < W_UNITS ? part.count - i : W_UNITS; }

// The producer of W: a warp. The first weights are on their way into the L2 cache before the inputs exist, and no further
// until this block has said that it ordered its part of those: that waits for all copies under way.
DEVICE void produce_weights(unsigned char *memory, u64 *full, const Weight &weight, const Share &share, int lane) {
    int size = share.end - share.begin;
#pragma unroll 1
    for (int at = 0, stage = 0; at < size && stage < W_STAGES;) {
        Part part = part_at(share, at, weight.units);
        at += part.count;
#pragma unroll 1
        for (int i = 0; i < part.count && stage < W_STAGES; i += W_UNITS, ++stage)
            copy_weights((unsigned char *)0, (u64 *)0, weight, part.tile, part.first + i, units_at(part, i), lane);
    }
    wait_for_previous();
    sync_threads<2 * WARP>(SAID_BARRIER);
    u64 *empty = full + W_STAGES;
    turn now = {0, 0};
#pragma unroll 1
    for (int at = 0; at < size;) {
        Part part = part_at(share, at, weight.units);
        at += part.count;
#pragma unroll 1
        for (int i = 0; i < part.count; i += W_UNITS, next(now, W_STAGES)) {
            barrier_wait(empty + now.stage, now.parity ^ 1);
            copy_weights(memory + now.stage * W_STAGE, full + now.stage, weight, part.tile, part.first + i, units_at(part, i), lane);
        }
    }
}

// The producer of x: one thread. `ordered` counts blocks: those that have ordered their part, then those that have seen it.
DEVICE void produce_inputs(unsigned char *ring, u64 *full, const Weight &weight, const unsigned char *x, const Share &share, u64 *ordered) {
    u64 *empty = full + X_STAGES, blocks = gridDim.x;
    turn now = {0, 0};
    wait_for_previous();
    await_count(ordered, blocks);
    copies_see_writes();
#pragma unroll 1
    for (int at = 0; at < share.end - share.begin;) {
        Part part = part_at(share, at, weight.units);
        const unsigned char *from = x + ((u64)(part.tile % weight.token_tiles) * weight.units + part.first) * 4 * X_BLOCK;
        at += part.count;
#pragma unroll 1
        for (int i = 0; i < part.count * 4; i += X_BLOCKS, next(now, X_STAGES), from += X_STAGE) {
            barrier_wait(empty + now.stage, now.parity ^ 1);
            barrier_expect(full + now.stage, X_STAGE);
            copy_bulk(ring + now.stage * X_STAGE, from, X_STAGE, full + now.stage);
        }
    }
    if (count_one(ordered) == 2 * blocks - 1) *ordered = 0;
}

// A block's part of the inputs, by its consumers, in the ring that will hold them.
#define RING_PIECES (X_STAGES * X_STAGE / PIECE_BYTES)
#define ORDERING (RING_PIECES < CONSUMERS / WARP ? RING_PIECES : CONSUMERS / WARP) // warps
DEVICE void order_part(const Inputs &inputs, unsigned char *ring, u64 *ordered) {
    order_inputs<ORDERING>(inputs, ring);
    sync_threads<CONSUMERS>(ORDERED_BARRIER);
    if (threadIdx.x == 0) count_one(ordered);
    if (threadIdx.x < WARP) sync_threads<2 * WARP>(SAID_BARRIER);
}

// What all warps have read may be overwritten.
DEVICE void release(u64 *barrier, int lane) {
    sync_warp();
    if (lane == 0) barrier_arrive(barrier);
}

DEVICE void group_tables(Tables &tables, const unsigned char *mine, int unit, int k, int g) { // k: in the unit
    int group = REGULAR ? k / GROUP : (unit * UNIT + k) / GROUP - unit * UNIT / GROUP;
    tables = load_tables(mine + group * TILE_ROWS * TABLE_BYTES, g);
}

struct Rings {
    unsigned char *memory;
    u64 *w_full, *x_full;
    turn w, x;
    u64 *left; // the barrier of the x that is still being multiplied, null: none
};

// sums += one unit's product of a warp's row tile, number `tile` of the block's. The last is still under way afterwards.
// `at`: in its stage; `last`: of it.
DEVICE void multiply_unit(float (&sums)[SUMS], Rings &rings, int unit, int at, bool last, int tile, int lane, u32 (&a)[2][16]) {
    unsigned char *mine = rings.memory + TABLES_AT + tile * TABLES_BYTES, *stage = rings.memory + rings.w.stage * W_STAGE;
    u32 words[4][PLANES];
    if (at == 0) barrier_wait(rings.w_full + rings.w.stage, rings.w.parity);
#pragma unroll
    for (int plane = 0; plane < PLANES; ++plane) {
        quad v = *(const quad *)(stage + (tile * W_UNITS + at) * PLANES_BYTES + plane * WARP * 16 + lane * 16);
        words[0][plane] = v.x, words[1][plane] = v.y, words[2][plane] = v.z, words[3][plane] = v.w;
    }
    int groups_before = unit * UNIT / GROUP - (unit - at) * UNIT / GROUP;
    const u32 *scales = (const u32 *)(stage + ROW_TILES * W_UNITS * PLANES_BYTES + tile * SCALES_BYTES + groups_before * GROUP_BYTES);
    sync_warp(); // all lanes have read the tables before
#pragma unroll
    for (int first = 0; first < SPAN * TILE_ROWS; first += WARP) {
        int index = first + lane, row = index % TILE_ROWS;
        if (index < SPAN * TILE_ROWS)
            make_tables(mine + index * TABLE_BYTES, scales + (index / TILE_ROWS * 8 + row % 8) * PARAMETERS, row / 8);
    }
    sync_warp(); // all tables are there, and all lanes have read the stage
    if (last) {
        if (lane == 0) barrier_arrive(rings.w_full + W_STAGES + rings.w.stage);
        next(rings.w, W_STAGES);
    }
    Tables tables, upper;
#pragma unroll
    for (int block = 0; block < 4; ++block) {
        if (!REGULAR || block * 64 % GROUP == 0 || block == 0) group_tables(tables, mine, unit, block * 64, lane / 4);
        if (HALVED) group_tables(upper, mine, unit, block * 64 + 32, lane / 4);
        WordIndices indices = word_indices(words[block]);
        if (!FINE) {
#pragma unroll
            for (int step = 0; step < 4; ++step) expand_step(a[block % 2], indices, step, tables, HALVED ? upper : tables);
        }
        if (block % X_BLOCKS == 0) barrier_wait(rings.x_full + rings.x.stage, rings.x.parity);
        u64 x = core_matrices(shared_address(rings.memory + X_RING + rings.x.stage * X_STAGE + block % X_BLOCKS * X_BLOCK), COLUMNS * 16, 128);
        if (!FINE) products_begin();
#pragma unroll
        for (int step = 0; step < 4; ++step) {
            if (FINE) {
                expand_step(a[block % 2], indices, step, tables, HALVED ? upper : tables);
                products_begin();
            }
            multiply_add_16<IS_BFLOAT>(sums, a[block % 2] + 4 * step, x + step * 2 * COLUMNS);
        }
        end_of_products();
        products_wait<1>(sums); // those before
        keep(a[1 - block % 2]);
        if (block % X_BLOCKS == 0 && rings.left) release(rings.left, lane);
        if (block % X_BLOCKS == X_BLOCKS - 1) {
            rings.left = rings.x_full + X_STAGES + rings.x.stage;
            next(rings.x, X_STAGES);
        }
    }
}

// The blocks [low, high] of a tile. `owners` of them, from `first` on, each add up a slice of it; this is number `mine`.
struct Meeting { int tile, low, high, first, owners, mine; };

DEVICE Meeting meeting_of(const Part &part, const Share &share, int units) {
    int begin = part.tile * units;
    Meeting its = {part.tile, block_of(begin, share.total), block_of(begin + units - 1, share.total)};
    its.first = its.low + (its.low < its.high && begin_of(its.low, share.total) < begin); // that one has another tile to do
    its.owners = its.high + 1 - its.first < SLICES ? its.high + 1 - its.first : SLICES;
    its.mine = (int)blockIdx.x - its.first;
    return its;
}
DEVICE int owner_of(const Meeting &its, int slice) { return slice * its.owners / SLICES; }

// Where parts lie: [blocks][the tile that a block doesn't end, that which it ends][COLUMNS / 8][CONSUMERS] of four sums.
DEVICE u64 place_of(const Meeting &its, int block) { return (u64)block * 2 + (block == its.high); }
DEVICE float *quad_of(float *part, int quad) { return part + (quad * CONSUMERS + (int)threadIdx.x) * 4; }
DEVICE u64 *flag_of(u64 *announced, const Meeting &its, int block, int owner) {
    return announced + (place_of(its, block) * GROUPS + threadIdx.x / WARPGROUP) * SLICES + owner;
}

// A warpgroup's sums of the slices of others to where these find them.
DEVICE void give(float *parts, u64 *announced, const Meeting &its, const float (&sums)[SUMS], int thread, int number) {
    float *part = parts + place_of(its, (int)blockIdx.x) * SUMS * CONSUMERS;
#pragma unroll
    for (int slice = 0; slice < SLICES; ++slice)
        if (owner_of(its, slice) != its.mine) {
#pragma unroll
            for (int i = slice * SLICE; i < (slice + 1) * SLICE; i += 4) store_quad(quad_of(part, i / 4), sums + i);
        }
    sync_warpgroup(1 + number);
    if (thread < its.owners && thread != its.mine) announce(flag_of(announced, its, (int)blockIdx.x, thread));
}

#define AT_A_TIME 3 // parts
DEVICE void add_quad(float *sums, float *part, int quad, bool there) {
    float four[4];
    load_quad(four, quad_of(part, quad));
#pragma unroll
    for (int n = 0; n < 4; ++n) sums[n] += there ? four[n] : 0.0f;
}

// Add what others gave of this block's slices.
DEVICE void take(float (&sums)[SUMS], float *parts, u64 *announced, const Meeting &its, int thread, int number) {
    int others = its.high - its.low;
    for (int i = thread; i < others; i += WARPGROUP)
        await(flag_of(announced, its, its.low + i + (its.low + i >= (int)blockIdx.x), its.mine));
    sync_warpgroup(1 + number);
    if (its.owners == 1 && others == 1) {
        float *part = parts + place_of(its, its.low == (int)blockIdx.x ? its.high : its.low) * SUMS * CONSUMERS;
#pragma unroll
        for (int i = 0; i < SUMS; i += 4) add_quad(sums + i, part, i / 4, true);
        return;
    }
#pragma unroll
    for (int slice = 0; slice < SLICES; ++slice) {
        if (owner_of(its, slice) != its.mine) continue;
#pragma unroll 1
        for (int first = 0; first < others; first += AT_A_TIME)
#pragma unroll
            for (int i = slice * SLICE; i < (slice + 1) * SLICE; i += 4)
#pragma unroll
                for (int n = 0; n < AT_A_TIME; ++n) { // all loads are under way before a sum is needed
                    int other = first + n < others ? its.low + first + n : its.low;
                    add_quad(sums + i, parts + place_of(its, other + (other >= (int)blockIdx.x)) * SUMS * CONSUMERS, i / 4, first + n < others);
                }
    }
}

struct Target {
    const u16 *residual;
    u16 *y;
    const int *places;
    int outputs, batch, width; // outputs: of all blocks
};

// A warpgroup's outputs of its slices of a tile, through shared memory: y has an output's neighbours beside it, a thread a
// token's.
DEVICE void store_sums(const float (&sums)[SUMS], const Meeting &its, u16 *staged, const Target &to, int first, int token0, int number) {
    int thread = (int)threadIdx.x % WARPGROUP, lane = thread % WARP, g = lane / 4;
    int row = EPILOGUE == 2 ? thread / WARP * 8 + g : thread / WARP * 16 + g;
#pragma unroll
    for (int base = 0; base < COLUMNS; base += AT_ONCE) {
        if (owner_of(its, base / AT_ONCE) != its.mine) continue;
        sync_warpgroup(1 + number); // what was staged has been read
#pragma unroll
        for (int i = 0; i < AT_ONCE / 2; ++i) {
            int token = i / 4 * 8 + lane % 4 * 2 + i % 2, above = i / 2 % 2 * 8;
            float value = sums[base / 2 + i];
            if (EPILOGUE == 2) {
                if (above) continue; // these are up, those are gate
                value = silu(value) * sums[base / 2 + i + (EPILOGUE == 2 ? 2 : 0)];
            }
            if (EPILOGUE == 1) {
                int out = first + row + above;
                if (token0 + base + token < to.batch && out < to.outputs)
                    value += load_activation(to.residual[(u64)(token0 + base + token) * to.width + (to.places ? to.places[out] : out)]);
            }
            staged[token * Y_STRIDE + row + above] = store_activation(value);
        }
        sync_warpgroup(1 + number);
        for (int i = thread; i < AT_ONCE * OUTPUTS / 8; i += WARPGROUP) {
            int token = i / (OUTPUTS / 8), at = i % (OUTPUTS / 8) * 8, out = first + at;
            if (token0 + base + token >= to.batch) break;
            const u16 *from = staged + token * Y_STRIDE + at;
            u16 *row_of_y = to.y + (u64)(token0 + base + token) * to.width;
            if (!to.places && to.width % 8 == 0 && out + 8 <= to.outputs) {
                *(quad *)(row_of_y + out) = *(const quad *)from;
            } else {
                for (int n = 0; n < 8 && out + n < to.outputs; ++n)
                    row_of_y[to.places ? to.places[out + n] : out + n] = from[n];
            }
        }
    }
}

// A consumer's thread.
DEVICE void consume(unsigned char *memory, u64 *w_full, u64 *x_full, const Weight &weight, const Share &share,
                    const Target &target, float *parts, u64 *announced) {
    int thread = (int)threadIdx.x % WARPGROUP, number = (int)threadIdx.x / WARPGROUP;
    int lane = (int)threadIdx.x % WARP, tile = (int)threadIdx.x / WARP;
    int units = weight.units;
    Rings rings = {memory, w_full, x_full, {0, 0}, {0, 0}, (u64 *)0};
    u32 a[2][16] = {};
    for (int at = 0; at < share.end - share.begin;) {
        Part part = part_at(share, at, units);
        at += part.count;
        float sums[SUMS];
#pragma unroll
        for (int i = 0; i < SUMS; ++i) sums[i] = 0.0f;
#pragma unroll 1
        for (int unit = part.first; unit < part.first + part.count; ++unit) {
            int in_stage = (unit - part.first) % W_UNITS;
            bool last = in_stage == W_UNITS - 1 || unit + 1 == part.first + part.count;
            multiply_unit(sums, rings, unit, in_stage, last, tile, lane, a);
        }
        products_wait<0>(sums);
        keep(a[1]);
        release(rings.left, lane);
        rings.left = (u64 *)0;
        Meeting its = meeting_of(part, share, units);
        if (its.high > its.low && (its.owners > 1 || its.mine != 0)) give(parts, announced, its, sums, thread, number);
        if (its.mine < 0 || its.mine >= its.owners) continue;
        if (its.high > its.low) take(sums, parts, announced, its, thread, number);
        u16 *staged = (u16 *)(memory + Y_AT + number * Y_BYTES);
        int first = (part.tile / weight.token_tiles * GROUPS + number) * OUTPUTS;
        store_sums(sums, its, staged, target, first, part.tile % weight.token_tiles * COLUMNS, number);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
bit_plane_wgmma(const unsigned char *planes, // [row_tiles][units][PLANES][32] of 16 bytes
                const unsigned char *scales, // [row_tiles][groups][8][PARAMETERS], rows g and g + 8
                const u16 *x,                // [batch][in_features]
                unsigned char *ordered,      // x, of order_inputs.cuh
                const u16 *residual,         // [batch][width], or null
                u16 *y,                      // [batch][width]: out_features wide; EPILOGUE 2: half as many
                const int *places,           // [out_features], the columns of y; null: as they come
                float *parts,                // where: see place_of
                u64 *announced,              // a count, then [blocks][2][GROUPS][SLICES]; zeros
                int out_features, int in_features, int batch, int row_tiles, int units, int groups, int width, int token_tiles) {
    DYNAMIC_SHARED(memory);
    u64 *w_full = (u64 *)(memory + BARRIERS_AT), *x_full = w_full + 2 * W_STAGES;
    int number = (int)threadIdx.x / WARPGROUP;
    Weight weight = {planes, scales, row_tiles, units, groups, token_tiles};
    Share &share = *(Share *)(memory + SHARE_AT); // there, as it isn't needed often and registers are few
    Inputs inputs = {x, (quad *)ordered, in_features, batch, token_tiles, units * 4};
    if (number < GROUPS) prefetch_inputs<ORDERING>(inputs); // before the weights: all wait for these
    if (threadIdx.x == CONSUMERS) {
        share = share_of((int)blockIdx.x, (row_tiles + ROW_TILES - 1) / ROW_TILES * token_tiles * units, units);
        for (int stage = 0; stage < W_STAGES; ++stage)
            barrier_init(w_full + stage, 1), barrier_init(w_full + W_STAGES + stage, ROW_TILES);
        for (int stage = 0; stage < X_STAGES; ++stage)
            barrier_init(x_full + stage, 1), barrier_init(x_full + X_STAGES + stage, ROW_TILES);
        barriers_are_ready();
    }
    __syncthreads();
    let_next_start();
    if (number == GROUPS) {
        if (GROUPS > 1) fewer_registers<FEW_REGISTERS>();
        int thread = (int)threadIdx.x - CONSUMERS;
        if (thread < WARP) produce_weights(memory, w_full, weight, share, thread);
        else if (thread == WARP) produce_inputs(memory + X_RING, x_full, weight, ordered, share, announced);
        else wait_for_previous();
        sync_warp();
    } else {
        if (GROUPS > 1) more_registers<MANY_REGISTERS>();
        wait_for_previous();
        order_part(inputs, memory + X_RING, announced);
        Target target = {residual, y, places, EPILOGUE == 2 ? out_features / 2 : out_features, batch, width};
        consume(memory, w_full, x_full, weight, share, target, parts, announced + 1);
    }
}
