/* Weights whose groups run along rows: panels.h says how they lie. */
#include "panels.h"

#define PANEL_CHUNKS 16 /* of a group of inputs, at most */
#define PANEL_INPUTS (PANEL_CHUNKS * QT_CHUNK)

static int64_t bytes_of_block(const qt_planes *w, int64_t tiles) {
    return qt_all_chunks(w) * (w->num_bits * tiles * QT_CHUNK_BYTES + (w->num_bits + 1) * QT_CHUNK * 2);
}

/* Blocks of `rows` rows of one group. */
static int64_t blocks_of(const qt_planes *w, int64_t rows) {
    int64_t each = w->together * QT_TILE_ROWS;
    return (rows + each - 1) / each;
}

int64_t qt_cut_panels(qt_planes *w) {
    int64_t tiles = (w->panel_rows + QT_TILE_ROWS - 1) / QT_TILE_ROWS;
    int64_t blocks = (tiles + QT_TOGETHER - 1) / QT_TOGETHER, last = w->rows % w->panel_rows;
    w->together = (tiles + blocks - 1) / blocks;
    w->tile_bytes = bytes_of_block(w, 1);
    w->blocks = w->rows / w->panel_rows * blocks_of(w, w->panel_rows) + blocks_of(w, last);
    last = last ? last : w->panel_rows;
    last -= (blocks_of(w, last) - 1) * w->together * QT_TILE_ROWS;
    tiles = (last + QT_TILE_ROWS - 1) / QT_TILE_ROWS;
    return (w->blocks - 1) * bytes_of_block(w, w->together) + bytes_of_block(w, tiles);
}

/* A block: its rows, their tiles, its group of rows, and where it begins in the stream. */
typedef struct {
    int64_t first, rows, tiles, panel;
    const uint8_t *stream;
} block_place;

static block_place place_of(const qt_planes *w, int64_t block) {
    int64_t each = blocks_of(w, w->panel_rows), most = w->together * QT_TILE_ROWS;
    block_place place = {.panel = block / each};
    int64_t end = (place.panel + 1) * w->panel_rows;
    end = end < w->rows ? end : w->rows;
    place.first = place.panel * w->panel_rows + block % each * most;
    place.rows = end - place.first < most ? end - place.first : most;
    place.tiles = block + 1 < w->blocks ? w->together : (place.rows + QT_TILE_ROWS - 1) / QT_TILE_ROWS;
    place.stream = w->stream + block * bytes_of_block(w, w->together);
    return place;
}

/* Numbers of plane `p` of a group, of its offsets where p is num_bits: (chunks * 32) floats. */
static void numbers_of(const qt_planes *w, const uint8_t *group, int64_t chunks, int64_t p, float *y) {
    qt_widen(group + p * chunks * QT_CHUNK * 2, QT_FLOAT16, chunks * QT_CHUNK, y);
    if (p < w->num_bits || !w->centered) return;
    float steps[PANEL_INPUTS], unit = qt_center_unit(w);
    qt_widen(group, QT_FLOAT16, chunks * QT_CHUNK, steps);
    for (int64_t i = 0; i < chunks * QT_CHUNK; i++) y[i] *= steps[i] * unit;
}

/* Tables of x times `numbers`, (count) each; returns their scale. */
static float make_tables(const float *x, const float *numbers, int64_t count, int64_t kind, int8_t *entries) {
    float scaled[PANEL_INPUTS], sum;
    for (int64_t i = 0; i < count; i++) scaled[i] = x[i] * numbers[i];
    if (kind == QT_INT16_TABLES) return qt_put_group(scaled, count, QT_INT16_TABLES, entries, &sum);
    if (kind == QT_INT8_TABLES) return qt_put_group(scaled, count, QT_INT8_TABLES, entries, &sum);
    return qt_put_group(scaled, count, QT_FLOAT32_TABLES, entries, &sum);
}

/* Adds tiles of one plane of a group to y (tiles, batch, rows), by tables of each of a batch. */
QT_INLINE void add_plane(const uint8_t *stream, int64_t chunks, int64_t tiles, const int8_t *const *entries,
                         const float *scales, const int batch, const int kind, qt_floats (*y)[2]) {
    qt_floats sums[QT_MOST_TOKENS][2];
    for (int64_t t = 0; t < tiles; t++, stream += chunks * QT_CHUNK_BYTES, y += batch) {
        if (kind == QT_FLOAT32_TABLES)
            qt_add_floats(stream, chunks, (const float *)(const void *)entries[0], sums[0]);
        else
            qt_sum_plane(stream, chunks, entries, batch, kind, sums);
        for (int b = 0; b < batch; b++)
            for (int half = 0; half < 2; half++) y[b][half] += sums[b][half] * scales[b];
    }
}

/* The same, by code for that number of inputs and what tables have. */
static void add_some_plane(const uint8_t *stream, int64_t chunks, int64_t tiles, const int8_t *const *entries,
                           const float *scales, int64_t batch, int64_t kind, qt_floats (*y)[2]) {
    if (kind == QT_FLOAT32_TABLES)
        add_plane(stream, chunks, tiles, entries, scales, 1, QT_FLOAT32_TABLES, y);
    else if (kind == QT_INT8_TABLES && batch == 1)
        add_plane(stream, chunks, tiles, entries, scales, 1, QT_INT8_TABLES, y);
    else if (kind == QT_INT8_TABLES && batch == 2)
        add_plane(stream, chunks, tiles, entries, scales, 2, QT_INT8_TABLES, y);
    else if (kind == QT_INT8_TABLES)
        add_plane(stream, chunks, tiles, entries, scales, 4, QT_INT8_TABLES, y);
    else if (batch == 1)
        add_plane(stream, chunks, tiles, entries, scales, 1, QT_INT16_TABLES, y);
    else if (batch == 2)
        add_plane(stream, chunks, tiles, entries, scales, 2, QT_INT16_TABLES, y);
    else
        add_plane(stream, chunks, tiles, entries, scales, 4, QT_INT16_TABLES, y);
}

