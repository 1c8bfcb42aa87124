// y = x W^T from bit planes whose groups run along out_features: what the two products share. Rows that
// share their scales lie together, in *panels* of TILES tiles. A scale belongs to a column, so
// it is a factor of x: the file that includes this has defined
//   OPERAND_BYTES     shared memory of a warp for one unit of inputs and its scales,
//   BATCH_AHEAD       tokens whose inputs a lane holds before they are staged (0: none),
//   stage_item        x and scales of a panel's unit into that memory,
//   multiply_tile     one tile's product with them, added to sums in shared memory.
//
// Compile-time: PLANES 1..8, OFFSET (0: none; 1: an offset beside the scales; 2: the center of an affine
// weight), TILES (of a panel, 1 or more), SETS (1; 2: panels of gate and up alternate), WARPS, BLOCKS,
// STAGES (tiles of a warp in shared memory, 2 or more), COLUMNS (tokens of a block), EPILOGUE (0: y;
// 1: y + residual; 2: silu(gate) * up), ALIGNED, ACTIVATION_BF16.
//
// The stream is [panel][unit][set][tile]. Blocks and warps share it in equal parts as they do with
// groups along in_features (bit_planes.cuh), a panel in place of a tile. A warp stages by itself what it is
// about to multiply, and waits for no other; it uses that for up to TILES tiles.

#define THREADS (WARPS * WARP)
#define PARAMETERS (PLANES + (OFFSET != 0))
#define SET_PART (TILES * TILE_ROWS * COLUMNS)
#define PART (SETS * SET_PART)
#define STEPS (SETS * TILES) // of a unit
#define STAGE_BYTES (PLANES * PLANE_BYTES)

#include "bit_planes_share.cuh"

// One unit of a panel: what a warp stages for.
struct Item { int panel, unit, step; };

DEVICE Item item_at(int index, int units) {
    int count = units * STEPS;
    Item item;
    item.panel = divide(index, count);
    int rest = index - item.panel * count;
    item.unit = rest / STEPS;
    item.step = rest % STEPS;
    return item;
}

// What a lane reads for its eight inputs of a unit.
struct Ahead {
    quad scales[PARAMETERS];
    quad x[BATCH_AHEAD ? BATCH_AHEAD : 1];
};

// The offset of a column, from its parameters in float32.
DEVICE float column_offset(float last, float first) {
    return OFFSET == 0 ? 0.0f : OFFSET == 1 ? last : last * (first * per_center(PLANES));
}

DEVICE float half_at(const quad &v, int i) { return half_to_float(bits_at(v, i)); }

DEVICE void stage_item(const Ahead &ahead, const u16 *x, int first, int in_features, int columns, int lane,
                       unsigned char *operands);
