/* Sixteen floats at a time, by the compiler's own vectors: whatever the machine has runs them. */
#ifndef QT_VECTORS_H
#define QT_VECTORS_H

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX__)
#include <immintrin.h>
#endif

#define QT_LANES 16
typedef float qt_floats __attribute__((vector_size(64)));
typedef int32_t qt_ints __attribute__((vector_size(64)));
#define QT_INLINE static inline __attribute__((always_inline))

QT_INLINE qt_floats qt_load(const float *p) {
    qt_floats v;
    memcpy(&v, p, sizeof v);
    return v;
}

QT_INLINE void qt_store(float *p, qt_floats v) { memcpy(p, &v, sizeof v); }

QT_INLINE qt_floats qt_all(float value) { return value - (qt_floats){0}; }

QT_INLINE qt_floats qt_chosen(qt_ints mask, qt_floats yes, qt_floats no) {
    return (qt_floats)(((qt_ints)yes & mask) | ((qt_ints)no & ~mask));
}

/* Lanes by their numbers. */
#if defined(__clang__)
#define qt_shuffled(v, ...) __builtin_shufflevector(v, v, __VA_ARGS__)
#else
#define qt_shuffled(v, ...) __builtin_shuffle(v, (qt_ints){__VA_ARGS__})
#endif

/* The sum of all lanes. */
QT_INLINE float qt_sum(qt_floats v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#elif defined(__AVX__)
    float wide[QT_LANES];
    memcpy(wide, &v, sizeof v);
    __m256 eight = _mm256_add_ps(_mm256_loadu_ps(wide), _mm256_loadu_ps(wide + 8));
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
#else
    float parts[QT_LANES];
    memcpy(parts, &v, sizeof v);
    for (int half = QT_LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) parts[i] += parts[i + half];
    return parts[0];
#endif
}

/* exp(x), relative error below 2e-7; x below -87 gives what is next to nothing, above 88 a lot. */
QT_INLINE qt_floats qt_exp(qt_floats x) {
    const qt_floats low = qt_all(-87.0f), high = qt_all(88.0f);
    qt_ints under = x < low, over = x > high;
    x = (qt_floats)(((qt_ints)low & under) | ((qt_ints)x & ~under));
    x = (qt_floats)(((qt_ints)high & over) | ((qt_ints)x & ~over));
    const float shift = 12582912.0f; /* 1.5 * 2^23: adding it rounds to a whole number */
    qt_floats rounded = x * 1.44269504088896341f + shift;
    qt_ints power = (qt_ints)rounded - (qt_ints)qt_all(shift);
    rounded -= shift;
    qt_floats r = (x - rounded * 0.693359375f) + rounded * 2.12194440e-4f;
    qt_floats y = qt_all(1.9875691500e-4f);
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    return (qt_floats)((qt_ints)y + (power << 23));
}

QT_INLINE float qt_dot(const float *a, const float *b, int64_t n) {
    qt_floats first = {0}, second = {0};
    int64_t i = 0;
    for (; i + 2 * QT_LANES <= n; i += 2 * QT_LANES) {
        first += qt_load(a + i) * qt_load(b + i);
        second += qt_load(a + i + QT_LANES) * qt_load(b + i + QT_LANES);
    }
    float total = qt_sum(first + second);
    for (; i < n; i++) total += a[i] * b[i];
    return total;
}

/* y = x / rms(x) * weight */
QT_INLINE void qt_rms_norm(const float *x, const float *weight, float eps, int64_t n, float *y) {
    float scale = 1.0f / sqrtf(qt_dot(x, x, n) / (float)n + eps);
    for (int64_t i = 0; i < n; i++) y[i] = x[i] * scale * weight[i];
}

