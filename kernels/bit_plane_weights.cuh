// How bit_plane_wgmma.cu makes 16-bit weights of planes: by tables, or of equal steps and more than three planes by arithmetic.
#if OFFSET == 2 && PLANES > 3
#define PAIRED 1 // order_inputs.cuh
#include "bit_plane_code_weights.cuh"
#else
#define PAIRED 0
#include "bit_plane_nibbles.cuh"
#include "bit_plane_lookup.cuh"
#endif
