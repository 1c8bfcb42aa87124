/* Codes and levels of a group of columns under error feedback, and least squares of its levels.

   Rows know nothing of one another: a thread takes a tile of them through all starts and iterations. What a
   row is worth is linear in its planes of signs, so these are whitened, and nothing else: errors of old and
   of new parameters, and the equations for these, are sums of whitened planes. */
#include "groups.h"

#include <string.h>

#include "columns.h"
#include "team.h"
#include "vectors.h"

#define QT_VECTORS (QT_TILE / QT_LANES)
#define QT_UNKNOWNS (QT_MOST_PLANES + 1)
#define QT_TINY 1e-30 /* keeps an all-zero system solvable */

typedef double qt_system[QT_UNKNOWNS][QT_UNKNOWNS + 1][QT_TILE];

/* A tile's room; each of (columns, QT_TILE) but for what is said. */
typedef struct {
    float *weight, *whitened, *steps, *levels, *signs, *errors;
    float *planes; /* (bits + 1, columns, QT_TILE): products of a matrix and signs, and of ones */
    uint8_t *codes, *best;
} qt_tile;

int64_t qt_group_room(int64_t columns, int64_t bits) {
    return columns * QT_TILE * (6 + bits + 1) + columns * QT_TILE / 2;
}

static qt_tile divided(float *room, int64_t columns, int64_t bits) {
    int64_t part = columns * QT_TILE;
    float *planes = room + 6 * part;
    uint8_t *codes = (uint8_t *)(planes + (bits + 1) * part);
    return (qt_tile){.weight = room,
                     .whitened = room + part,
                     .steps = room + 2 * part,
                     .levels = room + 3 * part,
                     .signs = room + 4 * part,
                     .errors = room + 5 * part,
                     .planes = planes,
                     .codes = codes,
                     .best = codes + part};
}

/* Rows from `row` on of (columns, rows), zero where there is none. */
static void fetch(const float *from, int64_t columns, int64_t rows, int64_t row, int64_t count, float *to) {
    memset(to, 0, (size_t)(columns * QT_TILE) * sizeof *to);
    for (int64_t c = 0; c < columns; c++) memcpy(to + c * QT_TILE, from + c * rows + row, (size_t)count * sizeof *to);
}

/* A matrix (columns, columns) times a tile; `lower`: it has nothing right of its diagonal. */
static void multiply(const float *matrix, int64_t columns, const int lower, const float *in, float *out) {
    for (int64_t c = 0; c < columns; c += 2) {
        int64_t second = c + 1 < columns ? c + 1 : c, stop = lower ? second + 1 : columns;
        const float *first_row = matrix + c * columns, *second_row = matrix + second * columns;
        qt_floats first[QT_VECTORS] = {0}, next[QT_VECTORS] = {0};
        for (int64_t d = 0; d < stop; d++)
            for (int v = 0; v < QT_VECTORS; v++) {
                qt_floats x = qt_load(in + d * QT_TILE + v * QT_LANES);
                first[v] += first_row[d] * x;
                next[v] += second_row[d] * x;
            }
        for (int v = 0; v < QT_VECTORS; v++) {
            qt_store(out + c * QT_TILE + v * QT_LANES, first[v]);
            qt_store(out + second * QT_TILE + v * QT_LANES, next[v]);
        }
    }
}

/* What becomes of ones: the sums of a matrix's rows, the same in all lanes. */
static void multiply_ones(const float *matrix, int64_t columns, float *out) {
    for (int64_t c = 0; c < columns; c++) {
        float sum = 0.0f;
        for (int64_t d = 0; d < columns; d++) sum += matrix[c * columns + d];
        for (int64_t i = 0; i < QT_TILE; i++) out[c * QT_TILE + i] = sum;
    }
}

/* One plane of a tile's codes, as 1 and -1. */
static void signs_of(const uint8_t *codes, int64_t columns, int64_t bit, float *signs) {
    for (int64_t i = 0; i < columns * QT_TILE; i++) signs[i] = (float)(2 * ((codes[i] >> bit) & 1) - 1);
}

