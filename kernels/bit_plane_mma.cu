// y = x W^T for a binary-coded W with groups along in_features, batches of up to 8 tokens per column
// block. Raw bit planes are the A operand of mma.m16n8k16: a bit at position p of a float16 *is* the
// subnormal 2^(p - 24), so one AND per register makes an operand of two bits. The position's power of
// two is folded into x, the start value of the accumulator turns {0, 1} into {-1, +1}, and a plane's
// scale is applied once per group, in float32. docs: kernels/README.md.
//
// Compile-time: PLANES 1..8, GROUP (inputs per group, a multiple of 32), OFFSET 0/1,
// COLUMNS 1 or 8 (tokens that a block of columns holds), ACTIVATION_BF16.
//
// Grid (CTAs over row tiles, splits of in_features, column blocks), 256 threads.
// Shared memory per split of n units: (n * 8) * COLUMNS * (64 + 4) bytes for x and its sums, then
// (WARPS * 16 + 1) * COLUMNS * 4 bytes.

#define WARPS 8
#define THREADS (WARPS * WARP)
#define PARAMETERS (PLANES + OFFSET)

// x of one 32-input block as B operands: [column][t][pair 0..3] half2.
#define BLOCK_BYTES 64

// Stage the inputs of units [first, first + count): B operands, and the sum of x over each segment,
// that is the part of a group inside a unit, at the segment's first block. Returns nothing; the
// exponent that x was divided by is at exponents[column].
DEVICE void stage(const u16 *x, int in_features, int first, int count, int columns,
                  unsigned char *operands, float *sums, int *exponents, float *scratch) {
    int thread = (int)threadIdx.x;
    int begin = first * UNIT, length = count * UNIT;
    for (int column = 0; column < COLUMNS; ++column) {
        const u16 *row = x + (u64)column * in_features;
        float largest = 0.0f;
        if (column < columns)
            for (int k = thread; k < length; k += THREADS)
                if (begin + k < in_features) {
                    float magnitude = load_activation(row[begin + k]);
                    magnitude = magnitude < 0.0f ? -magnitude : magnitude;
                    largest = magnitude > largest ? magnitude : largest;
                }
        for (int lanes = 16; lanes > 0; lanes >>= 1) {
            float other = shuffle_xor(largest, lanes);
            largest = other > largest ? other : largest;
        }
        if (thread % WARP == 0) scratch[thread / WARP] = largest;
        __syncthreads();
        for (int warp = 0; warp < WARPS; ++warp)
            largest = scratch[warp] > largest ? scratch[warp] : largest;
        __syncthreads();
        // Bring the largest magnitude below 2^7: times 2^8, the most that a position needs, it is
        // still below float16's end.
        int exponent = (int)(bits_of_float(largest) >> 23) - 127 - 6;
        if (largest == 0.0f || bits_of_float(largest) >= 0x7f800000u) exponent = 0;
        exponent = exponent < -120 ? -120 : exponent;
        if (thread == 0) exponents[column] = exponent;
        float factor = power_of_two(-exponent);
        for (int block = thread; block < count * BLOCKS_PER_UNIT; block += THREADS) {
            float sum = 0.0f;
            u16 *target = (u16 *)(operands + ((u64)block * COLUMNS + column) * BLOCK_BYTES);
            bool upper = block & 1; // pairs 4..7 of a 64-input word
            for (int i = 0; i < 32; ++i) {
                int k = begin + block * 32 + i;
                float value = 0.0f;
                if (column < columns && k < in_features)
                    value = half_to_float(float_to_half(load_activation(row[k]) * factor));
                sum += value;
                int pair = (upper ? 4 : 0) + (i & 7) / 2;
                float position = power_of_two(pair <= 4 ? 8 - 2 * pair : 18 - 2 * pair);
                target[i] = float_to_half(value * position); // i = 8 t + 2 (pair & 3) + half
            }
            sums[block * COLUMNS + column] = sum;
        }
    }
    __syncthreads();
    // Sums of blocks become sums of segments.
    for (int index = thread; index < count * COLUMNS; index += THREADS) {
        int unit = index / COLUMNS, column = index % COLUMNS;
        float sum = 0.0f;
        for (int block = BLOCKS_PER_UNIT - 1; block >= 0; --block) {
            float *place = sums + (unit * BLOCKS_PER_UNIT + block) * COLUMNS + column;
            sum += *place;
            *place = sum;
            if ((((first + unit) * BLOCKS_PER_UNIT + block) * 32) % GROUP == 0) sum = 0.0f;
        }
    }
    __syncthreads();
}

