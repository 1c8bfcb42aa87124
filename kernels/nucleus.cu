// Draws a token of each row by temperature and nucleus, as qtool/core/nucleus.py defines it for logits of
// 16 bits: likelier tokens come first, of equal ones the first; masses are whole numbers, so that no order
// of sums matters. Several blocks of a row add masses by bins of 32 values; the last of them to end finds
// the bin where the nucleus ends, in it the value, and by that what a number in [0, 1) draws. Only the
// first takes an exponential per token.
//
// Grid (splits, rows). Compile-time: ACTIVATION_BF16. Shared: a `Nucleus`.

#define THREADS 1024
#define WARPS (THREADS / WARP)
#define BINS 2048
#define VALUES 32 // of a bin
#define MASS_OF_BEST 17592186044416.0 // 2^44

struct Nucleus {
    u64 until[BINS];            // masses of bins, then sums of all until each
    u64 scan[2][THREADS];
    u64 masses[VALUES];         // of the values of a bin, all tokens of each
    u32 counts[WARPS][VALUES];  // tokens of each value in the part of the row that a warp looks at
    u32 matches[THREADS];
    u32 of_warps[WARPS];
    int bin, key, part, thread, last;
    u64 end;                    // the sum with the token that was found
    u32 rank;                   // which of the tokens of its value, in the row, then in the part
};

static_assert(sizeof(Nucleus) <= 41472, "decode_ops.py asks for so much");

// Where a logit stands among all numbers, the largest first; NaN is the last.
DEVICE int place_of(u16 bits) {
    float value = load_activation(bits);
    if (value != value) return BINS * VALUES - 1;
    if (value == 0.0f) bits = 0; // -0 is 0
    return 0xffff - (bits & 0x8000 ? 0xffff ^ bits : bits | 0x8000);
}

DEVICE double value_at(int place) {
    u16 above = (u16)(0xffff - place);
    float value = load_activation((u16)(above & 0x8000 ? above ^ 0x8000 : 0xffff ^ above));
    return value != value ? -(double)float_of_bits(0x7f800000u) : (double)value;
}

DEVICE u64 mass_of(double value, double best, double temperature) {
    double exponent = (value - best) / temperature;
    if (exponent != exponent) exponent = 0.0;
    return exponent < -31.0 ? 0 : (u64)(power_of_e(exponent) * MASS_OF_BEST);
}

// Logits of eight tokens; what is beyond the end isn't looked at.
struct Eight { u64 low, high; };

DEVICE Eight load_eight(const u16 *row, int first, int vocabulary) {
    Eight loaded = {0, 0};
    if (vocabulary % 8 == 0 && first < vocabulary) {
        quad v = *(const quad *)(row + first);
        loaded = {v.x | (u64)v.y << 32, v.z | (u64)v.w << 32};
    } else {
        for (int i = 0; i < 4 && first + i < vocabulary; ++i) loaded.low |= (u64)row[first + i] << 16 * i;
        for (int i = 4; i < 8 && first + i < vocabulary; ++i) loaded.high |= (u64)row[first + i] << 16 * (i - 4);
    }
    return loaded;
}

DEVICE int place_in(const Eight &loaded, int i) {
    return place_of((u16)((i < 4 ? loaded.low : loaded.high) >> 16 * (i % 4)));
}

// Add the masses of a block's tokens to the row's bins.
DEVICE void add_masses(Nucleus &at, const u16 *row, int vocabulary, double best, double temperature,
                       u64 *bins) {
    int thread = (int)threadIdx.x;
    for (int bin = thread; bin < BINS; bin += THREADS) at.until[bin] = 0;
    __syncthreads();
    int stride = 8 * THREADS * (int)gridDim.x;
    for (int first = 8 * (THREADS * (int)blockIdx.x + thread); first < vocabulary; first += stride) {
        Eight loaded = load_eight(row, first, vocabulary);
#pragma unroll 1 // an exponential is long
        for (int i = 0; i < 8 && first + i < vocabulary; ++i) {
            int place = place_in(loaded, i);
            u64 mass = mass_of(value_at(place), best, temperature);
            if (mass != 0) add_to(&at.until[place / VALUES], mass);
        }
    }
    __syncthreads();
    for (int bin = thread; bin < BINS; bin += THREADS)
        if (at.until[bin] != 0) add_to(&bins[bin], at.until[bin]);
}

// Sum the row's bins up, and leave zeros there; return the sum of all.
DEVICE u64 sum_up(Nucleus &at, u64 *bins) {
    int thread = (int)threadIdx.x;
    u64 first = load_through(bins + 2 * thread), both = first + load_through(bins + 2 * thread + 1);
    bins[2 * thread] = 0, bins[2 * thread + 1] = 0;
    u64 sum = both;
    at.scan[0][thread] = sum;
    int now = 0;
    for (int back = 1; back < THREADS; back *= 2, now ^= 1) {
        __syncthreads();
        if (thread >= back) sum += at.scan[now][thread - back];
        at.scan[now ^ 1][thread] = sum;
    }
    at.until[2 * thread] = sum - both + first, at.until[2 * thread + 1] = sum;
    __syncthreads();
    return at.until[BINS - 1];
}