/* The sum over columns of products, row by row. */
static void dots(const float *a, const float *b, int64_t columns, double *out) {
    qt_floats sums[QT_VECTORS] = {0};
    for (int64_t c = 0; c < columns * QT_TILE; c += QT_TILE)
        for (int v = 0; v < QT_VECTORS; v++) sums[v] += qt_load(a + c + v * QT_LANES) * qt_load(b + c + v * QT_LANES);
    for (int i = 0; i < QT_TILE; i++) out[i] = (double)sums[i / QT_LANES][i % QT_LANES];
}

/* Gauss-Jordan elimination, each row's system for itself; the solution is the last column. */
static void eliminate(qt_system a, int64_t n, double ridge) {
    double floor[QT_TILE] = {0}, pivot[QT_TILE];
    for (int64_t k = 0; k < n; k++)
        for (int i = 0; i < QT_TILE; i++) floor[i] += a[k][k][i];
    for (int i = 0; i < QT_TILE; i++) floor[i] = ridge * (floor[i] / (double)n) + QT_TINY;
    for (int64_t k = 0; k < n; k++)
        for (int i = 0; i < QT_TILE; i++) a[k][k][i] += floor[i];
    for (int64_t k = 0; k < n; k++) {
        for (int i = 0; i < QT_TILE; i++) pivot[i] = 1.0 / (a[k][k][i] > floor[i] ? a[k][k][i] : floor[i]);
        for (int64_t j = k; j <= n; j++)
            for (int i = 0; i < QT_TILE; i++) a[k][j][i] *= pivot[i];
        for (int64_t other = 0; other < n; other++)
            for (int64_t j = k + 1; j <= n && other != k; j++)
                for (int i = 0; i < QT_TILE; i++) a[other][j][i] -= a[other][k][i] * a[k][j][i];
    }
    for (int64_t k = 0; k < n; k++) memmove(a[k][0], a[k][n], sizeof a[k][0]);
}

/* Levels ascending, what lies between them, and their codes, (places, QT_TILE) each. */
static void sort_levels(const float *theta, int64_t bits, float *levels, float *middles, uint8_t *codes) {
    const int64_t places = (int64_t)1 << bits;
    float numbers[QT_MOST_PLACES * QT_TILE];
    for (int64_t p = 0; p < places; p++)
        for (int i = 0; i < QT_TILE; i++) {
            float level = theta[bits * QT_TILE + i];
            for (int64_t u = 0; u < bits; u++) {
                float scale = theta[u * QT_TILE + i];
                level += (p >> (bits - 1 - u)) & 1 ? scale : -scale;
            }
            levels[p * QT_TILE + i] = level;
            numbers[p * QT_TILE + i] = (float)p;
        }
    for (int64_t p = 1; p < places; p++)
        for (int64_t q = p; q > 0; q--)
            for (int i = 0; i < QT_TILE; i++) {
                float *low = levels + (q - 1) * QT_TILE + i, *high = low + QT_TILE, a = *low, b = *high;
                float *low_number = numbers + (q - 1) * QT_TILE + i, *high_number = low_number + QT_TILE;
                float m = *low_number, n = *high_number;
                *low = a > b ? b : a, *high = a > b ? a : b;
                *low_number = a > b ? n : m, *high_number = a > b ? m : n;
            }
    for (int64_t i = 0; i < (places - 1) * QT_TILE; i++) middles[i] = (levels[i] + levels[i + QT_TILE]) / 2;
    for (int64_t i = 0; i < places * QT_TILE; i++) codes[i] = (uint8_t)numbers[i];
}

/* Codes of a tile under feedback, with the levels that theta says. */
static void walk(const qt_group *g, const qt_tile *t, const float *theta) {
    float levels[QT_MOST_PLACES * QT_TILE], middles[QT_MOST_PLACES * QT_TILE];
    uint8_t codes[QT_MOST_PLACES * QT_TILE];
    sort_levels(theta, g->bits, levels, middles, codes);
    qt_columns w = {.columns = g->columns, .rows = QT_TILE, .places = (int64_t)1 << g->bits};
    w.work = t->weight, w.shares = g->shares, w.first = levels, w.second = middles, w.codes_of = codes;
    w.codes = t->codes, w.levels = t->levels;
    qt_columns_tile(&w, 0, QT_TILE, t->steps);
}

