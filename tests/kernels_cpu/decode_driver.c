/* Takes decoding steps of small models of odd shapes, for a compiler's sanitizers to watch. By one thread
   and by several they must say the same. */
#include <stdio.h>
#include <stdlib.h>

#include "product.h"

int64_t qt_planes_size(qt_planes *w);
void qt_planes_pack(const qt_planes *, const uint32_t *, const uint16_t *, const uint16_t *, int64_t);

#define MOST_KEPT 4096
static void *kept[MOST_KEPT];
static int num_kept;
static uint32_t state;
static uint32_t some(void) { return state = state * 1664525u + 1013904223u; }

/* Exactly as many bytes as are needed, so that a read beyond them is found. */
static void *exactly(int64_t bytes) {
    void *place = NULL;
    if (num_kept == MOST_KEPT || posix_memalign(&place, 64, (size_t)bytes)) abort();
    memset(place, 0, (size_t)bytes);
    return kept[num_kept++] = place;
}

static float *floats(int64_t count, float size) {
    float *place = exactly(count * 4);
    for (int64_t i = 0; i < count; i++) place[i] = size * ((float)(some() >> 8) / 8388608.0f - 1);
    return place;
}

/* In groups of inputs, or of rows. */
static qt_planes *planes(int64_t rows, int64_t inputs, int64_t group, int64_t bits, int64_t panel_rows) {
    qt_planes *w = exactly(sizeof *w);
    *w = (qt_planes){.rows = rows, .inputs = inputs, .group_size = group < inputs ? group : inputs, .num_bits = bits,
                     .panel_rows = panel_rows};
    w->stream = exactly(qt_planes_size(w));
    int64_t words = (inputs + 31) / 32, groups = rows * w->num_groups;
    if (panel_rows) groups = (rows + panel_rows - 1) / panel_rows * inputs;
    uint32_t *signs = exactly(bits * rows * words * 4);
    uint16_t *scales = exactly(bits * groups * 2);
    for (int64_t i = 0; i < bits * rows * words; i++) signs[i] = some();
    for (int64_t i = 0; i < bits * groups; i++)
        scales[i] = qt_float_to_half((float)(some() % 99) / 99 / sqrtf((float)inputs));
    qt_planes_pack(w, signs, scales, NULL, 1);
    return w;
}

/* Two classes of rows, every other row of each, if `classes`. */
static qt_planes *weight(int64_t rows, int64_t inputs, int64_t group, int64_t bits, int classes) {
    if (!classes || rows < 2) return planes(rows, inputs, group, bits, classes ? 0 : some() >> 20 & 1 ? 24 : 0);
    int64_t second = rows / 2, first = rows - second, *places = exactly(rows * 8), *numbers = exactly(rows * 8);
    qt_planes *w = planes(first, inputs, group, bits, 0), *next = planes(second, inputs, group, bits - 1, 0);
    for (int64_t i = 0; i < rows; i++) {
        int64_t number = i % 2 ? first + i / 2 : i / 2;
        numbers[i] = number, places[number] = i;
    }
    w->next = next, w->places = places, next->places = places + first, w->numbers = numbers;
    return w;
}

/* Dense in one of the dtypes, or of planes: whatever comes next. */
static qt_projection projection(int64_t rows, int64_t inputs) {
    qt_projection p = {.rows = rows, .inputs = inputs, .dtype = some() >> 16 & 3};
    if (p.dtype == 3) {
        p.packed = weight(rows, inputs, some() >> 20 & 1 ? 16 : 512, 2 + (some() >> 20) % 3, some() >> 21 & 1);
        p.dtype = 0;
    } else {
        void *dense = exactly(rows * inputs * (p.dtype == QT_FLOAT32 ? 4 : 2));
        qt_narrow(floats(rows * inputs, 1 / sqrtf((float)inputs)), (qt_dtype)p.dtype, rows * inputs, dense);
        p.dense = dense;
    }
    return p;
}

typedef struct {
    int64_t layers, hidden, heads, kv_heads, dim, intermediate, vocab, batch, length, cache;
    int norms, biases;
} shape;

