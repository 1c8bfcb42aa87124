/* Entries of tables: sums of four inputs with all their signs, as what lookups read. */
#ifndef QT_ENTRIES_H
#define QT_ENTRIES_H

#include "sums.h"

#define QT_ROUNDS 12582912.0f /* 1.5 * 2^23: where it was added, lower bits are the nearest whole number */

/* Sixteen sums of four inputs. */
QT_INLINE qt_floats qt_sums_of_four(const float *x) {
    static const qt_floats s0 = {-1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1};
    static const qt_floats s1 = {-1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1};
    static const qt_floats s2 = {-1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1};
    static const qt_floats s3 = {-1, -1, -1, -1, -1, -1, -1, -1, 1, 1, 1, 1, 1, 1, 1, 1};
    return x[0] * s0 + x[1] * s1 + x[2] * s2 + x[3] * s3;
}

/* Four sets of sums of x (16), rounded to the nearest, times 2^shift: lower bytes (4, 16), then upper ones. */
QT_INLINE void qt_put_sets(const float *x, const int shift, int8_t *entries) {
#if defined(__AVX512VBMI__) && defined(__AVX512VNNI__)
    typedef int8_t bytes __attribute__((vector_size(64)));
    static const bytes places = {0,  4,  8,  12, 16, 20, 24,  28,  32,  36,  40,  44,  48,  52,  56,  60,
                                 64, 68, 72, 76, 80, 84, 88,  92,  96,  100, 104, 108, 112, 116, 120, 124,
                                 1,  5,  9,  13, 17, 21, 25,  29,  33,  37,  41,  45,  49,  53,  57,  61,
                                 65, 69, 73, 77, 81, 85, 89,  93,  97,  101, 105, 109, 113, 117, 121, 125};
    __m512i sums[4], two[2];
#pragma GCC unroll 4
    for (int set = 0; set < 4; set++) {
        sums[set] = (__m512i)(qt_sums_of_four(x + 4 * set) + QT_ROUNDS);
        if (shift) sums[set] = _mm512_slli_epi32(sums[set], (unsigned)shift);
    }
    for (int i = 0; i < 2; i++) two[i] = _mm512_permutex2var_epi8(sums[2 * i], (__m512i)places, sums[2 * i + 1]);
    _mm512_storeu_si512(entries, _mm512_shuffle_i64x2(two[0], two[1], 0x44));
    _mm512_storeu_si512(entries + 64, _mm512_shuffle_i64x2(two[0], two[1], 0xee));
#elif defined(__AVX2__)
    const __m256 s1 = _mm256_setr_ps(-1, 1, -1, 1, -1, 1, -1, 1), s2 = _mm256_setr_ps(-1, -1, 1, 1, -1, -1, 1, 1);
    const __m256 s3 = _mm256_setr_ps(-1, -1, -1, -1, 1, 1, 1, 1), rounds = _mm256_set1_ps(QT_ROUNDS);
#pragma GCC unroll 4
    for (int set = 0; set < 4; set++, x += 4, entries += 16) { /* sums of even numbers, then odd ones */
        __m256 three = _mm256_mul_ps(_mm256_set1_ps(x[1]), s1), first = _mm256_set1_ps(x[0]);
        three = _mm256_fmadd_ps(_mm256_set1_ps(x[2]), s2, three);
        three = _mm256_fmadd_ps(_mm256_set1_ps(x[3]), s3, three);
        __m256i even = _mm256_castps_si256(_mm256_add_ps(_mm256_sub_ps(three, first), rounds));
        __m256i odd = _mm256_castps_si256(_mm256_add_ps(_mm256_add_ps(three, first), rounds));
        __m256i sums = _mm256_blend_epi16(even, _mm256_slli_epi32(odd, 16), 0xaa);
        if (shift) sums = _mm256_slli_epi16(sums, shift);
        __m256i low = _mm256_and_si256(sums, _mm256_set1_epi16(255));
        __m256i high = _mm256_xor_si256(_mm256_srli_epi16(sums, 8), _mm256_set1_epi16(QT_HIGH_BIAS));
        sums = _mm256_permute4x64_epi64(_mm256_packus_epi16(low, high), 0xd8);
        _mm_storeu_si128((__m128i *)entries, _mm256_castsi256_si128(sums));
        _mm_storeu_si128((__m128i *)(entries + 64), _mm256_extracti128_si256(sums, 1));
    }
#else
    typedef int8_t bytes __attribute__((vector_size(16)));
    for (int set = 0; set < 4; set++, x += 4, entries += 16) {
        qt_ints whole = ((qt_ints)(qt_sums_of_four(x) + QT_ROUNDS) - 0x4B400000) << shift;
        bytes low = __builtin_convertvector(whole, bytes);
        bytes high = __builtin_convertvector((whole >> 8) + QT_HIGH_BIAS, bytes);
        memcpy(entries, &low, 16);
        memcpy(entries + 64, &high, 16);
    }
#endif
}

/* The largest sum of magnitudes of four inputs, and the sum of all. */
QT_INLINE float qt_look_at_inputs(const float *x, int64_t count, float *sum) {
    qt_floats most = {0}, all = {0};
    float lanes[QT_LANES] = {0}, largest = 0.0f;
    for (int64_t i = 0; i < count; i += QT_LANES) {
        qt_floats v;
        if (count - i < QT_LANES) memcpy(lanes, x + i, (size_t)(count - i) * 4);
        v = qt_load(count - i < QT_LANES ? lanes : x + i);
        all += v;
        v = (qt_floats)((qt_ints)v & 0x7fffffff);
        v += qt_shuffled(v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
        v += qt_shuffled(v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
        qt_ints more = v > most;
        most = (qt_floats)(((qt_ints)v & more) | ((qt_ints)most & ~more));
    }
    *sum = qt_sum(all);
    qt_store(lanes, most);
    for (int i = 0; i < QT_LANES; i += 4) largest = lanes[i] > largest ? lanes[i] : largest;
    return largest;
}

/* Entries of a group of `count` inputs, (chunks of 32, ...): their scale, and the sum of all inputs. */
QT_INLINE float qt_put_group(const float *x, int64_t count, const int kind, int8_t *entries, float *sum) {
    const int shift = kind == QT_INT8_TABLES ? 8 : 0;
    const float largest = shift ? 127.0f : 32767.0f, most = qt_look_at_inputs(x, count, sum);
    const float inverse = kind == QT_FLOAT32_TABLES ? 1.0f : most > 0.0f ? largest / most : 0.0f;
    for (int64_t c = 0; c < count; c += QT_CHUNK) {
        float scaled[QT_CHUNK] = {0};
        int64_t left = count - c;
        if (left >= QT_CHUNK)
            for (int64_t i = 0; i < QT_CHUNK; i++) scaled[i] = x[c + i] * inverse;
        else
            for (int64_t i = 0; i < left; i++) scaled[i] = x[c + i] * inverse;
        if (kind == QT_FLOAT32_TABLES) {
            for (int64_t i = 0; i < QT_CHUNK; i += 4, entries += 64)
                qt_store((float *)(void *)entries, qt_sums_of_four(scaled + i));
            continue;
        }
        qt_put_sets(scaled, shift, entries);
        qt_put_sets(scaled + 16, shift, entries + QT_CHUNK_TABLE / 2);
        entries += QT_CHUNK_TABLE;
    }
    return kind == QT_FLOAT32_TABLES ? 1.0f : most / (largest * (float)(1 << shift));
}

#endif
