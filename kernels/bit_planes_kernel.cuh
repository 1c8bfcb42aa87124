// The kernel of one weight of planes, named KERNEL by the file that includes this after its product.
//
// Grid (blocks, slabs of in_features, blocks of columns). CLUSTER 2 or more (1 unless defined; compute capability 9.0): as many
// slabs, whose blocks are a cluster, so they are in the grid's first dimension.
#if CLUSTER > 1
#define CLUSTERED __cluster_dims__(CLUSTER, 1, 1)
#else
#define CLUSTERED
#endif

extern "C" __global__ void CLUSTERED __launch_bounds__(THREADS, BLOCKS)
KERNEL(const quad *planes,   // [row_tiles][units][PLANES][32]
       const u32 *scales,    // [row_tiles][groups][8][PARAMETERS], rows g and g + 8
       const u16 *x,         // [batch][in_features]
       const u16 *residual,  // [batch][width], or null
       u16 *y,               // [batch][width]: out_features wide; EPILOGUE 2: of half as many
       const int *places,    // [out_features], the columns of y; null: as they come
       float *partial,       // [slabs][batch][row_tiles * 16]; null: one slab, write y
       const u16 *norm,      // [in_features], if NORM
       u64 *exchange,        // [blocks of columns][slabs][blocks][WARPS][PART], zeros
       int out_features, int in_features, int batch, int row_tiles, int units, int groups,
       int width, int units_per_slab, float eps) {
    DYNAMIC_SHARED(shared);
    exchange += ((u64)blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x * WARPS * PART;
    multiply({planes, scales, x, residual, y, places, partial, exchange, out_features, in_features, batch,
              row_tiles, units, groups, width, units_per_slab, (int)blockIdx.x / CLUSTER, (int)gridDim.x / CLUSTER, norm, eps},
             shared);
}