int64_t qt_multiply_panel(const qt_planes *w, int64_t block, const float *x, int64_t batch, qt_floats (*y)[2],
                          int64_t *rows) {
    _Alignas(64) int8_t room[QT_MOST_TOKENS][PANEL_CHUNKS * QT_CHUNK_TABLE]; /* of floats, for one input */
    const int8_t *entries[QT_MOST_TOKENS];
    float all[QT_MOST_TOKENS] = {0}, scales[QT_MOST_TOKENS], numbers[PANEL_INPUTS];
    block_place place = place_of(w, block);
    for (int b = 0; b < QT_MOST_TOKENS; b++) entries[b] = room[b];
    memset(y, 0, (size_t)(place.tiles * batch) * sizeof *y);
    for (int64_t g = 0; g < w->num_groups; g++, x += w->group_size) {
        int64_t chunks = qt_group_chunks(w, g), count = qt_group_inputs(w, g);
        const uint8_t *keys = place.stream + (w->num_bits + 1) * chunks * QT_CHUNK * 2;
        numbers_of(w, place.stream, chunks, w->num_bits, numbers);
        for (int64_t b = 0; b < batch; b++) all[b] += qt_dot(numbers, x + b * w->inputs, count);
        for (int64_t p = 0; p < w->num_bits; p++, keys += place.tiles * chunks * QT_CHUNK_BYTES) {
            numbers_of(w, place.stream, chunks, p, numbers);
            for (int64_t b = 0; b < batch; b++)
                scales[b] = make_tables(x + b * w->inputs, numbers, count, w->tables, room[b]);
            add_some_plane(keys, chunks, place.tiles, entries, scales, batch, w->tables, y);
        }
        place.stream = keys;
    }
    for (int64_t t = 0; t < place.tiles; t++)
        for (int64_t b = 0; b < batch; b++) y[t * batch + b][0] += all[b], y[t * batch + b][1] += all[b];
    *rows = place.rows;
    return place.first;
}

void qt_pack_panels(const qt_planes *w, const uint32_t *bit_planes, const uint16_t *scales,
                    const uint16_t *offsets, int64_t begin, int64_t end, uint8_t *stream) {
    int64_t words = (w->inputs + 31) / 32, panels = (w->rows + w->panel_rows - 1) / w->panel_rows;
    for (int64_t block = begin; block < end; block++) {
        block_place place = place_of(w, block);
        uint8_t *to = stream + (place.stream - w->stream);
        for (int64_t g = 0; g < w->num_groups; g++) {
            int64_t chunks = qt_group_chunks(w, g), count = qt_group_inputs(w, g), input = g * w->group_size;
            for (int64_t p = 0; p < w->num_bits; p++, to += chunks * QT_CHUNK * 2)
                memcpy(to, scales + (p * panels + place.panel) * w->inputs + input, (size_t)count * 2);
            if (offsets) memcpy(to, offsets + place.panel * w->inputs + input, (size_t)count * 2);
            to += chunks * QT_CHUNK * 2;
            for (int64_t p = 0; p < w->num_bits; p++, to += place.tiles * chunks * QT_CHUNK_BYTES)
                for (int64_t r = 0; r < place.rows; r++)
                    qt_put_keys(bit_planes + (p * w->rows + place.first + r) * words, input, count,
                                r % QT_TILE_ROWS, to + r / QT_TILE_ROWS * chunks * QT_CHUNK_BYTES);
        }
    }
}

void qt_panel_row(const qt_planes *w, int64_t row, qt_dtype dtype, char *y) {
    const float one = 1.0f;
    float signs[PANEL_INPUTS], numbers[PANEL_INPUTS], sums[PANEL_INPUTS];
    int64_t in_panel = row % w->panel_rows, tile = in_panel / QT_TILE_ROWS;
    block_place place =
        place_of(w, row / w->panel_rows * blocks_of(w, w->panel_rows) + tile / w->together);
    for (int64_t g = 0; g < w->num_groups; g++) {
        int64_t chunks = qt_group_chunks(w, g), count = qt_group_inputs(w, g), all = chunks * QT_CHUNK;
        const uint8_t *keys = place.stream + (w->num_bits + 1) * all * 2;
        keys += tile % w->together * chunks * QT_CHUNK_BYTES;
        numbers_of(w, place.stream, chunks, w->num_bits, sums);
        for (int64_t p = 0; p < w->num_bits; p++, keys += place.tiles * chunks * QT_CHUNK_BYTES) {
            numbers_of(w, place.stream, chunks, p, numbers);
            qt_widen_group(keys, chunks, 1, in_panel % QT_TILE_ROWS, &one, 0.0f, all, signs);
            for (int64_t i = 0; i < all; i++) sums[i] += signs[i] * numbers[i];
        }
        qt_narrow(sums, dtype, count, y);
        y += count * (dtype == QT_FLOAT32 ? 4 : 2);
        place.stream += (w->num_bits + 1) * all * 2 + w->num_bits * place.tiles * chunks * QT_CHUNK_BYTES;
    }
}
