// y = x W^T for a binary-coded W with groups of a multiple of 128 along in_features, of one token, by the binary
// tensor cores: mma.m16n8k128 on bits counts where a bit of a plane and a bit of x are both one, so planes are the A
// operand as they are. x becomes an integer of 23 bits plus 2^22, whose bits are columns of B, and a column of ones
// takes the 2^22 off again: all counts are exact. A lane has six columns, weights 1 to 32 times 64^t: what it counts of
// a group times a scale is exact too. Compute capability 8.0 to 9.0: later cards have no such product.
//
// What turns {0, 1} into {-1, +1} is half of the sum of x, beside the offset's.

#define OWN_STAGING
// What a lane reads and writes of its warp's first unit: places in shared memory; the number of its first input, of a token
// and of all tokens; what a sum is multiplied by.
struct Offsets {
    u32 warp, lane, limb, given, taken, first, second, third, k, place;
    float power;
};
struct Weight;
DEVICE Offsets offsets_of(int from, const Weight &weight, int lane);
DEVICE const Offsets &offsets_here(const Offsets &its, int);
#include "bit_planes.cuh"

#define ACCUMULATORS 2 // rows g and g + 8
#define BY_TOKENS 0
#define ROW_POWER 14 // 28 with COUNT_POWER and the half, less 14 in a unit's factor, which would overflow
#define UPPER_POWER ROW_POWER
#define X_BYTES 136
#define X_NUMBERS 0 // beside the operands
// Of a unit of x: for either half of it [lane][16 bytes], for lane 4 n + t words of columns n + 8 i, i of 0 .. 2, and half of
// its sum, negative, for t = 0; after the first half the factor that undoes the scaling.
#define UNIT_BYTES (8 * X_BYTES)
#define HALF_BYTES 576 // the same columns of both halves are in other banks
#define FACTOR_AT 512
#define BIT_TILES 3
#define MAGIC 0x4ac00000u // 1.5 * 2^22 as a float: halves of integers added to it are read off its lower 24 bits
// A count, read as the bits of a float, is that many times 2^-149: no conversion, and products of it are exact.
#define COUNT_POWER 122 // what brings it to 2^-27
#define ONE_GROUP (GROUP % UNIT == 0) // of a unit

struct alignas(8) Four { u32 low, high; };

// Eight inputs, four of which are at `place`, number k of a token, and four 32 further.
DEVICE quad load_split(const u16 *x, int place, int k, int in_features) {
    const u16 *its = x + place;
    u32 pairs[4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        int first = 32 * half;
#if ALIGNED
        Four four = {0, 0};
        if (k + first < in_features) four = *(const Four *)(its + first);
        pairs[2 * half] = four.low, pairs[2 * half + 1] = four.high;
#else
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            u32 low = k + first + 2 * i < in_features ? its[first + 2 * i] : 0;
            u32 high = k + first + 2 * i + 1 < in_features ? its[first + 2 * i + 1] : 0;
            pairs[2 * half + i] = low | high << 16;
        }
#endif
    }
    return quad{pairs[0], pairs[1], pairs[2], pairs[3]};
}

// The bits of `low` and `high` under MASK and those SHIFT higher: low's higher ones and high's lower ones change places.
template <int SHIFT> DEVICE void exchange_bits(u32 &low, u32 &high, u32 mask) {
    u32 both = either(mask, low, high << SHIFT);
    high = either(mask, low >> SHIFT, high), low = both;
}

// The value itself, where this stands: the compiler would reckon it when it is wanted, after inputs have come, for each unit.
DEVICE u32 kept_of(u32 value) { return shuffle_xor(value, 0); }

// Lane 4 s + t of eight has inputs 8 t + 4 s .. 8 t + 4 s + 3 of either half of a word. Bits 6 a + 2 i and one more are columns
// 2 a and 2 a + 1 of tile i; the sum is beside all of them.
DEVICE Offsets offsets_of(int from, const Weight &weight, int) {
    u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, t = lane % 4, limb = lane / 4 % 4, half = lane / 16;
    u32 place = warp * UNIT_BYTES, four = place + half * 128 + t * 32;
    u32 first = place + half * HALF_BYTES + t * 16 + (limb == 3 ? 12 : limb * 132);
    u32 k = ((u32)weight.first + warp) * UNIT + lane / 8 * 64 + t * 8 + (lane & 4);
    return {warp, lane, limb, kept_of(four + limb * 8), kept_of(four + limb * 272), kept_of(first),
            kept_of(first + (limb == 3 ? 256 : limb == 2 ? 120 : 4)),
            kept_of(first + (limb == 3 ? 384 : limb ? 124 : 8)), kept_of(k), kept_of(k + (u32)from),
            t == 0 ? -power_of_two(-28) : 0.0f};
}
DEVICE const Offsets &offsets_here(const Offsets &its, int) { return its; }
// A number that isn't known before all of them are, below 2^31.
DEVICE u32 number_of(const Offsets &its) { return its.given | its.taken | its.first | its.second | its.third | its.k | its.place; }

