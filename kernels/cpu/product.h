/* Products of a decoding step: weights of planes by tables, dense ones by dot products. */
#ifndef QT_PRODUCT_H
#define QT_PRODUCT_H

#include "decode.h"
#include "panels.h"
#include "team.h"

#define QT_OWN_TABLES 65536 /* bytes of tables that each thread sooner makes than waits for */

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

/* Rows begin .. end - 1 of a dense weight times x (batch, inputs). */
static inline void qt_multiply_dense(const qt_projection *w, const float *x, int64_t batch, float *y,
                                     int64_t stride, int add, int64_t begin, int64_t end) {
    int64_t item = w->dtype == QT_FLOAT32 ? 4 : 2;
    for (int64_t row = begin; row < end; row++) {
        const char *weights = (const char *)w->dense + row * w->inputs * item;
        for (int64_t b = 0; b < batch; b++) {
            float value = qt_dot_with(weights, (qt_dtype)w->dtype, x + b * w->inputs, w->inputs);
            y[b * stride + row] = add ? y[b * stride + row] + value : value;
        }
    }
}

/* Writes rows row .. row + count - 1 of a tile, or adds them, for each of a batch. */
QT_INLINE void qt_put_tile(const qt_planes *w, const qt_floats (*tile)[2], int64_t row, int64_t count,
                           int64_t batch, float *y, int64_t stride, int add) {
    for (int64_t b = 0; b < batch; b++, y += stride) {
        float values[QT_TILE_ROWS];
        qt_store(values, tile[b][0]), qt_store(values + QT_LANES, tile[b][1]);
        for (int64_t i = 0; i < count; i++) {
            float *place = y + (w->places ? w->places[row + i] : row + i);
            *place = add ? *place + values[i] : values[i];
        }
    }
}

/* `count` tiles of one block times `batch` tables, by code for that number and what they have. Never inlined:
   gcc keeps sums differently where it sees that they're a caller's own, and loses 15 % at 4 planes. */
static __attribute__((noinline, unused)) void qt_multiply_some(const qt_planes *w, int64_t first, int64_t count, const qt_tables *tables,
                                    int64_t batch, qt_floats (*y)[2]) {
    if (w->tables == QT_INT16_TABLES && batch == 1)
        qt_multiply_tiles(w, first, count, tables, 1, QT_INT16_TABLES, y);
    else if (w->tables == QT_INT16_TABLES && batch == 2)
        qt_multiply_tiles(w, first, count, tables, 2, QT_INT16_TABLES, y);
    else if (w->tables == QT_INT16_TABLES)
        qt_multiply_tiles(w, first, count, tables, 4, QT_INT16_TABLES, y);
    else if (w->tables == QT_INT8_TABLES && batch == 1)
        qt_multiply_tiles(w, first, count, tables, 1, QT_INT8_TABLES, y);
    else if (w->tables == QT_INT8_TABLES && batch == 2)
        qt_multiply_tiles(w, first, count, tables, 2, QT_INT8_TABLES, y);
    else if (w->tables == QT_INT8_TABLES)
        qt_multiply_tiles(w, first, count, tables, 4, QT_INT8_TABLES, y);
    else
        qt_multiply_tiles(w, first, count, tables, 1, QT_FLOAT32_TABLES, y);
}

/* Tiles begin .. end - 1 of a weight of planes, by tables `apart` bytes apart. */
static inline void qt_multiply_planes(const qt_planes *w, const char *place, int64_t apart, int64_t batch,
                                      float *y, int64_t stride, int add, int64_t begin, int64_t end) {
    qt_tables tables[QT_MOST_TOKENS];
    qt_floats values[QT_TOGETHER * QT_MOST_TOKENS][2];
    for (int64_t tile = begin, count; tile < end; tile += count) {
        count = w->together - tile % w->together; /* to the end of the block */
        count = end - tile < count ? end - tile : count;
        for (int64_t b = 0, tokens; b < batch; b += tokens) {
            tokens = batch - b >= 4 ? 4 : batch - b >= 2 ? 2 : 1;
            if (w->tables == QT_FLOAT32_TABLES) tokens = 1;
            for (int64_t i = 0; i < tokens; i++) tables[i] = qt_tables_at(w, place + (b + i) * apart);
            qt_multiply_some(w, tile, count, tables, tokens, values);
            for (int64_t t = 0; t < count; t++) {
                int64_t row = (tile + t) * QT_TILE_ROWS, left = w->rows - row;
                qt_put_tile(w, values + t * tokens, row, left < QT_TILE_ROWS ? left : QT_TILE_ROWS, tokens,
                            y + b * stride, stride, add);
            }
        }
    }
}

