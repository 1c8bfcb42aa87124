// What kernels over streams of bit planes share: how blocks and warps divide a stream, how sums of what
// they divide meet, how a lane reads words and inputs. The file that includes this has defined PLANES,
// THREADS, WARPS and PART, the floats of a tile's sums.

#define PLANE_BYTES (WARP * 16) // of 16 rows x 256 inputs

// A block's share [begin, begin + size) of the stream. Its first `given` units, in the order of work,
// are the end of the share: the tile that a later block ends.
struct Share { int begin, size, given; };

// a / b for 0 <= a < 2^24: an integer division takes five times as long, and a block has four.
DEVICE int divide(int a, int b) {
    int quotient = (int)((float)a * reciprocal((float)b)), rest = a - quotient * b;
    return quotient + (rest >= b) - (rest < 0);
}

// `each` units for every block, one more for the first `more`; what is given has to be filled in.
DEVICE Share share_of(int block, int each, int more) {
    Share share;
    share.begin = block * each + (block < more ? block : more);
    share.size = each + (block < more);
    share.given = 0;
    return share;
}
// How many units are given if the share's last tile, which begins at unit `tile`, is a later block's.
DEVICE int given_of(const Share &share, int tile) {
    return share.begin + share.size - (share.begin > tile ? share.begin : tile);
}

DEVICE int first_of_warp(int warp, int size) { return size * warp / WARPS; }

// In a share of few units, some warps have none.
DEVICE bool is_idle(int warp, int size) {
    return first_of_warp(warp, size) == first_of_warp(warp + 1, size);
}

// The warp that does work `work`.
DEVICE int warp_of(int work, int size) {
    int warp = divide(work * WARPS + WARPS - 1, size);
    while (first_of_warp(warp, size) > work) --warp;
    while (first_of_warp(warp + 1, size) <= work) ++warp;
    return warp;
}

// A warp asks for its work [begin, end) STAGES - 1 ahead, at first for numbers `from` .. `to` - 1 of it. `next` is the place of
// what it asks for next: `request` asks for that, `advance` goes on. `stream` is what they take besides. Where `free` is, is
// reckoned where it is used: sooner, the machine code of some kernels is another.
template <class Place, class... Stream>
DEVICE void request_first(unsigned char *ring, Place &next, int from, int to, int begin, int end, int lane,
                          const Stream &...stream) {
    for (int i = from; i < to; ++i) {
        if (begin + i < end) {
            request(ring + i * STAGE_BYTES, next, lane, stream...);
            advance(next, begin + i + 1, lane, stream...);
        }
        end_of_fetches();
    }
}

// Wait for work `work`, and ask for what takes the place of the one before.
template <class Place, class... Stream>
DEVICE void request_next(unsigned char *ring, int free, Place &next, int work, int end, int lane, const Stream &...stream) {
    fetched<STAGES - 2>();
    sync_warp(); // all lanes have read what `free` held, and see what others asked for or staged
    if (work + STAGES - 1 < end) {
        request(ring + free * STAGE_BYTES, next, lane, stream...);
        advance(next, work + STAGES, lane, stream...);
    }
    end_of_fetches();
}

// For each own tile, the first and the last warp that have a part of it.
DEVICE void find_spans(u32 *spans, int tiles, int start, int count, const Share &share) {
    for (int tile = (int)threadIdx.x; tile < tiles; tile += THREADS) {
        int from = start + tile * count - share.begin, to = from + count, kept = share.size - share.given;
        if (to > kept) to = kept;
        int low = warp_of(share.given + (from < 0 ? 0 : from), share.size);
        spans[tile] = (u32)(low | warp_of(share.given + to - 1, share.size) << 16);
    }
}

DEVICE bool has_given(int warp, const Share &share) {
    return first_of_warp(warp, share.size) < share.given && !is_idle(warp, share.size);
}

