/* Weights of bit planes, and products with them by tables of partial sums (BiQGEMM).

   A stream per weight, read once from front to back: for each block of `together` tiles of 32 rows, for
   each group of inputs, for each tile, for each plane, for each chunk of 32 inputs, 128 bytes; then, per group, 32 float16 scales of each plane
   and 32 float16 offsets. Byte `qt_key_place(r, q)` of a chunk has the keys of row r: the signs of inputs
   4 q .. 4 q + 3 in the lower four bits, those of inputs 16 + 4 q .. in the upper ones. A short group is
   filled up with inputs that are zero.

   Of each input vector, a table has per chunk eight sets of 16 sums +-x0 +-x1 +-x2 +-x3 in 16 bits, lower
   bytes and upper bytes apart: 256 bytes; and per group a scale of these, and the sum of its inputs. */
#ifndef QT_PLANES_H
#define QT_PLANES_H

#include "entries.h"
#include "widen.h"

#define QT_MOST_BITS 8
#define QT_MOST_GROUPED 1024 /* inputs of a group */
/* Tiles of a block where tables are large: those of a group then stay in the first cache for all of
   them. Few, so that a thread has blocks of its own: threads that take turns in one read at half the pace. */
#define QT_TOGETHER 8
#define QT_FEW_TABLES 10000 /* bytes of them that stay there beside a stream */

typedef struct qt_planes {
    int64_t rows, inputs, group_size, num_bits;
    int64_t num_groups, chunks; /* per whole group */
    int64_t tables;             /* a qt_table_kind */
    int64_t centered;           /* offsets are centers: of steps, in halves */
    int64_t tile_bytes, blocks, together; /* tiles of a block, the last one may have fewer */
    int64_t panel_rows; /* rows of a group, where groups run along these: panels.h. 0: groups are of inputs */
    const uint8_t *stream;
    /* A weight whose rows have bits of their own is a list of classes of rows. */
    const struct qt_planes *next; /* of the same inputs and groups, or NULL */
    const int64_t *places;        /* (rows) of this class: which rows of the whole they are; NULL: all */
    const int64_t *numbers;       /* of the first class: where each row is in the classes, stacked */
} qt_planes;

/* Tables of one input vector. */
typedef struct {
    const int8_t *entries;             /* (all chunks, qt_chunk_table) */
    const float *scales, *sums;        /* (groups) */
} qt_tables;

QT_INLINE int64_t qt_group_inputs(const qt_planes *w, int64_t group) {
    int64_t left = w->inputs - group * w->group_size;
    return left < w->group_size ? left : w->group_size;
}

QT_INLINE int64_t qt_group_chunks(const qt_planes *w, int64_t group) {
    return (qt_group_inputs(w, group) + QT_CHUNK - 1) / QT_CHUNK;
}

QT_INLINE int64_t qt_all_chunks(const qt_planes *w) {
    return (w->num_groups - 1) * w->chunks + qt_group_chunks(w, w->num_groups - 1);
}

QT_INLINE int64_t qt_bytes_of_group(const qt_planes *w, int64_t chunks) {
    return w->num_bits * chunks * QT_CHUNK_BYTES + (w->num_bits + 1) * QT_TILE_ROWS * 2;
}

QT_INLINE int64_t qt_tiles(const qt_planes *w) { return (w->rows + QT_TILE_ROWS - 1) / QT_TILE_ROWS; }

/* Where group `g` of a tile begins. */
QT_INLINE int64_t qt_group_place(const qt_planes *w, int64_t tile, int64_t g) {
    int64_t first = tile / w->together * w->together, left = qt_tiles(w) - first;
    int64_t count = left < w->together ? left : w->together;
    int64_t before = g * count * qt_bytes_of_group(w, w->chunks);
    return first * w->tile_bytes + before + (tile - first) * qt_bytes_of_group(w, qt_group_chunks(w, g));
}

/* What centers count, as a part of the first plane's scale: 2^(2 - bits). */
QT_INLINE float qt_center_unit(const qt_planes *w) {
    int32_t bits = (int32_t)(127 + 2 - w->num_bits) << 23; /* a call in the innermost loops would cost */
    float unit;
    memcpy(&unit, &bits, sizeof unit);
    return unit;
}

/* Bytes of the tables of a chunk. */
QT_INLINE int64_t qt_chunk_table(const qt_planes *w) {
    return w->tables == QT_FLOAT32_TABLES ? 128 * 4 : QT_CHUNK_TABLE;
}