// As `stage_inputs` needs them, and for other rows.
DEVICE quad load_of_lane(const u16 *row, int unit, const Offsets &offsets, int in_features) {
    int k = (unit - (int)offsets.warp) * UNIT + (int)offsets.k;
    return load_split(row, k, k, in_features);
}

// The B operands of a unit, and what goes with them.
//
// A bit of an operand's word stands where those of its inputs do in a plane's words: 16 h + 8 half + 2 i + word % 2, i of
// four pairs. A lane's numbers are split into bytes; four lanes give one another, through the unit's own
// place, what makes one of them owner of byte `limb` of 32 inputs, and one of the sum.
DEVICE void stage_unit(quad v, int unit, int, int, const Weight &, Offsets offsets, unsigned char *operands,
                       float *, float *) {
    int exponent = exponent_of(v);
    float factor = power_of_two(20 - exponent); // halves of magnitudes below 2^22
    u32 pairs[4] = {v.x, v.y, v.z, v.w}, u[2][4], sum = 0, bytes[3][2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            u32 pair = pairs[2 * r + i];
            u[i][r] = bits_of_float(load_activation((u16)(pair & 0xffffu)) * factor + 6291456.0f);
            u[i][2 + r] = bits_of_float(load_activation((u16)(pair >> 16)) * factor + 6291456.0f);
            sum += u[i][r] + u[i][2 + r];
        }
        u32 low = permute_bytes(u[i][0], u[i][1], 0x5140u), high = permute_bytes(u[i][2], u[i][3], 0x5140u);
        bytes[0][i] = permute_bytes(low, high, 0x5410u), bytes[1][i] = permute_bytes(low, high, 0x7632u);
        low = permute_bytes(u[i][0], u[i][1], 0x7362u), high = permute_bytes(u[i][2], u[i][3], 0x7362u);
        bytes[2][i] = permute_bytes(low, high, 0x5410u);
    }
    unsigned char *place = operands + (unit - (int)offsets.warp) * UNIT_BYTES;
    unsigned char *given = place + offsets.given, *taken = place + offsets.taken;
#pragma unroll
    for (int i = 0; i < 3; ++i) { // [word % 2][upper bit of a pair's number][lower bit]: the last one becomes that of the byte
        exchange_bits<2>(bytes[i][0], bytes[i][1], 0x33333333u);
        *(u64 *)(given + i * 272) = (u64)bytes[i][1] << 32 | bytes[i][0];
    }
    sum -= 8u * MAGIC;
    float total = (float)(int)(ONE_GROUP ? warp_sum(sum) : half_warp_sum(sum, (int)offsets.lane));
    u32 start = bits_of_float(total * offsets.power);
    sync_warp();
    quad of_even = *(const quad *)taken, of_odd = *(const quad *)(taken + 16);
    u32 rows[2][4] = {{of_even.x, of_even.y, of_even.z, of_even.w}, {of_odd.x, of_odd.y, of_odd.z, of_odd.w}};
#pragma unroll
    for (int r = 0; r < 4; ++r) exchange_bits<4>(rows[r / 2][r % 2], rows[r / 2][2 + r % 2], 0x0f0f0f0fu);
#pragma unroll
    for (int r = 0; r < 4; ++r) exchange_bits<1>(rows[0][r], rows[1][r], 0x55555555u);
    sync_warp(); // all have read what is overwritten
    u32 *columns[4] = {(u32 *)(place + offsets.first), (u32 *)(place + offsets.second),
                       (u32 *)(place + offsets.third), (u32 *)(place + offsets.first + 128)};
#pragma unroll
    for (int pair = 0; pair < 4; ++pair)
#pragma unroll
        for (int i = 0; i < 2; ++i) columns[pair][16 * i] = offsets.limb == 3 ? start : rows[i][pair];
    if (offsets.lane == 0)
        *(float *)(operands + unit * UNIT_BYTES + FACTOR_AT) =
            exponent < 128 ? power_of_two(exponent - 7) : float_of_bits(0x7fc00000u);
}

