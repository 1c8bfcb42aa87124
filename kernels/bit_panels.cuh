// y = x W^T from bit planes whose groups run along out_features: what two products share. Rows that
// share their scales lie together, in *panels* of TILES tiles. A scale belongs to a column, so
// it is a factor of x: the file that includes this has included panel_inputs.cuh and defined
//   OPERAND_BYTES     shared memory of a warp for one unit of inputs and its scales,
//   stage_item        x and scales of a panel's unit into that memory,
//   multiply_tile     one tile's product with them, added to sums in shared memory.
//
// Compile-time: PLANES 1..8, OFFSET (0: none; 1: an offset beside the scales; 2: the center of an affine
// weight), TILES (of a panel, 1 or more), SETS (1; 2: panels of gate and up alternate), WARPS, BLOCKS,
// STAGES (tiles of a warp in shared memory, 2 or more), COLUMNS (tokens of a block), EPILOGUE (0: y;
// 1: y + residual; 2: silu(gate) * up), WHOLE (1: a block has whole tiles of all inputs and gives nothing;
// 0), CHUNK (of a panel, the most tiles that a block has: TILES if not WHOLE), NORM (1: x is normed before it
// is staged, where BATCH_AHEAD isn't 0; 0), ALIGNED, ACTIVATION_BF16.
//
// The stream is [panel][unit][set][tile]. Blocks and warps share it in equal parts as they do with
// groups along in_features (bit_planes.cuh), a panel in place of a tile. A warp stages by itself what it is
// about to multiply, and waits for no other; it uses that for up to TILES tiles. Where tiles come out even
// (WHOLE), a block has some that follow one another, which may be parts of panels: its *run* of each.

#define STEPS (SETS * TILES) // of a unit

// A block's panels, from the first one whose sums it writes; of WHOLE tiles, how many tiles of that one are
// a lower block's, and how many are its own in all.
struct Own { int panel, head, tiles; };

// Tiles of a panel that follow one another.
struct Run { int from, count; };

// A block's own of its panel `order`.
DEVICE Run run_of(const Own &own, int order) {
    Run run = {0, TILES};
    if (!WHOLE) return run;
    if (order == 0) run.from = own.head;
    int to = own.head + own.tiles - order * TILES;
    run.count = (to < TILES ? to : TILES) - run.from;
    return run;
}

// A set of a panel's unit: what a warp stages for. `tile` is the next one of the run.
struct Item {
    int panel, unit, set, tile;
    Run run;
};

// Where a block's work `work` is. Of what isn't WHOLE, the first is what it gives.
DEVICE Item item_at(int work, const Own &own, const Share &share, int units) {
    Item item;
    int count = units * STEPS, rest = work, order = 0;
    if (WHOLE) {
        int first = run_of(own, 0).count * SETS * units;
        if (work >= first) {
            order = divide(work - first, count);
            rest = work - first - order++ * count;
        }
        item.panel = own.panel + order;
    } else {
        int index = share.begin + work + (work < share.given ? share.size : 0) - share.given;
        item.panel = divide(index, count);
        rest = index - item.panel * count;
    }
    item.run = run_of(own, order);
    int of_unit = item.run.count * SETS;
    item.unit = WHOLE ? divide(rest, of_unit) : rest / STEPS;
    rest -= item.unit * of_unit;
    item.set = SETS == 2 && rest >= item.run.count;
    item.tile = rest - item.set * item.run.count;
    return item;
}

// Where a tile is in memory, and what follows it.
struct Place {
    const quad *planes;
    int order, row, tile; // row: unit and set
    Run run;
};

DEVICE Place place_of(const Item &item, const Own &own, const quad *planes, int units, int lane) {
    u64 row = (u64)item.unit * SETS + item.set, first = (u64)item.panel * units * SETS + row;
    const quad *source = planes + (first * TILES + item.run.from + item.tile) * PLANES * WARP + lane;
    return {source, item.panel - own.panel, (int)row, item.tile, item.run};
}

