// The kernel of the chosen experts' weights, named KERNEL by the file that includes this after its
// product, which has one column: each slot has a token, and a weight, of its own.
//
// Grid (blocks, slabs of in_features, slots).

#if COLUMNS != 1
#error a slot has one token
#endif

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
KERNEL(const quad *planes, // [experts][row_tiles][units][PLANES][32]
       const u32 *scales,  // [experts][row_tiles][groups][8][PARAMETERS], rows g and g + 8
       const int *chosen,  // [slots], the expert of each
       const u16 *x,       // [slots][in_features]
       u16 *y,             // [slots][width]: out_features wide
       float *partial,     // [slabs][slots][row_tiles * 16]; null: one slab, write y
       u64 *exchange,      // [slots][slabs][blocks][WARPS][16], zeros
       int out_features, int in_features, int slots, int row_tiles, int units, int groups, int width,
       int units_per_slab) {
    DYNAMIC_SHARED(shared);
    wait_for_previous(); // which weights are read is its result
    u32 tiles = (u32)(chosen[blockIdx.z] * row_tiles);
    planes += (u64)tiles * (u32)(units * PLANES * 32), scales += (u64)tiles * (u32)(groups * 8 * PARAMETERS);
    exchange += ((u64)blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x * WARPS * PART;
    multiply({planes, scales, x, (const u16 *)0, y, (const int *)0, partial, exchange, out_features,
              in_features, slots, row_tiles, units, groups, width, units_per_slab, (int)blockIdx.x,
              (int)gridDim.x},
             shared);
}