/* The parameters that are best for a tile's codes, whose planes are whitened on the way. */
static void fit(const qt_group *g, const qt_tile *t, float *theta) {
    const int64_t unknowns = g->bits + (g->offset != 0), part = g->columns * QT_TILE;
    qt_system a;
    for (int64_t u = 0; u < g->bits; u++) {
        signs_of(t->codes, g->columns, g->bits - 1 - u, t->signs);
        multiply(g->whitening, g->columns, 1, t->signs, t->planes + u * part);
    }
    for (int64_t u = 0; u < unknowns; u++) {
        dots(t->planes + u * part, t->whitened, g->columns, a[u][unknowns]);
        for (int64_t other = 0; other <= u; other++) {
            dots(t->planes + u * part, t->planes + other * part, g->columns, a[u][other]);
            memcpy(a[other][u], a[u][other], sizeof a[u][other]);
        }
    }
    eliminate(a, unknowns, g->ridge);
    memset(theta, 0, (size_t)(g->bits + 1) * QT_TILE * sizeof *theta);
    for (int64_t u = 0; u < unknowns; u++)
        for (int i = 0; i < QT_TILE; i++) theta[u * QT_TILE + i] = (float)a[u][0][i];
}

/* Sums of squares of whitened errors of the codes at hand; with `into`, errors go there where `mask` says so. */
static void errors_of(const qt_group *g, const qt_tile *t, const float *theta, const qt_ints *mask, float *into,
                      qt_floats *loss) {
    const int64_t part = g->columns * QT_TILE;
    for (int v = 0; v < QT_VECTORS; v++) loss[v] = (qt_floats){0};
    for (int64_t c = 0; c < part; c += QT_TILE)
        for (int v = 0; v < QT_VECTORS; v++) {
            const int64_t at = c + v * QT_LANES;
            qt_floats error = qt_load(t->whitened + at);
            for (int64_t u = 0; u <= g->bits; u++)
                error -= qt_load(theta + u * QT_TILE + v * QT_LANES) * qt_load(t->planes + u * part + at);
            loss[v] += error * error;
            if (into) qt_store(into + at, qt_chosen(mask[v], error, qt_load(into + at)));
        }
}

/* What the best so far is, of a tile. */
typedef struct {
    float theta[(QT_MOST_PLANES + 1) * QT_TILE];
    qt_floats loss[QT_VECTORS];
} qt_best;

/* Keep the codes at hand with theta in the rows where they are better. */
static void keep(const qt_group *g, const qt_tile *t, const float *theta, qt_best *best) {
    qt_floats loss[QT_VECTORS];
    qt_ints better[QT_VECTORS];
    uint8_t rows[QT_TILE];
    int any = 0;
    errors_of(g, t, theta, NULL, NULL, loss);
    for (int v = 0; v < QT_VECTORS; v++) {
        better[v] = loss[v] < best->loss[v];
        best->loss[v] = qt_chosen(better[v], loss[v], best->loss[v]);
        for (int i = 0; i < QT_LANES; i++) any |= rows[v * QT_LANES + i] = (uint8_t)better[v][i];
        for (int64_t u = 0; u <= g->bits; u++) {
            float *at = best->theta + u * QT_TILE + v * QT_LANES;
            qt_store(at, qt_chosen(better[v], qt_load(theta + u * QT_TILE + v * QT_LANES), qt_load(at)));
        }
    }
    if (!any) return;
    errors_of(g, t, best->theta, better, t->errors, loss);
    for (int64_t c = 0; c < g->columns * QT_TILE; c += QT_TILE)
        for (int i = 0; i < QT_TILE; i++)
            t->best[c + i] = (uint8_t)((t->codes[c + i] & rows[i]) | (t->best[c + i] & ~rows[i]));
}

