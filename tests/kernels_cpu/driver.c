/* Runs the library on weights of odd shapes, for a compiler's sanitizers to watch; prints nothing. */
#include <stdio.h>
#include <stdlib.h>

#include "product.h"

int64_t qt_planes_size(qt_planes *w);
void qt_planes_pack(const qt_planes *, const uint32_t *, const uint16_t *, const uint16_t *, int64_t);
void qt_planes_rows(const qt_planes *, const int64_t *, int64_t, int64_t, int64_t, char *, int64_t);
int64_t qt_planes_room(const qt_planes *, int64_t);
void qt_planes_multiply(const qt_planes *, const float *, int64_t, char *, float *, int64_t);

static uint32_t state = 1;
static uint32_t some(void) { return state = state * 1664525u + 1013904223u; }

/* Exactly as many bytes as are needed, so that a read beyond them is found. */
static void *exactly(int64_t bytes) {
    void *place = NULL;
    if (posix_memalign(&place, 64, (size_t)bytes)) abort();
    memset(place, 0, (size_t)bytes);
    return place;
}

/* Of groups of inputs; of rows, where there are `panel_rows` in one. */
static int run(int64_t rows, int64_t inputs, int64_t group, int64_t bits, int64_t batch, int64_t threads,
               int64_t tables, int64_t panel_rows) {
    qt_planes w = {.rows = rows, .inputs = inputs, .group_size = group, .num_bits = bits, .panel_rows = panel_rows};
    w.centered = batch % 2;
    w.tables = tables;
    uint8_t *stream = exactly(qt_planes_size(&w));
    w.stream = stream;
    int64_t words = (inputs + 31) / 32, groups = rows * ((inputs + group - 1) / group), wrong = 0;
    if (panel_rows) groups = (rows + panel_rows - 1) / panel_rows * inputs;
    uint32_t *planes = exactly(bits * rows * words * 4);
    uint16_t *scales = exactly(bits * groups * 2), *offsets = exactly(groups * 2);
    for (int64_t i = 0; i < bits * rows * words; i++) planes[i] = some();
    for (int64_t i = 0; i < bits * groups; i++) scales[i] = qt_float_to_half((float)(some() % 99) / 99);
    for (int64_t i = 0; i < groups; i++) offsets[i] = qt_float_to_half((float)(some() % 9) / 2);
    qt_planes_pack(&w, planes, scales, batch % 3 ? offsets : NULL, threads);
    float *x = exactly(batch * inputs * 4), *y = exactly(batch * rows * 4), *dense = exactly(rows * inputs * 4);
    for (int64_t i = 0; i < batch * inputs; i++) x[i] = (float)(some() >> 8) / 8388608.0f - 1;
    char *room = exactly(qt_planes_room(&w, batch));
    qt_planes_multiply(&w, x, batch, room, y, threads);
    qt_planes_rows(&w, NULL, 0, rows, QT_FLOAT32, (char *)dense, threads);
    for (int64_t dtype = QT_FLOAT16; dtype <= QT_BFLOAT16; dtype++) {
        char *narrow = exactly(rows * inputs * 2);
        float wide;
        qt_planes_rows(&w, NULL, 0, rows, dtype, narrow, threads);
        for (int64_t i = 0; i < rows * inputs; i++) {
            qt_widen(narrow + 2 * i, (qt_dtype)dtype, 1, &wide);
            wrong += !(fabsf(wide - dense[i]) <= 0.004f * fabsf(dense[i]) + 1e-7f);
        }
        free(narrow);
    }
    for (int64_t b = 0; b < batch; b++)
        for (int64_t row = 0; row < rows; row++) {
            double sum = 0, terms = 0;
            for (int64_t i = 0; i < inputs; i++) {
                double term = (double)dense[row * inputs + i] * x[b * inputs + i];
                sum += term, terms += fabs(term);
            }
            wrong += !(fabs(y[b * rows + row] - sum) <= (tables == QT_INT8_TABLES ? 1e-2 : 1e-4) * (terms + 1));
        }
    free(stream), free(planes), free(scales), free(offsets), free(x), free(y), free(dense), free(room);
    return wrong > 0;
}

void qt_norm_rows(const char *x, const char *weight, double eps, int64_t rows, int64_t inputs,
                  int64_t dtype, char *y, int64_t threads);
void qt_gate_rows(const char *gate, const char *up, int64_t rows, int64_t inputs, int64_t dtype, char *y,
                  int64_t threads);

/* What stands between products of prompts: a row of ones normed, and gated by what it is. */
static int run_rows(int64_t rows, int64_t inputs, int64_t dtype, int64_t threads) {
    int wrong = 0;
    int64_t item = dtype == QT_FLOAT32 ? 4 : 2, all = rows * inputs;
    float one = 1.0f, value;
    char *x = exactly(all * item), *weight = exactly(inputs * item), *y = exactly(all * item);
    for (int64_t i = 0; i < all; i++) qt_narrow(&one, (qt_dtype)dtype, 1, x + i * item);
    memcpy(weight, x, (size_t)(inputs * item));
    qt_norm_rows(x, weight, 0.0, rows, inputs, dtype, y, threads);
    qt_gate_rows(x, y, rows, inputs, dtype, x, threads);
    for (int64_t i = 0; i < all; i++) {
        qt_widen(x + i * item, (qt_dtype)dtype, 1, &value);
        wrong += !(fabsf(value - 0.731f) <= 4e-3f);
    }
    free(x), free(weight), free(y);
    return wrong > 0;
}

int decode_steps(void); /* decode_driver.c */
int column_loops(void); /* columns_driver.c */
int group_solvers(void); /* groups_driver.c */

int main(void) {
    int wrong = decode_steps() + column_loops() + group_solvers();
    for (int64_t tables = QT_INT16_TABLES; tables <= QT_FLOAT32_TABLES; tables++) {
        wrong += run(1, 1, 1, 1, 1, 1, tables, 0);
        wrong += run(31, 31, 31, 8, 2, 2, tables, 0);
        wrong += run(33, 65, 64, 3, 3, 3, tables, 0);
        wrong += run(100, 576, 128, 4, 5, 2, tables, 0);
        wrong += run(2100, 1300, 512, 2, 1, 2, tables, 0);
        wrong += run(70, 2048, 16, 3, 7, 1, tables, 0);
        wrong += run(1, 1, 1, 1, 1, 1, tables, 1);
        wrong += run(100, 67, 67, 8, 2, 2, tables, 64);
        wrong += run(330, 545, 512, 3, 5, 2, tables, 300);
        wrong += run(90, 544, 512, 2, 3, 3, tables, 16);
    }
    for (int64_t dtype = QT_FLOAT32; dtype <= QT_BFLOAT16; dtype++) wrong += run_rows(5, 257, dtype, 2);
    return wrong;
}
