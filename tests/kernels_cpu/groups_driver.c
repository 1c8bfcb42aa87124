/* Solves and fits groups of odd shapes, for a compiler's sanitizers to watch. */
#include "groups.h"

#include <math.h>
#include <stdlib.h>

#include "fits.h"

static float *numbers(int64_t count, float from, float step, int64_t period) {
    float *x = malloc((size_t)count * sizeof *x);
    if (!x) abort();
    for (int64_t i = 0; i < count; i++) x[i] = from + step * (float)(i % period);
    return x;
}

/* The identity times a number. */
static float *diagonal(int64_t n, float value) {
    float *x = numbers(n * n, 0, 0, 1);
    for (int64_t i = 0; i < n; i++) x[i * n + i] = value;
    return x;
}

/* Weights of 1 and -1 are the first plane, whatever the start; nothing is left of them. */
static int solves(int64_t columns, int64_t rows, int64_t bits, int64_t offset, int64_t threads) {
    int64_t size = columns * rows, of_rows = (bits + 1) * rows, unknowns = bits + offset, wrong = 0;
    float *weight = numbers(size, -1, 2, 2), *shares = diagonal(columns, 1), *whitening = diagonal(columns, 1);
    float *theta = numbers(2 * of_rows, 0, 0, 1), *parameters = numbers(of_rows, 9, 0, 1);
    float *errors = numbers(size, 9, 0, 1);
    float *room = numbers(threads * qt_group_room(columns, bits), 0, 0, 1);
    double *normal = malloc((size_t)(rows * unknowns * unknowns) * sizeof *normal);
    double *right = malloc((size_t)(rows * unknowns) * sizeof *right);
    uint8_t *codes = malloc((size_t)size);
    if (!codes || !normal || !right) abort();
    for (int64_t i = 0; i < rows; i++) theta[i] = 0.5f, theta[of_rows + i] = 2.0f;
    qt_group g = {.columns = columns, .rows = rows, .bits = bits, .offset = offset, .starts = 2, .iterations = 3,
                  .ridge = 1e-6, .weight = weight, .shares = shares, .whitening = whitening, .theta = theta,
                  .codes = codes, .parameters = parameters, .errors = errors, .room = room};
    qt_group_solve(&g, threads);
    for (int64_t i = 0; i < size; i++) wrong += !(fabsf(errors[i]) < 1e-3f) || codes[i] >> bits;
    qt_equations e = {.columns = columns, .rows = rows, .bits = bits, .offset = offset, .codes = codes,
                      .matrix = whitening, .gradient = weight, .normal = normal, .right = right, .room = room};
    qt_group_equations(&e, threads);
    for (int64_t i = 0; i < rows; i++) wrong += normal[i * unknowns * unknowns] != (double)columns;
    free(weight), free(shares), free(whitening), free(theta), free(parameters), free(errors), free(room);
    free(normal), free(right), free(codes);
    return wrong > 0;
}

static int fits(int64_t groups, int64_t size, int64_t bits, int64_t offset, int64_t threads) {
    const double ratios[2] = {1.0, 0.5};
    float *values = numbers(groups * size, -1, 2, 2), *importance = numbers(groups * size, 1, 0, 1);
    double *theta = malloc((size_t)(groups * (bits + 1)) * sizeof *theta);
    double *error = malloc((size_t)groups * sizeof *error);
    double *room = malloc((size_t)(threads * qt_fit_room(size)) * sizeof *room);
    int64_t wrong = 0;
    if (!theta || !error || !room) abort();
    if (size > 2) importance[size - 1] = 0.0f;
    qt_fit f = {.groups = groups, .size = size, .bits = bits, .offset = offset, .rounds = 4, .greedy = 1, .ratios = 2,
                .ridge = 1e-9, .progress = 1e-9, .values = values, .importance = importance, .ratio = ratios,
                .theta = theta, .error = error, .room = room};
    qt_fit_groups(&f, threads);
    for (int64_t i = 0; i < groups; i++) wrong += !(error[i] < 1e-6 * (double)size);
    free(values), free(importance), free(theta), free(error), free(room);
    return wrong > 0;
}

int group_solvers(void) {
    int wrong = 0;
    for (int64_t offset = 0; offset < 2; offset++) {
        wrong += solves(1, 1, 1, offset, 1);
        wrong += solves(7, 65, 3, offset, 2);
        wrong += solves(16, 130, QT_MOST_PLANES, offset, 3);
        wrong += fits(1, 1, 1, offset, 1);
        wrong += fits(5, 33, 3, offset, 2);
        wrong += fits(2, 130, QT_FIT_PLANES, offset, 3);
    }
    return wrong;
}
