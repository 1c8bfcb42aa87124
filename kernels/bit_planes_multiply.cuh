// What a block of the bit-plane kernels does. The file that includes this has defined
//   ACCUMULATORS      floats per lane,
//   ROW_POWER         what rows 0..7 of a tile are to be multiplied by, as a power of two; the rest by
//                     UPPER_POWER, half of it unless that is defined too,
//   X_BYTES           shared memory for 32 inputs of a token,
//   BY_TOKENS         how sums lie (bit_planes.cuh),
//   X_NUMBERS         0: x has no starts and no factors; else 1, or not defined,
//   stage_unit        x into shared memory,
//   multiply_unit     one unit's product, added to the accumulators,
//   put_part          the accumulators into shared memory or, marked, into global.
// The kernel that calls `multiply` is in bit_planes_kernel.cuh, or bit_plane_classes.cu for several
// weights beside one another.

#ifndef UPPER_POWER
#define UPPER_POWER (ROW_POWER - 1)
#endif
#ifndef X_NUMBERS
#define X_NUMBERS 1
#endif
#ifndef CLUSTER
#define CLUSTER 1
#endif
#if CLUSTER > 1
#include "bit_planes_cluster.cuh"
#endif
#if NORM
#include "bit_planes_norm.cuh"
#endif
#if RANKS > 1
#include "peer_boxes.cuh"
#endif

// A weight, by what it is multiplied, and the blocks that share it.
struct Product {
    const quad *planes;  // [row_tiles][units][PLANES][32]
    const u32 *scales;   // [row_tiles][groups][8][PARAMETERS], rows g and g + 8
    const u16 *x;        // [batch][in_features]
    const u16 *residual; // [batch][width], or null
    u16 *y;              // [batch][width]: out_features wide; EPILOGUE 2: of half as many
    const int *places;   // [out_features], the columns of y; null: as they come
    float *partial;      // [slabs][batch][row_tiles * 16]; null: one slab, write y
    u64 *exchange;       // [blocks][WARPS][PART], zeros, of this slab and block of columns
    int out_features, in_features, batch, row_tiles, units, groups, width, units_per_slab;
    int block, blocks;
    const u16 *norm;     // [in_features], if NORM
    float eps;
#if RANKS > 1
    Peers peers;         // with whom y is summed: EPILOGUE 0 or 1, no places, one slab
#endif
};

#if CLUSTER > 1
#define SLAB ((int)cluster_rank())
#define FIRST_OUTPUT (SLAB * THREADS)
#else
#define SLAB ((int)blockIdx.y)
#define FIRST_OUTPUT 0
#endif

#define UPPER PLACE_OF(8, 0) // from a row to that of the upper half

