// What all kernels share. Prepended to each of them as text: there is no #include, so that NVRTC
// needs no header of any toolkit. Primitives of the machine are one-line functions; the tests
// define QTOOL_HOST and bring their own, to run the very same kernels on a CPU.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

#define WARP 32
#define TILE_ROWS 16      // rows of the A operand of mma.m16n8k16
#define UNIT 256          // inputs whose bits one 16-byte load per lane holds
#define BLOCKS_PER_UNIT 8 // of 32 inputs, the finest group

#ifndef QTOOL_HOST

struct __align__(16) quad { u32 x, y, z, w; };
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#define DEVICE __device__ __forceinline__

// Weights are read once: past L1.
DEVICE quad load_stream(const quad *address) {
    quad v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(address));
    return v;
}

// The same into shared memory, 16 bytes, without waiting: `fetched` says when.
DEVICE void fetch(void *shared, const void *address) {
    u32 target = (u32)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(address) : "memory");
}
// Or 4 or 8 bytes.
template <int SIZE> DEVICE void fetch(void *shared, const void *address) {
    if (SIZE == 16) return fetch(shared, address);
    u32 target = (u32)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(target), "l"(address), "n"(SIZE) : "memory");
}
DEVICE void end_of_fetches() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Wait until all but the last PENDING groups of this thread's fetches are there.
template <int PENDING> DEVICE void fetched() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Programmatic dependent launch: let the next kernel of the stream start; wait until all before
// this one have ended and their writes are visible. Weights may be read before that, nothing else.
DEVICE void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
DEVICE void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The same, when numbers that `number` is made of are known, which isn't 0xffffffff: the compiler would reckon them afterwards.
DEVICE void wait_for_previous(u32 number) {
#if __CUDA_ARCH__ >= 900
    asm volatile("{.reg .pred known; setp.ne.u32 known, %0, 0xffffffff; @known griddepcontrol.wait;}" ::"r"(number) : "memory");
#endif
}

// A float and a mark, one 64-bit word: who sees the mark sees the float.
DEVICE void store_marked(u64 *place, float value, u32 mark) {
    u64 word = (u64)mark << 32 | (u32)__float_as_int(value);
    asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(place), "l"(word) : "memory");
}
DEVICE u32 load_marked(const u64 *place, float *value) {
    u64 word;
    asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(word) : "l"(place) : "memory");
    *value = __int_as_float((int)(u32)word);
    return (u32)(word >> 32);
}

// What several threads add to, here or in other blocks. Not of sums whose rounding depends on an order.
DEVICE void add_to(u64 *place, u64 value) { atomicAdd(place, value); }
DEVICE void add_to(u32 *place, u32 value) { atomicAdd(place, value); }
// Of a counter: what it was, and nothing about what others have written.
DEVICE u32 count_up(u32 *place) { return atomicAdd(place, 1u); }
// Of one thread, after all of its block have met: count the block, and see what counted ones have written.
DEVICE u64 take_ticket(u64 *place) {
    __threadfence();
    u64 ticket = atomicAdd(place, 1ull);
    __threadfence();
    return ticket;
}
// From where blocks meet, past L1.
DEVICE u64 load_through(const u64 *place) {
    u64 word;
    asm volatile("ld.global.cg.u64 %0, [%1];" : "=l"(word) : "l"(place) : "memory");
    return word;
}

// e^x, to one unit in the last place.
DEVICE double power_of_e(double x) { return exp(x); }

