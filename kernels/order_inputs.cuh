// x as the products of bit_plane_wgmma.cu read it: B operands, in the order of its inputs. A product is
// of 16 inputs that a lane's nibbles hold (common.cuh says which bit is which weight), so of each
// 64 inputs 32 u + 8 t + 4 e + 2 q + h comes at 32 q + 16 h + 8 u + 2 t + e. Core matrices are
// 8 tokens x 8 of these; a block of 64 inputs x COLUMNS tokens is together. What is beyond the last
// token or input is zero.
//
// Compile-time: COLUMNS (tokens of a tile), ALIGNED (1: in_features is a multiple of 8).

struct Inputs {
    const u16 *x;  // [batch][in_features]
    quad *ordered; // [token_tiles][blocks of 64 inputs][8][COLUMNS]
    int in_features, batch, token_tiles, blocks;
};

#define TOGETHER 4 // pieces of a thread that are on their way at once

// A piece: 32 inputs of a token. Number `index` of blocks * 2 * token_tiles * COLUMNS.
DEVICE void load_piece(quad (&v)[4], const Inputs &its, int index) {
    int padded = its.token_tiles * COLUMNS, token = index % padded, part = index / padded;
    const u16 *row = its.x + (u64)token * its.in_features;
#pragma unroll
    for (int t = 0; t < 4; ++t)
        v[t] = token < its.batch && part < its.blocks * 2 ? load_inputs(row, part * 32 + t * 8, its.in_features) : quad{0, 0, 0, 0};
}
DEVICE void store_piece(const quad (&v)[4], const Inputs &its, int index) {
    int padded = its.token_tiles * COLUMNS, token = index % padded, part = index / padded;
    if (part >= its.blocks * 2) return;
    quad *to = its.ordered + (((u64)(token / COLUMNS) * its.blocks + part / 2) * 8 + part % 2) * COLUMNS + token % COLUMNS;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        u32 pick = half ? 0x7632u : 0x5410u;
        to[2 * half * COLUMNS] = quad{permute_bytes(v[0].x, v[0].z, pick), permute_bytes(v[1].x, v[1].z, pick),
                                      permute_bytes(v[2].x, v[2].z, pick), permute_bytes(v[3].x, v[3].z, pick)};
        to[(4 + 2 * half) * COLUMNS] = quad{permute_bytes(v[0].y, v[0].w, pick), permute_bytes(v[1].y, v[1].w, pick),
                                            permute_bytes(v[2].y, v[2].w, pick), permute_bytes(v[3].y, v[3].w, pick)};
    }
}

// A block's part, by so many threads: its warps take turns with those of all others.
template <int THREAD_COUNT> DEVICE void order_inputs(const Inputs &its) {
    int warps = (int)gridDim.x * (THREAD_COUNT / WARP), pieces = its.blocks * 2 * its.token_tiles * COLUMNS;
    int warp = (int)threadIdx.x / WARP * (int)gridDim.x + (int)blockIdx.x, lane = (int)threadIdx.x % WARP;
    for (int i = warp * WARP + lane; i < pieces; i += warps * WARP * TOGETHER) {
        quad v[TOGETHER][4];
#pragma unroll
        for (int n = 0; n < TOGETHER; ++n) load_piece(v[n], its, i + n * warps * WARP);
#pragma unroll
        for (int n = 0; n < TOGETHER; ++n) store_piece(v[n], its, i + n * warps * WARP);
    }
}
