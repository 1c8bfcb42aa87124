// y = x W^T for a W whose rows have bits of their own: its classes of rows, each a weight of planes,
// beside one another in one launch. Each class has blocks of its own, as many as its share of the
// time: all begin at once and end at once, and the beginning and the end are paid once.
//
// Compile-time: as bit_planes.cuh, but CLASSES (1..4), BYTES (1: the product of bit_plane_imma.cuh, 0:
// of bit_plane_mma.cuh) and, of each class, PLANES_0, OFFSET_0, STAGES_0 and so on; EPILOGUE 0.
#define PASTED(name, number) name##number
#define PASTE(name, number) PASTED(name, number)
#define IN_CLASS(name) PASTE(name, CLASS)
#define PLANES IN_CLASS(PLANES_)
#define OFFSET IN_CLASS(OFFSET_)
#define STAGES IN_CLASS(STAGES_)

#define CLASS 0
#include "bit_planes_class.cuh"
#if CLASSES > 1
#undef CLASS
#define CLASS 1
#include "bit_planes_class.cuh"
#endif
#if CLASSES > 2
#undef CLASS
#define CLASS 2
#include "bit_planes_class.cuh"
#endif
#if CLASSES > 3
#undef CLASS
#define CLASS 3
#include "bit_planes_class.cuh"
#endif

// The blocks of class `i` come after those of the ones before it.
#define RUN_CLASS(i)                                                                                  \
    if (block < blocks_##i) {                                                                         \
        class_##i::multiply({planes_##i, scales_##i, x, (u16 *)0, y, places_##i, (float *)0,          \
                             exchange + (u64)((int)blockIdx.x - block) * WARPS * PART, rows_##i,      \
                             in_features, batch, tiles_##i, units, groups, width, units, block,       \
                             blocks_##i}, shared);                                                    \
        return;                                                                                       \
    }                                                                                                 \
    block -= blocks_##i;

// Grid (blocks of all classes, 1, blocks of columns).
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
bit_plane_classes(const u16 *x, // [batch][in_features]
                  u16 *y,       // [batch][width]
                  // of each class, as in bit_planes_kernel.cuh:
                  const quad *planes_0, const u32 *scales_0, const int *places_0,
                  const quad *planes_1, const u32 *scales_1, const int *places_1,
                  const quad *planes_2, const u32 *scales_2, const int *places_2,
                  const quad *planes_3, const u32 *scales_3, const int *places_3,
                  u64 *exchange, // [blocks of columns][blocks][WARPS][PART], zeros
                  int in_features, int batch, int units, int groups, int width,
                  int rows_0, int tiles_0, int blocks_0, int rows_1, int tiles_1, int blocks_1,
                  int rows_2, int tiles_2, int blocks_2, int rows_3, int tiles_3, int blocks_3) {
    DYNAMIC_SHARED(shared);
    exchange += (u64)blockIdx.z * gridDim.x * WARPS * PART;
    int block = (int)blockIdx.x;
    RUN_CLASS(0)
#if CLASSES > 1
    RUN_CLASS(1)
#endif
#if CLASSES > 2
    RUN_CLASS(2)
#endif
#if CLASSES > 3
    RUN_CLASS(3)
#endif
}
