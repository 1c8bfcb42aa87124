/* The column loop of error feedback and coordinate descent: columns in order, rows side by side.

   A column's value is what was there moved by the steps of the columns before it, summed up when it is
   its turn. Rows know nothing of one another: a thread takes sixty-four at a time through all columns. */
#include "columns.h"

#include "team.h"
#include "vectors.h"

#define QT_VECTORS (QT_TILE / QT_LANES)

/* Rows of a tile that are there, for one of its vectors. */
static int64_t there_of(int64_t count, int v) {
    int64_t left = count - v * QT_LANES;
    return left < 0 ? 0 : left < QT_LANES ? left : QT_LANES;
}

QT_INLINE qt_floats load_some(const float *p, int64_t there) {
    qt_floats v = {0};
    if (there == QT_LANES) return qt_load(p);
    memcpy(&v, p, (size_t)there * sizeof *p);
    return v;
}

QT_INLINE void store_some(float *p, qt_floats v, int64_t there) {
    if (there == QT_LANES)
        qt_store(p, v);
    else
        memcpy(p, &v, (size_t)there * sizeof *p);
}

/* The codes of a tile's levels as numbers, (places, QT_TILE). */
static void widen_codes(const qt_columns *w, int64_t row, int64_t count, float *wide) {
    for (int64_t p = 0; p < w->places; p++)
        for (int64_t i = 0; i < QT_TILE; i++)
            wide[p * QT_TILE + i] = i < count ? (float)w->codes_of[p * w->rows + row + i] : 0.0f;
}

/* The nearest of ascending levels, ties up, and its code. */
QT_INLINE qt_floats nearest(const qt_columns *w, qt_floats value, int64_t row, int64_t there,
                            const float *wide, qt_floats *code) {
    qt_floats level = load_some(w->first + row, there);
    *code = qt_load(wide);
    for (int64_t p = 1; p < w->places; p++) {
        qt_ints above = value >= load_some(w->second + (p - 1) * w->rows + row, there);
        level = qt_chosen(above, load_some(w->first + p * w->rows + row, there), level);
        *code = qt_chosen(above, qt_load(wide + p * QT_TILE), *code);
    }
    return level;
}

/* The nearest multiple of a column's scale, ties to even, and its code. */
QT_INLINE qt_floats rounded(const qt_columns *w, qt_floats value, int64_t at, int64_t there, qt_floats *code) {
    const float shift = 12582912.0f; /* 1.5 * 2^23: adding it rounds to a whole number */
    qt_floats scale = load_some(w->first + at, there), zero = load_some(w->second + at, there);
    qt_floats none = {0}, top = qt_all((float)w->top), found = value / scale + zero;
    found = qt_chosen(found > none, found, none); /* what is no number is 0 */
    found = qt_chosen(found < top, found, top);
    found = (found + shift) - shift;
    *code = found;
    return (found - zero) * scale;
}

/* The values of a column of a tile, as the columns before have left them. */
QT_INLINE void moved(const qt_columns *w, int64_t column, int64_t row, int64_t count, const float *steps,
                     qt_floats *values) {
    const float *shares = w->shares + column * w->columns, *work = w->work + column * w->rows + row;
    for (int v = 0; v < QT_VECTORS; v++) values[v] = load_some(work + v * QT_LANES, there_of(count, v));
    for (int64_t before = 0; before < column; before++)
        for (int v = 0; v < QT_VECTORS; v++)
            values[v] += shares[before] * qt_load(steps + before * QT_TILE + v * QT_LANES);
}

void qt_columns_tile(const qt_columns *w, int64_t row, int64_t count, float *steps) {
    float wide[QT_MOST_PLACES * QT_TILE];
    widen_codes(w, row, count, wide);
    for (int64_t column = 0; column < w->columns; column++) {
        qt_floats values[QT_VECTORS];
        moved(w, column, row, count, steps, values);
        for (int v = 0; v < QT_VECTORS; v++) {
            int64_t here = row + v * QT_LANES, at = column * w->rows + here, there = there_of(count, v);
            if (there == 0) continue;
            qt_floats value = values[v], old = value, code, level;
            if (w->before) {
                old = load_some(w->before + at, there);
                value = old - value / w->own[column];
            }
            level = w->places ? nearest(w, value, here, there, wide + v * QT_LANES, &code)
                              : rounded(w, value, at, there, &code);
            qt_store(steps + column * QT_TILE + v * QT_LANES, level - old);
            store_some(w->levels + at, level, there);
            for (int64_t i = 0; i < there; i++) w->codes[at + i] = (uint8_t)code[i];
        }
    }
}

static void walk(void *argument, qt_team *team, int64_t thread, int64_t threads) {
    const qt_columns *w = argument;
    (void)team;
    float *steps = w->room + thread * w->columns * QT_TILE;
    const int64_t end = qt_first_row(w->rows, thread + 1, threads);
    for (int64_t row = qt_first_row(w->rows, thread, threads); row < end; row += QT_TILE)
        qt_columns_tile(w, row, qt_tile_rows(w->rows, row), steps);
}

void qt_columns_walk(const qt_columns *w, int64_t threads) { qt_team_run(threads, walk, (void *)w); }
