// Activations to int8, a step per token (or one for all), laid out as int_gemm.cu reads them. The
// definition is qtool/core/activations.py, and the codes are those to the bit: values are multiplied
// by 1 / step, and those near the threshold between two codes once more divided, as there.
//
// Codes: [tiles of 128 tokens][blocks of 128 inputs][8 runs of 16 inputs][128 tokens][16], so core
// matrices of 8 tokens x 16 bytes follow one another. Tokens beyond the last are zeros.
//
// Compile-time: INPUTS (a multiple of 128), ROWS (tokens per block, 1 or 2), THREADS (a multiple of
// 32), STATIC (0: a step per token), SHIFTED (half isn't 1 / 2: thresholds are moved), ACTIVATION_BF16. Grid (padded tokens / ROWS). Shared: THREADS / 32 words.

#define RUN 16
#define RUNS (INPUTS / RUN)
#define HELD ((RUNS * ROWS + THREADS - 1) / THREADS) // runs per thread, 8 at most
#define WARPS (THREADS / WARP)
#define NEAR 0.0001f // of a threshold: more than a product by 1 / step is off by, up to 127
#define BIG 12582912.0f // 1.5 * 2^23: what is added to it is rounded, halves to even

// The definition.
DEVICE float exact_code(float x, float step, float half) {
    float scaled = x / step;
    return half == 0.5f ? rintf(scaled) : copysignf(floorf(fabsf(scaled) + half), scaled);
}

// Its low byte is the code of x; says whether that is near to a threshold between codes.
DEVICE u32 code_of(float x, float inverse, float half, float largest, bool &near) {
    float scaled = fminf(fmaxf(x * inverse, -largest), largest);
    if (SHIFTED) scaled += scaled < 0.0f ? 0.5f - half : half - 0.5f;
    float big = scaled + BIG;
    near = near || fabsf(scaled - (big - BIG)) > 0.5f - NEAR;
    return bits_of_float(big);
}

DEVICE u32 low_bytes(u32 a, u32 b, u32 c, u32 d) {
    return permute_bytes(permute_bytes(a, b, 0x0040u), permute_bytes(c, d, 0x0040u), 0x5410u);
}

DEVICE float half_of(u32 pair, int which) { return load_activation((u16)(pair >> (16 * which))); }

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
    quad *to = codes + (u64)(token / 128) * (INPUTS / 128) * 1024 + token % 128;
    u32 again = 0; // a bit for each four codes
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
        int run = (i * THREADS + thread) / ROWS;
        if (run >= RUNS) continue;
        u32 packed[4];
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            quad v = values[i][n / 2];
            u32 low = n % 2 ? v.z : v.x, high = n % 2 ? v.w : v.y;
            bool near = false;
            u32 first = code_of(half_of(low, 0), inverse, half, largest, near);
            u32 second = code_of(half_of(low, 1), inverse, half, largest, near);
            u32 third = code_of(half_of(high, 0), inverse, half, largest, near);
            u32 fourth = code_of(half_of(high, 1), inverse, half, largest, near);
            packed[n] = low_bytes(first, second, third, fourth);
            again |= (u32)near << (4 * i + n);
        }
        to[run / 8 * 1024 + run % 8 * 128] = quad{packed[0], packed[1], packed[2], packed[3]};
    }
    if (token >= tokens) return;
#pragma unroll 1
    for (int bit = 0; again != 0; ++bit, again >>= 1) {
        if ((again & 1) == 0) continue;
        int run = (bit / 4 * THREADS + thread) / ROWS;
        const u16 *four = (const u16 *)from + run * RUN + bit % 4 * 4;
        signed char *place = (signed char *)(to + run / 8 * 1024 + run % 8 * 128) + bit % 4 * 4;
#pragma unroll 1
        for (int n = 0; n < 4; ++n)
            place[n] = (signed char)(int)fminf(fmaxf(exact_code(load_activation(four[n]), step, half), -largest), largest);
    }
}
