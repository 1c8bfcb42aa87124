// W from panels of bit planes, whose groups run along out_features: as dequantize.cu, one float32 sum per
// weight, rounded once. Of panels of gate and up, the rows of gate, then those of up.
//
// Compile-time: PLANES, OFFSET, TILES, SETS (as in bit_panels.cuh), ACTIVATION_BF16.

#define PARAMETERS (PLANES + (OFFSET != 0))
#define WARPS 4
#define THREADS (WARPS * WARP)

// One weight, from the bits of its planes and the parameters of its column, `apart` from one another.
DEVICE float weight_of(const u16 *scales, int apart, u32 signs) {
    float first = half_to_float(scales[0]), value = 0.0f;
    if (OFFSET) value = half_to_float(scales[PLANES * apart]);
    if (OFFSET == 2) value *= first * per_center(PLANES);
#pragma unroll
    for (int plane = 0; plane < PLANES; ++plane) {
        float scale = half_to_float(scales[plane * apart]);
        value += signs >> plane & 1u ? scale : -scale;
    }
    return value;
}

extern "C" __global__ void __launch_bounds__(THREADS)
panel_dequantize(const quad *planes, // [panels][units][SETS][TILES][PLANES][32]
                 const u16 *scales,  // [groups][units][SETS][PARAMETERS][256]
                 u16 *weight,        // [SETS][out_features][in_features]
                 int out_features, int in_features, int panels, int units, int group_rows,
                 int panels_per_group) {
    let_next_start();
    wait_for_previous();
    int lane = (int)threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    int index = (int)blockIdx.x * WARPS + (int)threadIdx.x / WARP;
    if (index >= panels * units * SETS * TILES) return;
    int tile = index % TILES, set = index / TILES % SETS, unit = index / (TILES * SETS) % units;
    int panel = index / (TILES * SETS * units), group = panel / panels_per_group;
    const u16 *parameters = scales + (((u64)group * units + unit) * SETS + set) * PARAMETERS * UNIT;
    const quad *source = planes + (u64)index * PLANES * WARP + lane;
    u32 words[PLANES][4];
#pragma unroll
    for (int plane = 0; plane < PLANES; ++plane) {
        quad v = load_stream(source + plane * WARP);
        words[plane][0] = v.x, words[plane][1] = v.y, words[plane][2] = v.z, words[plane][3] = v.w;
    }
    int of_group = ((panel - group * panels_per_group) * TILES + tile) * TILE_ROWS + g;
#pragma unroll
    for (int block = 0; block < BLOCKS_PER_UNIT; ++block) {
        int first = unit * UNIT + block * 32 + 8 * t; // of this lane's eight inputs
        quad columns[PARAMETERS];
#pragma unroll
        for (int i = 0; i < PARAMETERS; ++i)
            columns[i] = ((const quad *)(parameters + i * UNIT))[block * 4 + t];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            int row = group * group_rows + of_group + 8 * r;
            u32 packed[4] = {0, 0, 0, 0};
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                u16 of_column[PARAMETERS];
                u32 signs = 0;
#pragma unroll
                for (int j = 0; j < PARAMETERS; ++j) of_column[j] = bits_at(columns[j], i);
#pragma unroll
                for (int plane = 0; plane < PLANES; ++plane)
                    signs |= (words[plane][block / 2] >> (16 * (i & 1) + 8 * (block & 1) + (i & 6) + r) & 1u) << plane;
                packed[i / 2] |= (u32)store_activation(weight_of(of_column, 1, signs)) << (16 * (i & 1));
            }
            if (of_group + 8 * r >= group_rows || row >= out_features) continue; // padding
            u16 *target = weight + ((u64)set * out_features + row) * in_features + first;
            if (in_features % 8 == 0) {
                if (first < in_features) *(quad *)target = quad{packed[0], packed[1], packed[2], packed[3]};
            } else {
                for (int i = 0; i < 8; ++i)
                    if (first + i < in_features) target[i] = (u16)(packed[i / 2] >> (16 * (i & 1)));
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
panel_rows(const u32 *planes, // the same words, one by one
           const u16 *scales, const long long *index, u16 *rows, int out_features, int in_features,
           int units, int group_rows, int panels_per_group) {
    let_next_start();
    wait_for_previous();
    long long wanted = index[blockIdx.x];
    bool known = wanted >= 0 && wanted < out_features; // else NaN
    int group = known ? (int)wanted / group_rows : 0, of_group = known ? (int)wanted - group * group_rows : 0;
    int panel = group * panels_per_group + of_group / (TILES * TILE_ROWS);
    int tile = of_group / TILE_ROWS % TILES, g = of_group % 8, r = of_group % TILE_ROWS / 8;
    for (int k = (int)threadIdx.x; k < in_features; k += THREADS) {
        int lane = 4 * g + ((k >> 3) & 3), word = (k & 255) >> 6, unit = k / UNIT;
        int bit = 16 * (k & 1) + 8 * ((k >> 5) & 1) + 2 * ((k >> 1) & 3) + r;
        u64 place = (((u64)panel * units + unit) * SETS * TILES + tile) * PLANES * WARP + lane;
        u32 signs = 0;
        for (int plane = 0; plane < PLANES; ++plane)
            signs |= (planes[(place + plane * WARP) * 4 + word] >> bit & 1u) << plane;
        const u16 *parameters = scales + ((u64)group * units + unit) * SETS * PARAMETERS * UNIT;
        float value = weight_of(parameters + k % UNIT, UNIT, signs);
        rows[(u64)blockIdx.x * in_features + k] = known ? store_activation(value) : (u16)0x7fffu;
    }
}