// Stage all inputs of the slab, as in bit_planes.cuh, of one token.
template <class Late>
DEVICE void stage_inputs(const u16 *x, int in_features, const Weight &weight, int columns, int units, unsigned char *operands,
                         float *starts, float *factors, const Offsets &offsets, const Late &ask_late) {
    int warp = (int)offsets.warp;
    for (int done = 0; warp + done < weight.count || (LATE && done == 0); done += LOADS * WARPS) {
        quad v[LOADS]; // all on their way before the first is looked at
#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
            int ahead = (done + i * WARPS) * UNIT;
            v[i] = load_split(x, (int)offsets.place + ahead, (int)offsets.k + ahead, in_features);
        }
        if (LATE && done == 0) ask_late();
#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
            int unit = warp + done + i * WARPS;
            if (unit < weight.count) stage_unit(v[i], unit, 0, units, weight, offsets, operands, starts, factors);
        }
    }
    __syncthreads();
}

// What a lane's columns count of a group's numbers, where half of the weight's bits are ones, and what its numbers are on
// average: 31.5 of 63, -0.5 of the highest. Sums are kept about that, so that less of them cancels where lanes meet; the lowest
// column's lane makes up for what it comes to.
DEVICE float average_of(int t) {
    const float half = power_of_two(COUNT_POWER - 149) * (ONE_GROUP ? 128.0f : 64.0f);
    return half * (t == 0 ? 32.0f : t < 3 ? 31.5f : -0.5f);
}

// sums += scale * (counts by their weights - half of the sum of x) for each plane; offset * the latter.
DEVICE void flush(float *sums, const int (*c)[BIT_TILES][4], float start, float average, float last, const u32 *scales) {
    float centered = start - average;
#pragma unroll
    for (int number = 0; number < PARAMETERS; ++number) {
        u32 pair = scales[number];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float value = -start;
            if (number < PLANES) {
                const int (*counts)[4] = c[number];
                value = centered;
#pragma unroll
                for (int i = 0; i < BIT_TILES; ++i) {
                    float next = i == 2 ? last : power_of_two(COUNT_POWER + 2 * i + 1);
                    value = add_product(float_of_bits((u32)counts[i][2 * r]), power_of_two(COUNT_POWER + 2 * i), value);
                    value = add_product(float_of_bits((u32)counts[i][2 * r + 1]), next, value);
                }
            }
            sums[r] += half_to_float((u16)(r ? pair >> 16 : pair & 0xffffu)) * value;
        }
    }
}

// acc += one unit's product.
DEVICE void multiply_unit(float *acc, const unsigned char *stage, const unsigned char *operands,
                          const float *, const float *, int, int unit,
                          const Weight &weight, int lane) {
    int t = lane % 4, first = (weight.first + unit) * UNIT;
    const unsigned char *of_x = operands + unit * UNIT_BYTES;
    u32 words[PLANES][4];
    load_stored(words, stage, lane);
    const u32 *scales = (const u32 *)(stage + PLANES * PLANE_BYTES) + lane / 4 * PARAMETERS;
    const float last = t == 3 ? -power_of_two(COUNT_POWER + 4) : power_of_two(COUNT_POWER + 5); // of columns: ones
    const float average = average_of(t);
    const int zeros[4] = {0, 0, 0, 0};
    int c[PLANES][BIT_TILES][4];
    float sums[ACCUMULATORS] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        quad b = *(const quad *)(of_x + half * HALF_BYTES + lane * 16);
        const u32 columns[BIT_TILES] = {b.x, b.y, b.z};
        float start = float_of_bits(b.w);
#pragma unroll
        for (int plane = 0; plane < PLANES; ++plane) {
            u32 even = words[plane][2 * half], odd = words[plane][2 * half + 1]; // rows g, g + 8, g, ..
            u32 a0 = either(0x55555555u, even, odd << 1), a1 = either(0x55555555u, even >> 1, odd);
#pragma unroll
            for (int i = 0; i < BIT_TILES; ++i) {
                int *d = c[plane][i];
                mma_bits(d, half && ONE_GROUP ? d : zeros, a0, a1, columns[i]);
            }
        }
        if (ONE_GROUP && half == 0) continue;
        int group = REGULAR ? half * 128 / GROUP : (first + half * 128) / GROUP - first / GROUP;
        flush(sums, c, start, average, last, scales + group * 8 * PARAMETERS);
    }
    float factor = *(const float *)(of_x + FACTOR_AT);
    acc[0] += sums[0] * factor, acc[1] += sums[1] * factor;
}

// What a warp has of a tile, its lanes' columns put together: PLACE_OF, as floats or marked floats.
DEVICE void put_part(const float *acc, float *shared, u64 *exchange, int lane) {
    int t = lane % 4;
#pragma unroll
    for (int i = 0; i < ACCUMULATORS; ++i) {
        float value = acc[i] * power_of_two(6 * t);
        value += shuffle_xor(value, 1);
        value += shuffle_xor(value, 2);
        int index = PLACE_OF(lane / 4 + i * 8, 0);
        if (t != i) continue;
        if (exchange) store_marked(exchange + index, value, 1);
        else shared[index] = value;
    }
}

#include "bit_planes_multiply.cuh"
