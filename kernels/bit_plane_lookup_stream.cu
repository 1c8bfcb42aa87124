// The product of bit_plane_lookup_mma.cuh for blocks of whole tiles, about as many as warps: x comes unit by unit while weights
// are multiplied, so that shared memory holds a few units of it, however many tokens there are, and nobody waits for all of it.
//
// A block has TILES row tiles. Warp w < TILES multiplies the first MAIN units of tile w, all warps in step; the other
// warps share the REST that follow, tile by tile. So all have as many units: TILES * (MAIN + REST) =
// WARPS * MAIN where it comes out even. x of units below MAIN passes through a ring of X_STAGES; of the rest it stays. Every
// warp stages some tokens of each unit, X_STAGES - 1 units ahead. In the end a tile's own warp adds what the others had.
//
// Compile-time: as bit_planes.cuh but for BLOCKS, WHOLE, NORM and LOADS, and TILES, MAIN, REST, X_STAGES. Grid (row_tiles / TILES, 1,
// blocks of columns). Compute capability 9.0.
#define NORM 0
#define WHOLE 1
#define LOADS 1
#define CLUSTER 1
#include "hopper.cuh"
#include "bit_plane_lookup_mma.cuh"

#define X_UNIT (BLOCKS_PER_UNIT * COLUMNS * X_BYTES)
#define HELPERS (WARPS - TILES)
#define PROLOGUE (X_STAGES - 1 + REST) // units of x that are there before the first product
#define EACH ((COLUMNS + WARPS - 1) / WARPS) // tokens of a unit that a warp stages, at most

// What a warp does: units of the first MAIN of its tile, or of the rest, tile by tile.
struct Work { int tile, unit; };

DEVICE Work work_at(int warp, int index) {
    if (warp < TILES) return {warp, index};
    return {index / (REST > 0 ? REST : 1), MAIN + index % (REST > 0 ? REST : 1)};
}

// The first of a helper's units, of all that helpers have.
DEVICE int first_of_helper(int helper) { return helper * REST * TILES / (HELPERS > 0 ? HELPERS : 1); }

DEVICE Place place_of(Work work, int first_tile, const Weight &weight, int lane) {
    Place place;
    place.tile = first_tile + work.tile;
    place.unit = work.unit;
    place.planes = weight.planes + ((u64)place.tile * weight.units + work.unit) * PLANES * WARP + lane;
    place.scales = weight.scales + (u64)place.tile * weight.groups * 8 * PARAMETERS;
    return place;
}

// A warp's tokens of a unit of x: on their way, then where they are read.
DEVICE void load_tokens(quad (&v)[EACH], const u16 *x, int unit, int columns, int in_features) {
    int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        int column = warp + i * WARPS;
        v[i] = quad{0, 0, 0, 0};
        if (column < columns) v[i] = load_inputs(x + (u64)column * in_features, unit * UNIT + lane * 8, in_features);
    }
}

DEVICE void store_tokens(const quad (&v)[EACH], int slot, unsigned char *operands, const Weight &weight) {
    int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP;
#pragma unroll
    for (int i = 0; i < EACH; ++i)
        if (warp + i * WARPS < COLUMNS)
            stage_unit(v[i], slot, warp + i * WARPS, 0, weight, lane, operands, (float *)0, (float *)0);
}

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
            acc[i] += parts[(warp + helper) * PART + (i / 4 * 8 + 2 * (lane % 4) + i % 2) * TILE_ROWS + lane / 4 + i % 4 / 2 * 8];
    }
