// The kernel of a weight whose columns ranks share, by the product of bit_plane_imma.cuh.
#define KERNEL bit_plane_imma_ranks
#include "bit_plane_imma.cuh"
#include "bit_planes_ranks.cuh"