// acc += scale * C for each plane of a group, and the offset by way of the start values.
DEVICE void flush(float *acc, float (*c)[4], const float *start, const u32 *scales) {
#pragma unroll
    for (int plane = 0; plane < PLANES; ++plane) {
        u32 pair = scales[plane];
        float low = half_to_float((u16)(pair & 0xffffu)), high = half_to_float((u16)(pair >> 16));
        acc[0] += low * c[plane][0];
        acc[1] += low * c[plane][1];
        acc[2] += high * c[plane][2];
        acc[3] += high * c[plane][3];
    }
#if OFFSET
    u32 pair = scales[PLANES]; // start is -sum(x) in the units of the accumulator
    float low = -half_to_float((u16)(pair & 0xffffu)), high = -half_to_float((u16)(pair >> 16));
    acc[0] += low * start[0];
    acc[1] += low * start[1];
    acc[2] += high * start[2];
    acc[3] += high * start[3];
#endif
}

DEVICE u32 operand(u32 word, int position) { // 0 .. 15; two bits of one row, as float16 subnormals
    u32 shifted = position < 10 ? word : word >> 10;
    return shifted & (0x00010001u << (position < 10 ? position : position - 10));
}

extern "C" __global__ void __launch_bounds__(THREADS)
bit_plane_mma(const quad *planes,  // [row_tiles][units][PLANES][32]
              const u32 *scales,   // [row_tiles][groups][8][PARAMETERS], rows g and g + 8
              const u16 *x,        // [batch][in_features]
              u16 *y,              // [batch][out_features]
              float *partial,      // [splits][batch][row_tiles * 16]; null: one split, write y
              int out_features, int in_features, int batch, int row_tiles, int units, int groups,
              int units_per_split) {
    DYNAMIC_SHARED(shared);
    int first = (int)blockIdx.y * units_per_split;
    int count = units - first < units_per_split ? units - first : units_per_split;
    int column0 = (int)blockIdx.z * COLUMNS;
    int columns = batch - column0 < COLUMNS ? batch - column0 : COLUMNS;
    unsigned char *operands = shared;
    float *sums = (float *)(operands + (u64)units_per_split * BLOCKS_PER_UNIT * COLUMNS * BLOCK_BYTES);
    float *reduction = sums + units_per_split * BLOCKS_PER_UNIT * COLUMNS; // [WARPS][16][COLUMNS]
    int *exponents = (int *)(reduction + WARPS * TILE_ROWS * COLUMNS);
    stage(x + (u64)column0 * in_features, in_features, first, count, columns, operands, sums,
          exponents, reduction);

    int lane = (int)threadIdx.x % WARP, warp = (int)threadIdx.x / WARP;
    int g = lane / 4, t = lane % 4;
    int column = COLUMNS == 1 ? 0 : g; // of the B operand; with one column all lanes share it
    for (int tile = (int)blockIdx.x; tile < row_tiles; tile += (int)gridDim.x) {
        float acc[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        const quad *base = planes + ((u64)tile * units + first) * PLANES * WARP + lane;
        const u32 *tile_scales = scales + ((u64)tile * groups * 8 + g) * PARAMETERS;
        quad next[PLANES];
        if (warp < count)
#pragma unroll
            for (int plane = 0; plane < PLANES; ++plane)
                next[plane] = load_stream(base + (warp * PLANES + plane) * WARP);
        for (int unit = warp; unit < count; unit += WARPS) {
            u32 words[PLANES][4];
#pragma unroll
            for (int plane = 0; plane < PLANES; ++plane) {
                words[plane][0] = next[plane].x;
                words[plane][1] = next[plane].y;
                words[plane][2] = next[plane].z;
                words[plane][3] = next[plane].w;
            }
            if (unit + WARPS < count)
#pragma unroll
                for (int plane = 0; plane < PLANES; ++plane)
                    next[plane] = load_stream(base + ((unit + WARPS) * PLANES + plane) * WARP);
            float c[PLANES][4], start[4];
            const u32 *current = 0;
#pragma unroll
            for (int block = 0; block < BLOCKS_PER_UNIT; ++block) {
                int k = ((first + unit) * BLOCKS_PER_UNIT + block) * 32;
                if (block == 0 || k % GROUP == 0) {
                    if (block > 0) flush(acc, c, start, current);
                    int group = k / GROUP < groups ? k / GROUP : groups - 1; // padding: x is zero
                    current = tile_scales + (u64)group * 8 * PARAMETERS;
                    const float *sum = sums + (unit * BLOCKS_PER_UNIT + block) * COLUMNS;
                    float even = sum[COLUMNS == 1 ? 0 : 2 * t], odd = sum[COLUMNS == 1 ? 0 : 2 * t + 1];
                    start[0] = -0.5f * power_of_two(-16) * even; // rows 0 .. 7
                    start[1] = -0.5f * power_of_two(-16) * odd;
                    start[2] = -0.5f * power_of_two(-15) * even; // rows 8 .. 15: one bit higher
                    start[3] = -0.5f * power_of_two(-15) * odd;
#pragma unroll
                    for (int plane = 0; plane < PLANES; ++plane)
                        for (int i = 0; i < 4; ++i) c[plane][i] = start[i];
                }
                quad b = *(const quad *)(operands +
                    ((u64)(unit * BLOCKS_PER_UNIT + block) * COLUMNS + column) * BLOCK_BYTES + 16 * t);
                int p = 8 * (block & 1); // position of this half's first bit
#pragma unroll
                for (int plane = 0; plane < PLANES; ++plane) {
                    u32 word = words[plane][block / 2];
                    mma(c[plane], operand(word, p), operand(word, p + 1), operand(word, p + 2),
                        operand(word, p + 3), b.x, b.y);
                    mma(c[plane], operand(word, p + 4), operand(word, p + 5), operand(word, p + 6),
                        operand(word, p + 7), b.z, b.w);
                }
            }
            flush(acc, c, start, current);
        }
        // Sum over the warps in a fixed order, then undo the powers of two.
        float *mine = reduction + warp * TILE_ROWS * COLUMNS;
        if (COLUMNS > 1 || t == 0) {
            int low = COLUMNS == 1 ? 0 : 2 * t;
            mine[g * COLUMNS + low] = acc[0];
            mine[(g + 8) * COLUMNS + low] = acc[2];
            if (COLUMNS > 1) {
                mine[g * COLUMNS + low + 1] = acc[1];
                mine[(g + 8) * COLUMNS + low + 1] = acc[3];
            }
        }
        __syncthreads();
        for (int index = (int)threadIdx.x; index < TILE_ROWS * COLUMNS; index += THREADS) {
            int row = index / COLUMNS, token = index % COLUMNS;
            float sum = 0.0f;
            for (int w = 0; w < WARPS; ++w) sum += reduction[w * TILE_ROWS * COLUMNS + index];
            sum *= power_of_two(row < 8 ? 17 : 16);
            sum *= power_of_two(exponents[token]); // apart: together they might overflow
            int out = tile * TILE_ROWS + row;
            if (token < columns) {
                u64 at = (u64)(column0 + token);
                if (partial)
                    partial[((u64)blockIdx.y * batch + at) * row_tiles * TILE_ROWS + out] = sum;
                else if (out < out_features)
                    y[at * out_features + out] = store_activation(sum);
            }
        }
        __syncthreads();
    }
}