#pragma unroll
    for (int i = 0; i < ACCUMULATORS; ++i) {
        if (EPILOGUE == 2 && i % 4 >= 2) continue;
        write_output(its, acc[i], EPILOGUE == 2 ? acc[i + (i % 4 < 2 ? 2 : 0)] : 0.0f,
                     (first_tile + warp) * rows + lane / 4 + i % 4 / 2 * 8, column0 + i / 4 * 8 + 2 * (lane % 4) + i % 2);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
bit_plane_lookup_stream(const quad *planes,   // [row_tiles][units][PLANES][32]
                        const u32 *scales,    // [row_tiles][groups][8][PARAMETERS], rows g and g + 8
                        const u16 *x,         // [batch][in_features]
                        const u16 *residual,  // [batch][width], or null
                        u16 *y,               // [batch][width]: out_features wide; EPILOGUE 2: of half as many
                        const int *places,    // [out_features], the columns of y; null: as they come
                        int out_features, int in_features, int batch, int row_tiles, int units, int groups, int width) {
    DYNAMIC_SHARED(shared);
    int lane = (int)threadIdx.x % WARP, warp = (int)threadIdx.x / WARP;
    int first_tile = (int)blockIdx.x * TILES, column0 = (int)blockIdx.z * COLUMNS;
    int columns = batch - column0 < COLUMNS ? batch - column0 : COLUMNS;
    Product its = {planes, scales, x, residual, y, places, (float *)0, (u64 *)0, out_features, in_features, batch, row_tiles, units,
                   groups, width, units, (int)blockIdx.x, (int)gridDim.x, (const u16 *)0, 0.0f};
    Weight weight = {planes, scales, units, groups, 0, units};
    unsigned char *ring = shared + warp * STAGES * STAGE_BYTES, *operands = shared + WARPS * STAGES * STAGE_BYTES;
    float *parts = (float *)(operands + (X_STAGES + REST) * X_UNIT); // [TILES + HELPERS - 1][COLUMNS][16]
    u64 *full = (u64 *)(parts + (HELPERS > 0 ? TILES + HELPERS - 1 : 0) * PART), *empty = full + X_STAGES;
    if (threadIdx.x < X_STAGES) barrier_init(full + threadIdx.x, WARPS), barrier_init(empty + threadIdx.x, TILES);

    int begin = 0, end = MAIN;
    if (HELPERS > 0 && warp >= TILES) {
        begin = first_of_helper(warp - TILES), end = first_of_helper(warp - TILES + 1);
    }
    if (warp < TILES && first_tile + warp >= row_tiles) end = begin; // of the last block
    for (int i = 0; i < STAGES - 1; ++i) { // weights are on their way before the inputs exist
        Work work = work_at(warp, begin + i);
        if (begin + i < end && first_tile + work.tile < row_tiles)
            request(ring + i * STAGE_BYTES, place_of(work, first_tile, weight, lane), weight, lane);
        end_of_fetches();
    }
    wait_for_previous();
    const u16 *inputs = x + (u64)column0 * in_features;
    quad ahead[PROLOGUE][EACH]; // all on their way before the first is stored
#pragma unroll
    for (int i = 0; i < PROLOGUE; ++i)
        load_tokens(ahead[i], inputs, i < X_STAGES - 1 ? i : MAIN + i - (X_STAGES - 1), columns, in_features);
#pragma unroll
    for (int i = 0; i < PROLOGUE; ++i) store_tokens(ahead[i], i < X_STAGES - 1 ? i : i + 1, operands, weight);
    __syncthreads();
    if (lane == 0)
        for (int i = 0; i < X_STAGES - 1; ++i) barrier_arrive(full + i);
    float acc[ACCUMULATORS] = {};
    int stage = 0, free = STAGES - 1, steps = end - begin > MAIN ? end - begin : MAIN;
    bool asked = false;
    for (int step = 0; step < steps; ++step) {
        int index = begin + step, coming = step + X_STAGES - 1, slot = coming % X_STAGES;
        quad v[EACH];
        if (coming < MAIN) load_tokens(v, inputs, coming, columns, in_features);
        fetched<STAGES - 2>();
        sync_warp(); // all lanes have read what `free` held, and see all scales
        Work next = work_at(warp, index + STAGES - 1), now = work_at(warp, index);
        if (index + STAGES - 1 < end && first_tile + next.tile < row_tiles)
            request(ring + free * STAGE_BYTES, place_of(next, first_tile, weight, lane), weight, lane);
        end_of_fetches();
        if (!asked && index + STAGES >= end) let_next_start(), asked = true;
        if (index < end && first_tile + now.tile < row_tiles) {
            bool passes = warp < TILES;
            if (passes) barrier_wait(full + step % X_STAGES, (u32)(step / X_STAGES & 1));
            int place = passes ? step % X_STAGES : X_STAGES + now.unit - MAIN;
            multiply_unit(acc, ring + stage * STAGE_BYTES, operands + (place - now.unit) * X_UNIT, (const float *)0, (const float *)0,
                          0, now.unit, weight, lane);
            if (!passes && (index + 1 == end || (index + 1) % (REST > 0 ? REST : 1) == 0)) {
                put_part(acc, parts + (now.tile + warp - TILES) * PART, (u64 *)0, lane);
#pragma unroll
                for (int i = 0; i < ACCUMULATORS; ++i) acc[i] = 0.0f;
            }
        }
        free = stage;
        stage = stage + 1 == STAGES ? 0 : stage + 1;
        sync_warp();
        if (warp < TILES && step < MAIN && lane == 0) barrier_arrive(empty + step % X_STAGES);
        if (coming < MAIN) {
            if (step > 0) barrier_wait(empty + slot, (u32)((step - 1) / X_STAGES & 1)); // all have multiplied unit step - 1
            store_tokens(v, slot, operands, weight);
            sync_warp();
            if (lane == 0) barrier_arrive(full + slot);
        }
    }
    __syncthreads();
    if (warp < TILES && first_tile + warp < row_tiles) write_tile(its, acc, parts, first_tile, column0);
}
