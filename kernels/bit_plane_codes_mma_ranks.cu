// The kernel of a weight whose columns ranks share, by the product of bit_plane_codes_mma.cuh.
#define KERNEL bit_plane_codes_mma_ranks
#include "bit_plane_codes_mma.cuh"
#include "bit_planes_ranks.cuh"
