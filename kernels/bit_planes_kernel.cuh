// The kernel of the bit planes. The file that includes this has defined
//   KERNEL            its name,
//   ACCUMULATORS      floats per lane,
//   ROW_POWER         what rows 0..7 of a tile are to be multiplied by, as a power of two; the rest by
//                     half of it,
//   X_BYTES           shared memory for 32 inputs of a token,
//   stage_unit        x into shared memory,
//   multiply_unit     one unit's product, added to the accumulators,
//   put_part          the accumulators to `put`, once per row and column.
//
// Grid (blocks, slabs of in_features, blocks of columns).

// What lower blocks have given of this block's first tile, which begins at unit `from` of the stream:
// each warp takes what its namesakes gave.
DEVICE void take_given(u64 *exchange, int each, int more, int from, float *given) {
    int lane = (int)threadIdx.x % WARP, warp = (int)threadIdx.x / WARP;
    int block = (int)blockIdx.x - 1;
    while (share_of(block, each, more).begin > from) --block;
    float sums[(PART + WARP - 1) / WARP] = {};
    for (; block < (int)blockIdx.x; ++block) {
        Share share = share_of(block, each, more);
        int work = first_of_warp(warp, share.size);
        if (work >= given_of(share, from) || work == first_of_warp(warp + 1, share.size)) continue;
        u64 *place = exchange + ((u64)block * WARPS + warp) * PART;
#pragma unroll
        for (int i = 0; i < (PART + WARP - 1) / WARP; ++i) {
            int index = i * WARP + lane;
            if (index >= PART) break;
            float value;
            while (load_marked(place + index, &value) == 0) {}
            store_marked(place + index, 0.0f, 0); // as the next launch wants to find it
            sums[i] += value;
        }
    }
#pragma unroll
    for (int i = 0; i < (PART + WARP - 1) / WARP; ++i)
        if (i * WARP + lane < PART) given[warp * PART + i * WARP + lane] = sums[i];
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
KERNEL(const quad *planes,   // [row_tiles][units][PLANES][32]
       const u32 *scales,    // [row_tiles][groups][8][PARAMETERS], rows g and g + 8
       const u16 *x,         // [batch][in_features]
       const u16 *residual,  // [batch][out_features], or null
       u16 *y,               // [batch][out_features]; EPILOGUE 2: of half as many
       float *partial,       // [slabs][batch][row_tiles * 16]; null: one slab, write y
       u64 *exchange,        // [blocks of columns][slabs][blocks][WARPS][16][COLUMNS], zeros
       int out_features, int in_features, int batch, int row_tiles, int units, int groups,
       int units_per_slab) {
    DYNAMIC_SHARED(shared);
    int lane = (int)threadIdx.x % WARP, warp = (int)threadIdx.x / WARP;
    Weight weight = {planes, scales, units, groups, (int)blockIdx.y * units_per_slab, units_per_slab};
    if (units - weight.first < weight.count) weight.count = units - weight.first;
    int column0 = (int)blockIdx.z * COLUMNS;
    int columns = batch - column0 < COLUMNS ? batch - column0 : COLUMNS;
    int total = row_tiles * weight.count, each = divide(total, (int)gridDim.x);
    int more = total - each * (int)gridDim.x;
    Share share = share_of((int)blockIdx.x, each, more);
    int own = divide(share.begin, weight.count); // the first of this block's own tiles
    int last = divide(share.begin + share.size, weight.count) * weight.count;
    if (last < share.begin + share.size) share.given = given_of(share, last);
    int begin = first_of_warp(warp, share.size), end = first_of_warp(warp + 1, share.size);

    unsigned char *ring = shared + warp * STAGES * STAGE_BYTES;
    unsigned char *operands = shared + WARPS * STAGES * STAGE_BYTES;
    float *starts = (float *)(operands + units_per_slab * BLOCKS_PER_UNIT * COLUMNS * X_BYTES);
    float *factors = starts + units_per_slab * BLOCKS_PER_UNIT * COLUMNS; // [unit][COLUMNS]
    float *given = factors + units_per_slab * COLUMNS; // [WARPS][16][COLUMNS]
    float *parts = given + WARPS * PART;               // [own tiles + WARPS][16][COLUMNS]

    // Weights are on their way before the inputs exist.
    let_next_start();
    Place ahead = place_at(weight, begin < share.given ? share.begin + share.size - share.given + begin
                                                       : share.begin + begin - share.given, lane);
    int unit = ahead.unit, tile = ahead.tile;
    for (int i = 0; i < STAGES - 1; ++i) {
        if (begin + i < end) {
            request(ring + i * STAGE_BYTES, ahead, weight, lane);
            advance(ahead, begin + i + 1, share, weight, lane);
        }
        end_of_fetches();
    }
    // So is, before there is anything to sum, who will have had a part of which tile.
    int kept = share.size - share.given, start = own * weight.count;
    int tiles = kept == 0 ? 0 : divide(share.begin + kept - 1, weight.count) + 1 - own;
    u32 *spans = (u32 *)(parts + (tiles + WARPS) * PART); // [own tiles], first and last warp
    for (int i = (int)threadIdx.x; i < tiles; i += THREADS) {
        int from = start + i * weight.count - share.begin, to = from + weight.count;
        int low = warp_of(share.given + (from < 0 ? 0 : from), share.size);
        spans[i] = (u32)(low | warp_of(share.given + to - 1, share.size) << 16);
    }
    wait_for_previous();
    stage_inputs(x + (u64)column0 * in_features, in_features, weight, columns, units_per_slab,
                 operands, starts, factors);

    exchange += ((u64)blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x * WARPS * PART;
    float acc[ACCUMULATORS] = {};
    int stage = 0, free = STAGES - 1;
    for (int work = begin; work < end; ++work) {
        fetched<STAGES - 2>();
        sync_warp(); // all lanes have read what `free` held, and see all scales
        if (work + STAGES - 1 < end) {
            request(ring + free * STAGE_BYTES, ahead, weight, lane);
            advance(ahead, work + STAGES, share, weight, lane);
        }
        end_of_fetches();
        multiply_unit(acc, ring + stage * STAGE_BYTES, operands, starts, factors, units_per_slab, unit,
                      weight, lane);
        free = stage;
        stage = stage + 1 == STAGES ? 0 : stage + 1;
        bool last_given = work + 1 == share.given;
        if (++unit == weight.count || last_given || work + 1 == end) {
            if (work < share.given)
                put_part(acc, (float *)0, exchange + ((u64)blockIdx.x * WARPS + warp) * PART, lane);
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
    if (kept == 0) return;
    if (start < share.begin) take_given(exchange, each, more, start, given);
    __syncthreads();
    const int rows = EPILOGUE == 2 ? TILE_ROWS / 2 : TILE_ROWS;
    for (int index = (int)threadIdx.x; index < tiles * rows * COLUMNS; index += THREADS) {
        int tile = index / (rows * COLUMNS), row = index / COLUMNS % rows, column = index % COLUMNS;
        int at = row * COLUMNS + column;
        float value = 0.0f, other = 0.0f;
        if (tile == 0 && start < share.begin)
#pragma unroll
            for (int w = 0; w < WARPS; ++w) {
                value += given[w * PART + at];
                if (EPILOGUE == 2) other += given[w * PART + at + 8 * COLUMNS];
            }
        u32 span = spans[tile];
        for (int w = (int)(span & 0xffffu); w <= (int)(span >> 16); ++w) {
            if (first_of_warp(w, share.size) == first_of_warp(w + 1, share.size)) continue;
            value += parts[(tile + w) * PART + at];
            if (EPILOGUE == 2) other += parts[(tile + w) * PART + at + 8 * COLUMNS];
        }
        value *= power_of_two(row < 8 ? ROW_POWER : ROW_POWER - 1);
        int out = (own + tile) * rows + row;
        u64 token = (u64)(column0 + column);
        if (column >= columns) continue;
        if (partial) {
            partial[((u64)blockIdx.y * batch + token) * row_tiles * TILE_ROWS + out] = value;
            continue;
        }
        if (EPILOGUE == 2) value = silu(value) * (other * power_of_two(ROW_POWER - 1));
        int outputs = EPILOGUE == 2 ? out_features / 2 : out_features;
        if (out >= outputs) continue;
        u64 to_write = token * outputs + out;
        if (EPILOGUE == 1) value += load_activation(residual[to_write]);
        y[to_write] = store_activation(value);
    }
}
