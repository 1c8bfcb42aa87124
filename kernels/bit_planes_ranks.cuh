// The kernel of one weight of planes of which each rank has some of the columns, named KERNEL by the file
// that includes this after its product: y is the sum over ranks, plus the residual. All have as many rows.
//
// Grid (blocks, 1, blocks of columns), all of which a card runs at once.

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
KERNEL(const quad *planes,   // [row_tiles][units][PLANES][32]
       const u32 *scales,    // [row_tiles][groups][8][PARAMETERS], rows g and g + 8
       const u16 *x,         // [batch][in_features], this rank's
       const u16 *residual,  // [batch][out_features], or null, the same on all ranks
       u16 *y,               // [batch][out_features]
       const u64 *boxes,     // [RANKS] addresses, see peer_boxes.cuh
       u32 *rounds,          // [2]
       u64 *exchange,        // [blocks of columns][blocks][WARPS][PART], zeros
       int out_features, int in_features, int batch, int row_tiles, int units, int groups,
       int rank, int box_size) {
    DYNAMIC_SHARED(shared);
    exchange += (u64)blockIdx.z * gridDim.x * WARPS * PART;
    multiply({planes, scales, x, residual, y, (const int *)0, (float *)0, exchange, out_features, in_features,
              batch, row_tiles, units, groups, out_features, units, (int)blockIdx.x, (int)gridDim.x,
              (const u16 *)0, 0.0f, {boxes, rounds, rank, box_size}},
             shared);
}
