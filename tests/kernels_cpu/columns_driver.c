/* Runs the column loops on blocks of odd shapes, for a compiler's sanitizers to watch. */
#include "columns.h"

#include <math.h>
#include <stdlib.h>

static float *numbers(int64_t count, float from, float step, int64_t period) {
    float *x = malloc((size_t)count * sizeof *x);
    if (!x) abort();
    for (int64_t i = 0; i < count; i++) x[i] = from + step * (float)(i % period);
    return x;
}

/* With levels 0, 1, 2 and so on, and columns that don't move one another, all are rounded. */
static int run(int64_t columns, int64_t rows, int64_t places, int descends, int64_t threads) {
    int64_t size = columns * rows, levels = places ? places : 8, wrong = 0;
    float *work = numbers(size, descends ? -1.25f : 1.25f, 0, 1), *before = numbers(size, 0, 0, 1);
    float *shares = numbers(columns * columns, 0, 0, 1), *own = numbers(columns, 1, 0, 1);
    float *first = numbers(places ? places * rows : size, 1, 0, 1), *second = numbers(places * rows + size, 0, 0, 1);
    uint8_t *codes_of = malloc((size_t)(levels * rows)), *codes = malloc((size_t)size);
    float *found = numbers(size, -1, 0, 1), *room = numbers(threads * columns * QT_TILE, 0, 0, 1);
    if (!codes_of || !codes) abort();
    for (int64_t p = 0; p < places; p++)
        for (int64_t i = 0; i < rows; i++) {
            first[p * rows + i] = (float)p, codes_of[p * rows + i] = (uint8_t)p;
            if (p > 0) second[(p - 1) * rows + i] = (float)p - 0.5f;
        }
    qt_columns w = {.columns = columns, .rows = rows, .places = places, .work = work, .shares = shares, .own = own,
                    .before = descends ? before : NULL, .first = first, .second = second, .codes_of = codes_of,
                    .top = 7, .codes = codes, .levels = found, .room = room};
    qt_columns_walk(&w, threads);
    for (int64_t i = 0; i < size; i++) wrong += !(fabsf(found[i] - 1) < 1e-6f) || codes[i] != 1;
    free(work), free(before), free(shares), free(own), free(first), free(second);
    free(codes_of), free(codes), free(found), free(room);
    return wrong > 0;
}

int column_loops(void) {
    int wrong = 0;
    for (int descends = 0; descends < 2; descends++) {
        wrong += run(1, 1, 2, descends, 1);
        wrong += run(5, 63, 8, descends, 3);
        wrong += run(33, 200, QT_MOST_PLACES, descends, 2);
        wrong += run(1, 1, 0, descends, 1);
        wrong += run(7, 130, 0, descends, 2);
    }
    return wrong;
}
