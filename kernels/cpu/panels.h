/* Weights whose groups run along rows: each input has scales of its own in each group of rows.

   A group of rows is cut into equal blocks of `together` tiles of 32 rows; the last block of all has as
   many tiles as it needs. A stream per weight, read once: for each block, for each group of `group_size`
   inputs, float16 scales of each plane and offsets (num_bits + 1, chunks * 32), then for each plane, for
   each tile, 128 bytes per chunk, as planes.h has them. Tables are of inputs times their scales: a plane
   has its own in each block, made where they're read, by whom they're read. */
#ifndef QT_PANELS_H
#define QT_PANELS_H

#include "planes.h"

/* Cuts groups of rows into the fewest equal blocks; returns the bytes of the stream. */
int64_t qt_cut_panels(qt_planes *w);

/* Lays out blocks begin .. end - 1; the stream is zero before.

   bit_planes (num_bits, rows, words); scales (num_bits, groups of rows, inputs) and offsets (groups of
   rows, inputs), or NULL, float16. */
void qt_pack_panels(const qt_planes *w, const uint32_t *bit_planes, const uint16_t *scales,
                    const uint16_t *offsets, int64_t begin, int64_t end, uint8_t *stream);

/* Row `row` of a weight, (inputs) numbers of a dtype. */
void qt_panel_row(const qt_planes *w, int64_t row, qt_dtype dtype, char *y);

/* y[tile * batch + b] (rows) of a block, for x (batch, inputs): returns the first of its `rows` rows.
   `batch` is 1, 2 or QT_MOST_TOKENS; 1 where tables are of floats. */
int64_t qt_multiply_panel(const qt_planes *w, int64_t block, const float *x, int64_t batch, qt_floats (*y)[2],
                          int64_t *rows);

#endif
