// Runs CUDA kernels on a CPU, for tests: every thread of a block is a fiber, and what a warp or a
// block does together is a meeting of fibers. Include this, then kernels/common.cuh, then a kernel.
// host.cpp runs them; it is compiled once, so that a kernel takes little more than its own lines.
#pragma once
#define QTOOL_HOST
#include <algorithm>
#include <sched.h>
#include <cmath>
#include <cstdint>
#include <cstring>

#define __global__ static
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define DEVICE static inline
#define DYNAMIC_SHARED(name) unsigned char *name = host::shared

struct dim3 { unsigned x = 1, y = 1, z = 1; };
struct alignas(16) quad { unsigned x, y, z, w; };
extern dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace host {

extern unsigned char *shared;
extern uint32_t *mailbox; // (threads, 8): what lanes of a warp give one another
extern int current; // fiber
extern unsigned block; // of those of a cluster
unsigned char *shared_of(unsigned block);

void meet_block();
void meet_cluster();
void meet_warp();
void meet_warpgroup();
void meet_some(int threads, int number);
void yield(); // to the other threads of the block
void wait_for_previous();
int launch(dim3 grid, int cluster, int threads, size_t bytes, void (*thread)(void *), void *arguments);

static inline uint32_t *box(int lane) { return &mailbox[(size_t)(current / 32 * 32 + lane) * 8]; }

template <class Kernel, class... Arguments>
static int launch_kernel(dim3 grid, int cluster, int threads, size_t bytes, Kernel kernel, Arguments... arguments) {
    auto body = [=] { kernel(arguments...); };
    return launch(grid, cluster, threads, bytes, [](void *it) { (*static_cast<decltype(body) *>(it))(); }, &body);
}

// A product that a thread has asked for and that isn't there yet: as late as a card may be with it.
struct Product { void *d; const unsigned *a; uint64_t b; int count; int kind; }; // of BYTES, HALVES, BFLOATS
enum { BYTES, HALVES, BFLOATS };
void ask_for(Product product);
void end_products();
void finish_products(int pending); // all but the last groups

// The same of copies into shared memory.
void fetch(void *shared, const void *address, int bytes);
void end_fetches();
void finish_fetches(int pending);

// An mbarrier.
struct Barrier { uint8_t arrivals, left; uint16_t phase; int32_t bytes; };
static inline void change(unsigned long long *place, int arrived, int bytes) {
    auto *barrier = (Barrier *)place;
    barrier->left -= arrived, barrier->bytes += bytes;
    if (barrier->left == 0 && barrier->bytes == 0) barrier->left = barrier->arrivals, barrier->phase ^= 1;
}

}  // namespace host

DEVICE void wait_for_previous() { host::wait_for_previous(); }
DEVICE void wait_for_previous(unsigned) { host::wait_for_previous(); }
DEVICE void __syncthreads() { host::meet_block(); }

DEVICE float half_to_float(unsigned short bits) {
    _Float16 value;
    memcpy(&value, &bits, 2);
    return (float)value;
}
DEVICE unsigned short float_to_half(float value) {
    _Float16 rounded = (_Float16)value;
    unsigned short bits;
    memcpy(&bits, &rounded, 2);
    return bits;
}
DEVICE float float_of_bits(unsigned bits) { float v; memcpy(&v, &bits, 4); return v; }
DEVICE unsigned bits_of_float(float value) { unsigned b; memcpy(&b, &value, 4); return b; }
DEVICE quad load_stream(const quad *address) { return *address; }
template <int BYTES> DEVICE void fetch(void *shared, const void *address) { host::fetch(shared, address, BYTES); }
DEVICE void fetch(void *shared, const void *address) { fetch<16>(shared, address); }
DEVICE void end_of_fetches() { host::end_fetches(); }
template <int PENDING> DEVICE void fetched() { host::finish_fetches(PENDING); }
DEVICE void let_next_start() {}
DEVICE void store_marked(unsigned long long *place, float value, unsigned mark) {
    *place = (unsigned long long)mark << 32 | bits_of_float(value);
}
DEVICE unsigned load_marked(const unsigned long long *place, float *value) {
    *value = float_of_bits((unsigned)*place);
    return (unsigned)(*place >> 32);
}
DEVICE void add_to(unsigned long long *place, unsigned long long value) { *place += value; }
DEVICE void add_to(unsigned *place, unsigned value) { *place += value; }
DEVICE unsigned count_up(unsigned *place) { return (*place)++; }
DEVICE unsigned long long take_ticket(unsigned long long *place) { return (*place)++; }
DEVICE unsigned long long load_through(const unsigned long long *place) { return *place; }
DEVICE double power_of_e(double x) { return exp(x); }
DEVICE void store_far(quad *place, quad v) { // of another process: halves of 8 bytes, each as a whole
    for (int i = 0; i < 2; ++i) {
        uint64_t both = (uint64_t)(&v.x)[2 * i + 1] << 32 | (&v.x)[2 * i];
        __atomic_store_n((uint64_t *)place + i, both, __ATOMIC_RELAXED);
    }
}
DEVICE quad load_far(const quad *place) { // who asks may wait for that process
    sched_yield();
    uint64_t both[2] = {__atomic_load_n((const uint64_t *)place, __ATOMIC_RELAXED),
                        __atomic_load_n((const uint64_t *)place + 1, __ATOMIC_RELAXED)};
    return quad{(unsigned)both[0], (unsigned)(both[0] >> 32), (unsigned)both[1], (unsigned)(both[1] >> 32)};
}
DEVICE void store_marked_far(unsigned long long *place, float value, unsigned mark) {
    __atomic_store_n((uint64_t *)place, (uint64_t)mark << 32 | bits_of_float(value), __ATOMIC_RELAXED);
}
DEVICE unsigned load_marked_far(const unsigned long long *place, float *value) {
    sched_yield();
    uint64_t word = __atomic_load_n((const uint64_t *)place, __ATOMIC_RELAXED);
    *value = float_of_bits((unsigned)word);
    return (unsigned)(word >> 32);
}
DEVICE float exp2_fast(float x) { return exp2f(x); }
DEVICE float reciprocal(float x) { return 1.0f / x; }
DEVICE float inverse_root(float x) { return 1.0f / sqrtf(x); }
DEVICE void sync_warp() { host::meet_warp(); }

