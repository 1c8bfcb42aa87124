/* A decoding step of a model of Llama's kind: every thread runs all of it on its share of the rows
   and positions, and they wait for one another where one needs what another has made. */
#include "decode.h"

#include <stdatomic.h>
#include <time.h>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define QT_GUARD 64 /* bytes behind each part of the room that nobody may touch */
#else
#define QT_GUARD 0
#define ASAN_POISON_MEMORY_REGION(place, bytes) ((void)(place), (void)(bytes))
#endif

#include "attention.h"
#include "product.h"

#define QT_SHARES 8 /* parts in which a thread takes its blocks, at most */

/* Of one thread's blocks in one pass: how many somebody has taken. */
typedef struct {
    _Alignas(64) _Atomic int64_t blocks;
} qt_taken;

typedef struct {
    float *x;                  /* (batch, hidden): what goes from block to block */
    float *qkv, *inner, *gate_up;
    qt_part *parts;            /* (threads, batch, heads) */
    float *sums;               /* (threads, batch, heads, head_dim) */
    float *own;                /* (threads, own_floats): what one thread alone sees */
    char *tables;              /* of the input of the projections that run, where they are shared */
    char *own_tables;          /* (threads, QT_OWN_TABLES) */
    qt_taken *taken;           /* (passes, threads) */
    int64_t *best;             /* (threads, batch) */
    float *best_logits;
    int64_t own_floats, taken_bytes, num_bytes;
} qt_room;

typedef struct {
    const qt_decoder *decoder;
    const qt_state *state;
    qt_room room;
} qt_step;

typedef struct {
    const qt_step *step;
    qt_team *team;
    int64_t thread, threads, passes;
    float *own;
    double since; /* when the span that runs began */
} qt_worker;

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

/* A span has ended, and the next one begins. */
static void told(qt_worker *w, int span) {
    double *seconds = w->step->state->seconds;
    if (!seconds || w->thread > 0) return;
    double time = now();
    seconds[span] += time - w->since;
    w->since = time;
}

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

static char *take(char *base, int64_t *used, int64_t bytes) {
    char *place = base ? base + *used : NULL;
    *used += (bytes + 63) / 64 * 64 + QT_GUARD;
    if (base) ASAN_POISON_MEMORY_REGION(place + bytes, base + *used - place - bytes);
    return place;
}

static int64_t rows_of(const qt_projections *all) {
    int64_t rows = 0;
    for (int64_t i = 0; i < all->count; i++) rows += all->parts[i].rows;
    return rows;
}

static int64_t table_bytes(const qt_projections *all) {
    int64_t most = 0;
    for (int64_t i = 0; i < all->count; i++)
        if (all->parts[i].packed) most = larger(most, qt_table_bytes(all->parts[i].packed));
    return most;
}

static int64_t most_table_bytes(const qt_decoder *d) {
    int64_t most = table_bytes(&d->head);
    for (int64_t i = 0; i < d->num_layers; i++) {
        const qt_layer *layer = d->layers + i;
        most = larger(most, larger(table_bytes(&layer->qkv), table_bytes(&layer->output)));
        most = larger(most, larger(table_bytes(&layer->gate_up), table_bytes(&layer->down)));
    }
    return most;
}

/* Of all products of a step, each of parts that may all want tables of their own. */
static int64_t most_passes(const qt_decoder *d) {
    int64_t passes = d->head.count;
    for (int64_t i = 0; i < d->num_layers; i++)
        passes += d->layers[i].qkv.count + d->layers[i].output.count + d->layers[i].gate_up.count +
                  d->layers[i].down.count;
    return passes;
}

