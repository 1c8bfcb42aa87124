// What kernels of groups along out_features share, where scales are factors of x: what a lane reads of a unit's inputs
// and scales, and norms. The file that includes this has defined BATCH_AHEAD (tokens whose inputs a lane holds before
// they are staged; 0: none) and the constants that bit_panels.cuh names.

#define THREADS (WARPS * WARP)
#ifndef PART
#define SET_PART (CHUNK * TILE_ROWS * COLUMNS)
#define PART (SETS * SET_PART)
#endif
#define PARAMETERS (PLANES + (OFFSET != 0))
#define STAGE_BYTES (PLANES * PLANE_BYTES)

#include "bit_planes_share.cuh"

// Ask for a unit of a tile, where the lane's place in it is.
template <class Place, class... Stream>
DEVICE void request(unsigned char *stage, const Place &place, int lane, const Stream &...) {
#pragma unroll
    for (int plane = 0; plane < PLANES; ++plane)
        fetch(stage + plane * PLANE_BYTES + lane * 16, place.planes + plane * WARP);
}

// What a lane reads for its eight inputs of a unit.
struct Ahead {
    quad scales[PARAMETERS];
    quad x[BATCH_AHEAD ? BATCH_AHEAD : 1];
#if NORM
    quad gains;
#endif
};

#if NORM
// What an RMS norm multiplies the inputs of each token by. Every block sums the squares of all inputs.
DEVICE void norm_factors(float (&factors)[COLUMNS], const u16 *x, int in_features, int units, int columns, float eps,
                         int lane, float *sums) {
#pragma unroll
    for (int column = 0; column < COLUMNS; ++column) {
        factors[column] = 0.0f;
        for (int unit = (int)threadIdx.x / WARP; unit < units && column < columns; unit += WARPS) {
            quad v = load_inputs(x + (u64)column * in_features, unit * UNIT + lane * 8, in_features);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                float value = load_activation(bits_at(v, i));
                factors[column] += value * value;
            }
        }
    }
    squares_to_factors(factors, in_features, eps, sums);
}

DEVICE void norm_inputs(Ahead &ahead, const float *factors) {
    const quad &gain = ahead.gains;
#pragma unroll
    for (int i = 0; i < COLUMNS; ++i) {
        quad &v = ahead.x[i];
        v = quad{normed(v.x, factors[i], gain.x), normed(v.y, factors[i], gain.y),
                 normed(v.z, factors[i], gain.z), normed(v.w, factors[i], gain.w)};
    }
}
#endif

// The offset of a column, from its parameters in float32.
DEVICE float column_offset(float last, float first) {
    return OFFSET == 0 ? 0.0f : OFFSET == 1 ? last : last * (first * per_center(PLANES));
}

DEVICE float half_at(const quad &v, int i) { return half_to_float(bits_at(v, i)); }

// Of a unit and a set of a group.
DEVICE void load_scales(Ahead &ahead, const quad *scales, const u16 *norm, int group, int unit, int set, int units,
                        int in_features, int lane) {
    const quad *source = scales + (((u64)group * units + unit) * SETS + set) * PARAMETERS * WARP + lane;
#pragma unroll
    for (int i = 0; i < PARAMETERS; ++i) ahead.scales[i] = load_stream(source + i * WARP);
#if NORM
    ahead.gains = load_inputs(norm, unit * UNIT + lane * 8, in_features);
#endif
}

DEVICE void load_tokens(Ahead &ahead, const u16 *x, int unit, int in_features, int columns, int lane) {
#pragma unroll
    for (int i = 0; i < BATCH_AHEAD; ++i) {
        ahead.x[i] = quad{0, 0, 0, 0};
        if (i < columns) ahead.x[i] = load_inputs(x + (u64)i * in_features, unit * UNIT + lane * 8, in_features);
    }
}