/* Bytes of the tables of one input vector, a multiple of 64; there are none where groups are of rows. */
QT_INLINE int64_t qt_table_bytes(const qt_planes *w) {
    if (w->panel_rows) return 0;
    return qt_all_chunks(w) * qt_chunk_table(w) + (w->num_groups * 8 + 63) / 64 * 64;
}

QT_INLINE qt_tables qt_tables_at(const qt_planes *w, const char *place) {
    qt_tables tables;
    tables.entries = (const int8_t *)place;
    tables.scales = (const float *)(place + qt_all_chunks(w) * qt_chunk_table(w));
    tables.sums = tables.scales + w->num_groups;
    return tables;
}

/* Tables of x (inputs) for a weight's groups begin .. end - 1. */
QT_INLINE void qt_make_tables(const qt_planes *w, const float *x, int64_t begin, int64_t end, char *place) {
    qt_tables tables = qt_tables_at(w, place);
    int8_t *entries = (int8_t *)place + begin * w->chunks * qt_chunk_table(w);
    float *scales = (float *)tables.scales, *sums = (float *)tables.sums;
    for (int64_t g = begin; g < end; g++, entries += w->chunks * qt_chunk_table(w)) {
        const float *inputs = x + g * w->group_size;
        int64_t count = qt_group_inputs(w, g);
        if (w->tables == QT_INT16_TABLES)
            scales[g] = qt_put_group(inputs, count, QT_INT16_TABLES, entries, sums + g);
        else if (w->tables == QT_INT8_TABLES)
            scales[g] = qt_put_group(inputs, count, QT_INT8_TABLES, entries, sums + g);
        else
            scales[g] = qt_put_group(inputs, count, QT_FLOAT32_TABLES, entries, sums + g);
    }
}

/* Adds a group of a tile times `batch` (1 .. QT_MOST_TOKENS) tables to y[b] (rows); returns where the
   next group begins. */
QT_INLINE const uint8_t *qt_add_group(const qt_planes *w, const uint8_t *stream, int64_t g,
                                      const qt_tables *tables, const int batch, const int kind,
                                      qt_floats (*y)[2]) {
    const int8_t *entries[QT_MOST_TOKENS];
    int64_t chunks = g + 1 < w->num_groups ? w->chunks : qt_group_chunks(w, g);
    const int64_t table = kind == QT_FLOAT32_TABLES ? 128 * 4 : QT_CHUNK_TABLE;
    const uint8_t *scales = stream + w->num_bits * chunks * QT_CHUNK_BYTES;
    qt_floats total[QT_MOST_TOKENS][2] = {{{0}}}, sums[QT_MOST_TOKENS][2], scale[2], first[2] = {{0}};
    for (int b = 0; b < batch; b++) entries[b] = tables[b].entries + g * w->chunks * table;
    for (int64_t p = 0; p < w->num_bits; p++, stream += chunks * QT_CHUNK_BYTES, scales += 64) {
        if (kind == QT_FLOAT32_TABLES)
            for (int b = 0; b < batch; b++) qt_add_floats(stream, chunks, (const float *)entries[b], sums[b]);
        else
            qt_sum_plane(stream, chunks, entries, batch, kind, sums);
        scale[0] = qt_halves(scales), scale[1] = qt_halves(scales + 32);
        if (p == 0) first[0] = scale[0], first[1] = scale[1];
        for (int b = 0; b < batch; b++)
            for (int half = 0; half < 2; half++) total[b][half] += sums[b][half] * scale[half];
    }
    for (int half = 0; half < 2; half++) {
        qt_floats offset = qt_halves(scales + 32 * half);
        if (w->centered) offset *= first[half] * qt_center_unit(w);
        for (int b = 0; b < batch; b++)
            y[b][half] += total[b][half] * tables[b].scales[g] + offset * tables[b].sums[g];
    }
    return scales + 64;
}

/* y[tile * batch + b] (rows) of `count` tiles of one block. */
QT_INLINE void qt_multiply_tiles(const qt_planes *w, int64_t first, int64_t count, const qt_tables *tables,
                                 const int batch, const int kind, qt_floats (*y)[2]) {
    memset(y, 0, (size_t)(count * batch) * sizeof *y);
    for (int64_t g = 0; g < w->num_groups; g++) {
        const uint8_t *stream = w->stream + qt_group_place(w, first, g);
        for (int64_t t = 0; t < count; t++) 
            stream = qt_add_group(w, stream, g, tables, batch, kind, y + t * batch);
    }
}