static void fill_layer(const shape *s, qt_layer *layer) {
    int64_t inner = s->heads * s->dim, kv = s->kv_heads * s->dim;
    layer->input_norm = floats(s->hidden, 1), layer->mlp_norm = floats(s->hidden, 1);
    layer->qkv_bias = s->biases ? floats(inner + 2 * kv, 1) : NULL;
    layer->query_norm = s->norms ? floats(s->dim, 1) : NULL;
    layer->key_norm = s->norms ? floats(s->dim, 1) : NULL;
    layer->qkv.count = 3, layer->gate_up.count = 2, layer->output.count = layer->down.count = 1;
    layer->qkv.parts[0] = projection(inner, s->hidden);
    layer->qkv.parts[1] = projection(kv, s->hidden), layer->qkv.parts[2] = projection(kv, s->hidden);
    layer->output.parts[0] = projection(s->hidden, inner);
    layer->gate_up.parts[0] = projection(s->intermediate, s->hidden);
    layer->gate_up.parts[1] = projection(s->intermediate, s->hidden);
    layer->down.parts[0] = projection(s->hidden, s->intermediate);
}

/* Fills a cache step by step; returns the logits of the last one, (batch, vocab). */
static float *steps(const shape *s, const qt_decoder *d, int64_t threads, double *seconds) {
    int64_t item = s->cache == QT_FLOAT32 ? 4 : 2, sequence = s->kv_heads * s->length * s->dim;
    qt_state at = {.batch = s->batch, .max_length = s->length, .cache_dtype = s->cache};
    at.sequence_stride = sequence, at.layer_stride = s->batch * sequence, at.history_stride = s->length + 1;
    at.keys = exactly(s->layers * at.layer_stride * item), at.values = exactly(s->layers * at.layer_stride * item);
    float *rotary = exactly(s->length * s->dim * 4);
    for (int64_t i = 0; i < s->length * s->dim; i++)
        rotary[i] = i % s->dim < s->dim / 2 ? cosf((float)i) : sinf((float)(i - s->dim / 2));
    at.rotary = rotary;
    at.tokens = exactly(s->batch * 8), at.positions = exactly(s->batch * 4);
    at.history = exactly(s->batch * at.history_stride * 8), at.steps = exactly(4);
    at.logits = exactly(s->batch * s->vocab * 4);
    at.room = exactly(qt_decode_room(d, s->batch, threads)), at.seconds = seconds;
    for (int64_t i = 0; i < s->length; i++) {
        for (int64_t b = 0; b < s->batch; b++) at.tokens[b] = (i * 7 + b) % s->vocab;
        qt_decode_step(d, &at, threads);
    }
    return at.steps[0] == s->length && at.positions[0] == s->length ? at.logits : NULL;
}

static int run(shape s, uint32_t seed) {
    qt_decoder d = {s.layers, s.hidden, s.heads, s.kv_heads, s.dim, s.intermediate, s.vocab, 1e-5, 0.3};
    state = seed;
    qt_layer *layers = exactly(s.layers * (int64_t)sizeof *layers);
    for (int64_t i = 0; i < s.layers; i++) fill_layer(&s, layers + i);
    d.layers = layers, d.final_norm = floats(s.hidden, 1);
    d.embedding.count = d.head.count = 1;
    d.embedding.parts[0] = projection(s.vocab, s.hidden), d.head.parts[0] = projection(s.vocab, s.hidden);
    double seconds[QT_NUM_SPANS] = {0};
    float *alone = steps(&s, &d, 1, NULL), most = 0;
    int wrong = !alone;
    for (int64_t threads = 2; threads <= 3; threads++) {
        float *together = steps(&s, &d, threads, seconds);
        wrong |= !together;
        if (wrong) break;
        for (int64_t i = 0; i < s.batch * s.vocab; i++) most = fmaxf(most, fabsf(alone[i]));
        for (int64_t i = 0; i < s.batch * s.vocab; i++)
            wrong |= !(fabsf(alone[i] - together[i]) <= 2e-2f * most); /* a cache of 16 bits rounds */
    }
    for (int i = 0; i < num_kept; i++) free(kept[i]);
    num_kept = 0;
    return wrong || !(most > 0) || !(seconds[QT_HEAD] > 0);
}

int decode_steps(void);
int decode_steps(void) {
    int wrong = 0;
    for (uint32_t seed = 1; seed <= 4; seed++) {
        wrong += run((shape){2, 33, 3, 1, 6, 50, 71, 1, 5, QT_FLOAT32, 0, 1}, seed);
        wrong += run((shape){2, 64, 4, 2, 16, 96, 130, 3, 20, QT_FLOAT16, 1, 0}, seed);
        wrong += run((shape){1, 65, 2, 2, 34, 31, 40, 2, 70, QT_BFLOAT16, 1, 1}, seed);
        wrong += run((shape){1, 2, 1, 1, 2, 1, 2, 1, 1, QT_FLOAT32, 0, 0}, seed);
        wrong += run((shape){1, 600, 1, 1, 6, 1300, 2, 1, 1, QT_FLOAT32, 0, 0}, seed); /* blocks of tiles */
    }
    return wrong;
}
