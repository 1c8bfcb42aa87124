// y = x W^T by tables, as in LUT-GEMM (arXiv 2206.09557): eight signs are a key into the 256 signed
// sums of eight inputs. Other than there, tables and sums are float32, sums are added in a fixed
// order without atomics, the planes are read as a checkpoint stores them, and no two lanes of a
// warp ever want the same bank: each lane looks up its own inputs in its own tables.
//
// A block owns a slab of 32 * 8 * KEYS inputs: a lane those of KEYS keys, which are one piece (a
// word if KEYS is 4) of every row of every plane. It builds the tables of the slab once; then its
// warps go through the rows, ROWS at a time. As soon as a plane of these rows is looked up, that of
// the next ones is requested into the same registers: most of them wait for memory at any time.
//
// Compile-time: PLANES, GROUP (a multiple of 32, or at least INPUTS), OFFSET, INPUTS (in_features),
// KEYS (2 or 4), ROWS (a power of two, at most 32 and at most out_features), THREADS (a power of
// two from 128 to 256 * KEYS), ACTIVATION_BF16.
//
// Grid (blocks per slab, slabs, batch), THREADS threads, KEYS * 33824 bytes of shared memory.

#define WARPS (THREADS / WARP)
#define OWN (8 * KEYS)     // inputs of a lane
#define SLAB (WARP * OWN)  // inputs of a block
#define PITCH (WARP + 1)   // of staged inputs: no two lanes in one bank
#define PIECES ((INPUTS + OWN - 1) / OWN)
#define ROW_PIECES ((INPUTS + 31) / 32 * (4 / KEYS)) // rows end with a whole word
#define GROUPS ((INPUTS + GROUP - 1) / GROUP)

#if KEYS == 4
typedef u32 Piece;
#else
typedef u16 Piece;
#endif
#if INPUTS > SLAB
typedef float Output; // add_splits.cu does the rest
#else
typedef u16 Output;
#endif

#ifndef QTOOL_HOST
DEVICE u32 load_piece(const u32 *address) {
    u32 value;
    asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(value) : "l"(address));
    return value;
}
DEVICE u16 load_piece(const u16 *address) {
    u16 value;
    asm volatile("ld.global.nc.L1::no_allocate.u16 %0, [%1];" : "=h"(value) : "l"(address));
    return value;
}
// Computed once, kept in registers.
template <class T> DEVICE void keep(T *&pointer) { asm("" : "+l"(pointer)); }
// Bytes, lowest first: the lowest of `low`, byte `key` of `piece`, 0, 0 (`low` has one byte).
DEVICE u32 entry_of(u32 piece, u32 key, u32 low) {
    return __byte_perm(piece, low, 0x5504 | (key << 4));
}
#else
template <class T> DEVICE T load_piece(const T *address) { return *address; }
template <class T> DEVICE void keep(T *&) {}
DEVICE u32 entry_of(u32 piece, u32 key, u32 low) { return (piece >> 8 * key & 255u) << 8 | low; }
#endif

// Entry e of key k of lane l is float k / 2 * 2^14 + e * 64 + k % 2 * 32 + l. Entries are 256 bytes
// apart, so a byte of a piece and four times the lane, side by side, are an address: one PRMT.
DEVICE u32 table_of(u32 key) { return (key / 2 << 14) + key % 2 * WARP; }

// What a lane holds of ROWS rows, as it comes from memory.
struct Step {
    Piece piece[PLANES][ROWS];
    u16 scale[PLANES][ROWS], offset[ROWS];
};

// Where a lane finds it: its piece of a row of a plane, and the parameters of that.
struct Place {
    const Piece *pieces;
    const u16 *scales, *offsets;
};

DEVICE Place of_row(const Place &top, u32 row) {
    u64 groups = (u64)row * GROUPS;
    return {top.pieces + (u64)row * ROW_PIECES, top.scales + groups, top.offsets + groups};
}

DEVICE void to_next_plane(Place &place, u32 rows) {
    place.pieces += (u64)rows * ROW_PIECES;
    place.scales += (u64)rows * GROUPS;
}

DEVICE void load_plane(Step &step, u32 plane, const Place &place) {
    for (u32 i = 0; i < ROWS; ++i)
        step.piece[plane][i] = load_piece(place.pieces + i * ROW_PIECES);
    for (u32 i = 0; i < ROWS; ++i) step.scale[plane][i] = load_piece(place.scales + i * GROUPS);
}

DEVICE void load_offsets(Step &step, const Place &place) {
    for (u32 i = 0; i < ROWS; ++i) step.offset[i] = load_piece(place.offsets + i * GROUPS);
}

// Inputs of the slab, float32: input i of lane l at i * PITCH + l. None beyond the end of a row.
DEVICE void stage(float *staged, const u16 *x) {
    for (u32 n = 0; n < SLAB / THREADS; ++n) {
        u32 i = n * THREADS + threadIdx.x, k = blockIdx.y * SLAB + i;
        staged[i % OWN * PITCH + i / OWN] = k < INPUTS ? load_activation(x[k]) : 0.0f;
    }
}