// Find the token, likelier ones first, with which the sum of masses exceeds a number below the total:
// sets key, rank and end, and counts how often each value of its bin is in each part of the row.
DEVICE void find(Nucleus &at, const u16 *row, int vocabulary, int length, u64 number, double best,
                 double temperature) {
    int thread = (int)threadIdx.x, warp = thread / WARP, lane = thread % WARP;
    for (int bin = thread; bin < BINS; bin += THREADS)
        if (number < at.until[bin] && (bin == 0 || number >= at.until[bin - 1])) at.bin = bin;
    at.counts[warp][lane] = 0;
    __syncthreads();
    int bin = at.bin;
    for (int from = 8 * lane; from < length; from += 8 * WARP) {
        int first = warp * length + from;
        Eight loaded = load_eight(row, first, vocabulary);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            int place = place_in(loaded, i);
            bool here = place / VALUES == bin && first + i < vocabulary;
            if (here) add_to(&at.counts[warp][place % VALUES], 1u);
        }
    }
    __syncthreads();
    if (warp > 0) return;
    u64 each = mass_of(value_at(bin * VALUES + lane), best, temperature), count = 0;
    for (int w = 0; w < WARPS; ++w) count += at.counts[w][lane];
    at.masses[lane] = each * count;
    sync_warp();
    u64 before = bin == 0 ? 0 : at.until[bin - 1];
    for (int value = 0; value < lane; ++value) before += at.masses[value];
    if (number >= before && number - before < each * count) {
        u64 rank = (number - before) / each;
        at.key = bin * VALUES + lane, at.rank = (u32)rank, at.end = before + (rank + 1) * each;
    }
}

// Return the token of that key and rank, in one thread; -1 in the others.
DEVICE int token_found(Nucleus &at, const u16 *row, int vocabulary, int length) {
    int thread = (int)threadIdx.x, warp = thread / WARP, lane = thread % WARP;
    if (thread == 0) {
        u32 rank = at.rank;
        int part = 0;
        while (rank >= at.counts[part][at.key % VALUES]) rank -= at.counts[part++][at.key % VALUES];
        at.part = part, at.rank = rank;
    }
    __syncthreads();
    int first = 8 * thread < length ? at.part * length + 8 * thread : vocabulary, key = at.key;
    u32 matches = 0;
    Eight loaded = load_eight(row, first, vocabulary);
#pragma unroll
    for (int i = 0; i < 8; ++i) matches += first + i < vocabulary && place_in(loaded, i) == key;
    at.matches[thread] = matches;
    u32 sum = warp_sum(matches);
    if (lane == 0) at.of_warps[warp] = sum;
    __syncthreads();
    if (thread == 0) {
        u32 rank = at.rank;
        int found = 0;
        while (rank >= at.of_warps[found]) rank -= at.of_warps[found++];
        found *= WARP;
        while (rank >= at.matches[found]) rank -= at.matches[found++];
        at.thread = found, at.rank = rank;
    }
    __syncthreads();
    int token = -1;
    u32 rank = at.rank;
    if (thread == at.thread)
#pragma unroll
        for (int i = 0; i < 8; ++i)
            if (first + i < vocabulary && place_in(loaded, i) == key && rank-- == 0) token = first + i;
    return token;
}

extern "C" __global__ void __launch_bounds__(THREADS)
nucleus(const u16 *logits,          // [rows][vocabulary], at most 8 * THREADS * WARPS
        const long long *likeliest, // [rows]
        const double *options,      // [rows][4]: temperature, top_p, a number in [0, 1), 1: the likeliest
        long long *tokens,          // [rows]
        u64 *zeros,                 // [rows][BINS], then of each row how many blocks have ended
        int vocabulary) {
    DYNAMIC_SHARED(memory);
    Nucleus &at = *(Nucleus *)memory;
    let_next_start();
    int thread = (int)threadIdx.x, r = (int)blockIdx.y;
    wait_for_previous();
    const double *own = options + 4 * r;
    double temperature = own[0], top_p = own[1], drawn = own[2];
    if (own[3] > 0.0) {
        if (blockIdx.x == 0 && thread == 0) tokens[r] = likeliest[r];
        return;
    }
    const u16 *row = logits + (u64)r * vocabulary;
    double best = (double)load_activation(row[likeliest[r]]);
    u64 *bins = zeros + (u64)r * BINS, *ended = zeros + (u64)gridDim.y * BINS + r;
    add_masses(at, row, vocabulary, best, temperature, bins);
    __syncthreads();
    if (thread == 0) at.last = take_ticket(ended) == gridDim.x - 1;
    __syncthreads();
    if (!at.last) return;
    if (thread == 0) *ended = 0;
    u64 total = sum_up(at, bins), end = total;
    int length = ((vocabulary + 7) / 8 + WARPS - 1) / WARPS * 8; // of the parts of a row, one per warp
    if (top_p < 1.0) {
        double exact = top_p * (double)total;
        u64 wanted = exact > 0.0 ? (u64)exact : 0;
        if ((double)wanted < exact) ++wanted;
        if (wanted < 1) wanted = 1;
        if (wanted > total) wanted = total;
        find(at, row, vocabulary, length, wanted - 1, best, temperature);
        __syncthreads();
        end = at.end;
    }
    u64 number = (u64)(drawn * (double)end);
    find(at, row, vocabulary, length, number < end ? number : end - 1, best, temperature);
    __syncthreads();
    int token = token_found(at, row, vocabulary, length);
    if (token >= 0) tokens[r] = token;
}