/* Puts signs first .. first + count - 1 of a row into the chunks of its tile, which were zero. */
QT_INLINE void qt_put_keys(const uint32_t *signs, int64_t first, int64_t count, int64_t in_tile, uint8_t *to) {
    for (int64_t i = 0; i < count; i += 4) {
        uint32_t key = 0;
        for (int64_t j = i; j < i + 4 && j < count; j++) key |= (signs[(first + j) / 32] >> (first + j) % 32 & 1) << (j - i);
        to[i / QT_CHUNK * QT_CHUNK_BYTES + qt_key_place(in_tile, i % 16 / 4)] |= (uint8_t)(key << i % QT_CHUNK / 16 * 4);
    }
}

/* Lays a weight out as a stream of tiles `begin` .. `end` - 1; the stream is zero before, and
   stays so for rows that aren't there.

   bit_planes (num_bits, rows, words) of 32 signs; scales (num_bits, rows, groups) and offsets (rows,
   groups), or NULL, float16. */
static inline void qt_pack_tiles(const qt_planes *w, const uint32_t *bit_planes, const uint16_t *scales,
                          const uint16_t *offsets, int64_t begin, int64_t end, uint8_t *stream) {
    int64_t words = (w->inputs + 31) / 32, groups = w->num_groups;
    for (int64_t row = begin * QT_TILE_ROWS; row < end * QT_TILE_ROWS && row < w->rows; row++) {
        int64_t in_tile = row % QT_TILE_ROWS;
        for (int64_t g = 0; g < groups; g++) {
            uint8_t *to = stream + qt_group_place(w, row / QT_TILE_ROWS, g);
            int64_t chunks = qt_group_chunks(w, g), count = qt_group_inputs(w, g);
            for (int64_t p = 0; p < w->num_bits; p++, to += chunks * QT_CHUNK_BYTES)
                qt_put_keys(bit_planes + (p * w->rows + row) * words, g * w->group_size, count, in_tile, to);
            uint16_t *numbers = (uint16_t *)to + in_tile;
            for (int64_t p = 0; p < w->num_bits; p++)
                numbers[p * QT_TILE_ROWS] = scales[(p * w->rows + row) * groups + g];
            if (offsets) numbers[w->num_bits * QT_TILE_ROWS] = offsets[row * groups + g];
        }
    }
}

/* Row `row` of the weight, (inputs) numbers of a dtype. */
QT_INLINE void qt_planes_row(const qt_planes *w, int64_t row, qt_dtype dtype, char *y) {
    float wide[QT_MOST_GROUPED];
    if (w->numbers) row = w->numbers[row];
    for (; row >= w->rows; w = w->next) row -= w->rows;
    int64_t tile = row / QT_TILE_ROWS, in_tile = row % QT_TILE_ROWS, whole = qt_bytes_of_group(w, w->chunks);
    int64_t in_block = tile % w->together, left = qt_tiles(w) - tile + in_block;
    const uint8_t *block = w->stream + (tile - in_block) * w->tile_bytes;
    for (int64_t g = 0; g < w->num_groups; g++) {
        int64_t chunks = qt_group_chunks(w, g), count = qt_group_inputs(w, g);
        const uint8_t *stream = block + in_block * qt_bytes_of_group(w, chunks);
        const uint8_t *numbers = stream + w->num_bits * chunks * QT_CHUNK_BYTES;
        block += (left < w->together ? left : w->together) * whole;
        float scales[QT_MOST_BITS + 1];
        for (int64_t p = 0; p <= w->num_bits; p++)
            qt_widen(numbers + 64 * p + 2 * in_tile, QT_FLOAT16, 1, scales + p);
        float offset = scales[w->num_bits];
        if (w->centered) offset *= scales[0] * qt_center_unit(w);
        float *numbers_of_group = dtype == QT_FLOAT32 ? (float *)y : wide;
        qt_widen_group(stream, chunks, w->num_bits, in_tile, scales, offset, count, numbers_of_group);
        if (dtype != QT_FLOAT32) qt_narrow(wide, dtype, count, y);
        y += count * (dtype == QT_FLOAT32 ? 4 : 2);
    }
}

#endif
