// The product of bit_plane_lookup_mma.cuh for blocks of whole tiles, about as many as warps: x comes unit by unit while weights
// are multiplied, so that shared memory holds a few units of it, however many tokens there are, and nobody waits for all of it.
//
// A block has TILES row tiles. Warp w < TILES, the *owner* of tile w, multiplies its first MAIN units, all owners in step; the
// other warps help: they share the REST that follow, tile by tile. So all have as many units: TILES * (MAIN + REST) =
// WARPS * MAIN where it comes out even. In the end owners add what helpers had of their tiles.
//
// x of owners' units passes through a ring of 2 * AHEAD; that of the rest stays. In step s all warps stage unit s + AHEAD, and
// all wait until all have staged unit s: then all have multiplied unit s - AHEAD, whose place unit s + AHEAD takes.
//
// Compile-time: as bit_planes.cuh but for BLOCKS, WHOLE, NORM and LOADS, and TILES, MAIN, REST, AHEAD; no more COLUMNS than WARPS.
// Grid (blocks, 1, blocks of columns). Compute capability 9.0.
#define NORM 0
#define WHOLE 1
#define LOADS 1
#define CLUSTER 1
#define KERNEL bit_plane_lookup_stream
#include "hopper.cuh"
#include "bit_plane_lookup_mma.cuh"

#define RING (2 * AHEAD)
#define X_UNIT (BLOCKS_PER_UNIT * COLUMNS * X_BYTES)
#define HELPERS (WARPS - TILES)

// A warp's token of a unit of x: on its way, then where it is read.
DEVICE void load_token(quad &v, const u16 *x, int unit, int columns, int in_features) {
    int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP;
    v = quad{0, 0, 0, 0};
    if (warp < columns) v = load_inputs(x + (u64)warp * in_features, unit * UNIT + lane * 8, in_features);
}

DEVICE void store_token(const quad &v, int slot, unsigned char *operands, const Weight &weight) {
    int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP;
    if (warp < COLUMNS) stage_unit(v, slot, warp, 0, weight, lane, operands, (float *)0, (float *)0);
}

// The first of a helper's units, of all that helpers have.
DEVICE int first_of_helper(int helper) { return HELPERS > 0 ? helper * REST * TILES / (HELPERS > 0 ? HELPERS : 1) : 0; }

// One output of a tile: as the end of `multiply`.
DEVICE void write_output(const Product &its, float value, float other, int out, int token) {
    int outputs = EPILOGUE == 2 ? its.out_features / 2 : its.out_features;
    if (out >= outputs || token >= its.batch) return;
    if (EPILOGUE == 2) value = silu(value) * other;
    u64 to_write = (u64)token * its.width + (its.places ? its.places[out] : out);
    if (EPILOGUE == 1) value += load_activation(its.residual[to_write]);
    its.y[to_write] = store_activation(value);
}

