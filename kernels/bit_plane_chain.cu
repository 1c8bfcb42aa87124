// Products that follow one another, y_1 = f(x W_1^T), y_2 = f(y_1 W_2^T) and so on, of one token, in one
// launch: what comes between two attentions of a decoding step. A launch per product begins and ends in
// 3 us, in which no weight is read; here the planes of the products to come are asked for all the time,
// as far as shared memory holds them, and the next product begins when its inputs are there.
//
// Blocks have whole tiles of each product. What a block has made it stores as *words*: two outputs and
// the mark of this launch, 64 bits that are stored and read as a whole. Who reads them waits for the
// mark, so nothing else orders blocks: no counter, no fence. Marks are counted up by each block for
// itself, from launch to launch: all launches that share `words` have the same grid, one block per
// multiprocessor, and no two run at once. All blocks have to be on the card together.
//
// Compile-time: as bit_planes.cuh with COLUMNS 1, BLOCKS 1 and LOADS units of x per warp, all of them;
// LINKS (2 to 4); HELD (stages that are asked for only when the inputs of a product are there: what is
// under way stands in their way); MOST_TILES (of a block and product).
#include "bit_plane_imma.cuh"
#include "bit_planes_norm.cuh"

#define LINKS_BYTES ((LINKS * sizeof(Link) + 15) / 16 * 16)

// One product.
struct Link {
    const quad *planes; // [row_tiles][units][PLANES][32]
    const u32 *scales;  // [row_tiles][groups][8][PARAMETERS], rows g and g + 8
    const u16 *norm;    // [inputs], gains of x's RMS norm; null: x is as it is multiplied
    u16 *y;             // [outputs]; null: only the next link wants it
    int row_tiles, units, groups, outputs;
    int gated;    // 1: y is silu(gate) * up, rows of a tile are 8 of gate, 8 of up
    int residual; // which is added to y: 0: none; 1: the kernel's; 2 + i: what link i has made
    int tile, tiles, size; // of this block: the first tile, how many, units of all
};

// Where outputs 2 i and 2 i + 1 are as a word: a warp reads a unit in whole sectors.
DEVICE int word_of(int output) { return output / UNIT * 128 + output % 8 / 2 * WARP + output % UNIT / 8; }

DEVICE void set_link(Link &its, const quad *planes, const u32 *scales, const u16 *norm, u16 *y,
                     int row_tiles, int units, int groups, int outputs, int gated, int residual) {
    its.planes = planes, its.scales = scales, its.norm = norm, its.y = y;
    its.row_tiles = row_tiles, its.units = units, its.groups = groups, its.outputs = outputs;
    its.gated = gated, its.residual = residual;
    int blocks = (int)gridDim.x, each = divide(row_tiles, blocks);
    Share share = share_of((int)blockIdx.x, each, row_tiles - each * blocks);
    its.tile = share.begin, its.tiles = share.size, its.size = share.size * units;
}

// The next unit that a warp asks for, of whichever product.
struct Cursor {
    int link, work, end; // of this warp's work in it
    Place place;
    Weight weight;
};

DEVICE void to_next_link(Cursor &next, const Link *links, int warp, int lane) {
    while (++next.link < LINKS) {
        const Link &its = links[next.link];
        next.work = first_of_warp(warp, its.size), next.end = first_of_warp(warp + 1, its.size);
        if (next.work == next.end) continue;
        next.weight = {its.planes, its.scales, its.units, its.groups, 0, its.units};
        next.place = place_at(next.weight, its.tile * its.units + next.work, lane);
        return;
    }
}

DEVICE void ask(Cursor &next, unsigned char *stage, const Link *links, int warp, int lane) {
    request(stage, next.place, next.weight, lane);
    end_of_fetches();
    if (++next.work == next.end) return to_next_link(next, links, warp, lane);
    next.place.planes += PLANES * WARP;
    if (++next.place.unit < next.weight.count) return;
    next.place.unit = 0;
    next.place.scales += (u64)next.weight.groups * 8 * PARAMETERS;
}

