// x as the products of bit_plane_wgmma.cu read it: B operands, in the order of its inputs. A product is
// of 16 inputs that a lane's nibbles hold (common.cuh says which bit is which weight), so of each
// 64 inputs 32 u + 8 t + 4 e + 2 q + h comes at 32 q + 16 h + 8 u + 2 t + e. Core matrices are
// 8 tokens x 8 of these; a block of 64 inputs x COLUMNS tokens is together. What is beyond the last
// token or input is zero.
//
// PAIRED: e and h change places, so that pairs are of neighbouring inputs (bit_plane_code_weights.cuh).
// Compile-time: COLUMNS (tokens of a tile), PAIRED, ALIGNED (1: in_features is a multiple of 8).

struct Inputs {
    const u16 *x;  // [batch][in_features]
    quad *ordered; // [token_tiles][blocks of 64 inputs][8][COLUMNS]
    int in_features, batch, token_tiles, blocks;
};

// A piece: 16 tokens x 128 inputs, that a warp turns round in shared memory, so that it reads and writes whole sectors.
#define PIECE_ROW 272 // bytes of a token: 256, and what keeps banks apart
#define PIECE_BYTES (16 * PIECE_ROW)
#define PIECES 2 // of a warp that are on their way at once

struct Place { int token, block; }; // the first of a piece
DEVICE Place piece_at(const Inputs &its, int index) {
    int groups = its.token_tiles * (COLUMNS / 16);
    return {index % groups * 16, index / groups * 2};
}

DEVICE void load_piece(quad (&v)[8], const Inputs &its, Place place, int lane) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        int token = place.token + 2 * i + lane / 16;
        bool there = token < its.batch && place.block < its.blocks;
        v[i] = there ? load_inputs(its.x + (u64)token * its.in_features, place.block * 64 + lane % 16 * 8, its.in_features) : quad{0, 0, 0, 0};
    }
}

DEVICE void store_piece(const quad (&v)[8], unsigned char *staged, const Inputs &its, Place place, int lane) {
    if (place.block >= its.blocks) return;
#pragma unroll
    for (int i = 0; i < 8; ++i) *(quad *)(staged + (2 * i + lane / 16) * PIECE_ROW + lane % 16 * 16) = v[i];
    sync_warp();
    int token = place.token + lane % 16, block = place.block + lane / 16;
    const quad *from = (const quad *)(staged + lane % 16 * PIECE_ROW + lane / 16 * 128);
    quad *to = its.ordered + ((u64)(token / COLUMNS) * its.blocks + block) * 8 * COLUMNS + token % COLUMNS;
#pragma unroll
    for (int u = 0; u < 2; ++u) {
        quad a = from[4 * u], b = from[4 * u + 1], c = from[4 * u + 2], d = from[4 * u + 3];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            u32 pick = half ? PAIRED ? 0x7654u : 0x7632u : PAIRED ? 0x3210u : 0x5410u;
            to[(2 * half + u) * COLUMNS] = quad{permute_bytes(a.x, a.z, pick), permute_bytes(b.x, b.z, pick),
                                                permute_bytes(c.x, c.z, pick), permute_bytes(d.x, d.z, pick)};
            to[(2 * half + u + 4) * COLUMNS] = quad{permute_bytes(a.y, a.w, pick), permute_bytes(b.y, b.w, pick),
                                                    permute_bytes(c.y, c.w, pick), permute_bytes(d.y, d.w, pick)};
        }
    }
    sync_warp(); // all lanes have read what was staged
}

// What `order_inputs` will read into the L2 cache; it need not be there yet.
template <int WARPS> DEVICE void prefetch_inputs(const Inputs &its) {
    int number = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP, warps = (int)gridDim.x * WARPS;
    int pieces = its.blocks / 2 * its.token_tiles * (COLUMNS / 16);
    if (number >= WARPS) return;
    for (int i = number * (int)gridDim.x + (int)blockIdx.x; i < pieces; i += warps) {
        Place place = piece_at(its, i);
        int token = place.token + lane / 2, k = place.block * 64 + lane % 2 * 64;
        if (token < its.batch && k < its.in_features) prefetch(its.x + (u64)token * its.in_features + k);
    }
}

// A block's part, by its first WARPS warps, each with PIECE_BYTES of shared memory: they take turns with those of all others.
template <int WARPS> DEVICE void order_inputs(const Inputs &its, unsigned char *shared) {
    int number = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP, warps = (int)gridDim.x * WARPS;
    int pieces = its.blocks / 2 * its.token_tiles * (COLUMNS / 16);
    if (number >= WARPS) return;
    for (int i = number * (int)gridDim.x + (int)blockIdx.x; i < pieces; i += warps * PIECES) {
        quad v[PIECES][8];
#pragma unroll
        for (int n = 0; n < PIECES; ++n) load_piece(v[n], its, piece_at(its, i + n * warps), lane);
#pragma unroll
        for (int n = 0; n < PIECES; ++n) store_piece(v[n], shared + number * PIECE_BYTES, its, piece_at(its, i + n * warps), lane);
    }
}