// A tile's sums, with what helpers had of it, to where they belong.
DEVICE void write_tile(const Product &its, float *acc, const float *parts, int first_tile, int column0) {
    int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP, rows = EPILOGUE == 2 ? TILE_ROWS / 2 : TILE_ROWS;
#pragma unroll
    for (int helper = 0; helper < HELPERS; ++helper) {
        if (first_of_helper(helper) >= (warp + 1) * REST || first_of_helper(helper + 1) <= warp * REST) continue;
#pragma unroll
        for (int i = 0; i < ACCUMULATORS; ++i)
            acc[i] += parts[(warp + helper) * PART + PLACE_OF(lane / 4 + i % 4 / 2 * 8, i / 4 * 8 + 2 * (lane % 4) + i % 2)];
    }
#pragma unroll
    for (int i = 0; i < ACCUMULATORS; ++i) {
        if (EPILOGUE == 2 && i % 4 >= 2) continue;
        write_output(its, acc[i], EPILOGUE == 2 ? acc[i + (i % 4 < 2 ? 2 : 0)] : 0.0f,
                     (first_tile + warp) * rows + lane / 4 + i % 4 / 2 * 8, column0 + i / 4 * 8 + 2 * (lane % 4) + i % 2);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
KERNEL(const quad *planes,   // [row_tiles][units][PLANES][32]
       const u32 *scales,    // [row_tiles][groups][8][PARAMETERS], rows g and g + 8
       const u16 *x,         // [batch][in_features]
       const u16 *residual,  // [batch][width], or null
       u16 *y,               // [batch][width]: out_features wide; EPILOGUE 2: of half as many
       const int *places,    // [out_features], the columns of y; null: as they come
       float *partial, const u16 *norm, // these, and the last two, are what bit_planes_kernel.cuh takes
       int out_features, int in_features, int batch, int row_tiles, int units, int groups, int width, int units_per_slab, float eps) {
    DYNAMIC_SHARED(shared);
    int lane = (int)threadIdx.x % WARP, warp = (int)threadIdx.x / WARP, first_tile = (int)blockIdx.x * TILES;
    int column0 = (int)blockIdx.z * COLUMNS, columns = batch - column0 < COLUMNS ? batch - column0 : COLUMNS;
    Product its = {planes, scales, x, residual, y, places, (float *)0, (u64 *)0, out_features, in_features, batch, row_tiles, units,
                   groups, width, units, (int)blockIdx.x, (int)gridDim.x, (const u16 *)0, 0.0f};
    unsigned char *ring = shared + warp * STAGES * STAGE_BYTES, *operands = shared + WARPS * STAGES * STAGE_BYTES;
    float *parts = (float *)(operands + (RING + REST) * X_UNIT); // [TILES + HELPERS - 1][COLUMNS][16]
    u64 *staged = (u64 *)(parts + (HELPERS > 0 ? TILES + HELPERS - 1 : 0) * PART);
    if (threadIdx.x < RING) barrier_init(staged + threadIdx.x, WARPS);

    bool owns = warp < TILES;
    int tiles = row_tiles - first_tile < TILES ? row_tiles - first_tile : TILES;
    Weight weight = {planes, scales, units, groups, owns ? 0 : MAIN, owns ? MAIN : REST};
    int from = owns ? warp * MAIN : first_of_helper(warp - TILES), count = owns ? MAIN : first_of_helper(warp - TILES + 1) - from;
    if (from + count > tiles * weight.count) count = from < tiles * weight.count ? tiles * weight.count - from : 0;
    Share none = {0, 0, 0};
    Place ahead = place_at(weight, first_tile * weight.count + from, lane);
    int tile = ahead.tile, unit = ahead.unit;
    request_first(ring, ahead, 0, STAGES - 1, 0, count, lane, none, weight); // weights are on their way before the inputs exist
    wait_for_previous();
    const u16 *inputs = x + (u64)column0 * in_features;
    quad first[AHEAD + REST]; // all on their way before the first is stored
#pragma unroll
    for (int i = 0; i < AHEAD + REST; ++i)
        load_token(first[i], inputs, i < AHEAD ? i : MAIN + i - AHEAD, columns, in_features);
#pragma unroll
    for (int i = 0; i < AHEAD + REST; ++i) store_token(first[i], i < AHEAD ? i : i + AHEAD, operands, weight);
    __syncthreads();
    if (lane == 0)
        for (int i = 0; i < AHEAD; ++i) barrier_arrive(staged + i);
    if (count < STAGES) let_next_start();
    float acc[ACCUMULATORS] = {};
    int stage = 0, free = STAGES - 1, slot = 0, steps = count > MAIN ? count : MAIN;
    u32 turn = 0;
    for (int step = 0; step < steps; ++step) {
        quad v;
        if (step + AHEAD < MAIN) load_token(v, inputs, step + AHEAD, columns, in_features);
        request_next(ring, free, ahead, step, count, lane, none, weight);
        if (step == count - STAGES) let_next_start();
        if (step < MAIN) barrier_wait(staged + slot, turn);
        if (step < count) {
            multiply_unit(acc, ring + stage * STAGE_BYTES, operands + (owns ? slot - unit : RING) * X_UNIT, (const float *)0,
                          (const float *)0, 0, unit, weight, lane);
            if (++unit == weight.count || step + 1 == count) {
                if (!owns) {
                    put_part(acc, parts + (tile - first_tile + warp - TILES) * PART, (u64 *)0, lane);
#pragma unroll
                    for (int i = 0; i < ACCUMULATORS; ++i) acc[i] = 0.0f;
                }
                unit = 0, ++tile;
            }
        }
        free = stage;
        stage = stage + 1 == STAGES ? 0 : stage + 1;
        if (step + AHEAD < MAIN) {
            int to = slot < AHEAD ? slot + AHEAD : slot - AHEAD;
            store_token(v, to, operands, weight);
            sync_warp();
            if (lane == 0) barrier_arrive(staged + to);
        }
        if (++slot == RING) slot = 0, turn ^= 1;
    }
    __syncthreads();
    if (owns && warp < tiles) write_tile(its, acc, parts, first_tile, column0);
}
