// The kernel of one weight of planes by the product of bit_plane_codes_mma.cuh.
#define KERNEL bit_plane_codes_mma
#include "bit_plane_codes_mma.cuh"
#include "bit_planes_kernel.cuh"