// Wait for the oldest of so many requests.
template <int MOST> DEVICE void wait_for_oldest(int asked) {
    if (MOST == 0 || asked > MOST) fetched<MOST>();
    else wait_for_oldest<(MOST > 0 ? MOST - 1 : 0)>(asked);
}

// Eight inputs of a lane, and their marks.
struct Words { float pairs[4]; u32 marks[4]; };

DEVICE void load_words_of(Words &its, const u64 *words, int lane) {
#pragma unroll
    for (int i = 0; i < 4; ++i) its.marks[i] = load_marked(words + i * WARP + lane, &its.pairs[i]);
}

// The inputs, when they are there.
DEVICE quad await_words(Words &its, const u64 *words, u32 mark, int lane) {
    while (its.marks[0] != mark || its.marks[1] != mark || its.marks[2] != mark || its.marks[3] != mark) {
        let_others_run();
        load_words_of(its, words, lane);
    }
    return quad{bits_of_float(its.pairs[0]), bits_of_float(its.pairs[1]), bits_of_float(its.pairs[2]),
                bits_of_float(its.pairs[3])};
}

// Stage x, which is in `inputs`, or in `words` when it is there; normed as rms_norm.cu does, if it is to
// be. Every thread returns when all is staged.
DEVICE void stage_link(const Link &its, const u16 *inputs, const u64 *words, u32 mark, int in_features,
                       float eps, unsigned char *operands, float *starts, float *factors, float *sums) {
    int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP;
    Weight weight = {its.planes, its.scales, its.units, its.groups, 0, its.units};
    quad v[LOADS], gains[LOADS];
#pragma unroll
    for (int i = 0; i < LOADS; ++i) { // a weight, so it may be read early
        int k = (warp + i * WARPS) * UNIT + lane * 8;
        gains[i] = its.norm && k < in_features ? *(const quad *)(its.norm + k) : quad{0, 0, 0, 0};
    }
    Words found[LOADS]; // all on their way before the first is looked at
#pragma unroll
    for (int i = 0; i < LOADS; ++i) {
        int unit = warp + i * WARPS, k = unit * UNIT + lane * 8;
        v[i] = quad{0, 0, 0, 0};
        if (k >= in_features) continue;
        if (inputs) v[i] = *(const quad *)(inputs + k);
        else load_words_of(found[i], words + unit * 128, lane);
    }
#pragma unroll
    for (int i = 0; i < LOADS; ++i) {
        int unit = warp + i * WARPS;
        if (!inputs && unit * UNIT + lane * 8 < in_features)
            v[i] = await_words(found[i], words + unit * 128, mark, lane);
    }
    if (its.norm) {
        float square = 0.0f;
#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
            u32 pairs[4] = {v[i].x, v[i].y, v[i].z, v[i].w};
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                float low = load_activation((u16)(pairs[r] & 0xffffu));
                float high = load_activation((u16)(pairs[r] >> 16));
                square += low * low + high * high;
            }
        }
#pragma unroll
        for (int lanes = 16; lanes > 0; lanes /= 2) square += shuffle_xor(square, lanes);
        if (lane == 0) sums[warp] = square;
        __syncthreads();
        float total = 0.0f;
#pragma unroll
        for (int of = 0; of < WARPS; ++of) total += sums[of];
        float inverse = inverse_root(total / (float)in_features + eps);
#pragma unroll
        for (int i = 0; i < LOADS; ++i)
            v[i] = quad{normed(v[i].x, inverse, gains[i].x), normed(v[i].y, inverse, gains[i].y),
                        normed(v[i].z, inverse, gains[i].z), normed(v[i].w, inverse, gains[i].w)};
    }
#pragma unroll
    for (int i = 0; i < LOADS; ++i)
        if (warp + i * WARPS < its.units)
            stage_unit(v[i], warp + i * WARPS, 0, its.units, weight, lane, operands, starts, factors);
    __syncthreads();
}

