// y = x W^T for groups along out_features, 1 or 2 tokens, where blocks have many whole tiles: a block stages all units of all
// its panels before it multiplies, each once, where warps of bit_panel_imma.cu stage what they are about to multiply. So a warp
// may go along a tile, whose sums stay in registers.
//
// Compile-time: as bit_panels.cuh; WHOLE and CHUNK count for nothing.
#define KERNEL bit_panel_tiles
#define PART (TILE_ROWS * COLUMNS) // of a tile and a set
#include "panel_limbs.cuh"

// Where a unit of a tile is: of the block's own tiles, in the panel `order` after its first.
struct Place {
    const quad *planes;
    int tile, set, order, unit;
};

DEVICE Place place_of(int work, int panel, int head, const quad *planes, int units, int lane) {
    Place place;
    int index = divide(work, units);
    place.unit = work - index * units, place.tile = index / SETS, place.set = index % SETS;
    int tile = head + place.tile;
    place.order = tile / TILES;
    u64 row = ((u64)(panel + place.order) * units + place.unit) * SETS + place.set;
    place.planes = planes + (row * TILES + tile % TILES) * PLANES * WARP + lane;
    return place;
}

// The place of work `next`, which follows.
DEVICE void advance(Place &place, int next, int lane, int panel, int head, const quad *planes, int units) {
    if (++place.unit < units) place.planes += SETS * TILES * PLANES * WARP;
    else place = place_of(next, panel, head, planes, units, lane);
}

// What a warp has of a tile, limbs put together where t is even.
DEVICE void put_part(float *part, const float (&sums)[2], float rest, int lane) {
    int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float value = sums[half] + 65536.0f * shuffle_xor(sums[half], 1);
        if (t % 2 == 0 && t / 2 < COLUMNS) part[(g + 8 * half) * COLUMNS + t / 2] = value * (half ? 0.5f : 1.0f) + rest;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
KERNEL(const quad *planes,  // [panels][units][SETS][TILES][PLANES][32]
       const quad *scales,  // [groups][units][SETS][PARAMETERS][32], of eight inputs each
       const u16 *x,        // [batch][in_features]
       const u16 *residual, // [batch][width], or null
       u16 *y,              // [batch][width]
       const u16 *norm,     // [in_features], if NORM
       int out_features,    // of a set
       int in_features, int batch, int panels, int units, int width,
       int group_rows, int panels_per_group, float eps) {
    DYNAMIC_SHARED(shared);
    int lane = (int)threadIdx.x % WARP, warp = (int)threadIdx.x / WARP, blocks = (int)gridDim.x;
    int total = panels * TILES, each = divide(total, blocks);
    Share share = share_of((int)blockIdx.x, each, total - each * blocks);
    int panel = divide(share.begin, TILES), head = share.begin - panel * TILES, tiles = share.size;
    int items = ((head + tiles - 1) / TILES + 1) * units * SETS;
    share.begin = 0, share.size *= SETS * units;
    int begin = first_of_warp(warp, share.size), end = first_of_warp(warp + 1, share.size);

    unsigned char *ring = shared + warp * STAGES * STAGE_BYTES;
    unsigned char *operands = shared + WARPS * STAGES * STAGE_BYTES; // [items]: [panels][units][SETS]
    float *parts = (float *)(operands + items * OPERAND_BYTES);      // [SETS * tiles + WARPS][PART]
    u32 *spans = (u32 *)(parts + (SETS * tiles + WARPS) * PART);     // [SETS * tiles]

    // Weights are on their way before the inputs exist, and so are the first scales.
    Place next = place_of(begin, panel, head, planes, units, lane), place = next;
    request_first(ring, next, 0, STAGES - 1, begin, end, lane, panel, head, planes, units);
    Ahead ahead;
    int row = divide(warp, SETS), unit = row % units, group = divide(panel + row / units, panels_per_group);
    if (warp < items) load_scales(ahead, scales, norm, group, unit, warp % SETS, units, in_features, lane);
    find_spans(spans, SETS * tiles, 0, units, share);
    wait_for_previous();
    if (warp < items) load_tokens(ahead, x, unit, in_features, batch, lane);
#if NORM
    float factors[COLUMNS];
    norm_factors(factors, x, in_features, units, batch, eps, lane, (float *)(spans + SETS * tiles));
#endif
    for (int item = warp; item < items; item += WARPS) {
#if NORM
        norm_inputs(ahead, factors);
#endif
        Ahead now = ahead;
        int following = item + WARPS;
        if (following < items) {
            row = following / SETS;
            int order = divide(row, units);
            unit = row - order * units, group = divide(panel + order, panels_per_group);
            load_scales(ahead, scales, norm, group, unit, following % SETS, units, in_features, lane);
            load_tokens(ahead, x, unit, in_features, batch, lane);
        }
        stage_item(now, x, 0, in_features, batch, lane, operands + item * OPERAND_BYTES);
    }
    __syncthreads();

    int all_asked = end - STAGES + 1;
    if (begin >= all_asked) let_next_start();
    int stage = 0, free = STAGES - 1;
    float sums[2] = {0.0f, 0.0f}, rest = 0.0f;
    for (int work = begin; work < end; ++work) {
        request_next(ring, free, next, work, end, lane, panel, head, planes, units);
        if (work == all_asked) let_next_start();
        const unsigned char *staged = operands + ((place.order * units + place.unit) * SETS + place.set) * OPERAND_BYTES;
        int c[4];
        multiply_planes(c, ring + stage * STAGE_BYTES, staged, lane);
        const float *numbers = numbers_of(staged, lane);
        float factor = numbers[0];
        sums[0] += ((float)c[1] * 256.0f + (float)c[0]) * factor;
        sums[1] += ((float)c[3] * 256.0f + (float)c[2]) * factor;
        rest += numbers[1];
        free = stage;
        stage = stage + 1 == STAGES ? 0 : stage + 1;
        if (++place.unit == units || work + 1 == end) {
            put_part(parts + (place.tile * SETS + place.set + warp) * PART, sums, rest, lane);
            sums[0] = sums[1] = rest = 0.0f;
            if (work + 1 < end) place = place_of(work + 1, panel, head, planes, units, lane);
        }
    }
    __syncthreads();
    for (int index = (int)threadIdx.x; index < tiles * PART; index += THREADS) {
        int tile = index / PART, at = index % PART, column = at % COLUMNS;
        float value[SETS] = {};
#pragma unroll
        for (int set = 0; set < SETS; ++set) {
            int part = tile * SETS + set;
            u32 span = spans[part];
            for (int w = (int)(span & 0xffffu); w <= (int)(span >> 16); ++w)
                if (!is_idle(w, share.size)) value[set] += parts[(part + w) * PART + at];
        }
        int order = (head + tile) / TILES, of_panel = ((head + tile) % TILES) * TILE_ROWS + at / COLUMNS;
        int of = divide(panel + order, panels_per_group);
        int of_group = (panel + order - of * panels_per_group) * TILES * TILE_ROWS + of_panel, out = of * group_rows + of_group;
        if (column >= batch || of_group >= group_rows || out >= out_features) continue; // padding
        float result = EPILOGUE == 2 ? silu(value[0]) * value[SETS - 1] : value[0];
        u64 to_write = (u64)column * width + out;
        if (EPILOGUE == 1) result += load_activation(residual[to_write]);
        y[to_write] = store_activation(result);
    }
}