DEVICE float shuffle_xor(float value, int lanes) {
    int lane = (int)threadIdx.x % 32;
    host::box(lane)[0] = bits_of_float(value);
    host::meet_warp();
    float got = float_of_bits(host::box(lane ^ lanes)[0]);
    host::meet_warp();
    return got;
}

DEVICE float shuffle_down(float value, int lanes) {
    int lane = (int)threadIdx.x % 32;
    host::box(lane)[0] = bits_of_float(value);
    host::meet_warp();
    float got = float_of_bits(host::box(lane + lanes < 32 ? lane + lanes : lane)[0]);
    host::meet_warp();
    return got;
}

DEVICE unsigned warp_largest(unsigned value) {
    host::box((int)threadIdx.x % 32)[0] = value;
    host::meet_warp();
    for (int lane = 0; lane < 32; ++lane) value = std::max(value, host::box(lane)[0]);
    host::meet_warp();
    return value;
}
DEVICE unsigned warp_sum(unsigned value) {
    host::box((int)threadIdx.x % 32)[0] = value;
    host::meet_warp();
    value = 0;
    for (int lane = 0; lane < 32; ++lane) value += host::box(lane)[0];
    host::meet_warp();
    return value;
}
// As bits: of either format, NaN is above infinity, and that above the rest.
DEVICE float larger(float a, float b) { return a > b || a != a ? a : b; }
DEVICE unsigned larger_magnitudes(unsigned a, unsigned b) {
    return std::max(a & 0x7fffu, b & 0x7fffu) | std::max(a & 0x7fff0000u, b & 0x7fff0000u);
}

DEVICE unsigned multiply_half2(unsigned a, unsigned b) {
    unsigned low = float_to_half(half_to_float((unsigned short)a) * half_to_float((unsigned short)b));
    return low | (unsigned)float_to_half(half_to_float((unsigned short)(a >> 16)) *
                                         half_to_float((unsigned short)(b >> 16))) << 16;
}

