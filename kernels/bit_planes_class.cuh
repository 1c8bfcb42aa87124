// What blocks of one class of rows do, in a namespace of its own: CLASS is its number.
namespace IN_CLASS(class_) {
#if BYTES
#include "bit_plane_imma.cuh"
#else
#include "bit_plane_mma.cuh"
#endif
}