// The sum of what lower blocks have given of this block's first tile, which begins at unit `from`. All
// are asked before the first is waited for.
DEVICE void take_given(u64 *exchange, int own, int each, int more, int from, float *given) {
    int lowest = own - 1;
    while (share_of(lowest, each, more).begin > from) --lowest;
    for (int index = (int)threadIdx.x; index < PART; index += THREADS) {
        float sum = 0.0f;
        for (int block = lowest; block < own; ++block) {
            Share share = share_of(block, each, more);
            share.given = given_of(share, from);
            u64 *place = exchange + (u64)block * WARPS * PART + index;
            float value[WARPS];
            u32 mark[WARPS];
#pragma unroll
            for (int warp = 0; warp < WARPS; ++warp) {
                mark[warp] = 1, value[warp] = 0.0f;
                if (has_given(warp, share)) mark[warp] = load_marked(place + warp * PART, &value[warp]);
            }
#pragma unroll
            for (int warp = 0; warp < WARPS; ++warp) {
                while (mark[warp] == 0) mark[warp] = load_marked(place + warp * PART, &value[warp]);
                sum += value[warp];
                if (has_given(warp, share)) // as the next launch wants to find it
                    store_marked(place + warp * PART, 0.0f, 0);
            }
        }
        given[index] = sum;
    }
}

// A lane's words of a unit, each of 64 inputs, as they are in memory.
DEVICE void load_stored(u32 (*words)[4], const unsigned char *stage, int lane) {
#pragma unroll
    for (int plane = 0; plane < PLANES; ++plane) {
        quad v = *(const quad *)(stage + plane * PLANE_BYTES + lane * 16);
        words[plane][0] = v.x, words[plane][1] = v.y, words[plane][2] = v.z, words[plane][3] = v.w;
    }
}

// The same, of all planes.
DEVICE void load_words(u32 (*words)[4], const unsigned char *stage, int lane) {
    load_stored(words, stage, lane);
#ifdef NIBBLED
#pragma unroll
    for (int word = 0; word < 4 && NIBBLED; ++word) {
        u32 planes[PLANES];
#pragma unroll
        for (int plane = 0; plane < PLANES; ++plane) planes[plane] = words[plane][word];
        planes_of_stored(planes);
#pragma unroll
        for (int plane = 0; plane < PLANES; ++plane) words[plane][word] = planes[plane];
    }
#endif
}

// The largest magnitude among a warp's inputs of a unit, as the bits of a float: as numbers, NaN is
// larger than infinity, and that than the rest.
DEVICE u32 largest_of(quad v) {
    u32 pair = larger_magnitudes(larger_magnitudes(v.x, v.y), larger_magnitudes(v.z, v.w));
    u32 shifted = pair << 16; // what is below the larger half decides nothing
    u32 largest = warp_largest(pair > shifted ? pair : shifted);
    return bits_of_float(load_activation((u16)(largest >> 16)));
}

// Its exponent, or -100 where that is less; of what isn't finite: 128.
DEVICE int exponent_of(quad v) {
    int exponent = (int)(largest_of(v) >> 23) - 127;
    return exponent < -100 ? -100 : exponent;
}

// Two inputs, rounded where their norm is applied, times the norm's gains, rounded: as rms_norm.cu.
DEVICE u32 normed(u32 pair, float inverse, u32 gains) {
    u16 low = store_activation(load_activation((u16)(pair & 0xffffu)) * inverse);
    u16 high = store_activation(load_activation((u16)(pair >> 16)) * inverse);
    low = store_activation(load_activation(low) * load_activation((u16)(gains & 0xffffu)));
    high = store_activation(load_activation(high) * load_activation((u16)(gains >> 16)));
    return low | (u32)high << 16;
}

#if NORM
// What an RMS norm multiplies the inputs of each token by, in place of a thread's sums of their squares. `sums`
// has a float per warp and token.
DEVICE void squares_to_factors(float (&squares)[COLUMNS], int in_features, float eps, float *sums) {
    int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP;
#pragma unroll
    for (int column = 0; column < COLUMNS; ++column) {
#pragma unroll
        for (int lanes = 16; lanes > 0; lanes /= 2) squares[column] += shuffle_xor(squares[column], lanes);
        if (lane == 0) sums[warp * COLUMNS + column] = squares[column];
    }
    __syncthreads();
#pragma unroll
    for (int column = 0; column < COLUMNS; ++column) {
        float total = 0.0f;
#pragma unroll
        for (int of = 0; of < WARPS; ++of) total += sums[of * COLUMNS + column];
        squares[column] = inverse_root(total / (float)in_features + eps);
    }
}
#endif