// The place of work `next`, which follows that of `place`.
DEVICE void advance(Place &place, int next, int lane, const Own &own, const Share &share, const quad *planes, int units) {
    place.planes += PLANES * WARP;
    if (!WHOLE) {
        if (next == share.given && next != 0) place.planes = planes + (u64)share.begin * PLANES * WARP + lane;
        return;
    }
    if (++place.tile < place.run.count) return;
    place.tile = 0;
    place.planes += (TILES - place.run.count) * PLANES * WARP;
    if (++place.row < units * SETS) return;
    place.row = 0;
    place.planes -= place.run.from * PLANES * WARP;
    place.run = run_of(own, ++place.order);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
KERNEL(const quad *planes,  // [panels][units][SETS][TILES][PLANES][32]
       const quad *scales,  // [groups][units][SETS][PARAMETERS][32], of eight inputs each
       const u16 *x,        // [batch][in_features]
       const u16 *residual, // [batch][width], or null
       u16 *y,              // [batch][width]
       const u16 *norm,     // [in_features], if NORM
       u64 *exchange,       // [blocks of columns][blocks][WARPS][PART], zeros
       int out_features,    // of a set
       int in_features, int batch, int panels, int units, int width,
       int group_rows, int panels_per_group, float eps) {
    DYNAMIC_SHARED(shared);
    int lane = (int)threadIdx.x % WARP, warp = (int)threadIdx.x / WARP, blocks = (int)gridDim.x;
    exchange += (u64)blockIdx.y * gridDim.x * WARPS * PART;
    int column0 = (int)blockIdx.y * COLUMNS, columns = batch - column0 < COLUMNS ? batch - column0 : COLUMNS;
    int count = units * STEPS, total = panels * (WHOLE ? TILES : count), each = divide(total, blocks);
    int more = total - each * blocks;
    Share share = share_of((int)blockIdx.x, each, more);
    Own own = {divide(share.begin, WHOLE ? TILES : count), 0, share.size};
    int start = own.panel * count; // where the first own panel begins: in the stream, or, of WHOLE tiles,
    if (WHOLE) {                   // among a block's work
        own.head = share.begin - own.panel * TILES;
        start = -own.head * SETS * units;
        share.begin = 0, share.size *= SETS * units;
    } else {
        int last = divide(share.begin + share.size, count) * count;
        if (last < share.begin + share.size) share.given = given_of(share, last);
    }
    int begin = first_of_warp(warp, share.size), end = first_of_warp(warp + 1, share.size);

    unsigned char *ring = shared + warp * STAGES * STAGE_BYTES;
    unsigned char *operands = shared + WARPS * STAGES * STAGE_BYTES + warp * OPERAND_BYTES;
    float *given = (float *)(shared + WARPS * (STAGES * STAGE_BYTES + OPERAND_BYTES)); // [PART]
    float *parts = given + PART; // [own panels + WARPS][PART], then a number per own panel

    // Weights are on their way before the inputs exist, and so are the first scales.
    Item item = item_at(begin, own, share, units);
    Place next = place_of(item, own, planes, units, lane);
    request_first(ring, next, 0, STAGES - 1, begin, end, lane, own, share, planes, units);
    Ahead ahead;
    if (begin < end)
        load_scales(ahead, scales, norm, divide(item.panel, panels_per_group), item.unit, item.set, units, in_features, lane);

    int kept = share.size - share.given;
    int tiles = kept == 0 ? 0 : divide(share.begin + kept - 1, count) + 1 - own.panel; // panels, in fact
    if (WHOLE) tiles = (own.head + own.tiles - 1) / TILES + 1;
    u32 *spans = (u32 *)(parts + (tiles + WARPS) * PART);
    find_spans(spans, tiles, start, count, share);
    wait_for_previous();
    if (begin < end) load_tokens(ahead, x + (u64)column0 * in_features, item.unit, in_features, columns, lane);
#if NORM
    float factors[COLUMNS];
    norm_factors(factors, x + (u64)column0 * in_features, in_features, units, columns, eps, lane,
                 (float *)(spans + tiles));
#endif

    int all_asked = end - STAGES + 1;
    if (begin >= all_asked) let_next_start();
    int stage = 0, free = STAGES - 1;
    bool fresh = true; // sums begin
    for (int work = begin; work < end;) {
        int stop = work + item.run.count - item.tile, panel = item.panel;
        if (stop > end) stop = end;
        if (!WHOLE && work < share.given && stop > share.given) stop = share.given;
        float *sums = parts + ((work < share.given ? 0 : panel - own.panel) + warp) * PART;
        if (fresh)
            for (int i = lane; i < PART; i += WARP) sums[i] = 0.0f;
        sync_warp(); // all have multiplied by what is staged until now
#if NORM
        norm_inputs(ahead, factors);
#endif
        stage_item(ahead, x + (u64)column0 * in_features, item.unit * UNIT + lane * 8, in_features, columns,
                   lane, operands);
        sums += (item.set * CHUNK + item.tile) * TILE_ROWS * COLUMNS;
        item = item_at(stop, own, share, units);
        bool ends = stop == end || stop == share.given || item.panel != panel;
        if (stop < end) {
            load_scales(ahead, scales, norm, divide(item.panel, panels_per_group), item.unit, item.set, units, in_features, lane);
            load_tokens(ahead, x + (u64)column0 * in_features, item.unit, in_features, columns, lane);
        }
        for (; work < stop; ++work) {
            request_next(ring, free, next, work, end, lane, own, share, planes, units);
            if (work == all_asked) let_next_start();
            multiply_tile(sums, ring + stage * STAGE_BYTES, operands, lane);
            sums += TILE_ROWS * COLUMNS;
            free = stage;
            stage = stage + 1 == STAGES ? 0 : stage + 1;
        }
        fresh = ends;
        if (!WHOLE && ends && work <= share.given) { // a later block's
            sync_warp();
            const float *from = parts + warp * PART;
            u64 *to = exchange + ((u64)blockIdx.x * WARPS + warp) * PART;
            for (int i = lane; i < PART; i += WARP) store_marked(to + i, from[i], 1);
            sync_warp();
        }
    }
    if (kept == 0) return;
    bool shared_panel = !WHOLE && start < share.begin; // the first: others have had parts of it
    if (shared_panel) take_given(exchange, (int)blockIdx.x, each, more, start, given);
    __syncthreads();
    const int rows = TILES * TILE_ROWS;
    for (int index = (int)threadIdx.x; index < tiles * SET_PART; index += THREADS) {
        int tile = index / SET_PART, at = index % SET_PART, row = at / COLUMNS, column = at % COLUMNS;
        Run run = run_of(own, tile);
        if (row >= run.count * TILE_ROWS) continue;
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
        int group = divide(own.panel + tile, panels_per_group), panel = own.panel + tile - group * panels_per_group;
        int of_group = panel * rows + run.from * TILE_ROWS + row, out = group * group_rows + of_group;
        if (column >= columns || of_group >= group_rows || out >= out_features) continue; // padding
        if (EPILOGUE == 2) value = silu(value) * other;
        u64 to_write = (u64)(column0 + column) * width + out;
        if (EPILOGUE == 1) value += load_activation(residual[to_write]);
        y[to_write] = store_activation(value);
    }
}
