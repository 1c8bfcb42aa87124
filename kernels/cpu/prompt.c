/* What stands between the products of a prompt, row by row, rounded where transformers rounds. */
#include "team.h"
#include "vectors.h"

#define QT_STRIP 256 /* numbers that are widened at once */

typedef struct {
    const char *x, *other; /* (rows, inputs); a weight (inputs), or (rows, inputs) */
    float eps;
    int64_t rows, inputs;
    qt_dtype dtype;
    char *y;
} qt_rows_work;

static int64_t item_of(qt_dtype dtype) { return dtype == QT_FLOAT32 ? 4 : 2; }

/* Numbers as they are in a dtype. */
static void round_to(float *x, qt_dtype dtype, int64_t n) {
    uint16_t words[QT_STRIP];
    if (dtype == QT_FLOAT32) return;
    qt_narrow(x, dtype, n, words);
    qt_widen(words, dtype, n, x);
}

static int64_t strip_of(int64_t left) { return left < QT_STRIP ? left : QT_STRIP; }

static void norm_row(const qt_rows_work *w, int64_t row) {
    float x[QT_STRIP], weight[QT_STRIP], sum = 0.0f;
    int64_t item = item_of(w->dtype);
    const char *from = w->x + row * w->inputs * item;
    char *to = w->y + row * w->inputs * item;
    for (int64_t i = 0, count; i < w->inputs; i += count) {
        count = strip_of(w->inputs - i);
        qt_widen(from + i * item, w->dtype, count, x);
        sum += qt_dot(x, x, count);
    }
    float scale = 1.0f / sqrtf(sum / (float)w->inputs + w->eps);
    for (int64_t i = 0, count; i < w->inputs; i += count) {
        count = strip_of(w->inputs - i);
        qt_widen(from + i * item, w->dtype, count, x);
        qt_widen(w->other + i * item, w->dtype, count, weight);
        for (int64_t j = 0; j < count; j++) x[j] *= scale;
        round_to(x, w->dtype, count);
        for (int64_t j = 0; j < count; j++) x[j] *= weight[j];
        qt_narrow(x, w->dtype, count, to + i * item);
    }
}

static void gate_row(const qt_rows_work *w, int64_t row) {
    float x[QT_STRIP], up[QT_STRIP], ones[QT_STRIP];
    int64_t item = item_of(w->dtype), first = row * w->inputs;
    for (int64_t j = 0; j < QT_STRIP; j++) ones[j] = 1.0f;
    for (int64_t i = first, count; i < first + w->inputs; i += count) {
        count = strip_of(first + w->inputs - i);
        qt_widen(w->x + i * item, w->dtype, count, x);
        qt_widen(w->other + i * item, w->dtype, count, up);
        qt_silu_times(x, ones, count, x);
        round_to(x, w->dtype, count);
        for (int64_t j = 0; j < count; j++) x[j] *= up[j];
        qt_narrow(x, w->dtype, count, w->y + i * item);
    }
}

static void norm_rows(void *argument, qt_team *team, int64_t thread, int64_t threads) {
    const qt_rows_work *w = argument;
    (void)team;
    for (int64_t i = w->rows * thread / threads; i < w->rows * (thread + 1) / threads; i++) norm_row(w, i);
}

static void gate_rows(void *argument, qt_team *team, int64_t thread, int64_t threads) {
    const qt_rows_work *w = argument;
    (void)team;
    for (int64_t i = w->rows * thread / threads; i < w->rows * (thread + 1) / threads; i++) gate_row(w, i);
}

void qt_norm_rows(const char *x, const char *weight, double eps, int64_t rows, int64_t inputs,
                  int64_t dtype, char *y, int64_t threads) {
    qt_rows_work work = {x, weight, (float)eps, rows, inputs, (qt_dtype)dtype, y};
    qt_team_run(threads, norm_rows, &work);
}

void qt_gate_rows(const char *gate, const char *up, int64_t rows, int64_t inputs, int64_t dtype, char *y,
                  int64_t threads) {
    qt_rows_work work = {gate, up, 0.0f, rows, inputs, (qt_dtype)dtype, y};
    qt_team_run(threads, gate_rows, &work);
}
