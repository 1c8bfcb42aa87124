/* Sums of table entries over the chunks of a plane, for the 32 rows of a tile: what each kind of processor
   does its own way, and where in the 128 bytes of a chunk the keys of a row then are. */
#ifndef QT_SUMS_H
#define QT_SUMS_H

#include "vectors.h"

#define QT_TILE_ROWS 32
#define QT_CHUNK 32        /* inputs: byte q of a row has the keys of inputs 4 q .. and 16 + 4 q .. */
#define QT_CHUNK_BYTES 128 /* of 32 rows */
#define QT_CHUNK_TABLE 256 /* bytes of a chunk's tables: of inputs 0 .. 15 lower bytes, upper ones; of 16 .. */
#define QT_MOST_TOKENS 4   /* that read keys together */

/* What tables have: sums of 16 bits; of 8, which are those of 16 whose lower bytes are zero and aren't
   read; or floats, 32 of them per pair of sets, which round nothing and take no part in what is below. */
typedef enum { QT_INT16_TABLES, QT_INT8_TABLES, QT_FLOAT32_TABLES } qt_table_kind;

#if defined(__AVX512VBMI__) && defined(__AVX512VNNI__)
#include <immintrin.h>

/* A lane of 32 bits has the four bytes of a row; each looks into a quarter of 64 entries. */
#define QT_HIGH_BIAS 0
QT_INLINE int64_t qt_key_place(int64_t row, int64_t q) { return 4 * row + q; }

QT_INLINE void qt_sum_plane(const uint8_t *keys, int64_t chunks, const int8_t *const *entries,
                            const int batch, const int kind, qt_floats (*sums)[2]) {
    const __m512i nibble = _mm512_set1_epi8(15), quarter = _mm512_set1_epi32(0x30201000);
    const __m512i ones = _mm512_set1_epi8(1);
    __m512i low[QT_MOST_TOKENS][2], high[QT_MOST_TOKENS][2];
#pragma GCC unroll 4
    for (int b = 0; b < batch; b++)
        low[b][0] = low[b][1] = high[b][0] = high[b][1] = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int64_t c = 0; c < chunks; c++, keys += QT_CHUNK_BYTES) {
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            __m512i both = _mm512_loadu_si512(keys + 64 * half);
            __m512i first = _mm512_ternarylogic_epi32(both, nibble, quarter, 0xea);
            __m512i second = _mm512_ternarylogic_epi32(_mm512_srli_epi32(both, 4), nibble, quarter, 0xea);
#pragma GCC unroll 4
            for (int b = 0; b < batch; b++) {
                const int8_t *table = entries[b] + c * QT_CHUNK_TABLE;
                __m512i v;
                if (kind == QT_INT16_TABLES) {
                    v = _mm512_permutexvar_epi8(first, _mm512_load_si512(table));
                    low[b][half] = _mm512_dpbusd_epi32(low[b][half], v, ones);
                    v = _mm512_permutexvar_epi8(second, _mm512_load_si512(table + 128));
                    low[b][half] = _mm512_dpbusd_epi32(low[b][half], v, ones);
                }
                v = _mm512_permutexvar_epi8(first, _mm512_load_si512(table + 64));
                high[b][half] = _mm512_dpbusd_epi32(high[b][half], ones, v);
                v = _mm512_permutexvar_epi8(second, _mm512_load_si512(table + 192));
                high[b][half] = _mm512_dpbusd_epi32(high[b][half], ones, v);
            }
        }
    }
#pragma GCC unroll 4
    for (int b = 0; b < batch; b++)
        for (int half = 0; half < 2; half++)
            sums[b][half] = (qt_floats)_mm512_cvtepi32_ps(
                _mm512_add_epi32(low[b][half], _mm512_slli_epi32(high[b][half], 8)));
}

#elif defined(__AVX2__)
#include <immintrin.h>

/* A vector has byte q of all rows; upper bytes of entries are made positive. Sums are of 16 bits: of
   all bytes times 1 or 256, and of those of odd rows; 256 entries fit, twice as many as there are. */
#define QT_HIGH_BIAS 128
QT_INLINE int64_t qt_key_place(int64_t row, int64_t q) { return 32 * q + row; }

typedef struct {
    __m256i all, odd;
} qt_pairs;

QT_INLINE qt_pairs qt_add_entries(qt_pairs sum, const int8_t *entries, __m256i keys) {
    __m256i table = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *)entries));
    __m256i v = _mm256_shuffle_epi8(table, keys);
    sum.all = _mm256_add_epi16(sum.all, v);
    sum.odd = _mm256_add_epi16(sum.odd, _mm256_srli_epi16(v, 8));
    return sum;
}

