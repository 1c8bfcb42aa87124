// The kernel of one weight of planes by the product of bit_plane_imma.cuh.
#define KERNEL bit_plane_imma
#include "bit_plane_imma.cuh"
#include "bit_planes_kernel.cuh"