// What is added to an output of a link.
DEVICE float residual_of(const Link &its, int output, const u16 *residual, const u64 *words, int stride) {
    if (its.residual == 0 || output >= its.outputs) return 0.0f;
    if (its.residual == 1) return load_activation(residual[output]);
    float pair; // all blocks have read it before, as inputs
    load_marked(words + (its.residual - 2) * stride + word_of(output), &pair);
    u32 bits = bits_of_float(pair);
    return load_activation((u16)(output & 1 ? bits >> 16 : bits & 0xffffu));
}

// Sum up what warps have of this block's tiles, and store it: plainly, as words, or both.
DEVICE void write_link(const Link &its, const float *parts, const u32 *spans, float added,
                       const u16 *residual, const u64 *words, int stride, u64 *made, u32 mark) {
    int lane = (int)threadIdx.x % WARP, shift = its.gated ? 3 : 4, rows = 1 << shift;
    int count = its.tiles * rows;
    for (int index = (int)threadIdx.x; index - lane < count; index += THREADS) {
        int tile = index >> shift, row = index & (rows - 1), output = (its.tile + tile) * rows + row;
        float value = 0.0f, other = 0.0f;
        if (index < count) {
            u32 span = spans[tile];
            const float *part = parts + (tile + (int)(span & 0xffffu)) * PART + row;
            for (int w = (int)(span & 0xffffu); w <= (int)(span >> 16); ++w, part += PART) {
                if (is_idle(w, its.size)) continue;
                value += part[0];
                if (its.gated) other += part[8];
            }
        }
        value *= power_of_two(row < 8 ? ROW_POWER : ROW_POWER - 1);
        if (its.gated) value = silu(value) * (other * power_of_two(ROW_POWER - 1));
        value += index < THREADS ? added : residual_of(its, output, residual, words, stride);
        u32 bits = store_activation(value), next = shuffle_down(bits, 1);
        if (index >= count || output >= its.outputs) continue;
        if (made && lane % 2 == 0)
            store_marked(made + word_of(output), float_of_bits(bits | next << 16), mark);
        if (its.y) its.y[output] = (u16)bits;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
bit_plane_chain(const u16 *x,        // [inputs of the first link]
                const u16 *residual, // [outputs], what links add that ask for it; or null
                // of each link, see Link:
                const quad *planes_0, const u32 *scales_0, const u16 *norm_0, u16 *y_0,
                const quad *planes_1, const u32 *scales_1, const u16 *norm_1, u16 *y_1,
                const quad *planes_2, const u32 *scales_2, const u16 *norm_2, u16 *y_2,
                const quad *planes_3, const u32 *scales_3, const u16 *norm_3, u16 *y_3,
                u64 *words, // [blocks rounded up to 32], marks; [LINKS - 1][stride]
                int inputs, int stride, float eps,
                int tiles_0, int units_0, int groups_0, int outputs_0, int gated_0, int residual_0,
                int tiles_1, int units_1, int groups_1, int outputs_1, int gated_1, int residual_1,
                int tiles_2, int units_2, int groups_2, int outputs_2, int gated_2, int residual_2,
                int tiles_3, int units_3, int groups_3, int outputs_3, int gated_3, int residual_3) {
    DYNAMIC_SHARED(shared);
    int lane = (int)threadIdx.x % WARP, warp = (int)threadIdx.x / WARP;
    Link *links = (Link *)shared;
#define SET_LINK(i)                                                                                   \
    if (i < LINKS && threadIdx.x == i * WARP)                                                         \
        set_link(links[i], planes_##i, scales_##i, norm_##i, y_##i, tiles_##i, units_##i, groups_##i, \
                 outputs_##i, gated_##i, residual_##i);
    SET_LINK(0) SET_LINK(1) SET_LINK(2) SET_LINK(3)
    __syncthreads();
    int most_units = 0;
    for (int i = 0; i < LINKS; ++i) most_units = links[i].units > most_units ? links[i].units : most_units;
    unsigned char *ring = shared + LINKS_BYTES + warp * STAGES * STAGE_BYTES;
    unsigned char *operands = shared + LINKS_BYTES + WARPS * STAGES * STAGE_BYTES;
    float *starts = (float *)(operands + most_units * BLOCKS_PER_UNIT * X_BYTES);
    float *factors = starts + most_units * BLOCKS_PER_UNIT, *sums = factors + most_units;
    float *parts = sums + WARPS; // [tiles + WARPS][16]
    u32 *spans = (u32 *)(parts + (MOST_TILES + WARPS) * PART); // [LINKS][tiles]

    // Planes are on their way before the inputs exist.
    Cursor next;
    next.link = -1;
    to_next_link(next, links, warp, lane);
    int asked = 0, fill = 0; // requests that weren't multiplied yet; the next one's stage
    while (asked < STAGES - 1 - HELD && next.link < LINKS) {
        ask(next, ring + fill * STAGE_BYTES, links, warp, lane);
        ++asked, fill = fill + 1 == STAGES ? 0 : fill + 1;
    }
    for (int i = 0; i < LINKS; ++i) {
        Share share = {links[i].tile * links[i].units, links[i].size, 0};
        find_spans(spans + i * MOST_TILES, links[i].tiles, share.begin, links[i].units, share);
    }
    wait_for_previous();
    float ignored;
    u32 mark = load_marked(words + blockIdx.x, &ignored) + 1;
    __syncthreads(); // all threads know it
    if (threadIdx.x == 0) store_marked(words + blockIdx.x, 0.0f, mark);
    words += ((int)gridDim.x + 31) / 32 * 32;

    int stage = 0;
    for (int link = 0; link < LINKS; ++link) {
        const Link &its = links[link];
        int in_features = link == 0 ? inputs : links[link - 1].outputs;
        stage_link(its, link == 0 ? x : (const u16 *)0, words + (link - 1) * stride, mark, in_features, eps,
                   operands, starts, factors, sums);
        int work = first_of_warp(warp, its.size), end = first_of_warp(warp + 1, its.size);
        int row = (int)threadIdx.x & (its.gated ? 7 : 15), tile = (int)threadIdx.x >> (its.gated ? 3 : 4);
        float added = tile < its.tiles ? residual_of(its, (its.tile + tile) * (its.gated ? 8 : 16) + row,
                                                     residual, words, stride) : 0.0f;
        // All of this link may be asked for now, and of those to come all but HELD stages.
        for (; HELD && asked < STAGES - 1 && next.link < LINKS && asked - (end - work) < STAGES - 1 - HELD; ++asked) {
            ask(next, ring + fill * STAGE_BYTES, links, warp, lane);
            fill = fill + 1 == STAGES ? 0 : fill + 1;
        }
        float acc[ACCUMULATORS] = {};
        tile = work < end ? divide(work, its.units) : 0;
        int unit = work - tile * its.units;
        Weight weight = {its.planes, its.scales, its.units, its.groups, 0, its.units};
        for (; work < end; ++work) {
            wait_for_oldest<STAGES - 2>(asked);
            sync_warp(); // all lanes have read what `fill` held, and see all scales
            --asked;
            if (next.link < LINKS && (!HELD || asked - (end - work - 1) < STAGES - 1 - HELD)) {
                ask(next, ring + fill * STAGE_BYTES, links, warp, lane);
                ++asked, fill = fill + 1 == STAGES ? 0 : fill + 1;
            }
            multiply_unit(acc, ring + stage * STAGE_BYTES, operands, starts, factors, its.units, unit, weight,
                          lane);
            stage = stage + 1 == STAGES ? 0 : stage + 1;
            if (++unit < its.units && work + 1 < end) continue;
            put_part(acc, parts + (tile + warp) * PART, (u64 *)0, lane);
#pragma unroll
            for (int i = 0; i < ACCUMULATORS; ++i) acc[i] = 0.0f;
            unit = 0;
            ++tile;
        }
        if (link == LINKS - 1) let_next_start();
        __syncthreads();
        u64 *made = link < LINKS - 1 ? words + link * stride : (u64 *)0;
        write_link(its, parts, spans + link * MOST_TILES, added, residual, words, stride, made, mark);
    }
}