// One block's work: of slab blockIdx.y, or of its rank's in its cluster, and of block of columns blockIdx.z.
DEVICE void multiply(const Product &its, unsigned char *shared) {
    int lane = (int)threadIdx.x % WARP, warp = (int)threadIdx.x / WARP;
    int units_per_slab = its.units_per_slab, first_unit = SLAB * units_per_slab;
    Weight weight = {its.planes, its.scales, its.units, its.groups, first_unit, units_per_slab};
    if (its.units - first_unit < weight.count) weight.count = its.units - first_unit;
    int column0 = (int)blockIdx.z * COLUMNS;
    int columns = its.batch - column0 < COLUMNS ? its.batch - column0 : COLUMNS;
    int total = WHOLE ? its.row_tiles : its.row_tiles * weight.count, each = divide(total, its.blocks);
    int more = total - each * its.blocks;
    Share share = share_of(its.block, each, more);
    if (WHOLE) {
        share.begin *= weight.count, share.size *= weight.count;
    } else {
        int last = divide(share.begin + share.size, weight.count) * weight.count;
        if (last < share.begin + share.size) share.given = given_of(share, last);
    }
    int begin = first_of_warp(warp, share.size), end = first_of_warp(warp + 1, share.size);

    unsigned char *ring = shared + warp * STAGES * STAGE_BYTES;
    unsigned char *operands = shared + WARPS * STAGES * STAGE_BYTES;
    float *starts = (float *)(operands + units_per_slab * BLOCKS_PER_UNIT * COLUMNS * X_BYTES);
    float *factors = starts + X_NUMBERS * units_per_slab * BLOCKS_PER_UNIT * COLUMNS; // [unit][COLUMNS]
    float *given = factors + X_NUMBERS * units_per_slab * COLUMNS; // [PART]
    float *parts = given + PART; // [own tiles + WARPS][PART], then a number per own tile

    // Weights are on their way before the inputs exist.
    Place ahead = place_at(weight, begin < share.given ? share.begin + share.size - share.given + begin
                                                       : share.begin + begin - share.given, lane);
    int unit = ahead.unit, tile = ahead.tile;
    request_first(ring, ahead, 0, EARLY, begin, end, lane, share, weight);
    // Own tiles: from the one that the share begins in to the last one that ends in it.
    int own = divide(share.begin, weight.count), start = own * weight.count;
    int kept = share.size - share.given;
    int tiles = kept == 0 ? 0 : divide(share.begin + kept - 1, weight.count) + 1 - own;
    u32 *spans = (u32 *)(parts + (tiles + WARPS) * PART);
    find_spans(spans, tiles, start, weight.count, share);
    // The next kernel is to ask for its weights when all of these have been asked for.
    int all_asked = end - STAGES + 1;
    const u16 *x = its.x + (u64)column0 * its.in_features;
    // Memory serves a multiprocessor in turn: no warp's weights are to be in front of another one's inputs.
    auto ask_late = [&] {
        __syncthreads();
        request_first(ring, ahead, EARLY, STAGES - 1, begin, end, lane, share, weight);
    };
    const Offsets offsets = offsets_of(column0 * its.in_features, weight, lane);
#if NORM
    Gains gains = load_gains(its.norm, its.in_features, offsets);
#endif
#ifdef OWN_STAGING
    wait_for_previous(number_of(offsets));
#else
    wait_for_previous();
#endif
#if NORM
    stage_normed(x, its.in_features, weight, columns, units_per_slab, operands, starts, factors, gains,
                 its.eps, given, offsets, ask_late);
#else
#if RANKS > 1
    Round round = begin_round(its.peers);
    u32 turn = 0;
#endif
#ifdef OWN_STAGING
    x = its.x; // `offsets` say where
#endif
    stage_inputs(x, its.in_features, weight, columns, units_per_slab, operands, starts, factors, offsets, ask_late);
#endif

#if RANKS > 1
    if (threadIdx.x == 0) turn = take_turn(its.peers);
#endif
    if (begin >= all_asked) let_next_start();
    float acc[ACCUMULATORS] = {};
    int stage = 0, free = STAGES - 1;
    for (int work = begin; work < end; ++work) {
        request_next(ring, free, ahead, work, end, lane, share, weight);
        if (work == all_asked) let_next_start();
        multiply_unit(acc, ring + stage * STAGE_BYTES, operands, starts, factors, units_per_slab, unit,
                      weight, lane);
        free = stage;
        stage = stage + 1 == STAGES ? 0 : stage + 1;
        bool last_given = !WHOLE && work + 1 == share.given;
        if (++unit == weight.count || last_given || work + 1 == end) {
            if (!WHOLE && work < share.given)
                put_part(acc, (float *)0, its.exchange + ((u64)its.block * WARPS + warp) * PART, lane);
            else
                put_part(acc, parts + (tile - own + warp) * PART, (u64 *)0, lane);
#pragma unroll
            for (int i = 0; i < ACCUMULATORS; ++i) acc[i] = 0.0f;
            if (last_given) {
                tile = own;
                unit = share.begin - own * weight.count;
            } else {
                unit = 0;
                ++tile;
            }
        }
    }
#if RANKS > 1
    if (threadIdx.x == 0) end_turn(its.peers, round, turn);
#endif
    if (kept == 0) return;
    bool shared_tile = !WHOLE && start < share.begin; // the first: others have had parts of it
    if (shared_tile) take_given(its.exchange, its.block, each, more, start, given);
    __syncthreads();
    const int rows = EPILOGUE == 2 ? TILE_ROWS / 2 : TILE_ROWS;
    int outputs = EPILOGUE == 2 ? its.out_features / 2 : its.out_features;
#if CLUSTER > 1
    add_parts(parts, spans, tiles, share);
    sync_cluster(); // all have their sums
#endif
    for (int index = (int)threadIdx.x + FIRST_OUTPUT; index < tiles * rows * COLUMNS; index += THREADS * CLUSTER) {
        int tile = index / (rows * COLUMNS), row = BY_TOKENS ? index % rows : index / COLUMNS % rows;
        int column = BY_TOKENS ? index / rows % COLUMNS : index % COLUMNS, at = PLACE_OF(row, column);
        float value = 0.0f, other = 0.0f;
        if (tile == 0 && shared_tile) {
            value = given[at];
            if (EPILOGUE == 2) other = given[at + UPPER];
        }
        u32 span = spans[tile];
#if CLUSTER > 1
        const float *sum = parts + (tile + (int)(span & 0xffffu)) * PART + at;
        value = cluster_sum(sum);
        if (EPILOGUE == 2) other = cluster_sum(sum + UPPER);
#else
        for (int w = (int)(span & 0xffffu); w <= (int)(span >> 16); ++w) {
            if (is_idle(w, share.size)) continue;
            value += parts[(tile + w) * PART + at];
            if (EPILOGUE == 2) other += parts[(tile + w) * PART + at + UPPER];
        }
#endif
        value *= power_of_two(row < 8 ? ROW_POWER : UPPER_POWER);
        int out = (own + tile) * rows + row;
        u64 token = (u64)(column0 + column);
        if (column >= columns) continue;
        if (its.partial) {
            its.partial[((u64)SLAB * its.batch + token) * its.row_tiles * TILE_ROWS + out] = value;
        } else if (out < outputs) {
            if (EPILOGUE == 2) value = silu(value) * (other * power_of_two(UPPER_POWER));
            u64 to_write = token * its.width + (its.places ? its.places[out] : out);
#if RANKS > 1
            give_peers(round, (int)to_write, value); // all of them, before the first is waited for
#else
            if (EPILOGUE == 1) value += load_activation(its.residual[to_write]);
            its.y[to_write] = store_activation(value);
#endif
        }
    }
#if CLUSTER > 1
    sync_cluster(); // others still read this block's sums
#endif
#if RANKS > 1
    for (int index = (int)threadIdx.x; index < tiles * rows * COLUMNS; index += THREADS) {
        int row = BY_TOKENS ? index % rows : index / COLUMNS % rows, column = BY_TOKENS ? index / rows % COLUMNS : index % COLUMNS;
        int out = (own + index / (rows * COLUMNS)) * rows + row;
        if (column >= columns || out >= outputs) continue;
        u64 to_write = (u64)(column0 + column) * its.width + out;
        float rest = EPILOGUE == 1 ? load_activation(its.residual[to_write]) : 0.0f;
        its.y[to_write] = store_activation(sum_of_peers(round, (int)to_write) + rest);
    }
#endif
}
