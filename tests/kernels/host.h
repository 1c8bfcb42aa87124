// Runs CUDA kernels on a CPU, for tests: every thread of a block is a fiber, and what a warp or a
// block does together is a meeting of fibers. Include this, then kernels/common.cuh, then a kernel.
#pragma once
#define QTOOL_HOST
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <vector>

#define __global__ static
#define __launch_bounds__(...)
#define DEVICE static inline
#define DYNAMIC_SHARED(name) unsigned char *name = host::shared.data()

struct dim3 { unsigned x = 1, y = 1, z = 1; };
struct alignas(16) quad { unsigned x, y, z, w; };
static dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace host {

struct Meeting { int arrived = 0, round = 0; };
struct Fiber { ucontext_t context; std::vector<char> stack; bool done; };

static std::vector<Fiber> fibers;
static std::vector<unsigned char> shared;
static ucontext_t scheduler;
static int current;
static Meeting block_meeting;
static std::vector<Meeting> warp_meetings;
static std::vector<uint32_t> mailbox; // (threads, 8): what lanes of a warp give one another
static std::function<void()> body;

// What a kernel may not touch before it has waited for the launch before it: inputs, which hold other
// bytes until then, and outputs, which must not have changed by then.
struct Region { char *place; std::vector<char> bytes; };
static std::vector<Region> inputs, outputs;
static bool waited, too_early;

static void wait() {
    int self = current;
    swapcontext(&fibers[self].context, &scheduler);
    current = self;
    threadIdx.x = (unsigned)self;
}

static void meet(Meeting &meeting, int size) {
    int round = meeting.round;
    if (++meeting.arrived == size) { meeting.arrived = 0; ++meeting.round; }
    while (meeting.round == round) wait();
}

static void meet_warp() { meet(warp_meetings[current / 32], 32); }
static uint32_t *box(int lane) { return &mailbox[(size_t)(current / 32 * 32 + lane) * 8]; }

static void enter() {
    body();
    fibers[current].done = true;
    swapcontext(&fibers[current].context, &scheduler);
}

static void hide() {
    waited = false;
    for (auto &region : inputs) memset(region.place, 0xff, region.bytes.size());
    for (auto &region : outputs) memcpy(region.bytes.data(), region.place, region.bytes.size());
}

static void show() {
    waited = true;
    for (auto &region : inputs) memcpy(region.place, region.bytes.data(), region.bytes.size());
    for (auto &region : outputs)
        too_early |= memcmp(region.bytes.data(), region.place, region.bytes.size()) != 0;
}

// Runs one block; throws if its threads wait for one another for ever.
static void run_block(int threads, size_t bytes) {
    hide();
    shared.assign(bytes, 0xff); // poison: NaN wherever nothing was staged
    block_meeting = {};
    warp_meetings.assign(threads / 32, {});
    mailbox.assign((size_t)threads * 8, 0);
    fibers.resize(threads);
    for (auto &fiber : fibers) {
        fiber.stack.resize(1 << 16);
        fiber.done = false;
        getcontext(&fiber.context);
        fiber.context.uc_stack = {fiber.stack.data(), 0, fiber.stack.size()};
        fiber.context.uc_link = &scheduler;
        makecontext(&fiber.context, enter, 0);
    }
    for (int alive = threads, turns = 0; alive > 0; ++turns) {
        if (turns > 1 << 20) throw std::runtime_error("deadlock");
        alive = 0;
        for (current = 0; current < threads; ++current)
            if (!fibers[current].done) {
                int self = current;
                threadIdx.x = (unsigned)self;
                swapcontext(&scheduler, &fibers[self].context);
                current = self;
                alive += !fibers[self].done;
            }
    }
}

template <class Kernel, class... Arguments>
static int launch(dim3 grid, int threads, size_t bytes, Kernel kernel, Arguments... arguments) {
    gridDim = grid;
    blockDim = {(unsigned)threads, 1, 1};
    body = [=] { kernel(arguments...); };
    try {
        for (unsigned z = 0; z < grid.z; ++z)
            for (unsigned y = 0; y < grid.y; ++y)
                for (unsigned x = 0; x < grid.x; ++x) {
                    blockIdx = {x, y, z};
                    run_block(threads, bytes);
                    if (!waited) { show(); return 2; }
                }
    } catch (const std::exception &) { show(); return 1; }
    return too_early ? 3 : 0;
}

}  // namespace host

extern "C" void host_forget() { host::inputs.clear(), host::outputs.clear(), host::too_early = false; }
extern "C" void host_region(void *place, size_t bytes, int is_output) {
    auto *first = (char *)place;
    (is_output ? host::outputs : host::inputs).push_back({first, {first, first + bytes}});
}

// Every thread has to wait, so it is a meeting; who comes back first shows what was hidden.
static void wait_for_previous() {
    host::meet(host::block_meeting, (int)blockDim.x);
    if (!host::waited) host::show();
}

static void __syncthreads() { host::meet(host::block_meeting, (int)blockDim.x); }

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
DEVICE void fetch(void *shared, const void *address) { memcpy(shared, address, 16); }
DEVICE void end_of_fetches() {}
template <int PENDING> DEVICE void fetched() {}
DEVICE void let_next_start() {}
DEVICE void store_marked(unsigned long long *place, float value, unsigned mark) {
    *place = (unsigned long long)mark << 32 | bits_of_float(value);
}
DEVICE unsigned load_marked(const unsigned long long *place, float *value) {
    *value = float_of_bits((unsigned)*place);
    return (unsigned)(*place >> 32);
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
DEVICE unsigned larger_magnitudes(unsigned a, unsigned b) {
    return std::max(a & 0x7fffu, b & 0x7fffu) | std::max(a & 0x7fff0000u, b & 0x7fff0000u);
}

DEVICE unsigned multiply_half2(unsigned a, unsigned b) {
    unsigned low = float_to_half(half_to_float((unsigned short)a) * half_to_float((unsigned short)b));
    return low | (unsigned)float_to_half(half_to_float((unsigned short)(a >> 16)) *
                                         half_to_float((unsigned short)(b >> 16))) << 16;
}

DEVICE unsigned permute_bytes(unsigned a, unsigned b, unsigned pick) {
    unsigned long long both = (unsigned long long)b << 32 | a;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i)
        result |= (unsigned)(both >> (8 * (pick >> (4 * i) & 7)) & 255) << (8 * i);
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

// The fragments of the PTX manual: A row-major 16x16, B column-major 16x8, C and D 16x8.
DEVICE void mma(float *d, const float *c, unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                unsigned b0, unsigned b1) {
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
            sum += (double)half_to_float((unsigned short)(a >> 16 * (k & 1))) *
                   (double)half_to_float((unsigned short)(b >> 16 * (k & 1)));
        }
        results[i] = (float)sum;
    }
    memcpy(d, results, sizeof results);
    host::meet_warp();
}