/* Blocks begin .. end - 1 of a weight whose groups run along rows, times x (batch, inputs). */
static inline void qt_multiply_panels(const qt_planes *w, const float *x, int64_t batch, float *y, int64_t stride,
                                      int add, int64_t begin, int64_t end) {
    qt_floats values[QT_TOGETHER * QT_MOST_TOKENS][2];
    for (int64_t block = begin; block < end; block++)
        for (int64_t b = 0, tokens; b < batch; b += tokens) {
            tokens = batch - b >= 4 ? 4 : batch - b >= 2 ? 2 : 1;
            if (w->tables == QT_FLOAT32_TABLES) tokens = 1;
            int64_t rows, first = qt_multiply_panel(w, block, x + b * w->inputs, tokens, values, &rows);
            for (int64_t r = 0; r < rows; r += QT_TILE_ROWS)
                qt_put_tile(w, values + r / QT_TILE_ROWS * tokens, first + r,
                            rows - r < QT_TILE_ROWS ? rows - r : QT_TILE_ROWS, tokens, y + b * stride, stride, add);
        }
}

/* Blocks of a projection: of its classes one after the other; of a dense one, as many rows as a tile has. */
QT_INLINE int64_t qt_projection_blocks(const qt_projection *w) {
    if (!w->packed) return (w->rows + QT_TILE_ROWS - 1) / QT_TILE_ROWS;
    int64_t blocks = 0;
    for (const qt_planes *class = w->packed; class; class = class->next) blocks += class->blocks;
    return blocks;
}

/* Products of one input with weights that share their tables, and whose rows are one below the other. */
typedef struct {
    const qt_projection *parts;
    int64_t count, batch, stride;
    const float *x;
    const char *tables;
    float *y;
    int add;
} qt_products;

/* Blocks first .. last - 1, counted over all parts. */
static inline void qt_multiply_products(const qt_products *p, int64_t first, int64_t last) {
    float *y = p->y;
    for (int64_t i = 0; i < p->count && last > 0; y += p->parts[i++].rows) {
        const qt_projection *part = p->parts + i;
        const qt_planes *w = part->packed;
        int64_t blocks = qt_projection_blocks(part);
        int64_t begin = first > 0 ? first : 0, end = last < blocks ? last : blocks;
        first -= blocks, last -= blocks;
        if (begin >= end) continue;
        if (!w) {
            int64_t rows = end * QT_TILE_ROWS < part->rows ? end * QT_TILE_ROWS : part->rows;
            qt_multiply_dense(part, p->x, p->batch, y, p->stride, p->add, begin * QT_TILE_ROWS, rows);
        }
        if (w && w->panel_rows) {
            qt_multiply_panels(w, p->x, p->batch, y, p->stride, p->add, begin, end);
            continue;
        }
        for (; w && end > 0; begin -= w->blocks, end -= w->blocks, w = w->next) {
            int64_t from = begin > 0 ? begin * w->together : 0, to = end * w->together;
            to = to < qt_tiles(w) ? to : qt_tiles(w);
            qt_multiply_planes(w, p->tables, qt_table_bytes(w), p->batch, y, p->stride, p->add, from, to);
        }
    }
}

/* Row `row` of a weight of planes, (inputs) numbers of a dtype. */
static inline void qt_number_row(const qt_planes *w, int64_t row, qt_dtype dtype, char *y) {
    if (w->panel_rows)
        qt_panel_row(w, row, dtype, y);
    else
        qt_planes_row(w, row, dtype, y);
}

/* Row `row` of a weight, (inputs) floats. */
static inline void qt_row(const qt_projection *w, int64_t row, float *y) {
    int64_t item = w->dtype == QT_FLOAT32 ? 4 : 2;
    if (w->packed)
        qt_number_row(w->packed, row, QT_FLOAT32, (char *)y);
    else
        qt_widen((const char *)w->dense + row * w->inputs * item, (qt_dtype)w->dtype, w->inputs, y);
}

#endif
