// What host.h promises: blocks, or clusters of blocks, one after the other, their threads as fibers in turn.
#include "host.h"

#include <setjmp.h>
#include <ucontext.h>

#include <stdexcept>
#include <vector>

dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace host {

struct Meeting { int arrived = 0, round = 0; };
// Only the first switch to a fiber is of contexts: those ask the system for the mask of signals.
struct Fiber { ucontext_t context; jmp_buf place; std::vector<char> stack; bool begun, done; };
struct Fetch { void *shared; const void *address; int bytes; };

// A block of the cluster that runs.
struct Block {
    std::vector<Fiber> fibers;
    std::vector<unsigned char> shared;
    std::vector<uint32_t> letters;
    Meeting meeting, some[16];
    std::vector<Meeting> warps, warpgroups;
    std::vector<std::vector<std::vector<Product>>> products; // by thread: groups, the last still open
    std::vector<std::vector<std::vector<Fetch>>> fetches;    // the same
};

unsigned char *shared;
uint32_t *mailbox;
int current;
unsigned block;
static std::vector<Block> blocks(1);
static Block *here;
static Meeting cluster_meeting, waiting;
static jmp_buf scheduler;
static void (*body)(void *);
static void *body_arguments;

// What a kernel may not touch before it has waited for the launch before it: inputs, which hold other
// bytes until then, and outputs, which must not have changed by then.
struct Region { char *place; std::vector<char> bytes; };
static std::vector<Region> inputs, outputs;
static bool waited, too_early;

void yield() {
    if (!_setjmp(here->fibers[current].place)) _longjmp(scheduler, 1);
    threadIdx.x = (unsigned)current;
}

static void meet(Meeting &meeting, int size) {
    int round = meeting.round;
    if (++meeting.arrived == size) { meeting.arrived = 0; ++meeting.round; }
    while (meeting.round == round) yield();
}

void meet_block() { meet(here->meeting, (int)blockDim.x); }
void meet_cluster() { meet(cluster_meeting, (int)(blockDim.x * blocks.size())); }
void meet_warp() { meet(here->warps[current / 32], 32); }
// The first threads of a block, so many: as many meetings as there are numbers.
void meet_some(int threads, int number) { meet(here->some[number], threads); }
void meet_warpgroup() { meet(here->warpgroups[current / 128], 128); }
unsigned char *shared_of(unsigned rank) { return blocks[rank].shared.data(); }

void ask_for(Product product) { here->products[current].back().push_back(product); }
void end_products() { here->products[current].emplace_back(); }

static double number(unsigned bits, int kind) {
    return kind == BFLOATS ? float_of_bits(bits << 16) : half_to_float((unsigned short)bits);
}

// wgmma.mma_async.m64nNk32 of bytes, m64nNk16 of 16-bit numbers, by the PTX manual. A in registers: register r of
// lane 4 g + t has row g + 8 (r % 2) of the warp's 16 and 4 bytes of inputs from byte 4 t + 16 (r / 2) on. B:
// K-major without swizzling, core matrices of 8 x 16 bytes; the descriptor has, over 16, its address, the leading
// offset (to the next 16 bytes of inputs) and the stride offset (to the next 8 columns). D as the fragment C of
// mma.m16n8.
static void multiply(const Product &product) {
    int lane = current % 32, g = lane / 4, t = lane % 4;
    unsigned address = (product.b & 0x3fff) << 4, leading = (product.b >> 16 & 0x3fff) << 4;
    unsigned stride = (product.b >> 32 & 0x3fff) << 4;
    if (product.b >> 46) throw std::runtime_error("a swizzled matrix");
    memcpy(box(lane), product.a, 16);
    meet_warp();
    for (int i = 0; i < product.count; ++i) {
        int row = i & 2 ? 1 : 0, column = i / 4 * 8 + 2 * t + i % 2, sum = 0;
        double real = 0;
        const unsigned char *b = shared + address + column / 8 * stride + column % 8 * 16;
        for (int k = 0; k < 32; ++k) { // bytes
            uint32_t a = box(4 * g + k % 16 / 4)[row + 2 * (k / 16)];
            const unsigned char *at = b + k / 16 * leading + k % 16;
            if (product.kind == BYTES) sum += (int)(signed char)(a >> 8 * (k % 4)) * (int)(signed char)*at;
            else if (k % 2 == 0) real += number(a >> 8 * (k % 4) & 0xffff, product.kind) * number(at[0] | at[1] << 8, product.kind);
        }
        if (product.kind == BYTES) ((int *)product.d)[i] += sum;
        else ((float *)product.d)[i] += (float)real;
    }
    meet_warp();
}

void finish_products(int pending) {
    auto &mine = here->products[current];
    while ((int)mine.size() - 1 > pending) {
        for (const auto &product : mine.front()) multiply(product);
        mine.erase(mine.begin());
    }
}

void fetch(void *shared, const void *address, int bytes) {
    if ((uintptr_t)shared % bytes || (uintptr_t)address % bytes) throw std::runtime_error("a fetch from an odd place");
    here->fetches[current].back().push_back({shared, address, bytes});
}
void end_fetches() { here->fetches[current].emplace_back(); }
void finish_fetches(int pending) {
    auto &mine = here->fetches[current];
    while ((int)mine.size() - 1 > pending) {
        for (const auto &one : mine.front()) memcpy(one.shared, one.address, one.bytes);
        mine.erase(mine.begin());
    }
}

static void enter() {
    body(body_arguments);
    here->fibers[current].done = true;
    _longjmp(scheduler, 1);
}

static void go_on(Fiber &fiber) {
    if (_setjmp(scheduler)) return;
    if (fiber.begun) _longjmp(fiber.place, 1);
    fiber.begun = true;
    setcontext(&fiber.context);
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

// Every thread has to wait, so it is a meeting; who comes back first shows what was hidden.
void wait_for_previous() {
    meet(waiting, (int)(blockDim.x * blocks.size()));
    if (!waited) show();
}

static void prepare(Block &made, int threads, size_t bytes) {
    made.shared.assign(bytes, 0xff); // poison: NaN wherever nothing was staged
    made.meeting = {};
    for (auto &meeting : made.some) meeting = {};
    made.warps.assign(threads / 32, {});
    made.warpgroups.assign((threads + 127) / 128, {});
    made.products.assign(threads, {1, std::vector<Product>()});
    made.fetches.assign(threads, {1, std::vector<Fetch>()});
    made.letters.assign((size_t)threads * 8, 0);
    made.fibers.resize(threads);
    for (auto &fiber : made.fibers) {
        fiber.stack.resize(1 << 16);
        fiber.begun = fiber.done = false;
        getcontext(&fiber.context);
        fiber.context.uc_stack = {fiber.stack.data(), 0, fiber.stack.size()};
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, enter, 0);
    }
}

// With a seed, few warps are slower: each goes on in one of 8, 64 or 512 turns.
static unsigned seed;
static bool waits(unsigned number, int turns) {
    unsigned hash = (seed * 131 + number * 31 + current / 32 + 1) * 2654435761u;
    hash = (hash ^ hash >> 15) * 2246822519u >> 8;
    unsigned kind = hash % 16;
    return seed && kind < 3 && (turns + hash) % (8u << 3 * kind) != 0;
}

// Lets each thread of a block go on once; how many are still there.
static int turn(unsigned number, unsigned first, int threads, int turns) {
    int alive = 0;
    block = number, here = &blocks[number], blockIdx.x = first + number;
    shared = here->shared.data(), mailbox = here->letters.data();
    for (current = 0; current < threads; ++current)
        if (!here->fibers[current].done && waits(number, turns)) {
            ++alive;
        } else if (!here->fibers[current].done) {
            threadIdx.x = (unsigned)current;
            go_on(here->fibers[current]);
            alive += !here->fibers[current].done;
        }
    return alive;
}

// Runs the blocks of a cluster; throws if threads wait for one another for ever.
static void run_blocks(unsigned first, int threads, size_t bytes) {
    hide();
    cluster_meeting = waiting = {};
    for (auto &one : blocks) prepare(one, threads, bytes);
    for (int alive = threads, turns = 0; alive > 0; ++turns) {
        if (turns > 1 << 20) throw std::runtime_error("deadlock");
        alive = 0;
        for (unsigned number = 0; number < blocks.size(); ++number) alive += turn(number, first, threads, turns);
    }
}

int launch(dim3 grid, int cluster, int threads, size_t bytes, void (*thread)(void *), void *arguments) {
    gridDim = grid;
    blockDim = {(unsigned)threads, 1, 1};
    body = thread, body_arguments = arguments;
    blocks.resize(cluster);
    try {
        for (unsigned z = 0; z < grid.z; ++z)
            for (unsigned y = 0; y < grid.y; ++y)
                for (unsigned x = 0; x < grid.x; x += cluster) {
                    blockIdx = {x, y, z};
                    run_blocks(x, threads, bytes);
                    if (!waited) { show(); return 2; }
                }
    } catch (const std::exception &) { show(); return 1; }
    return too_early ? 3 : 0;
}

}  // namespace host

extern "C" void host_uneven(unsigned seed) { host::seed = seed; }
extern "C" void host_forget() { host::inputs.clear(), host::outputs.clear(), host::too_early = false; }
extern "C" void host_region(void *place, size_t bytes, int is_output) {
    auto *first = (char *)place;
    (is_output ? host::outputs : host::inputs).push_back({first, {first, first + bytes}});
}