/* y = silu(gate) * up */
QT_INLINE void qt_silu_times(const float *gate, const float *up, int64_t n, float *y) {
    int64_t i = 0;
    for (; i + QT_LANES <= n; i += QT_LANES) {
        qt_floats g = qt_load(gate + i);
        qt_store(y + i, g / (1.0f + qt_exp(-g)) * qt_load(up + i));
    }
    for (; i < n; i++) y[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
}

/* Pairs (i, i + n / 2) turned by the angles whose n / 2 cosines, then sines, `turn` has. */
QT_INLINE void qt_rotate(float *x, const float *turn, int64_t n) {
    int64_t half = n / 2;
    for (int64_t i = 0; i < half; i++) {
        float first = x[i], second = x[i + half], cosine = turn[i], sine = turn[i + half];
        x[i] = first * cosine - second * sine;
        x[i + half] = second * cosine + first * sine;
    }
}

typedef enum { QT_FLOAT32, QT_FLOAT16, QT_BFLOAT16 } qt_dtype;

QT_INLINE float qt_half_to_float(uint16_t half) {
#if defined(__F16C__)
    return _cvtsh_ss(half);
#endif
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7fff, bits;
    if (rest >= 0x7c00) {
        bits = 0x7f800000u | (rest & 0x3ff) << 13;
    } else { /* as a number 2^112 too small, then scaled: right for subnormal ones as well */
        float scaled;
        bits = rest << 13;
        memcpy(&scaled, &bits, 4);
        scaled *= 5.192296858534828e33f;
        memcpy(&bits, &scaled, 4);
    }
    bits |= sign;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

QT_INLINE uint16_t qt_float_to_half(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    if (rest > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (rest >= 0x477ff000) return (uint16_t)(sign | 0x7c00);
    if (rest < 0x38800000) { /* subnormal: the adder rounds */
        float scaled;
        memcpy(&scaled, &rest, 4);
        scaled += 0.5f;
        memcpy(&bits, &scaled, 4);
        return (uint16_t)(sign | (bits - 0x3f000000));
    }
    rest += 0xc8000fff + (rest >> 13 & 1);
    return (uint16_t)(sign | rest >> 13);
}

QT_INLINE float qt_brain_to_float(uint16_t brain) {
    uint32_t bits = (uint32_t)brain << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

QT_INLINE uint16_t qt_float_to_brain(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* Sixteen float16 numbers. */
QT_INLINE qt_floats qt_halves(const void *source) {
    qt_floats wide;
#if defined(__AVX512F__)
    wide = (qt_floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)source));
#elif defined(__F16C__)
    const __m128i *halves = source;
    __m256 first = _mm256_cvtph_ps(_mm_loadu_si128(halves)), second = _mm256_cvtph_ps(_mm_loadu_si128(halves + 1));
    memcpy(&wide, &first, 32), memcpy((char *)&wide + 32, &second, 32);
#else
    const uint16_t *halves = source;
    for (int i = 0; i < QT_LANES; i++) wide[i] = qt_half_to_float(halves[i]);
#endif
    return wide;
}

/* n numbers of a dtype as floats. */
QT_INLINE void qt_widen(const void *source, qt_dtype dtype, int64_t n, float *target) {
    const uint16_t *words = source;
    if (dtype == QT_FLOAT32) {
        memcpy(target, source, (size_t)n * sizeof *target);
    } else if (dtype == QT_FLOAT16) {
        int64_t i = 0;
        for (; i + QT_LANES <= n; i += QT_LANES) qt_store(target + i, qt_halves(words + i));
        for (; i < n; i++) target[i] = qt_half_to_float(words[i]);
    } else {
        for (int64_t i = 0; i < n; i++) target[i] = qt_brain_to_float(words[i]);
    }
}

/* n floats as numbers of a dtype, rounded to the nearest. */
QT_INLINE void qt_narrow(const float *source, qt_dtype dtype, int64_t n, void *target) {
    uint16_t *words = target;
    int64_t i = 0;
    if (dtype == QT_FLOAT32) {
        memcpy(target, source, (size_t)n * sizeof *source);
    } else if (dtype == QT_FLOAT16) {
#if defined(__AVX512F__)
        for (; i + QT_LANES <= n; i += QT_LANES)
            _mm256_storeu_si256((__m256i *)(words + i), _mm512_cvtps_ph(_mm512_loadu_ps(source + i), 0));
#elif defined(__F16C__)
        for (; i + 8 <= n; i += 8)
            _mm_storeu_si128((__m128i *)(words + i), _mm256_cvtps_ph(_mm256_loadu_ps(source + i), 0));
#endif
        for (; i < n; i++) words[i] = qt_float_to_half(source[i]);
    } else {
        for (; i + QT_LANES <= n; i += QT_LANES) {
            typedef uint16_t halves __attribute__((vector_size(32)));
            qt_floats value = qt_load(source + i);
            qt_ints bits = (qt_ints)value, none = value != value;
            bits = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
            bits = (bits & ~none) | (none & 0x7fc0);
            halves narrow = __builtin_convertvector(bits, halves);
            memcpy(words + i, &narrow, sizeof narrow);
        }
        for (; i < n; i++) words[i] = qt_float_to_brain(source[i]);
    }
}

#endif
