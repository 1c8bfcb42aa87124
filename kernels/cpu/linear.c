/* Weights of planes for a caller: their layout, single rows, and products with few inputs. */
#include "product.h"

typedef struct {
    const qt_planes *weight;
    const float *x;
    int64_t batch;
    char *tables;
    float *y;
} qt_call;

static void multiply(void *argument, qt_team *team, int64_t thread, int64_t threads) {
    const qt_call *call = argument;
    const qt_planes *w = call->weight;
    int64_t apart = qt_table_bytes(w), stride = 0;
    int64_t first = w->num_groups * thread / threads, last = w->num_groups * (thread + 1) / threads;
    if (w->panel_rows) {
        qt_multiply_panels(w, call->x, call->batch, call->y, w->rows, 0, w->blocks * thread / threads,
                           w->blocks * (thread + 1) / threads);
        return;
    }
    for (int64_t b = 0; b < call->batch; b++)
        qt_make_tables(w, call->x + b * w->inputs, first, last, call->tables + b * apart);
    qt_team_wait(team);
    for (const qt_planes *class = w; class; class = class->next) stride += class->rows;
    for (; w; w = w->next)
        qt_multiply_planes(w, call->tables, apart, call->batch, call->y, stride, 0,
                           qt_tiles(w) * thread / threads, qt_tiles(w) * (thread + 1) / threads);
}

typedef struct {
    const qt_planes *weight;
    const uint32_t *bit_planes;
    const uint16_t *scales, *offsets;
} qt_packing;

static void pack(void *argument, qt_team *team, int64_t thread, int64_t threads) {
    const qt_packing *p = argument;
    int64_t tiles = qt_tiles(p->weight);
    (void)team;
    if (p->weight->panel_rows) {
        int64_t blocks = p->weight->blocks;
        qt_pack_panels(p->weight, p->bit_planes, p->scales, p->offsets, blocks * thread / threads,
                       blocks * (thread + 1) / threads, (uint8_t *)p->weight->stream);
        return;
    }
    qt_pack_tiles(p->weight, p->bit_planes, p->scales, p->offsets, tiles * thread / threads,
                  tiles * (thread + 1) / threads, (uint8_t *)p->weight->stream);
}

typedef struct {
    const qt_planes *weight;
    const int64_t *rows;
    int64_t first, count;
    qt_dtype dtype;
    char *y;
} qt_rows_call;

static void widen(void *argument, qt_team *team, int64_t thread, int64_t threads) {
    const qt_rows_call *call = argument;
    int64_t bytes = call->weight->inputs * (call->dtype == QT_FLOAT32 ? 4 : 2);
    (void)team;
    for (int64_t i = call->count * thread / threads; i < call->count * (thread + 1) / threads; i++)
        qt_number_row(call->weight, call->rows ? call->rows[i] : call->first + i, call->dtype,
                      call->y + i * bytes);
}

int64_t qt_planes_size(qt_planes *w) {
    w->num_groups = (w->inputs + w->group_size - 1) / w->group_size;
    w->chunks = (w->group_size + QT_CHUNK - 1) / QT_CHUNK;
    if (w->panel_rows) return qt_cut_panels(w);
    w->tile_bytes = 0;
    for (int64_t g = 0; g < w->num_groups; g++)
        w->tile_bytes += qt_bytes_of_group(w, qt_group_chunks(w, g));
    w->together = qt_table_bytes(w) > QT_FEW_TABLES ? QT_TOGETHER : 1;
    w->blocks = (qt_tiles(w) + w->together - 1) / w->together;
    return qt_tiles(w) * w->tile_bytes;
}

void qt_planes_pack(const qt_planes *w, const uint32_t *bit_planes, const uint16_t *scales,
                    const uint16_t *offsets, int64_t threads) {
    qt_packing packing = {w, bit_planes, scales, offsets};
    qt_team_run(threads, pack, &packing);
}

void qt_planes_rows(const qt_planes *w, const int64_t *rows, int64_t first, int64_t count,
                    int64_t dtype, char *y, int64_t threads) {
    qt_rows_call call = {w, rows, first, count, (qt_dtype)dtype, y};
    qt_team_run(threads, widen, &call);
}

int64_t qt_planes_room(const qt_planes *w, int64_t batch) { return batch * qt_table_bytes(w); }

void qt_planes_multiply(const qt_planes *w, const float *x, int64_t batch, char *room, float *y,
                        int64_t threads) {
    qt_call call = {w, x, batch, room, y};
    qt_team_run(threads, multiply, &call);
}

#ifndef QT_FINGERPRINT
#define QT_FINGERPRINT "none"
#endif
/* Of the text and the flags that this was made of. */
const char *qt_fingerprint(void) { return QT_FINGERPRINT; }
