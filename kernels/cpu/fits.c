/* Levels of groups of weights by alternation from several starts: a thread takes one group after another.

   Levels cut a sorted group into runs, so with sums from its beginning a round looks up where the middles
   between levels lie, and goes through none of the weights. */
#include "fits.h"

#include <math.h>
#include <string.h>

#include "team.h"
#include "vectors.h"

#define PLACES (1 << QT_FIT_PLANES)
#define UNKNOWNS (QT_FIT_PLANES + 1)
#define TINY 1e-30 /* keeps an all-zero system solvable */

/* A group at unit range, sorted; what begins with a zero has one more. */
typedef struct {
    double *mass, *moment;               /* sums of importance, and of importance * value */
    float *values, *importance, *sorted; /* as they come, with zeros to whole vectors; ascending */
    float *rest;                         /* what planes leave of the values */
    double power;                        /* of importance * value^2 */
} group;

static int64_t padded(int64_t size) { return (size + QT_LANES - 1) / QT_LANES * QT_LANES; }

int64_t qt_fit_room(int64_t size) { return 2 * (size + 1) + 4 * padded(size) / 2; }

static group divided(double *room, int64_t size) {
    const int64_t wide = padded(size);
    float *after = (float *)(room + 2 * (size + 1));
    memset(after, 0, (size_t)(4 * wide) * sizeof *after);
    return (group){.mass = room,
                   .moment = room + size + 1,
                   .values = after,
                   .importance = after + wide,
                   .sorted = after + 2 * wide,
                   .rest = after + 3 * wide};
}

/* How many weights come before one; equal ones keep their order. */
static int32_t rank(const float *values, int64_t size, int64_t at) {
    const float value = values[at];
    int32_t before = 0;
    for (int64_t i = 0; i < at; i++) before += values[i] <= value;
    for (int64_t i = at + 1; i < size; i++) before += values[i] < value;
    return before;
}

static void sort(group *g, int64_t size) {
    g->power = 0.0;
    memset(g->sorted, 0, (size_t)size * sizeof(float));
    memset(g->mass, 0, (size_t)(size + 1) * sizeof(double));
    memset(g->moment, 0, (size_t)(size + 1) * sizeof(double));
    for (int64_t i = 0; i < size; i++) {
        int32_t place = rank(g->values, size, i);
        double mass = (double)g->importance[i], value = (double)g->values[i];
        g->sorted[place] = g->values[i];
        g->mass[place + 1] = mass;
        g->moment[place + 1] = mass * value;
        g->power += mass * value * value;
    }
    for (int64_t i = 0; i < size; i++) {
        g->mass[i + 1] += g->mass[i];
        g->moment[i + 1] += g->moment[i];
    }
}

/* The first weight that isn't below a value. */
static int64_t first_from(const float *sorted, int64_t size, float value) {
    const float *base = sorted;
    while (size > 1) {
        int64_t half = size / 2;
        base = base[half - 1] < value ? base + half : base;
        size -= half;
    }
    return base - sorted + (size > 0 && *base < value);
}

/* 1 or -1: a plane's sign in a code. */
static double sign_of(int64_t code, int64_t bits, int64_t plane) {
    return (double)(2 * ((code >> (bits - 1 - plane)) & 1) - 1);
}

/* Levels ascending, with their codes. */
static void sort_levels(const double *theta, int64_t bits, double *levels, int *codes) {
    for (int code = 0; code < 1 << bits; code++) {
        double level = theta[bits];
        for (int64_t u = 0; u < bits; u++) level += sign_of(code, bits, u) * theta[u];
        int p = code;
        for (; p > 0 && levels[p - 1] > level; p--) levels[p] = levels[p - 1], codes[p] = codes[p - 1];
        levels[p] = level, codes[p] = code;
    }
}

/* Sums over the weights nearest to each level, by its code; the squared error. */
static double sum_levels(const qt_fit *f, const group *g, const double *theta, double *mass, double *moment) {
    const int places = 1 << f->bits;
    double levels[PLACES], error = g->power;
    int codes[PLACES];
    sort_levels(theta, f->bits, levels, codes);
    for (int64_t p = 0, start = 0; p < places; p++) {
        int64_t stop = f->size;
        if (p + 1 < places) stop = first_from(g->sorted, f->size, (float)((levels[p + 1] + levels[p]) / 2));
        double m = g->mass[stop] - g->mass[start], s = g->moment[stop] - g->moment[start];
        mass[codes[p]] = m, moment[codes[p]] = s;
        error += levels[p] * levels[p] * m - 2 * levels[p] * s;
        start = stop;
    }
    return error;
}

/* Gauss-Jordan elimination without pivoting; the solution is the last column. */
static void eliminate(double a[UNKNOWNS][UNKNOWNS + 1], int64_t n, double ridge) {
    double floor = 0.0;
    for (int64_t k = 0; k < n; k++) floor += a[k][k];
    floor = ridge * (floor / (double)n) + TINY;
    for (int64_t k = 0; k < n; k++) a[k][k] += floor;
    for (int64_t k = 0; k < n; k++) {
        double pivot = a[k][k] > floor ? a[k][k] : floor;
        for (int64_t j = 0; j <= n; j++) a[k][j] /= pivot;
        for (int64_t i = 0; i < n; i++) {
            double factor = a[i][k];
            for (int64_t j = 0; j <= n && i != k; j++) a[i][j] -= factor * a[k][j];
        }
    }
}

