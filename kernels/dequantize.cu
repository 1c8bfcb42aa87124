// W from tiles of bit planes, for prefill: one float32 sum per weight, rounded once. The words are those
// of bit_plane_mma.cuh. A warp takes one unit (16 rows x 256 inputs); a lane owns eight neighbouring inputs
// of two rows in each block of 32, so it writes 16 bytes at a time.
//
// Compile-time: PLANES, GROUP (multiple of 32), OFFSET (as in bit_planes.cuh), ACTIVATION_BF16.

#include "bit_plane_nibbles.cuh"

#define PARAMETERS (PLANES + (OFFSET != 0))
#define WARPS 4
#define THREADS (WARPS * WARP)

DEVICE float parameter(const u32 *pairs, int index, int upper_row) {
    u32 pair = pairs[index];
    return half_to_float((u16)(upper_row ? pair >> 16 : pair & 0xffffu));
}

DEVICE float offset_of(const u32 *pairs, int upper_row) {
    if (OFFSET == 0) return 0.0f;
    float value = parameter(pairs, PLANES, upper_row);
    return OFFSET == 1 ? value : value * (parameter(pairs, 0, upper_row) * per_center(PLANES));
}

extern "C" __global__ void __launch_bounds__(THREADS)
dequantize(const quad *planes, // [row_tiles][units][PLANES][32]
           const u32 *scales,  // [row_tiles][groups][8][PARAMETERS], rows g and g + 8
           u16 *weight,        // [out_features][in_features]
           int out_features, int in_features, int row_tiles, int units, int groups) {
    let_next_start();
    wait_for_previous();
    int lane = (int)threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    int index = (int)blockIdx.x * WARPS + (int)threadIdx.x / WARP;
    if (index >= row_tiles * units) return;
    int tile = index / units, unit = index % units;
    const quad *source = planes + (u64)index * PLANES * WARP + lane;
    u32 words[4][PLANES];
#pragma unroll
    for (int plane = 0; plane < PLANES; ++plane) {
        quad v = load_stream(source + plane * WARP);
        words[0][plane] = v.x, words[1][plane] = v.y, words[2][plane] = v.z, words[3][plane] = v.w;
    }
#pragma unroll
    for (int word = 0; word < 4; ++word) planes_of_stored(words[word]);
#pragma unroll
    for (int block = 0; block < BLOCKS_PER_UNIT; ++block) {
        int first = unit * UNIT + block * 32 + 8 * t; // of this lane's eight inputs
        int group = first / GROUP < groups ? first / GROUP : groups - 1;
        const u32 *pairs = scales + (((u64)tile * groups + group) * 8 + g) * PARAMETERS;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            int row = tile * TILE_ROWS + g + 8 * r;
            u32 packed[4];
#pragma unroll
            for (int pair = 0; pair < 4; ++pair) {
                u32 both = 0;
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    int bit = 16 * half + 8 * (block & 1) + 2 * pair + r;
                    float value = offset_of(pairs, r);
#pragma unroll
                    for (int plane = 0; plane < PLANES; ++plane) {
                        float scale = parameter(pairs, plane, r);
                        value += (words[block / 2][plane] >> bit) & 1u ? scale : -scale;
                    }
                    both |= (u32)store_activation(value) << (16 * half);
                }
                packed[pair] = both;
            }
            if (row >= out_features) continue;
            u16 *target = weight + (u64)row * in_features + first;
            if (in_features % 8 == 0) {
                if (first < in_features)
                    *(quad *)target = quad{packed[0], packed[1], packed[2], packed[3]};
            } else {
                for (int i = 0; i < 8; ++i)
                    if (first + i < in_features)
                        target[i] = (u16)(packed[i / 2] >> (16 * (i & 1)));
            }
        }
    }
}

// The rows that `index` names, for an embedding: [tokens][in_features]. One block per token.
// Of a class of the rows of a whole, `places` says where each row of the whole is in the classes one
// below the other, of which this one begins at `first`; the other classes' rows are left alone.
extern "C" __global__ void __launch_bounds__(THREADS)
gather_rows(const u32 *planes, // the same words, one by one
            const u32 *scales, const long long *index,
            const int *places, // [whole], or null: this is the whole
            u16 *rows, int out_features, int in_features, int units, int groups, int first,
            int whole) {
    let_next_start();
    wait_for_previous();
    long long wanted = index[blockIdx.x];
    if (wanted < 0 || wanted >= whole) { // there is no such row: NaN
        for (int k = (int)threadIdx.x; k < in_features; k += THREADS)
            rows[(u64)blockIdx.x * in_features + k] = 0x7fffu;
        return;
    }
    int row = places ? places[wanted] - first : (int)wanted;
    if (row < 0 || row >= out_features) return;
    int tile = row / TILE_ROWS, g = row % 8, r = row % TILE_ROWS / 8;
    for (int k = (int)threadIdx.x; k < in_features; k += THREADS) {
        int lane = 4 * g + ((k >> 3) & 3), word = (k & 255) >> 6;
        int bit = 16 * (k & 1) + 8 * ((k >> 5) & 1) + 2 * ((k >> 1) & 3) + r;
        const u32 *pairs = scales + (((u64)tile * groups + k / GROUP) * 8 + g) * PARAMETERS;
        float value = offset_of(pairs, r);
        u32 stored[PLANES];
        for (int plane = 0; plane < PLANES; ++plane)
            stored[plane] = planes[((((u64)tile * units + k / UNIT) * PLANES + plane) * WARP + lane) * 4 + word];
        planes_of_stored(stored);
        for (int plane = 0; plane < PLANES; ++plane) {
            float scale = parameter(pairs, plane, r);
            value += (stored[plane] >> bit) & 1u ? scale : -scale;
        }
        rows[(u64)blockIdx.x * in_features + k] = store_activation(value);
    }
}