DEVICE void multiply_tile(float *sums, const unsigned char *stage, const unsigned char *operands, int lane);

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
KERNEL(const quad *planes,  // [panels][units][SETS][TILES][PLANES][32]
       const quad *scales,  // [groups][units][SETS][PARAMETERS][32], of eight inputs each
       const u16 *x,        // [batch][in_features]
       const u16 *residual, // [batch][width], or null
       u16 *y,              // [batch][width]
       u64 *exchange,       // [blocks of columns][blocks][WARPS][PART], zeros
       int out_features,    // of a set
       int in_features, int batch, int panels, int units, int width,
       int group_rows, int panels_per_group) {
    DYNAMIC_SHARED(shared);
    int lane = (int)threadIdx.x % WARP, warp = (int)threadIdx.x / WARP, blocks = (int)gridDim.x;
    exchange += (u64)blockIdx.y * gridDim.x * WARPS * PART;
    int column0 = (int)blockIdx.y * COLUMNS, columns = batch - column0 < COLUMNS ? batch - column0 : COLUMNS;
    int count = units * STEPS, total = panels * count, each = divide(total, blocks);
    int more = total - each * blocks;
    Share share = share_of((int)blockIdx.x, each, more);
    int last = divide(share.begin + share.size, count) * count;
    if (last < share.begin + share.size) share.given = given_of(share, last);
    int begin = first_of_warp(warp, share.size), end = first_of_warp(warp + 1, share.size);

    unsigned char *ring = shared + warp * STAGES * STAGE_BYTES;
    unsigned char *operands = shared + WARPS * STAGES * STAGE_BYTES + warp * OPERAND_BYTES;
    float *given = (float *)(shared + WARPS * (STAGES * STAGE_BYTES + OPERAND_BYTES)); // [PART]
    float *parts = given + PART; // [own panels + WARPS][PART], then a number per own panel

    // Work `work` of this block is this of the stream.
    int jump = share.begin + share.size - share.given;
#define INDEX(work) ((work) < share.given ? jump + (work) : share.begin + (work) - share.given)
    // Weights are on their way before the inputs exist, and so are the first scales.
    for (int i = 0; i < STAGES - 1; ++i) {
        if (begin + i < end) {
            const quad *source = planes + (u64)INDEX(begin + i) * PLANES * WARP + lane;
#pragma unroll
            for (int plane = 0; plane < PLANES; ++plane)
                fetch(ring + i * STAGE_BYTES + plane * PLANE_BYTES + lane * 16, source + plane * WARP);
        }
        end_of_fetches();
    }
    Ahead ahead;
    Item item = item_at(INDEX(begin), units);
#define LOAD_SCALES                                                                                                \
    {                                                                                                              \
        const quad *source = scales + (((u64)divide(item.panel, panels_per_group) * units + item.unit) * SETS +    \
                                       item.step / TILES) * PARAMETERS * WARP + lane;                              \
        _Pragma("unroll") for (int i = 0; i < PARAMETERS; ++i) ahead.scales[i] = load_stream(source + i * WARP);   \
    }
#define LOAD_INPUTS                                                                                                \
    _Pragma("unroll") for (int i = 0; i < BATCH_AHEAD; ++i) {                                                      \
        ahead.x[i] = quad{0, 0, 0, 0};                                                                             \
        if (i < columns)                                                                                           \
            ahead.x[i] = load_inputs(x + (u64)(column0 + i) * in_features, item.unit * UNIT + lane * 8, in_features); \
    }
    if (begin < end) LOAD_SCALES

    int own = divide(share.begin, count), start = own * count, kept = share.size - share.given;
    int tiles = kept == 0 ? 0 : divide(share.begin + kept - 1, count) + 1 - own;
    u32 *spans = (u32 *)(parts + (tiles + WARPS) * PART);
    find_spans(spans, tiles, start, count, share);
    wait_for_previous();
    if (begin < end) LOAD_INPUTS

    int all_asked = end - STAGES + 1;
    if (begin >= all_asked) let_next_start();
    int stage = 0, free = STAGES - 1;
    bool fresh = true; // sums begin
    for (int work = begin; work < end;) {
        int stop = work + TILES - item.step % TILES, panel = item.panel, step = item.step;
        if (stop > end) stop = end;
        if (work < share.given && stop > share.given) stop = share.given;
        float *sums = parts + ((work < share.given ? 0 : panel - own) + warp) * PART;
        if (fresh)
            for (int i = lane; i < PART; i += WARP) sums[i] = 0.0f;
        sync_warp(); // all have multiplied by what is staged until now
        stage_item(ahead, x + (u64)column0 * in_features, item.unit * UNIT + lane * 8, in_features, columns,
                   lane, operands);
        bool ends = stop == end || stop == share.given || (item.unit + 1 == units && step + stop - work == STEPS);
        item = item_at(INDEX(stop), units);
        if (stop < end) {
            LOAD_SCALES
            LOAD_INPUTS
        }
        sums += step * TILE_ROWS * COLUMNS;
        for (; work < stop; ++work) {
            fetched<STAGES - 2>();
            sync_warp(); // all lanes have read what `free` held, and see what is staged
            if (work + STAGES - 1 < end) {
                const quad *source = planes + (u64)INDEX(work + STAGES - 1) * PLANES * WARP + lane;
#pragma unroll
                for (int plane = 0; plane < PLANES; ++plane)
                    fetch(ring + free * STAGE_BYTES + plane * PLANE_BYTES + lane * 16, source + plane * WARP);
            }
            end_of_fetches();
            if (work == all_asked) let_next_start();
            multiply_tile(sums, ring + stage * STAGE_BYTES, operands, lane);
            sums += TILE_ROWS * COLUMNS;
            free = stage;
            stage = stage + 1 == STAGES ? 0 : stage + 1;
        }
        fresh = ends;
        if (ends && work <= share.given) { // a later block's
            sync_warp();
            const float *from = parts + warp * PART;
            u64 *to = exchange + ((u64)blockIdx.x * WARPS + warp) * PART;
            for (int i = lane; i < PART; i += WARP) store_marked(to + i, from[i], 1);
            sync_warp();
        }
    }
    if (kept == 0) return;
    bool shared_panel = start < share.begin; // the first: others have had parts of it
    if (shared_panel) take_given(exchange, (int)blockIdx.x, each, more, start, given);
    __syncthreads();
    const int rows = TILES * TILE_ROWS;
    for (int index = (int)threadIdx.x; index < tiles * SET_PART; index += THREADS) {
        int tile = index / SET_PART, at = index % SET_PART, row = at / COLUMNS, column = at % COLUMNS;
        float value = 0.0f, other = 0.0f;
        if (tile == 0 && shared_panel) {
            value = given[at];
            if (SETS == 2) other = given[at + SET_PART];
        }
        u32 span = spans[tile];
        for (int w = (int)(span & 0xffffu); w <= (int)(span >> 16); ++w) {
            if (is_idle(w, share.size)) continue;
            value += parts[(tile + w) * PART + at];
            if (SETS == 2) other += parts[(tile + w) * PART + at + SET_PART];
        }
        int group = divide(own + tile, panels_per_group);
        int of_group = (own + tile - group * panels_per_group) * rows + row, out = group * group_rows + of_group;
        if (column >= columns || of_group >= group_rows || out >= out_features) continue; // padding
        if (EPILOGUE == 2) value = silu(value) * other;
        u64 to_write = (u64)(column0 + column) * width + out;
        if (EPILOGUE == 1) value += load_activation(residual[to_write]);
        y[to_write] = store_activation(value);
    }
}