/* The parameters that fit best with the codes fixed. */
static void fit(const qt_fit *f, const double *mass, const double *moment, double *theta) {
    const int64_t n = f->bits + (f->offset != 0);
    double a[UNKNOWNS][UNKNOWNS + 1] = {{0}}, signs[UNKNOWNS];
    for (int code = 0; code < 1 << f->bits; code++) {
        for (int64_t u = 0; u < n; u++) signs[u] = u < f->bits ? sign_of(code, f->bits, u) : 1.0;
        for (int64_t u = 0; u < n; u++) {
            a[u][n] += signs[u] * moment[code];
            for (int64_t other = 0; other < n; other++) a[u][other] += signs[u] * signs[other] * mass[code];
        }
    }
    eliminate(a, n, f->ridge);
    theta[f->bits] = 0.0;
    for (int64_t u = 0; u < n; u++) theta[u] = a[u][n];
}

/* Alternate from a start; what is better than the best so far replaces it. */
static void alternate(const qt_fit *f, const group *g, const double *start, double *best, double *best_error) {
    double theta[UNKNOWNS], kept[UNKNOWNS], mass[PLACES], moment[PLACES], least = INFINITY;
    const size_t bytes = (size_t)(f->bits + 1) * sizeof *theta;
    memcpy(theta, start, bytes);
    memcpy(kept, start, bytes);
    for (int64_t round = 0; round <= f->rounds; round++) {
        double error = sum_levels(f, g, theta, mass, moment);
        if (!(error < least * (1 - f->progress))) break;
        least = error;
        memcpy(kept, theta, bytes);
        fit(f, mass, moment, theta);
    }
    if (!(least < *best_error)) return;
    *best_error = least;
    memcpy(best, kept, bytes);
}

/* Sums of importance, and of importance times a number or how large it is. */
static double weighted(const float *importance, const float *numbers, int64_t wide, const int32_t kept_bits) {
    qt_floats sum = {0};
    for (int64_t i = 0; i < wide; i += QT_LANES)
        sum += qt_load(importance + i) * (qt_floats)((qt_ints)qt_load(numbers + i) & kept_bits);
    return (double)qt_sum(sum);
}

/* Each plane takes the mean of what those before it have left. */
static void start_greedily(const qt_fit *f, const group *g, double *theta) {
    const int64_t wide = padded(f->size);
    qt_floats total = {0};
    for (int64_t i = 0; i < wide; i += QT_LANES) total += qt_load(g->importance + i);
    const double mass = (double)qt_sum(total) + 1e-30;
    theta[f->bits] = f->offset ? weighted(g->importance, g->values, wide, -1) / mass : 0.0;
    for (int64_t i = 0; i < wide; i++) g->rest[i] = g->values[i] - (float)theta[f->bits];
    for (int64_t u = 0; u < f->bits; u++) {
        theta[u] = weighted(g->importance, g->rest, wide, 0x7fffffff) / mass;
        const float scale = (float)theta[u];
        for (int64_t i = 0; i < wide; i++) g->rest[i] -= g->rest[i] >= 0 ? scale : -scale;
    }
}

/* The range of the weights that aren't padding. */
static void range_of(const qt_fit *f, const group *g, double *low, double *high) {
    float least = INFINITY, most = -INFINITY;
    for (int64_t i = 0; i < f->size; i++) {
        if (!(g->importance[i] > 0)) continue;
        least = g->values[i] < least ? g->values[i] : least;
        most = g->values[i] > most ? g->values[i] : most;
    }
    *low = least <= most ? (double)least : 0.0, *high = least <= most ? (double)most : 0.0;
    if (f->offset) return;
    *high = -*low > *high ? -*low : *high;
    *low = -*high;
}

static void fit_group(const qt_fit *f, group *g, int64_t number) {
    const float *values = f->values + number * f->size;
    float reach = 0.0f;
    double low, high, start[UNKNOWNS], *theta = f->theta + number * (f->bits + 1), error = INFINITY;
    for (int64_t i = 0; i < f->size; i++) reach = fabsf(values[i]) > reach ? fabsf(values[i]) : reach;
    if (!(reach > 0)) reach = 1.0f; /* a group of zeros stays so */
    for (int64_t i = 0; i < f->size; i++) g->values[i] = values[i] / reach;
    memcpy(g->importance, f->importance + number * f->size, (size_t)f->size * sizeof(float));
    sort(g, f->size);
    range_of(f, g, &low, &high);
    memset(theta, 0, (size_t)(f->bits + 1) * sizeof *theta);
    for (int64_t r = 0; r < f->ratios; r++) {
        double step = f->ratio[r] * (high - low) / (double)((1 << f->bits) - 1);
        for (int64_t u = 0; u < f->bits; u++) start[u] = ldexp(step, (int)(f->bits - 2 - u));
        start[f->bits] = (low + high) / 2;
        alternate(f, g, start, theta, &error);
    }
    if (f->greedy) {
        start_greedily(f, g, start);
        alternate(f, g, start, theta, &error);
    }
    for (int64_t u = 0; u <= f->bits; u++) theta[u] *= (double)reach;
    f->error[number] = (error > 0 ? error : 0.0) * (double)reach * (double)reach;
}

static void fit_some(void *argument, qt_team *team, int64_t thread, int64_t threads) {
    const qt_fit *f = argument;
    (void)team;
    group g = divided(f->room + thread * qt_fit_room(f->size), f->size);
    for (int64_t i = f->groups * thread / threads; i < f->groups * (thread + 1) / threads; i++) fit_group(f, &g, i);
}

void qt_fit_groups(const qt_fit *f, int64_t threads) { qt_team_run(threads, fit_some, (void *)f); }
