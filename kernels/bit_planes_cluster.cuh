// Slabs of inputs whose blocks are a cluster: each stages and multiplies its own, then they add one another's sums, and
// each writes a part of the outputs. They have the same whole tiles (WHOLE) and as many units of each, so the same spans.
#include "hopper.cuh"

// A tile's parts, added up where the first of them is.
DEVICE void add_parts(float *parts, const u32 *spans, int tiles, const Share &share) {
    for (int index = (int)threadIdx.x; index < tiles * PART; index += THREADS) {
        int tile = index / PART, low = (int)(spans[tile] & 0xffffu), high = (int)(spans[tile] >> 16);
        float *first = parts + (tile + low) * PART + index % PART, sum = *first;
        for (int w = low + 1; w <= high; ++w)
            if (!is_idle(w, share.size)) sum += first[(w - low) * PART];
        *first = sum;
    }
}

// What all blocks of the cluster have in the same place, in the order of their slabs.
DEVICE float cluster_sum(const float *place) {
    float sum = 0.0f;
#pragma unroll
    for (int rank = 0; rank < CLUSTER; ++rank) sum += load_of_block(place, (u32)rank);
    return sum;
}
