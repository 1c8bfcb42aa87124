// The kernel of the chosen experts' weights by the product of bit_plane_codes_mma.cuh.
#define KERNEL bit_plane_codes_mma_experts
#include "bit_plane_codes_mma.cuh"
#include "bit_planes_experts.cuh"
