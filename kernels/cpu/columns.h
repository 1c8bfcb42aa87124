#ifndef QT_COLUMNS_H
#define QT_COLUMNS_H
#include <stdint.h>
#define QT_TILE 64        /* rows at a time */
#define QT_MOST_PLACES 64 /* levels that a column may choose from */
typedef struct {
    int64_t columns, rows, places; /* places 0: each column has its own scales */
    const float *work;             /* (columns, rows): values to quantize; descending: the gradient */
    const float *before;           /* (columns, rows): descending: the levels so far; else NULL */
    const float *shares;           /* (columns, columns): row c says how c is moved by those before it */
    const float *own;              /* (columns): descending: the diagonal of the Hessian */
    const float *first;            /* levels, ascending (places, rows); or scales (columns, rows) */
    const float *second;           /* middles (places - 1, rows); or zero points (columns, rows) */
    const uint8_t *codes_of;       /* of levels, (places, rows) */
    double top;                    /* the highest code, where columns have scales */
    uint8_t *codes;                /* (columns, rows), out */
    float *levels;                 /* (columns, rows), out */
    float *room;                   /* (threads, columns, QT_TILE) */
} qt_columns;
/* Where a thread's share of all tiles begins; that of the next one is its end. */
static inline int64_t qt_first_row(int64_t rows, int64_t thread, int64_t threads) {
    return (rows + QT_TILE - 1) / QT_TILE * thread / threads * QT_TILE;
}
/* Rows of the tile that begins at one. */
static inline int64_t qt_tile_rows(int64_t rows, int64_t row) { return rows - row < QT_TILE ? rows - row : QT_TILE; }
void qt_columns_walk(const qt_columns *w, int64_t threads);
/* Some rows of it, as many as a tile has or fewer; steps: (columns, QT_TILE). */
void qt_columns_tile(const qt_columns *w, int64_t row, int64_t count, float *steps);
#endif