// All tables of the slab. Warps share the keys and, of a key, the settings of its upper five signs.
DEVICE void build(float *tables, const float *staged) {
    const u32 settings = 32 * KEYS / WARPS;
    u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, key = warp % KEYS;
    float x[8], low[8] = {};
    for (u32 i = 0; i < 8; ++i) x[i] = staged[(key * 8 + i) * PITCH + lane];
    for (u32 i = 0; i < 3; ++i)
        for (u32 e = 0; e < 1u << i; ++e) {
            low[e + (1 << i)] = low[e] + x[i];
            low[e] -= x[i];
        }
    for (u32 n = 0; n < settings; ++n) {
        u32 upper = warp / KEYS * settings + n;
        float sum = 0.0f;
        for (u32 i = 0; i < 5; ++i) sum += upper >> i & 1 ? x[i + 3] : -x[i + 3];
        float *table = tables + table_of(key) + upper * 8 * 64 + lane;
        for (u32 e = 0; e < 8; ++e) table[e * 64] = sum + low[e];
    }
}

// The signed sum of a lane's inputs.
DEVICE float look_up(const unsigned char *shared, u32 piece, u32 lane) {
    float sum[KEYS];
    for (u32 key = 0; key < KEYS; ++key)
        sum[key] = *(const float *)(shared + entry_of(piece, key, 4 * lane) + 4 * table_of(key));
    return KEYS == 4 ? (sum[0] + sum[1]) + (sum[2] + sum[3]) : sum[0] + sum[1];
}

// Sums over the lanes: of row i in lane 32 / ROWS * i. While there are two sums or more, a lane
// keeps half of them and gives away the others.
DEVICE float add_lanes(float *sum, u32 lane) {
    u32 lanes = WARP / 2;
    for (u32 half = ROWS / 2; half > 0; half /= 2, lanes /= 2)
        for (u32 i = 0; i < half; ++i) {
            float kept = lane & lanes ? sum[i + half] : sum[i];
            float given = lane & lanes ? sum[i] : sum[i + half];
            sum[i] = kept + shuffle_xor(given, (int)lanes);
        }
    for (; lanes > 0; lanes /= 2) sum[0] += shuffle_xor(sum[0], (int)lanes);
    return sum[0];
}

DEVICE void store(float *place, float value) { *place = value; }
DEVICE void store(u16 *place, float value) { *place = store_activation(value); }

extern "C" __global__ void __launch_bounds__(THREADS)
lut_gemm(const Piece *planes, // [PLANES][out_features][ROW_PIECES]
         const u16 *scales,   // [PLANES][out_features][GROUPS]
         const u16 *offsets,  // [out_features][GROUPS], if OFFSET
         const u16 *x,        // [batch][INPUTS]
         Output *outputs,     // [slabs][batch][out_features]: float32; if there is one slab, y
         int out_features) {
    DYNAMIC_SHARED(shared);
    float *tables = (float *)shared, *staged = tables + KEYS * 256 * WARP;
    u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, rows = (u32)out_features;
    let_next_start();
    // Beyond the end of a row, lanes take its last piece: it is there, and their inputs are zero.
    u32 own = blockIdx.y * WARP + lane < PIECES ? blockIdx.y * WARP + lane : PIECES - 1;
    u32 group = own * OWN / GROUP;
    Place top = {planes + own, scales + group, OFFSET ? offsets + group : 0};
    keep(top.pieces);
    keep(top.scales);
    keep(top.offsets);
    // Steps are dealt out, first to blocks: those read side by side and end together.
    u32 step = warp * gridDim.x + blockIdx.x, steps = (rows + ROWS - 1) / ROWS;
    // The last step takes rows of the one before it once more, to the same sums.
    u32 row = step < steps - 1 ? step * ROWS : rows - ROWS;
    Step now;
    if (step < steps) {
        Place place = of_row(top, row);
        for (u32 plane = 0; plane < PLANES; ++plane, to_next_plane(place, rows))
            load_plane(now, plane, place);
        if (OFFSET) load_offsets(now, place);
    }

    wait_for_previous();
    stage(staged, x + (u64)blockIdx.z * INPUTS);
    __syncthreads();
    build(tables, staged);
    __syncthreads();
    float total = look_up(shared, 0xffffffffu, lane);

    u64 sums = (u64)blockIdx.y * gridDim.z + blockIdx.z;
    Output *out = outputs + sums * rows + lane / (WARP / ROWS);
    keep(out);
    while (step < steps) {
        float sum[ROWS] = {};
        Output *here = out + row;
        step += WARPS * gridDim.x;
        row = step < steps - 1 ? step * ROWS : rows - ROWS;
        Place place = of_row(top, row);
        for (u32 plane = 0; plane < PLANES; ++plane, to_next_plane(place, rows)) {
            for (u32 i = 0; i < ROWS; ++i) {
                float scale = half_to_float(now.scale[plane][i]);
                sum[i] += scale * look_up(shared, now.piece[plane][i], lane);
                if (OFFSET == 2 && plane == 0)
                    sum[i] += half_to_float(now.offset[i]) * (scale * per_center(PLANES)) * total;
            }
            if (step < steps) load_plane(now, plane, place);
        }
        if (OFFSET) {
            for (u32 i = 0; i < ROWS && OFFSET == 1; ++i)
                sum[i] += half_to_float(now.offset[i]) * total;
            if (step < steps) load_offsets(now, place);
        }
        float whole = add_lanes(sum, lane);
        if (lane % (WARP / ROWS) == 0) store(here, whole);
    }
}
