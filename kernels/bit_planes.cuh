// What the bit-plane kernels share: how a card's blocks and warps divide a weight among them, and how
// it travels to them. What a block does with it is in bit_planes_multiply.cuh, the product in the files
// that include both.
//
// Compile-time: PLANES 1..8, GROUP (inputs per group, a multiple of 32), OFFSET (0: none; 1: an offset
// beside the scales; 2: the center of an affine weight, see per_center), WARPS, BLOCKS
// (that share a multiprocessor), STAGES (units of a warp in shared memory, 2 or more), COLUMNS (tokens
// of a block), EPILOGUE (0: y; 1: y + residual; 2: silu(gate) * up, rows of a tile are 8 of gate, 8 of
// up), ALIGNED (1: in_features is a multiple of 8), WHOLE (1: a block has whole tiles of a slab and gives
// nothing; 0), NORM (units of x that a warp norms before it stages them, all of them; 0: x is as it is
// multiplied), LOADS (of eight inputs each, that a lane has under way before it stages the first: 1 to
// 4), EARLY (units of weights that a warp asks for before there are inputs, STAGES - 1 unless defined; the rest of its stages it asks
// for as soon as the inputs have been asked for, which memory gives it sooner then), ACTIVATION_BF16.
//
// The units of a slab of inputs, row tile by row tile, are one stream that is cut into equal shares,
// one per block, and these into equal shares, one per warp: no rounding to tiles, no idle warp. What
// a warp has of a tile when the tile or its share ends is a *part*. Parts of a block's own tiles meet
// in shared memory. The tile that a block begins and doesn't end belongs to a later block: it is
// taken *first*, so that its sum has reached global memory (a float and a mark in one word: no fence,
// no counter) long before the owner asks for it. A block waits for lower ones only, and those are
// begun no later: no deadlock. All sums have a fixed order. Where tiles come out even (WHOLE), shares end
// with them: few units per warp hide no exchange.

#include "bit_plane_groups.cuh"
#include "bit_plane_nibbles.cuh"

#ifndef EARLY
#define EARLY (STAGES - 1)
#endif
#define LATE (EARLY < STAGES - 1)
#define THREADS (WARPS * WARP)
#define PART (TILE_ROWS * COLUMNS)
#ifndef SCALES_AT // of a stage: a product may want room after its planes
#define SCALES_AT (PLANES * PLANE_BYTES)
#endif
#define STAGE_BYTES (SCALES_AT + SPAN * 32 * PARAMETERS)

// Where a sum is in its part. BY_TOKENS, of the product: neighbours are of one token, so they write neighbouring outputs; else of
// one row, which takes registers that some products of few tokens lack.
#define PLACE_OF(row, column) (BY_TOKENS ? (column) * TILE_ROWS + (row) : (row) * COLUMNS + (column))

#include "bit_planes_share.cuh"

// A unit of the stream, and where it is in memory.
struct Place {
    int tile, unit;
    const quad *planes;
    const u32 *scales; // of the tile
};

struct Weight {
    const quad *planes; // [row_tiles][units][PLANES][32]
    const u32 *scales;  // [row_tiles][groups][8][PARAMETERS], rows g and g + 8
    int units, groups;  // of a row; whole units of groups
    int first, count;   // units of this slab
};

DEVICE Place place_at(const Weight &weight, int index, int lane) {
    Place place;
    place.tile = divide(index, weight.count);
    place.unit = index - place.tile * weight.count;
    place.planes = weight.planes +
        ((u64)place.tile * weight.units + weight.first + place.unit) * PLANES * WARP + lane;
    place.scales = weight.scales + (u64)place.tile * weight.groups * 8 * PARAMETERS;
    return place;
}

// The place of work `next`, which follows that of `place`.
DEVICE void advance(Place &place, int next, int lane, const Share &share, const Weight &weight) {
    if (next == share.given && next != 0) {
        place = place_at(weight, share.begin, lane);
        return;
    }
    place.planes += PLANES * WARP;
    if (++place.unit < weight.count) return;
    place.unit = 0;
    ++place.tile;
    place.planes += (u64)(weight.units - weight.count) * PLANES * WARP;
    place.scales += (u64)weight.groups * 8 * PARAMETERS;
}