/* Sums of 16 bits: of even rows in .all, of odd ones in .odd */
QT_INLINE qt_pairs qt_take_apart(qt_pairs sum) {
    sum.all = _mm256_sub_epi16(sum.all, _mm256_slli_epi16(sum.odd, 8));
    return sum;
}

QT_INLINE void qt_join_pairs(qt_pairs low, qt_pairs high, int64_t bias, float *sums) {
    const __m256i zero = _mm256_setzero_si256(), less = _mm256_set1_epi32((int)bias);
    low = qt_take_apart(low), high = qt_take_apart(high);
#pragma GCC unroll 2
    for (int upper = 0; upper < 2; upper++) { /* of the lower and the upper 8 of each 16 rows */
        __m256i l = upper ? _mm256_unpackhi_epi16(low.all, low.odd) : _mm256_unpacklo_epi16(low.all, low.odd);
        __m256i h = upper ? _mm256_unpackhi_epi16(high.all, high.odd)
                          : _mm256_unpacklo_epi16(high.all, high.odd);
        __m256i even = _mm256_add_epi32(_mm256_unpacklo_epi16(l, zero),
                                        _mm256_slli_epi32(_mm256_unpacklo_epi16(h, zero), 8));
        __m256i odd = _mm256_add_epi32(_mm256_unpackhi_epi16(l, zero),
                                       _mm256_slli_epi32(_mm256_unpackhi_epi16(h, zero), 8));
        __m256 a = _mm256_cvtepi32_ps(_mm256_sub_epi32(even, less)); /* rows 0 .. 3 and 16 .. 19, + 8 */
        __m256 b = _mm256_cvtepi32_ps(_mm256_sub_epi32(odd, less));  /* rows 4 .. 7 and 20 .. 23, + 8 */
        _mm256_storeu_ps(sums + 8 * upper, _mm256_permute2f128_ps(a, b, 0x20));
        _mm256_storeu_ps(sums + 16 + 8 * upper, _mm256_permute2f128_ps(a, b, 0x31));
    }
}

QT_INLINE void qt_sum_plane(const uint8_t *keys, int64_t chunks, const int8_t *const *entries,
                            const int batch, const int kind, qt_floats (*sums)[2]) {
    const __m256i nibble = _mm256_set1_epi8(15), zero = _mm256_setzero_si256();
    qt_pairs low[QT_MOST_TOKENS], high[QT_MOST_TOKENS];
#pragma GCC unroll 4
    for (int b = 0; b < batch; b++) low[b] = high[b] = (qt_pairs){zero, zero};
    for (int64_t c = 0; c < chunks; c++, keys += QT_CHUNK_BYTES) {
#pragma GCC unroll 4
        for (int q = 0; q < 4; q++) {
            __m256i both = _mm256_loadu_si256((const __m256i *)(keys + 32 * q));
            __m256i first = _mm256_and_si256(both, nibble);
            __m256i second = _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble);
#pragma GCC unroll 4
            for (int b = 0; b < batch; b++) {
                const int8_t *table = entries[b] + c * QT_CHUNK_TABLE + 16 * q;
                if (kind == QT_INT16_TABLES) {
                    low[b] = qt_add_entries(low[b], table, first);
                    low[b] = qt_add_entries(low[b], table + 128, second);
                }
                high[b] = qt_add_entries(high[b], table + 64, first);
                high[b] = qt_add_entries(high[b], table + 192, second);
            }
        }
    }
#pragma GCC unroll 4
    for (int b = 0; b < batch; b++) qt_join_pairs(low[b], high[b], chunks * 8 * 256 * 128, (float *)sums[b]);
}

#elif defined(__ARM_NEON)
#include <arm_neon.h>

#define QT_HIGH_BIAS 0
QT_INLINE int64_t qt_key_place(int64_t row, int64_t q) { return 32 * q + row; }