static qt_room cut_room(const qt_decoder *d, int64_t batch, int64_t threads, char *base) {
    qt_room room;
    int64_t used = 0, heads = d->num_heads * d->head_dim;
    int64_t widest = larger(larger(d->hidden, d->intermediate), heads);
    int64_t qkv = heads + 2 * d->num_kv_heads * d->head_dim, each = threads * batch * d->num_heads;
    room.own_floats = batch * larger(widest, heads) + (2 * QT_TILE + 1) * d->head_dim + QT_TILE;
    room.own_floats = (room.own_floats + 15) / 16 * 16;
    room.x = (float *)take(base, &used, batch * d->hidden * 4);
    room.qkv = (float *)take(base, &used, batch * qkv * 4);
    room.inner = (float *)take(base, &used, batch * widest * 4);
    room.gate_up = (float *)take(base, &used, batch * 2 * d->intermediate * 4);
    room.parts = (qt_part *)take(base, &used, each * (int64_t)sizeof(qt_part));
    room.sums = (float *)take(base, &used, each * d->head_dim * 4);
    room.own = (float *)take(base, &used, threads * room.own_floats * 4);
    room.tables = take(base, &used, batch * most_table_bytes(d));
    room.own_tables = take(base, &used, threads * QT_OWN_TABLES);
    room.taken_bytes = most_passes(d) * threads * (int64_t)sizeof(qt_taken);
    room.taken = (qt_taken *)take(base, &used, room.taken_bytes);
    room.best = (int64_t *)take(base, &used, threads * batch * 8);
    room.best_logits = (float *)take(base, &used, threads * batch * 4);
    room.num_bytes = used;
    return room;
}

int64_t qt_decode_room(const qt_decoder *decoder, int64_t batch, int64_t threads) {
    return cut_room(decoder, batch, threads, NULL).num_bytes;
}

static void wait_for_all(const qt_worker *w) { qt_team_wait(w->team); }

/* The part of `count` things that is this thread's. */
static void share(const qt_worker *w, int64_t count, int64_t *begin, int64_t *end) {
    *begin = count * w->thread / w->threads;
    *end = count * (w->thread + 1) / w->threads;
}

/* Tables of x (batch, inputs): a thread's own, or, where these are much work, shared ones. */
static const char *make_tables(const qt_worker *w, const qt_planes *weight, const float *x) {
    int64_t batch = w->step->state->batch, apart = qt_table_bytes(weight);
    int64_t begin = 0, end = weight->num_groups;
    if (weight->panel_rows) return NULL; /* each block makes its own */
    int is_shared = batch * apart > QT_OWN_TABLES;
    char *place = is_shared ? w->step->room.tables : w->step->room.own_tables + w->thread * QT_OWN_TABLES;
    if (is_shared) {
        wait_for_all(w); /* others may still read what is there */
        share(w, weight->num_groups, &begin, &end);
    }
    for (int64_t b = 0; b < batch; b++)
        qt_make_tables(weight, x + b * weight->inputs, begin, end, place + b * apart);
    if (is_shared) wait_for_all(w);
    return place;
}

/* Blocks of a thread are a run of their own; who has done his takes others' from theirs. */
static void run_products(qt_worker *w, const qt_products *products, int64_t blocks, int64_t together) {
    qt_taken *taken = w->step->room.taken + w->passes++ * w->threads;
    int64_t each = blocks / (QT_SHARES * w->threads), most = QT_TOGETHER / together;
    each = each < 1 ? 1 : each > most ? most : each;
    for (int64_t i = 0; i < w->threads; i++) {
        int64_t whose = (w->thread + i) % w->threads, first;
        int64_t begin = blocks * whose / w->threads, end = blocks * (whose + 1) / w->threads;
        while ((first = begin + atomic_fetch_add_explicit(&taken[whose].blocks, each, memory_order_relaxed)) < end)
            qt_multiply_products(products, first, first + each < end ? first + each : end);
    }
}

/* y (batch, rows of all) = x (batch, inputs) @ W.T, added to y if `add`; all threads have the same
   numbers in x. Afterwards all threads have come here. */
static void multiply(qt_worker *w, const float *x, const qt_projections *all, float *y, int add) {
    qt_products p = {NULL, 0, w->step->state->batch, rows_of(all), x, NULL, y, add};
    for (int64_t i = 0; i < all->count; i += p.count) {
        const qt_planes *first = all->parts[i].packed;
        int64_t blocks = 0;
        p.parts = all->parts + i, p.count = 0;
        for (int64_t j = i; j < all->count; j++, p.count++) { /* those of the same tables */
            const qt_planes *planes = all->parts[j].packed;
            if (!planes != !first || (first && planes->group_size != first->group_size)) break;
            if (first && !planes->panel_rows != !first->panel_rows) break;
            blocks += qt_projection_blocks(all->parts + j);
        }
        if (first) p.tables = make_tables(w, first, x);
        run_products(w, &p, blocks, first ? first->together : 1);
        for (int64_t j = 0; j < p.count; j++) p.y += p.parts[j].rows;
    }
    wait_for_all(w);
}