// 16 bytes that another card reads or writes; each half of 8 bytes comes as a whole.
DEVICE void store_far(quad *place, quad v) {
    asm volatile("st.volatile.global.v4.u32 [%0], {%1,%2,%3,%4};"
                 :: "l"(place), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
DEVICE quad load_far(const quad *place) {
    quad v;
    asm volatile("ld.volatile.global.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(place) : "memory");
    return v;
}

// A float and a mark, as above, that another card reads or writes.
DEVICE void store_marked_far(u64 *place, float value, u32 mark) {
    u64 word = (u64)mark << 32 | (u32)__float_as_int(value);
    asm volatile("st.relaxed.sys.global.b64 [%0], %1;" ::"l"(place), "l"(word) : "memory");
}
DEVICE u32 load_marked_far(const u64 *place, float *value) {
    u64 word;
    asm volatile("ld.relaxed.sys.global.b64 %0, [%1];" : "=l"(word) : "l"(place) : "memory");
    *value = __int_as_float((int)(u32)word);
    return (u32)(word >> 32);
}

DEVICE float half_to_float(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

DEVICE u16 float_to_half(float value) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

// D = A B + C for one 16x8x16 tile, A and B float16, C and D float32. D may be C.
DEVICE void mma(float *d, const float *c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%10,%11,%12,%13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1),
          "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

// The same of bfloat16.
DEVICE void mma_bfloat(float *d, const float *c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%10,%11,%12,%13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1),
          "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

// An 8x8 matrix of 16-bit numbers: lane 4 g + t gives row g, columns 2 t and 2 t + 1, and gets column g.
DEVICE u32 transpose_pairs(u32 pair) {
    u32 column;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(column) : "r"(pair));
    return column;
}

// The same on bytes, 16x8x32: A unsigned, B signed, C and D 32-bit integers.
DEVICE void mma_bytes(int *d, const int *c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%10,%11,%12,%13};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1),
          "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
}

// Of bits, 16x8x128: D = how many ones of a row and a column are in the same places + C. Compute capability 8.0 to 9.0;
// on later ones the compiler makes it of others.
DEVICE void mma_bits(int *d, const int *c, u32 a0, u32 a1, u32 b) {
    asm("mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%8,%9,%10};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a0), "r"(a1), "r"(b), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
}

// Not to become a part of a fused multiply-add.
DEVICE float multiply_rounded(float a, float b) { return __fmul_rn(a, b); }
// a * b + c, of subnormal numbers as of others: who compiles may have asked for those to be zeros, CuPy does.
DEVICE float add_product(float a, float b, float c) { return __fmaf_ieee_rn(a, b, c); }
// Four of the eight bytes of a (0..3) and b (4..7), which nibbles of `pick` name, lowest first.
DEVICE u32 permute_bytes(u32 a, u32 b, u32 pick) { return __byte_perm(a, b, pick); }

DEVICE u32 multiply_half2(u32 a, u32 b) {
    u32 product;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
    return product;
}

// Two pairs of 16-bit numbers, added and rounded.
DEVICE u32 add_half2(u32 a, u32 b) {
    u32 sum;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
    return sum;
}
DEVICE u32 add_bfloat2(u32 a, u32 b) { // sm_80 has no addition of these
    u32 sum;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(0x3f803f80u), "r"(b));
    return sum;
}
// A constant that stays in a register: the compiler, which would move it there before each use, doesn't know it.
DEVICE u32 in_register(u32 constant) {
    u32 found;
    asm volatile("{.reg .u32 zero; mov.u32 zero, %%nctaid.x; shr.u32 zero, zero, 31; or.b32 %0, zero, %1;}" : "=r"(found) : "r"(constant));
    return found;
}

// a b + c of pairs, rounded once.
DEVICE u32 fma_half2(u32 a, u32 b, u32 c) {
    u32 sum;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
    return sum;
}
DEVICE u32 fma_bfloat2(u32 a, u32 b, u32 c) {
    u32 sum;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
    return sum;
}

// 2^x and 1/x, to a few units in the last place.
DEVICE float exp2_fast(float x) {
    float value;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
    return value;
}
DEVICE float reciprocal(float x) {
    float value;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
    return value;
}
DEVICE float inverse_root(float x) {
    float value;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
    return value;
}

DEVICE void sync_warp() { __syncwarp(); }

DEVICE float shuffle_xor(float value, int lanes) {
    return __shfl_xor_sync(0xffffffffu, value, lanes);
}

DEVICE float shuffle_down(float value, int lanes) {
    return __shfl_down_sync(0xffffffffu, value, lanes);
}

DEVICE float float_of_bits(u32 bits) { return __int_as_float((int)bits); }
DEVICE u32 bits_of_float(float value) { return (u32)__float_as_int(value); }

// Of a whole warp.
DEVICE u32 warp_largest(u32 value) {
    u32 largest;
    asm volatile("redux.sync.max.u32 %0, %1, 0xffffffff;" : "=r"(largest) : "r"(value));
    return largest;
}
DEVICE u32 warp_sum(u32 value) {
    u32 sum;
    asm volatile("redux.sync.add.u32 %0, %1, 0xffffffff;" : "=r"(sum) : "r"(value));
    return sum;
}

// NaN, if one of them is.
DEVICE float larger(float a, float b) {
    float value;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(value) : "f"(a), "f"(b));
    return value;
}