DEVICE unsigned add_half2(unsigned a, unsigned b) {
    unsigned low = float_to_half(half_to_float((unsigned short)a) + half_to_float((unsigned short)b));
    return low | (unsigned)float_to_half(half_to_float((unsigned short)(a >> 16)) +
                                         half_to_float((unsigned short)(b >> 16))) << 16;
}
DEVICE unsigned add_bfloat2(unsigned a, unsigned b) { // not of NaN
    unsigned high = bits_of_float(float_of_bits(a & 0xffff0000u) + float_of_bits(b & 0xffff0000u));
    unsigned low = bits_of_float(float_of_bits(a << 16) + float_of_bits(b << 16));
    high += 0x7fffu + (high >> 16 & 1), low += 0x7fffu + (low >> 16 & 1);
    return (high & 0xffff0000u) | low >> 16;
}
DEVICE unsigned in_register(unsigned constant) { return constant; }
template <class Load, class Store> DEVICE unsigned fma_pair(unsigned a, unsigned b, unsigned c, Load load, Store store) {
    unsigned sum[2];
    for (int i = 0; i < 2; ++i) // exact in float64
        sum[i] = store((float)((double)load(a >> 16 * i & 0xffff) * load(b >> 16 * i & 0xffff) + load(c >> 16 * i & 0xffff)));
    return sum[0] | sum[1] << 16;
}
DEVICE unsigned fma_half2(unsigned a, unsigned b, unsigned c) {
    return fma_pair(a, b, c, [](unsigned v) { return half_to_float((unsigned short)v); }, [](float v) { return (unsigned)float_to_half(v); });
}
DEVICE unsigned fma_bfloat2(unsigned a, unsigned b, unsigned c) { // not of NaN
    return fma_pair(a, b, c, [](unsigned v) { return float_of_bits(v << 16); },
                    [](float v) { unsigned bits = bits_of_float(v); return bits + 0x7fffu + (bits >> 16 & 1) >> 16; });
}
DEVICE float multiply_rounded(float a, float b) { return a * b; }
DEVICE float add_product(float a, float b, float c) { return fmaf(a, b, c); }
DEVICE unsigned permute_bytes(unsigned a, unsigned b, unsigned pick) {
    unsigned long long both = (unsigned long long)b << 32 | a;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) {
        unsigned byte = (unsigned)(both >> (8 * (pick >> (4 * i) & 7)) & 255);
        if (pick >> (4 * i) & 8) byte = byte & 128 ? 255 : 0; // its sign, eight times
        result |= byte << (8 * i);
    }
    return result;
}

// The fragments of the PTX manual: A row-major 16x32 unsigned, B column-major 32x8 signed bytes.
DEVICE void mma_bytes(int *d, const int *c, unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                      unsigned b0, unsigned b1) {
    int results[4], lane = (int)threadIdx.x % 32, g = lane / 4, t = lane % 4;
    unsigned mine[6] = {a0, a1, a2, a3, b0, b1};
    memcpy(host::box(lane), mine, sizeof mine);
    host::meet_warp();
    for (int i = 0; i < 4; ++i) {
        int row = g + 8 * (i / 2), column = 2 * t + i % 2, sum = c[i];
        for (int k = 0; k < 32; ++k) {
            unsigned a = host::box(row % 8 * 4 + k % 16 / 4)[(row / 8) + 2 * (k / 16)];
            unsigned b = host::box(column * 4 + k % 16 / 4)[4 + k / 16];
            sum += (int)(unsigned char)(a >> 8 * (k & 3)) * (int)(signed char)(b >> 8 * (k & 3));
        }
        results[i] = sum;
    }
    memcpy(d, results, sizeof results);
    host::meet_warp();
}

// The fragments of the PTX manual: A row-major 16x128, B column-major 128x8 bits; lane t of four has 32 bits of each.
DEVICE void mma_bits(int *d, const int *c, unsigned a0, unsigned a1, unsigned b) {
    int results[4], lane = (int)threadIdx.x % 32, g = lane / 4, t = lane % 4;
    unsigned mine[3] = {a0, a1, b};
    memcpy(host::box(lane), mine, sizeof mine);
    host::meet_warp();
    for (int i = 0; i < 4; ++i) {
        results[i] = c[i];
        for (int part = 0; part < 4; ++part)
            results[i] += __builtin_popcount(host::box(g * 4 + part)[i / 2] & host::box((2 * t + i % 2) * 4 + part)[2]);
    }
    memcpy(d, results, sizeof results);
    host::meet_warp();
}

// The fragments of the PTX manual: A row-major 16x16, B column-major 16x8, C and D 16x8.
template <float (*NUMBER)(unsigned short)>
DEVICE void multiply_fragments(float *d, const float *c, unsigned a0, unsigned a1, unsigned a2,
                               unsigned a3, unsigned b0, unsigned b1) {
    float results[4];
    int lane = (int)threadIdx.x % 32, g = lane / 4, t = lane % 4;
    unsigned mine[6] = {a0, a1, a2, a3, b0, b1};
    memcpy(host::box(lane), mine, sizeof mine);
    host::meet_warp();
    for (int i = 0; i < 4; ++i) {
        int row = g + 8 * (i / 2), column = 2 * t + i % 2;
        double sum = c[i];
        for (int k = 0; k < 16; ++k) {
            unsigned a = host::box(row % 8 * 4 + k % 8 / 2)[(row / 8) + 2 * (k / 8)];
            unsigned b = host::box(column * 4 + k % 8 / 2)[4 + k / 8];
            sum += (double)NUMBER((unsigned short)(a >> 16 * (k & 1))) *
                   (double)NUMBER((unsigned short)(b >> 16 * (k & 1)));
        }
        results[i] = (float)sum;
    }
    memcpy(d, results, sizeof results);
    host::meet_warp();
}
DEVICE float number_of_bfloat(unsigned short bits) { return float_of_bits((unsigned)bits << 16); }
DEVICE void mma(float *d, const float *c, unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                unsigned b0, unsigned b1) {
    multiply_fragments<half_to_float>(d, c, a0, a1, a2, a3, b0, b1);
}
DEVICE void mma_bfloat(float *d, const float *c, unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                       unsigned b0, unsigned b1) {
    multiply_fragments<number_of_bfloat>(d, c, a0, a1, a2, a3, b0, b1);
}