static void normalized(const qt_worker *w, const float *weight, float *y) {
    const qt_decoder *d = w->step->decoder;
    for (int64_t b = 0; b < w->step->state->batch; b++)
        qt_rms_norm(w->step->room.x + b * d->hidden, weight, (float)d->norm_eps, d->hidden,
                    y + b * d->hidden);
}

/* A head of queries or keys with bias, norm and position; y may be x. */
static void finish_head(const qt_decoder *d, const float *x, const float *bias, const float *norm,
                        const float *turn, float *y) {
    for (int64_t i = 0; i < d->head_dim; i++) y[i] = x[i] + (bias ? bias[i] : 0.0f);
    if (norm) qt_rms_norm(y, norm, (float)d->norm_eps, d->head_dim, y);
    if (turn) qt_rotate(y, turn, d->head_dim);
}

/* Store the keys and values of one sequence's new token. */
static void store_new(const qt_worker *w, const qt_layer *layer, int64_t index, int64_t b, float *head) {
    const qt_decoder *d = w->step->decoder;
    const qt_state *s = w->step->state;
    int64_t dim = d->head_dim, key = d->num_heads * dim, width = key + 2 * d->num_kv_heads * dim;
    int64_t position = s->positions[b], item = s->cache_dtype == QT_FLOAT32 ? 4 : 2;
    for (int64_t i = 0; i < 2 * d->num_kv_heads; i++) {
        int64_t which = i % d->num_kv_heads, place = key + i * dim;
        int is_key = i < d->num_kv_heads;
        const float *bias = layer->qkv_bias ? layer->qkv_bias + place : NULL;
        finish_head(d, w->step->room.qkv + b * width + place, bias, is_key ? layer->key_norm : NULL,
                    is_key ? s->rotary + position * dim : NULL, head);
        int64_t at = index * s->layer_stride + b * s->sequence_stride;
        at += (which * s->max_length + position) * dim;
        qt_narrow(head, (qt_dtype)s->cache_dtype, dim, (is_key ? s->keys : s->values) + at * item);
    }
}

/* Which positions begin .. end - 1 of a sequence are this thread's, in runs of 16. */
static void positions_of(const qt_worker *w, int64_t count, int64_t *begin, int64_t *end) {
    share(w, (count + QT_LANES - 1) / QT_LANES, begin, end);
    *begin *= QT_LANES, *end *= QT_LANES;
    if (*end > count) *end = count;
}

/* This thread's part of the attention of all sequences. */
static void attend(const qt_worker *w, const qt_layer *layer, int64_t index) {
    const qt_decoder *d = w->step->decoder;
    const qt_state *s = w->step->state;
    int64_t dim = d->head_dim, heads = d->num_heads, group = heads / d->num_kv_heads;
    int64_t width = (heads + 2 * d->num_kv_heads) * dim, item = s->cache_dtype == QT_FLOAT32 ? 4 : 2;
    float *queries = w->own, *room = w->own + heads * dim;
    for (int64_t b = 0; b < s->batch; b++) {
        int64_t begin, end, position = s->positions[b];
        positions_of(w, position + 1, &begin, &end);
        if (end == position + 1 && begin < end) store_new(w, layer, index, b, room);
        for (int64_t h = 0; h < heads && begin < end; h++)
            finish_head(d, w->step->room.qkv + b * width + h * dim,
                        layer->qkv_bias ? layer->qkv_bias + h * dim : NULL, layer->query_norm,
                        s->rotary + position * dim, queries + h * dim);
        for (int64_t h = 0; h < d->num_kv_heads; h++) {
            int64_t first = (w->thread * s->batch + b) * heads + h * group;
            int64_t at = index * s->layer_stride + b * s->sequence_stride + h * s->max_length * dim;
            qt_attend_part(queries + h * group * dim, s->keys + at * item, s->values + at * item,
                           (qt_dtype)s->cache_dtype, begin, end, group, dim,
                           (float)d->attention_scale, w->step->room.parts + first,
                           w->step->room.sums + first * dim, room);
        }
    }
    wait_for_all(w);
}

/* What all threads have found of all heads, as the input of the output projection; each thread
   makes all of it, for that is sooner done than waited for. */
