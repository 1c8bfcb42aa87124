/* Attention of new tokens over a cache: each thread takes a part of the positions of all heads. */
#ifndef QT_ATTENTION_H
#define QT_ATTENTION_H

#include "vectors.h"

#define QT_TILE 64 /* positions whose keys and values stay in the first-level cache */

/* What one part of the positions gives a head: sum over e^(score - highest) * value. */
typedef struct {
    float highest, total;
} qt_part;

/* scores[i] = scale * query . keys[i] of one head */
QT_INLINE void qt_score(const float *query, const float *keys, int64_t count, int64_t dim,
                        float scale, float *scores) {
    for (int64_t i = 0; i < count; i++) scores[i] = scale * qt_dot(query, keys + i * dim, dim);
}

/* sum[j] = sum[j] * shrink + sum over i of weights[i] * values[i][j] */
QT_INLINE void qt_mix(const float *weights, const float *values, int64_t count, int64_t dim,
                      float shrink, float *sum) {
    int64_t j = 0;
    for (; j + 4 * QT_LANES <= dim; j += 4 * QT_LANES) {
        qt_floats a = qt_load(sum + j) * shrink, b = qt_load(sum + j + 16) * shrink;
        qt_floats c = qt_load(sum + j + 32) * shrink, d = qt_load(sum + j + 48) * shrink;
        for (int64_t i = 0; i < count; i++) {
            const float *value = values + i * dim + j;
            a += weights[i] * qt_load(value), b += weights[i] * qt_load(value + 16);
            c += weights[i] * qt_load(value + 32), d += weights[i] * qt_load(value + 48);
        }
        qt_store(sum + j, a), qt_store(sum + j + 16, b);
        qt_store(sum + j + 32, c), qt_store(sum + j + 48, d);
    }
    for (; j < dim; j++) {
        float total = sum[j] * shrink;
        for (int64_t i = 0; i < count; i++) total += weights[i] * values[i * dim + j];
        sum[j] = total;
    }
}

/* One tile more of one head; `scores` has room for a whole tile. */
QT_INLINE void qt_attend_tile(const float *query, const float *keys, const float *values,
                              int64_t count, int64_t dim, float scale, float *scores,
                              qt_part *part, float *sum) {
    qt_score(query, keys, count, dim, scale, scores);
    float highest = part->highest;
    for (int64_t i = 0; i < count; i++) highest = scores[i] > highest ? scores[i] : highest;
    for (int64_t i = count; i < QT_TILE; i++) scores[i] = -INFINITY;
    qt_floats total = {0};
    for (int64_t i = 0; i < QT_TILE; i += QT_LANES) {
        qt_ints there = qt_load(scores + i) > -INFINITY;
        qt_floats weights = qt_exp(qt_load(scores + i) - highest);
        weights = (qt_floats)((qt_ints)weights & there);
        qt_store(scores + i, weights);
        total += weights;
    }
    float shrink = part->total > 0.0f ? expf(part->highest - highest) : 0.0f;
    part->total = part->total * shrink + qt_sum(total);
    part->highest = highest;
    qt_mix(scores, values, count, dim, shrink, sum);
}

/* Positions begin .. end - 1 for the `group` heads that share keys and values.

   queries (group, dim); keys, values (positions, dim) of `dtype`; parts (group); sums (group, dim);
   room for 2 * QT_TILE * dim + QT_TILE floats. */
QT_INLINE void qt_attend_part(const float *queries, const char *keys, const char *values,
                              qt_dtype dtype, int64_t begin, int64_t end, int64_t group,
                              int64_t dim, float scale, qt_part *parts, float *sums,
                              float *room) {
    float *wide_keys = room, *wide_values = room + QT_TILE * dim, *scores = wide_values + QT_TILE * dim;
    int64_t item = dtype == QT_FLOAT32 ? 4 : 2;
    for (int64_t head = 0; head < group; head++) parts[head] = (qt_part){-INFINITY, 0.0f};
    memset(sums, 0, (size_t)(group * dim) * sizeof *sums);
    for (int64_t first = begin; first < end; first += QT_TILE) {
        int64_t count = end - first < QT_TILE ? end - first : QT_TILE;
        const char *k = keys + first * dim * item, *v = values + first * dim * item;
        if (dtype != QT_FLOAT32) {
            qt_widen(k, dtype, count * dim, wide_keys);
            qt_widen(v, dtype, count * dim, wide_values);
            k = (const char *)wide_keys, v = (const char *)wide_values;
        }
        for (int64_t head = 0; head < group; head++)
            qt_attend_tile(queries + head * dim, (const float *)k, (const float *)v, count, dim,
                           scale, scores, parts + head, sums + head * dim);
    }
}

/* output (dim) of a head, of what `count` threads have of it, `stride` parts apart. */
QT_INLINE void qt_merge_parts(const qt_part *parts, const float *sums, int64_t count,
                              int64_t stride, int64_t dim, float *output) {
    float highest = -INFINITY, total = 0.0f;
    for (int64_t i = 0; i < count; i++)
        if (parts[i * stride].total > 0.0f && parts[i * stride].highest > highest)
            highest = parts[i * stride].highest;
    memset(output, 0, (size_t)dim * sizeof *output);
    for (int64_t i = 0; i < count; i++) {
        if (parts[i * stride].total <= 0.0f) continue;
        float factor = expf(parts[i * stride].highest - highest);
        total += factor * parts[i * stride].total;
        for (int64_t j = 0; j < dim; j++) output[j] += factor * sums[i * stride * dim + j];
    }
    for (int64_t j = 0; j < dim && total > 0.0f; j++) output[j] /= total; /* nobody there: zeros */
}

#endif