DEVICE unsigned transpose_pairs(unsigned pair) {
    int lane = (int)threadIdx.x % 32, g = lane / 4, t = lane % 4;
    host::box(lane)[0] = pair;
    host::meet_warp();
    unsigned low = host::box(4 * (2 * t) + g / 2)[0], high = host::box(4 * (2 * t + 1) + g / 2)[0];
    host::meet_warp();
    return (low >> 16 * (g & 1) & 0xffffu) | (high >> 16 * (g & 1) & 0xffffu) << 16;
}

// kernels/hopper.cuh
DEVICE unsigned shared_address(const void *place) { return (unsigned)((unsigned char *)place - host::shared); }
DEVICE unsigned cluster_rank() { return host::block; }
DEVICE void sync_cluster() { host::meet_cluster(); }
DEVICE void barrier_init(unsigned long long *place, unsigned arrivals) {
    host::Barrier made = {(uint8_t)arrivals, (uint8_t)arrivals, 0, 0};
    memcpy(place, &made, 8);
}
DEVICE void barriers_are_ready() {}
DEVICE void barrier_expect(unsigned long long *place, unsigned bytes) { host::change(place, 1, (int)bytes); }
DEVICE void barrier_arrive(unsigned long long *place) { host::change(place, 1, 0); }
// The same place in another block of the cluster.
template <class Type> Type *there(unsigned rank, Type *place) { return (Type *)(host::shared_of(rank) + shared_address(place)); }
DEVICE float load_of_block(const float *place, unsigned rank) { return *there(rank, place); }
DEVICE void barrier_arrive(unsigned long long *place, unsigned rank) { host::change(there(rank, place), 1, 0); }
DEVICE void barrier_wait(unsigned long long *place, unsigned parity) {
    while (((host::Barrier *)place)->phase == parity) host::yield();
}
DEVICE void copy_bulk(void *shared, const void *address, unsigned bytes, unsigned long long *barrier) {
    memcpy(shared, address, bytes);
    host::change(barrier, 0, -(int)bytes);
}
DEVICE void prefetch_bulk(const void *, unsigned) {}
DEVICE void prefetch(const void *) {}
DEVICE void copy_bulk_to(unsigned short mask, void *shared, const void *address, unsigned bytes, unsigned long long *barrier) {
    for (unsigned rank = 0; mask >> rank; ++rank)
        if (mask >> rank & 1) copy_bulk(there(rank, shared), address, bytes, there(rank, barrier));
}
template <int COUNT> DEVICE void fewer_registers() {}
template <int COUNT> DEVICE void more_registers() {}
DEVICE void sync_warpgroup(int) { host::meet_warpgroup(); }
DEVICE void take_turn(int) {}
DEVICE void give_turn(int) {}
DEVICE void products_begin() {}
DEVICE void end_of_products() { host::end_products(); }
template <int PENDING, int COUNT> DEVICE void products_wait(int (&)[COUNT]) { host::finish_products(PENDING); }
template <int PENDING, int COUNT> DEVICE void products_wait(float (&)[COUNT]) { host::finish_products(PENDING); }
template <int COUNT> DEVICE void keep(const unsigned (&)[COUNT]) {}
template <int COUNT> DEVICE void multiply_add(int (&d)[COUNT], const unsigned *a, unsigned long long b) { host::ask_for({d, a, b, COUNT, host::BYTES}); }
template <int IS_BFLOAT, int COUNT> DEVICE void multiply_add_16(float (&d)[COUNT], const unsigned *a, unsigned long long b) {
    host::ask_for({d, a, b, COUNT, IS_BFLOAT ? host::BFLOATS : host::HALVES});
}
template <int COUNT> DEVICE void sync_threads(int number) { host::meet_some(COUNT, number); }
DEVICE void store_quad(float *to, const float *from) { memcpy(to, from, 16); }
DEVICE void load_quad(float *to, const float *from) { memcpy(to, from, 16); }
DEVICE unsigned long long count_one(unsigned long long *place) { return (*place)++; }
DEVICE void await_count(const unsigned long long *place, unsigned long long count) {
    while (*place < count) host::yield();
}
DEVICE void copies_see_writes() {}
DEVICE void announce(unsigned long long *flag) { *flag = 1; }
DEVICE void await(unsigned long long *flag) {
    while (*flag == 0) host::yield();
    *flag = 0;
}
