/* Products of a decoding step: packed weights by `linear.h`, dense ones by dot products. */
#ifndef QT_PRODUCT_H
#define QT_PRODUCT_H

#include "decode.h"
#include "team.h"
#include "vectors.h"

#define QT_ROWS 4 /* of a dense weight that read x together */

typedef struct {
    const float *x; /* (batch, inputs) */
    char *tables;
    int64_t inputs, batch;
} qt_input;

static int64_t qt_input_bytes(int64_t inputs, int64_t batch) { (void)inputs; (void)batch; return 64; }
static int qt_input_is_shared(const qt_projection *parts, int64_t count) { (void)parts; (void)count; return 0; }
static void qt_input_make(const qt_input *input, int64_t thread, int64_t threads) {
    (void)input; (void)thread; (void)threads;
}

QT_INLINE float qt_dot_with(const void *row, qt_dtype dtype, const float *x, int64_t n) {
    if (dtype == QT_FLOAT32) return qt_dot(row, x, n);
    float wide[8 * QT_LANES], total = 0.0f;
    for (int64_t i = 0; i < n; i += 8 * QT_LANES) {
        int64_t count = n - i < 8 * QT_LANES ? n - i : 8 * QT_LANES;
        qt_widen((const char *)row + 2 * i, dtype, count, wide);
        total += qt_dot(wide, x + i, count);
    }
    return total;
}

static void qt_multiply_dense(const qt_input *in, const qt_projection *w, float *y, int64_t stride,
                              int add, int64_t begin, int64_t end) {
    int64_t item = w->dtype == QT_FLOAT32 ? 4 : 2;
    for (int64_t row = begin; row < end; row++) {
        const char *weights = (const char *)w->dense + row * w->inputs * item;
        for (int64_t b = 0; b < in->batch; b++) {
            float value = qt_dot_with(weights, (qt_dtype)w->dtype, in->x + b * w->inputs, w->inputs);
            y[b * stride + row] = add ? y[b * stride + row] + value : value;
        }
    }
}

static void qt_multiply(const qt_input *in, const qt_projection *w, float *y, int64_t stride, int add,
                        int64_t thread, int64_t threads) {
    qt_multiply_dense(in, w, y, stride, add, w->rows * thread / threads, w->rows * (thread + 1) / threads);
}

static void qt_row(const qt_projection *w, int64_t row, float *y) {
    int64_t item = w->dtype == QT_FLOAT32 ? 4 : 2;
    qt_widen((const char *)w->dense + row * w->inputs * item, (qt_dtype)w->dtype, w->inputs, y);
}

#endif
