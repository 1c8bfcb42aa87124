/* A whole decoding step: one call per token, none of Python in it. */
#ifndef QT_DECODE_H
#define QT_DECODE_H

#include <stdint.h>

/* y = W x of one weight. */
typedef struct {
    int64_t rows, inputs;
    const void *packed; /* as `linear.h` has it; or NULL: it is dense */
    const void *dense;  /* (rows, inputs) */
    int64_t dtype;      /* of `dense`, a qt_dtype */
} qt_projection;

/* Weights that share an input, one below the other. */
typedef struct {
    int64_t count;
    qt_projection parts[3];
} qt_projections;

typedef struct {
    const float *input_norm;             /* (hidden) */
    const float *qkv_bias;               /* or NULL */
    const float *query_norm, *key_norm;  /* (head_dim), or NULL */
    const float *mlp_norm;
    qt_projections qkv, output, gate_up, down;
} qt_layer;

typedef struct {
    int64_t num_layers, hidden, num_heads, num_kv_heads, head_dim, intermediate, vocab;
    double norm_eps, attention_scale;
    const qt_layer *layers;
    const float *final_norm;
    qt_projections embedding, head;
} qt_decoder;

/* What the time of a step is told of, in the order in which `seconds` has them. */
enum { QT_EMBED, QT_QKV, QT_ATTEND, QT_OUTPUT, QT_GATE_UP, QT_GATE, QT_DOWN, QT_HEAD, QT_CHOOSE, QT_NUM_SPANS };

/* Where a batch of sequences stands; `DecodeState` says what each buffer is. */
typedef struct {
    int64_t batch, max_length, cache_dtype;
    int64_t layer_stride, sequence_stride, history_stride; /* in elements */
    char *keys, *values;
    const float *rotary;
    int64_t *tokens;
    int32_t *positions;
    int64_t *history;
    int32_t *steps;
    float *logits; /* (batch, vocab): what a step returns */
    char *room;    /* qt_decode_room bytes, aligned to 64 */
    double *seconds; /* (QT_NUM_SPANS) to add the time of each span to, or NULL */
} qt_state;

/* Bytes of `room` for steps by that many threads. */
int64_t qt_decode_room(const qt_decoder *decoder, int64_t batch, int64_t threads);

/* Reads the tokens, writes logits, chooses the likeliest tokens and moves on, by `threads`. */
void qt_decode_step(const qt_decoder *decoder, const qt_state *state, int64_t threads);

#endif