static void solve_tile(const qt_group *g, const qt_tile *t, int64_t row, int64_t count) {
    float theta[2][(QT_MOST_PLANES + 1) * QT_TILE];
    qt_best best;
    fetch(g->weight, g->columns, g->rows, row, count, t->weight);
    multiply(g->whitening, g->columns, 1, t->weight, t->whitened);
    fetch(g->theta, g->bits + 1, g->rows, row, count, best.theta);
    for (int v = 0; v < QT_VECTORS; v++) best.loss[v] = qt_all(INFINITY);
    memset(t->best, 0, (size_t)(g->columns * QT_TILE));
    memset(t->errors, 0, (size_t)(g->columns * QT_TILE) * sizeof *t->errors);
    for (int64_t s = 0; s < g->starts; s++) {
        fetch(g->theta + s * (g->bits + 1) * g->rows, g->bits + 1, g->rows, row, count, theta[0]);
        for (int64_t i = 0; i < g->iterations; i++) {
            walk(g, t, theta[i % 2]);
            fit(g, t, theta[(i + 1) % 2]);
            keep(g, t, theta[i % 2], &best);
            keep(g, t, theta[(i + 1) % 2], &best);
        }
    }
    for (int64_t c = 0; c < g->columns; c++) {
        memcpy(g->codes + c * g->rows + row, t->best + c * QT_TILE, (size_t)count);
        memcpy(g->errors + c * g->rows + row, t->errors + c * QT_TILE, (size_t)count * sizeof(float));
    }
    for (int64_t u = 0; u <= g->bits; u++)
        memcpy(g->parameters + u * g->rows + row, best.theta + u * QT_TILE, (size_t)count * sizeof(float));
}

static void solve(void *argument, qt_team *team, int64_t thread, int64_t threads) {
    const qt_group *g = argument;
    (void)team;
    qt_tile t = divided(g->room + thread * qt_group_room(g->columns, g->bits), g->columns, g->bits);
    multiply_ones(g->whitening, g->columns, t.planes + g->bits * g->columns * QT_TILE);
    const int64_t end = qt_first_row(g->rows, thread + 1, threads);
    for (int64_t row = qt_first_row(g->rows, thread, threads); row < end; row += QT_TILE)
        solve_tile(g, &t, row, qt_tile_rows(g->rows, row));
}

void qt_group_solve(const qt_group *g, int64_t threads) { qt_team_run(threads, solve, (void *)g); }

/* Normal equations of a tile's planes under a matrix. */
static void equate(const qt_equations *e, const qt_tile *t, int64_t row, int64_t count) {
    const int64_t unknowns = e->bits + (e->offset != 0), part = e->columns * QT_TILE;
    double sums[QT_TILE];
    fetch(e->gradient, e->columns, e->rows, row, count, t->weight);
    memset(t->codes, 0, (size_t)part);
    for (int64_t c = 0; c < e->columns; c++)
        memcpy(t->codes + c * QT_TILE, e->codes + c * e->rows + row, (size_t)count);
    for (int64_t u = 0; u < unknowns; u++) {
        if (u < e->bits) {
            signs_of(t->codes, e->columns, e->bits - 1 - u, t->signs);
            multiply(e->matrix, e->columns, 0, t->signs, t->planes + u * part);
        } else
            for (int64_t i = 0; i < part; i++) t->signs[i] = 1.0f;
        dots(t->signs, t->weight, e->columns, sums);
        for (int64_t i = 0; i < count; i++) e->right[(row + i) * unknowns + u] = sums[i];
        for (int64_t other = 0; other <= u; other++) {
            dots(t->signs, t->planes + other * part, e->columns, sums);
            for (int64_t i = 0; i < count; i++) {
                double *system = e->normal + (row + i) * unknowns * unknowns;
                system[u * unknowns + other] = system[other * unknowns + u] = sums[i];
            }
        }
    }
}

static void equate_all(void *argument, qt_team *team, int64_t thread, int64_t threads) {
    const qt_equations *e = argument;
    (void)team;
    qt_tile t = divided(e->room + thread * qt_group_room(e->columns, e->bits), e->columns, e->bits);
    multiply_ones(e->matrix, e->columns, t.planes + e->bits * e->columns * QT_TILE);
    const int64_t end = qt_first_row(e->rows, thread + 1, threads);
    for (int64_t row = qt_first_row(e->rows, thread, threads); row < end; row += QT_TILE)
        equate(e, &t, row, qt_tile_rows(e->rows, row));
}

void qt_group_equations(const qt_equations *e, int64_t threads) { qt_team_run(threads, equate_all, (void *)e); }
