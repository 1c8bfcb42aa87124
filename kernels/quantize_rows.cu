// Activations to int8, a step per token (or one for all), laid out as int_gemm.cu reads them. The
// definition is qtool/core/activations.py, and the codes are those to the bit.
//
// Codes: [tiles of 128 tokens][blocks of 128 inputs][8 runs of 16 inputs][128 tokens][16], so core
// matrices of 8 tokens x 16 bytes follow one another. Tokens beyond the last are zeros.
//
// Compile-time: INPUTS (a multiple of 128), ROWS (tokens per block, 1 or 2), THREADS (a multiple of
// 32), STATIC (0: a step per token), CLIPS (codes may be beyond the largest), SHIFTED (thresholds aren't
// halfway), ACTIVATION_BF16. Grid (padded tokens / ROWS). Shared: THREADS / 32 words.

#define RUN 16
#define RUNS (INPUTS / RUN)
#define HELD ((RUNS * ROWS + THREADS - 1) / THREADS) // runs per thread
#define WARPS (THREADS / WARP)
#define BIG 12582912.0f // 1.5 * 2^23: what is added to it is rounded, halves to even

// Four codes, as bytes.
DEVICE u32 codes_of(const float (&x)[4], float inverse, float half, float largest) {
    u32 code[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float scaled = multiply_rounded(x[i], inverse);
        if (SHIFTED) scaled = copysignf(floorf(fabsf(scaled) + half), scaled);
        if (CLIPS) scaled = fminf(fmaxf(scaled, -largest), largest);
        code[i] = bits_of_float(scaled + BIG);
    }
    return permute_bytes(permute_bytes(code[0], code[1], 0x0040u), permute_bytes(code[2], code[3], 0x0040u), 0x5410u);
}

extern "C" __global__ void __launch_bounds__(THREADS)
quantize_rows(const u16 *x,  // [tokens][INPUTS]
              quad *codes,   // see above
              float *steps,  // [padded tokens]
              int tokens, float clip, float largest, float half, float fixed) {
    DYNAMIC_SHARED(memory);
    u32 *maxima = (u32 *)memory;
    let_next_start();
    wait_for_previous();
    int thread = (int)threadIdx.x, row = thread % ROWS, token = (int)blockIdx.x * ROWS + row;
    const quad *from = (const quad *)(x + (u64)token * INPUTS);
    quad values[HELD][2];
    u32 magnitudes = 0;
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
        int run = (i * THREADS + thread) / ROWS;
        bool is_there = token < tokens && run < RUNS;
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            quad v = is_there ? from[2 * run + n] : quad{0, 0, 0, 0};
            values[i][n] = v;
            magnitudes = larger_magnitudes(larger_magnitudes(magnitudes, v.x), larger_magnitudes(v.y, larger_magnitudes(v.z, v.w)));
        }
    }
    float step = fixed;
    if (!STATIC) {
        // As integers: NaN is above infinity, and that above all else.
        u32 most = magnitudes >> 16 > (magnitudes & 0xffffu) ? magnitudes >> 16 : magnitudes & 0xffffu;
#pragma unroll
        for (int lanes = WARP / 2; lanes >= ROWS; lanes /= 2) {
            u32 other = shuffle_xor(most, lanes);
            most = other > most ? other : most;
        }
        if (thread % WARP < ROWS) maxima[thread / WARP * ROWS + row] = most;
        __syncthreads();
#pragma unroll
        for (int warp = 0; warp < WARPS; ++warp) {
            u32 other = maxima[warp * ROWS + row];
            most = other > most ? other : most;
        }
        step = clip * load_activation((u16)most) / largest;
        if (step < 1e-8f) step = 1e-8f; // NaN stays
    }
    float inverse = 1.0f / step;
    if (thread < ROWS) steps[token] = token < tokens ? step : 0.0f;
    u64 tile = (u64)(token / 128) * (INPUTS / 128);
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
        int run = (i * THREADS + thread) / ROWS;
        if (run >= RUNS) continue;
        u32 packed[4];
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            quad v = values[i][n / 2];
            u32 pair[2] = {n % 2 ? v.z : v.x, n % 2 ? v.w : v.y};
            float numbers[4];
#pragma unroll
            for (int b = 0; b < 4; ++b) numbers[b] = load_activation((u16)(pair[b / 2] >> (16 * (b % 2))));
            packed[n] = codes_of(numbers, inverse, half, largest);
        }
        codes[(tile + run / 8) * 1024 + run % 8 * 128 + token % 128] =
            quad{packed[0], packed[1], packed[2], packed[3]};
    }
}
