/* Numbers of a weight of planes: what its keys and scales say, sixteen inputs at a time. */
#ifndef QT_WIDEN_H
#define QT_WIDEN_H

#include "sums.h"

/* The lower four bits of each byte, one after the other. */
QT_INLINE int32_t qt_lower_halves(uint32_t four) {
#if defined(__AVX512F__) && defined(__BMI2__)
    return (int32_t)_pext_u32(four, 0x0f0f0f0f);
#endif
    return (int32_t)((four & 0xf) | (four >> 4 & 0xf0) | (four >> 8 & 0xf00) | (four >> 12 & 0xf000));
}

/* sum + scale where a bit of `signs` is one, sum - scale elsewhere. */
QT_INLINE qt_floats qt_add_signed(qt_floats sum, int32_t signs, float scale) {
#if defined(__AVX512F__)
    __m512 all = _mm512_set1_ps(scale), old = (__m512)sum;
    return (qt_floats)_mm512_mask_add_ps(_mm512_sub_ps(old, all), (__mmask16)signs, old, all);
#endif
    const qt_ints bit = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
    qt_ints minus = ((bit & signs) == 0) & INT32_MIN;
    return sum + (qt_floats)((qt_ints)qt_all(scale) ^ minus);
}

/* The numbers of one row of a tile in one group, (count) floats.

   keys (num_bits, chunks, QT_CHUNK_BYTES); scales (num_bits). */
QT_INLINE void qt_widen_group(const uint8_t *keys, int64_t chunks, int64_t num_bits, int64_t in_tile,
                              const float *scales, float offset, int64_t count, float *y) {
    for (int64_t c = 0; c < chunks; c++, count -= QT_CHUNK, y += QT_CHUNK) {
        qt_floats first = qt_all(offset), second = first;
        float last[QT_CHUNK], *target = count < QT_CHUNK ? last : y;
        for (int64_t p = 0; p < num_bits; p++) {
            const uint8_t *chunk = keys + (p * chunks + c) * QT_CHUNK_BYTES;
            uint32_t four = 0;
            for (int q = 0; q < 4; q++) four |= (uint32_t)chunk[qt_key_place(in_tile, q)] << 8 * q;
            first = qt_add_signed(first, qt_lower_halves(four), scales[p]);
            second = qt_add_signed(second, qt_lower_halves(four >> 4), scales[p]);
        }
        qt_store(target, first), qt_store(target + QT_LANES, second);
        if (count < QT_CHUNK) memcpy(y, last, (size_t)count * sizeof *y);
    }
}

#endif
