// The kernel of one weight of planes by the product of bit_plane_bmma.cuh.
#define KERNEL bit_plane_bmma
#include "bit_plane_bmma.cuh"
#include "bit_planes_kernel.cuh"