static void merge(const qt_worker *w, float *y) {
    const qt_decoder *d = w->step->decoder;
    int64_t all = w->step->state->batch * d->num_heads, dim = d->head_dim;
    for (int64_t i = 0; i < all; i++)
        qt_merge_parts(w->step->room.parts + i, w->step->room.sums + i * dim, w->threads, all, dim,
                       y + i * dim);
}

static void gate(const qt_worker *w) {
    const qt_decoder *d = w->step->decoder;
    int64_t n = d->intermediate, begin, end;
    share(w, (n + 63) / 64, &begin, &end);
    begin *= 64, end = end * 64 < n ? end * 64 : n;
    for (int64_t b = 0; b < w->step->state->batch && begin < end; b++) {
        const float *row = w->step->room.gate_up + b * 2 * n;
        qt_silu_times(row + begin, row + n + begin, end - begin, w->step->room.inner + b * n + begin);
    }
    wait_for_all(w);
}

static void run_layer(qt_worker *w, int64_t index) {
    const qt_layer *layer = w->step->decoder->layers + index;
    const qt_room *room = &w->step->room;
    normalized(w, layer->input_norm, w->own);
    multiply(w, w->own, &layer->qkv, room->qkv, 0);
    told(w, QT_QKV);
    attend(w, layer, index);
    told(w, QT_ATTEND);
    merge(w, w->own);
    multiply(w, w->own, &layer->output, room->x, 1);
    told(w, QT_OUTPUT);
    normalized(w, layer->mlp_norm, w->own);
    multiply(w, w->own, &layer->gate_up, room->gate_up, 0);
    told(w, QT_GATE_UP);
    gate(w);
    told(w, QT_GATE);
    multiply(w, room->inner, &layer->down, room->x, 1);
    told(w, QT_DOWN);
}

/* The likeliest tokens become the next ones. */
static void choose(const qt_worker *w) {
    const qt_step *step = w->step;
    const qt_state *s = step->state;
    int64_t vocab = step->decoder->vocab, begin, end;
    share(w, vocab, &begin, &end);
    for (int64_t b = 0; b < s->batch; b++) {
        const float *logits = s->logits + b * vocab;
        int64_t best = begin < end ? begin : 0;
        for (int64_t i = begin; i < end; i++)
            if (logits[i] > logits[best]) best = i;
        step->room.best[w->thread * s->batch + b] = best;
        step->room.best_logits[w->thread * s->batch + b] = logits[best];
    }
    wait_for_all(w);
    if (w->thread > 0) return;
    for (int64_t b = 0; b < s->batch; b++) {
        int64_t best = 0;
        for (int64_t t = 1; t < w->threads; t++)
            if (step->room.best_logits[t * s->batch + b] > step->room.best_logits[best * s->batch + b])
                best = t;
        s->tokens[b] = step->room.best[best * s->batch + b];
        s->positions[b] += 1;
        s->history[b * s->history_stride + s->positions[b]] = s->tokens[b];
    }
    s->steps[0] += 1;
}

static void work(void *argument, qt_team *team, int64_t thread, int64_t threads) {
    const qt_step *step = argument;
    const qt_decoder *d = step->decoder;
    qt_worker worker = {step, team, thread, threads, 0, step->room.own + thread * step->room.own_floats, 0};
    if (step->state->seconds && thread == 0) worker.since = now();
    for (int64_t b = thread; b < step->state->batch; b += threads)
        qt_row(&d->embedding.parts[0], step->state->tokens[b], step->room.x + b * d->hidden);
    wait_for_all(&worker);
    told(&worker, QT_EMBED);
    for (int64_t index = 0; index < d->num_layers; index++) run_layer(&worker, index);
    normalized(&worker, d->final_norm, worker.own);
    multiply(&worker, worker.own, &d->head, step->state->logits, 0);
    told(&worker, QT_HEAD);
    choose(&worker);
    told(&worker, QT_CHOOSE);
}

void qt_decode_step(const qt_decoder *decoder, const qt_state *state, int64_t threads) {
    qt_step step = {decoder, state, cut_room(decoder, state->batch, threads, state->room)};
    memset(step.room.taken, 0, (size_t)step.room.taken_bytes);
    qt_team_run(threads, work, &step);
}
