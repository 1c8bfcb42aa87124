// How a block norms x where it stages it: each warp holds its share of the units in registers, for one
// or two tokens whose inputs are one slab.

// What an RMS norm multiplies a lane's inputs by, unit by unit: a weight, so it may be read early.
struct Gains { quad of[NORM]; };

DEVICE Gains load_gains(const u16 *norm, int in_features, Offsets given) {
    int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP;
    const Offsets offsets = offsets_here(given, lane);
    Gains gains;
#pragma unroll
    for (int i = 0; i < NORM; ++i)
        gains.of[i] = load_of_lane(norm, (warp + i * WARPS) / COLUMNS, offsets, in_features);
    return gains;
}

// As `stage_inputs`, of x / sqrt(mean x^2 + eps), rounded, times the gains, rounded: as rms_norm.cu. The
// inputs are in one slab. `sums` has room for a float per warp and column.
template <class Late>
DEVICE void stage_normed(const u16 *x, int in_features, const Weight &weight, int columns, int units,
                         unsigned char *operands, float *starts, float *factors, const Gains &gains,
                         float eps, float *sums, Offsets given, const Late &ask_late) {
    int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP;
    const Offsets offsets = offsets_here(given, lane);
    quad v[NORM];
    float inverse[COLUMNS] = {};
#pragma unroll
    for (int i = 0; i < NORM; ++i) {
        int unit = (warp + i * WARPS) / COLUMNS, column = (warp + i * WARPS) % COLUMNS;
        v[i] = quad{0, 0, 0, 0};
        if (unit < weight.count && column < columns)
            v[i] = load_of_lane(x + (u64)column * in_features, unit, offsets, in_features);
    }
    if (LATE) ask_late();
#pragma unroll
    for (int i = 0; i < NORM; ++i) {
        u32 pairs[4] = {v[i].x, v[i].y, v[i].z, v[i].w};
        float square = 0.0f;
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            float low = load_activation((u16)(pairs[r] & 0xffffu));
            float high = load_activation((u16)(pairs[r] >> 16));
            square += low * low + high * high;
        }
#pragma unroll
        for (int column = 0; column < COLUMNS; ++column)
            if ((warp + i * WARPS) % COLUMNS == column) inverse[column] += square;
    }
    squares_to_factors(inverse, in_features, eps, sums);
#pragma unroll
    for (int i = 0; i < NORM; ++i) {
        int unit = (warp + i * WARPS) / COLUMNS, column = (warp + i * WARPS) % COLUMNS;
        if (unit >= weight.count || column >= columns) continue;
        float factor = column == 0 ? inverse[0] : inverse[COLUMNS - 1];
        quad gain = gains.of[i];
        quad value = {normed(v[i].x, factor, gain.x), normed(v[i].y, factor, gain.y),
                      normed(v[i].z, factor, gain.z), normed(v[i].w, factor, gain.w)};
        stage_unit(value, unit, column, units, weight, offsets, operands, starts, factors);
    }
    __syncthreads();
}