// The larger magnitudes of two pairs of activations; NaN is larger than all.
DEVICE u32 larger_magnitudes(u32 a, u32 b) {
    u32 larger;
#ifdef ACTIVATION_BF16
    asm("{.reg .b32 x, y; abs.bf16x2 x, %1; abs.bf16x2 y, %2; max.NaN.bf16x2 %0, x, y;}"
        : "=r"(larger) : "r"(a), "r"(b));
#else
    asm("{.reg .b32 x, y; abs.f16x2 x, %1; abs.f16x2 y, %2; max.NaN.f16x2 %0, x, y;}"
        : "=r"(larger) : "r"(a), "r"(b));
#endif
    return larger;
}

#endif

DEVICE u32 shuffle_xor(u32 value, int lanes) {
    return bits_of_float(shuffle_xor(float_of_bits(value), lanes));
}
DEVICE u32 shuffle_down(u32 value, int lanes) {
    return bits_of_float(shuffle_down(float_of_bits(value), lanes));
}

// Bits of a where `mask` has ones, else of b: one instruction, of which the compiler makes two where it knows the mask.
DEVICE u32 either(u32 mask, u32 a, u32 b) {
#ifdef QTOOL_HOST
    return a & mask | b & ~mask;
#else
    u32 bits;
    asm("lop3.b32 %0, %1, %2, %3, 0xca;" : "=r"(bits) : "r"(mask), "r"(a), "r"(b));
    return bits;
#endif
}

// 2^exponent for -126 <= exponent <= 127.
DEVICE float power_of_two(int exponent) { return float_of_bits((u32)(exponent + 127) << 23); }

// What turns scale * center into the offset of an affine weight, `scale` being that of its first plane,
// `center` what the middle of its codes is above the zero point: a half-integer, which float16 holds
// as it is where it would round the offset.
DEVICE float per_center(int planes) { return power_of_two(2 - planes); }

DEVICE float bfloat_to_float(u16 bits) { return float_of_bits((u32)bits << 16); }

// Both float16 of a word, added in float32.
DEVICE float sum_half2(u32 pair) {
    return half_to_float((u16)(pair & 0xffffu)) + half_to_float((u16)(pair >> 16));
}

// Round to nearest, ties to even; NaN stays NaN.
DEVICE u16 float_to_bfloat(float value) {
    u32 bits = bits_of_float(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (u16)((bits >> 16) | 0x40u);
    return (u16)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

#ifdef ACTIVATION_BF16
#define load_activation bfloat_to_float
#define store_activation float_to_bfloat
#define mma_activations mma_bfloat
#define add_pairs add_bfloat2
#else
#define load_activation half_to_float
#define store_activation float_to_half
#define mma_activations mma
#define add_pairs add_half2
#endif

DEVICE float silu(float x) { return x * reciprocal(1.0f + exp2_fast(-1.44269504f * x)); }

// How the bits of a word are laid out (qtool/runtime/backends/cuda/tiles.py packs them): a word holds 16 rows x 64
// inputs / 32 lanes. Lane 4 g + t has rows g and g + 8 and, in each half of 32 inputs, inputs
// 8 t .. 8 t + 7. Bit 16 h + 2 i + r belongs to row g + 8 r and to input
// 32 (i >> 2) + 8 t + 2 (i & 3) + h. Planes of equal steps are nibbles: bit_plane_nibbles.cuh.

// One of eight halves.
DEVICE u16 bits_at(const quad &v, int i) { // 0 .. 7, known to the compiler
    u32 pair = i < 2 ? v.x : i < 4 ? v.y : i < 6 ? v.z : v.w;
    return (u16)(i % 2 ? pair >> 16 : pair & 0xffffu);
}

// Eight inputs as they stand in memory; beyond the end: zero. ALIGNED (1: in_features is a multiple of 8) is the kernel's.
DEVICE quad load_inputs(const u16 *row, int k, int in_features) {
#if ALIGNED
    return k < in_features ? *(const quad *)(row + k) : quad{0, 0, 0, 0};
#else
    u32 pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        u32 low = k + 2 * i < in_features ? row[k + 2 * i] : 0;
        u32 high = k + 2 * i + 1 < in_features ? row[k + 2 * i + 1] : 0;
        pairs[i] = low | high << 16;
    }
    return quad{pairs[0], pairs[1], pairs[2], pairs[3]};
#endif
}