/* Of 16 rows, for one input vector. */
QT_INLINE void qt_sum_rows(const uint8_t *keys, int64_t chunks, const int8_t *table, float *sums) {
    uint16x8_t low[2] = {vdupq_n_u16(0), vdupq_n_u16(0)};
    int16x8_t high[2] = {vdupq_n_s16(0), vdupq_n_s16(0)};
    for (int64_t c = 0; c < chunks; c++, keys += QT_CHUNK_BYTES, table += QT_CHUNK_TABLE)
        for (int q = 0; q < 8; q++) {
            uint8x16_t both = vld1q_u8(keys + q % 4 * 32);
            uint8x16_t key = q < 4 ? vandq_u8(both, vdupq_n_u8(15)) : vshrq_n_u8(both, 4);
            const int8_t *entries = table + q / 4 * 128 + q % 4 * 16;
            uint8x16_t l = vqtbl1q_u8(vreinterpretq_u8_s8(vld1q_s8(entries)), key);
            int8x16_t h = vqtbl1q_s8(vld1q_s8(entries + 64), key);
            low[0] = vaddw_u8(low[0], vget_low_u8(l)), low[1] = vaddw_u8(low[1], vget_high_u8(l));
            high[0] = vaddw_s8(high[0], vget_low_s8(h)), high[1] = vaddw_s8(high[1], vget_high_s8(h));
        }
    for (int i = 0; i < 2; i++) {
        int32x4_t a = vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(low[i])));
        int32x4_t b = vreinterpretq_s32_u32(vmovl_u16(vget_high_u16(low[i])));
        a = vaddq_s32(a, vshlq_n_s32(vmovl_s16(vget_low_s16(high[i])), 8));
        b = vaddq_s32(b, vshlq_n_s32(vmovl_s16(vget_high_s16(high[i])), 8));
        vst1q_f32(sums + 8 * i, vcvtq_f32_s32(a)), vst1q_f32(sums + 8 * i + 4, vcvtq_f32_s32(b));
    }
}

QT_INLINE void qt_sum_plane(const uint8_t *keys, int64_t chunks, const int8_t *const *entries,
                            const int batch, const int kind, qt_floats (*sums)[2]) {
    (void)kind;
    for (int b = 0; b < batch; b++)
        for (int half = 0; half < 2; half++)
            qt_sum_rows(keys + 16 * half, chunks, entries[b], (float *)&sums[b][half]);
}

#else

#define QT_HIGH_BIAS 0
QT_INLINE int64_t qt_key_place(int64_t row, int64_t q) { return 32 * q + row; }

QT_INLINE void qt_sum_plane(const uint8_t *keys, int64_t chunks, const int8_t *const *entries,
                            const int batch, const int kind, qt_floats (*sums)[2]) {
    int32_t all[QT_MOST_TOKENS][QT_TILE_ROWS];
    (void)kind;
    memset(all, 0, sizeof all);
    for (int64_t c = 0; c < chunks; c++, keys += QT_CHUNK_BYTES)
        for (int b = 0; b < batch; b++)
            for (int q = 0; q < 4; q++) {
                int16_t sets[2][16]; /* whole entries */
                const int8_t *table = entries[b] + c * QT_CHUNK_TABLE + 16 * q;
                for (int i = 0; i < 32; i++) {
                    const int8_t *entry = table + i / 16 * 128 + i % 16;
                    sets[i / 16][i % 16] = (int16_t)((uint8_t)entry[0] + 256 * entry[64]);
                }
                for (int row = 0; row < QT_TILE_ROWS; row++) {
                    int both = keys[32 * q + row];
                    all[b][row] += sets[0][both & 15] + sets[1][both >> 4];
                }
            }
    for (int b = 0; b < batch; b++)
        for (int row = 0; row < QT_TILE_ROWS; row++) sums[b][row / 16][row % 16] = (float)all[b][row];
}
#endif

/* Sums of floats, of one input vector: of each chunk eight sets of 16, those of inputs 0 .. 15 first. */
QT_INLINE void qt_add_floats(const uint8_t *keys, int64_t chunks, const float *entries, qt_floats *sums) {
    sums[0] = sums[1] = qt_all(0.0f);
#if defined(__AVX512VBMI__) && defined(__AVX512VNNI__)
    for (int64_t c = 0; c < chunks; c++, keys += QT_CHUNK_BYTES, entries += 128)
        for (int half = 0; half < 2; half++) {
            __m512i both = _mm512_loadu_si512(keys + 64 * half);
            for (int set = 0; set < 8; set++) { /* a lookup sees four bits of a lane alone */
                __m512i key = _mm512_srlv_epi32(both, _mm512_set1_epi32(set % 4 * 8 + set / 4 * 4));
                sums[half] += (qt_floats)_mm512_permutexvar_ps(key, _mm512_loadu_ps(entries + 16 * set));
            }
        }
#else
    for (int64_t c = 0; c < chunks; c++, keys += QT_CHUNK_BYTES, entries += 128)
        for (int q = 0; q < 4; q++)
            for (int row = 0; row < QT_TILE_ROWS; row++) {
                int both = keys[qt_key_place(row, q)];
                sums[row / 16][row % 16] += entries[16 * q + (both & 15)] + entries[64 + 16 * q + (both >> 4)];
            }
#endif
}

#endif
