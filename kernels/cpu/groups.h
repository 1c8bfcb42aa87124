#ifndef QT_GROUPS_H
#define QT_GROUPS_H
#include <stdint.h>
#define QT_MOST_PLANES 6 /* of a code; QT_MOST_PLACES are its levels */
typedef struct {
    int64_t columns, rows, bits, offset; /* offset 0: it stays zero */
    int64_t starts, iterations;
    double ridge;           /* of least squares, by the mean of the diagonal */
    const float *weight;    /* (columns, rows) */
    const float *shares;    /* (columns, columns): row c says how c is moved by those before it */
    const float *whitening; /* (columns, columns), lower: of errors; their squares are the loss */
    const float *theta;     /* (starts, bits + 1, rows): scales, then the offset */
    uint8_t *codes;         /* (columns, rows), out */
    float *parameters;      /* (bits + 1, rows), out */
    float *errors;          /* (columns, rows), out: whitened */
    float *room;            /* (threads, qt_group_room) */
} qt_group;
typedef struct {
    int64_t columns, rows, bits, offset;
    const uint8_t *codes;  /* (columns, rows) */
    const float *matrix;   /* (columns, columns), symmetric */
    const float *gradient; /* (columns, rows) */
    double *normal;        /* (rows, unknowns, unknowns), out */
    double *right;         /* (rows, unknowns), out: of the gradient */
    float *room;           /* (threads, qt_group_room) */
} qt_equations;
int64_t qt_group_room(int64_t columns, int64_t bits);
void qt_group_solve(const qt_group *g, int64_t threads);
void qt_group_equations(const qt_equations *e, int64_t threads);
#endif
