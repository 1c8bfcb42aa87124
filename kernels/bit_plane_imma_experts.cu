// The kernel of the chosen experts' weights by the product of bit_plane_imma.cuh.
#define KERNEL bit_plane_imma_experts
#include "bit_plane_imma.cuh"
#include "bit_planes_experts.cuh"
