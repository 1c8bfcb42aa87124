#ifndef QT_FITS_H
#define QT_FITS_H
#include <stdint.h>
#define QT_FIT_PLANES 6
typedef struct {
    int64_t groups, size, bits, offset, rounds, greedy, ratios; /* rounds: at most */
    double ridge, progress; /* of least squares; what an error must fall by */
    const float *values;     /* (groups, size) */
    const float *importance; /* (groups, size), at least 0; 0: padding */
    const double *ratio;     /* (ratios): of the range, that uniform starts cover */
    double *theta;           /* (groups, bits + 1), out: scales, then the offset */
    double *error;           /* (groups), out */
    double *room;            /* (threads, qt_fit_room) */
} qt_fit;
int64_t qt_fit_room(int64_t size);
void qt_fit_groups(const qt_fit *f, int64_t threads);
#endif