// Ask for a unit's planes and scales. Lanes read back the words that they asked for themselves.
DEVICE void request(unsigned char *stage, const Place &place, int lane, const Share &, const Weight &weight) {
#pragma unroll
    for (int plane = 0; plane < PLANES; ++plane)
        fetch(stage + plane * PLANE_BYTES + lane * 16, place.planes + plane * WARP);
    int group = (weight.first + place.unit) * UNIT / GROUP;
    const quad *source = (const quad *)(place.scales + group * 8 * PARAMETERS);
    int pieces = SPAN * 2 * PARAMETERS;
    if (!REGULAR && weight.groups - group < SPAN) pieces = (weight.groups - group) * 2 * PARAMETERS;
#pragma unroll
    for (int piece = 0; piece < SPAN * 2 * PARAMETERS; piece += WARP)
        if (piece + lane < pieces)
            fetch(stage + SCALES_AT + (piece + lane) * 16, source + piece + lane);
}

// What staging wants to know of a lane, the same for all units: reckoned before there are inputs.
#ifndef OWN_STAGING
typedef int Offsets; // the lane: asked for where it is wanted, or the machine code is another
DEVICE Offsets offsets_of(int, const Weight &, int lane) { return lane; }
DEVICE Offsets offsets_here(Offsets, int lane) { return lane; }
DEVICE quad load_of_lane(const u16 *row, int unit, Offsets lane, int in_features) {
    return load_inputs(row, unit * UNIT + lane * 8, in_features);
}
#endif

// Stage one unit of one column, of which each lane has eight inputs: operands, the sums over segments
// and the factor that undoes the scaling.
DEVICE void stage_unit(quad v, int unit, int column, int units, const Weight &weight, Offsets lane,
                       unsigned char *operands, float *starts, float *factors);

#ifndef OWN_STAGING
// Stage all inputs of the slab. Every unit has its own scale, so that no warp waits for another until
// all are done; or until all have asked for their first inputs, LATE, when `ask_late` is called.
template <class Late>
DEVICE void stage_inputs(const u16 *x, int in_features, const Weight &weight, int columns, int units,
                         unsigned char *operands, float *starts, float *factors, Offsets,
                         const Late &ask_late) {
    int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP;
    for (int work = warp; work < weight.count * COLUMNS || (LATE && work == warp); work += LOADS * WARPS) {
        quad v[LOADS]; // all on their way before the first is looked at
#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
            int unit = (work + i * WARPS) / COLUMNS, column = (work + i * WARPS) % COLUMNS;
            v[i] = quad{0, 0, 0, 0};
            if (unit < weight.count && column < columns)
                v[i] = load_inputs(x + (u64)column * in_features,
                                   (weight.first + unit) * UNIT + lane * 8, in_features);
        }
        if (LATE && work == warp) ask_late();
#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
            int unit = (work + i * WARPS) / COLUMNS, column = (work + i * WARPS) % COLUMNS;
            if (unit >= weight.count || column >= columns) continue; // nobody reads other columns' sums
            stage_unit(v[i], unit, column, units, weight, lane, operands, starts, factors);
        }
    }
    __syncthreads();
}

#endif

// The sum over a segment, the part of a group inside a unit, of what its blocks of 32 inputs have in
// `sum`; for the first block of each segment.
template <class Number> DEVICE Number segment_sum(Number sum, int unit, int lane) {
    Number total = sum;
    if (REGULAR) {
#pragma unroll
        for (int lanes = 4; lanes < (GROUP < UNIT ? GROUP : UNIT) / 8; lanes *= 2)
            total += shuffle_xor(total, lanes);
        return total;
    }
    int group = (unit * BLOCKS_PER_UNIT + lane / 4) * 32 / GROUP;
#pragma unroll
    for (int ahead = 1; ahead < BLOCKS_PER_UNIT; ++ahead) {
        Number other = shuffle_down(sum, 4 * ahead);
        int block = lane / 4 + ahead;
        if (block < BLOCKS_PER_UNIT && (unit * BLOCKS_PER_UNIT + block) * 32 / GROUP == group)
            total += other;
    }
    return total;
}

// Sums of integers over either half of a warp's lanes. A whole warp's takes one instruction.
DEVICE u32 half_warp_sum(u32 sum, int lane) {
    bool lower = lane < WARP / 2;
    u32 of_lower = warp_sum(lower ? sum : 0), of_all = warp_sum(sum);
    return lower ? of_lower : of_all - of_lower;
}

// As `segment_sum`, of integers that every lane has.
DEVICE u32 segment_total(u32 sum, int unit, int lane) {
    if (GROUP % UNIT == 0) return warp_sum(sum);
    if (GROUP * 2 == UNIT) return half_warp_sum(sum, lane);
    sum += shuffle_xor(sum, 1);
    sum += shuffle_xor(sum, 2);
    return segment_sum(sum, unit, lane);
}
