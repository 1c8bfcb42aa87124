// Primitives that compute capability 9.0 alone has (target sm_90a): products of a warpgroup, bulk
// copies, and barriers that count bytes. PTX ISA: wgmma.mma_async, mbarrier, cp.async.bulk.

#define WARPGROUP 128

#ifndef QTOOL_HOST

DEVICE u32 shared_address(const void *shared) { return (u32)__cvta_generic_to_shared(shared); }

// Of the block in its cluster.
DEVICE u32 cluster_rank() {
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
// All threads of all blocks of the cluster.
DEVICE void sync_cluster() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// A float of the same place in one block's shared memory.
DEVICE float load_of_block(const float *place, u32 rank) {
    float value;
    asm volatile("{.reg .b32 there;\nmapa.shared::cluster.u32 there, %1, %2;\nld.shared::cluster.f32 %0, [there];}"
                 : "=f"(value) : "r"(shared_address(place)), "r"(rank) : "memory");
    return value;
}

DEVICE void barrier_init(u64 *barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// Make new barriers visible to copies and to other blocks; a barrier of threads comes after it.
DEVICE void barriers_are_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Arrive, and expect so many bytes of copies in this phase.
DEVICE void barrier_expect(u64 *barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
// Arrive at the same barrier of one block of the cluster.
DEVICE void barrier_arrive(u64 *barrier, u32 rank) {
    asm volatile("{.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
                 "mbarrier.arrive.shared::cluster.b64 _, [there];}"
                 ::"r"(shared_address(barrier)), "r"(rank) : "memory");
}
DEVICE void barrier_arrive(u64 *barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Wait for the end of the phase of this parity: 0, 1, 0, ...
DEVICE void barrier_wait(u64 *barrier, u32 parity) {
    asm volatile("{.reg .pred done;\nAGAIN:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra AGAIN;}"
                 ::"r"(shared_address(barrier)), "r"(parity) : "memory");
}

// Copy bytes, a multiple of 16, into shared memory; the barrier counts them.
DEVICE void copy_bulk(void *shared, const void *address, u32 bytes, u64 *barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(shared_address(shared)), "l"(address), "r"(bytes), "r"(shared_address(barrier)) : "memory");
}
// The same to the same place, and barrier, of all blocks of the cluster that `mask` names.
DEVICE void copy_bulk_to(u16 mask, void *shared, const void *address, u32 bytes, u64 *barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
                 "[%0], [%1], %2, [%3], %4;"
                 ::"r"(shared_address(shared)), "l"(address), "r"(bytes), "r"(shared_address(barrier)), "h"(mask) : "memory");
}

// Bytes into the L2 cache, a multiple of 16; or the 128 around an address.
DEVICE void prefetch_bulk(const void *address, u32 bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(address), "r"(bytes) : "memory");
}
DEVICE void prefetch(const void *address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }

// What blocks of a grid tell one another, past L1: all threads write, then meet, then one announces, which covers what those
// wrote that it met; one awaits that, which makes it 0 again, then all meet and read.
DEVICE void store_quad(float *to, const float *from) {
    asm volatile("st.global.cg.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(to), "f"(from[0]), "f"(from[1]), "f"(from[2]), "f"(from[3]) : "memory");
}
DEVICE void load_quad(float *to, const float *from) {
    asm volatile("ld.global.cg.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(to[0]), "=f"(to[1]), "=f"(to[2]), "=f"(to[3]) : "l"(from) : "memory");
}
DEVICE void announce(u64 *flag) { asm volatile("st.release.gpu.global.b64 [%0], %1;" ::"l"(flag), "l"(1ull) : "memory"); }
DEVICE void await(u64 *flag) {
    u64 seen;
    do asm volatile("ld.acquire.gpu.global.b64 %0, [%1];" : "=l"(seen) : "l"(flag) : "memory");
    while (seen == 0);
    *flag = 0;
}

// Blocks count: what a thread, and those that met before it, wrote is seen by who awaits the count. Returns the count before.
DEVICE u64 count_one(u64 *place) {
    u64 before;
    asm volatile("atom.add.acq_rel.gpu.global.u64 %0, [%1], 1;" : "=l"(before) : "l"(place) : "memory");
    return before;
}
DEVICE void await_count(const u64 *place, u64 count) {
    u64 seen;
    do asm volatile("ld.acquire.gpu.global.b64 %0, [%1];" : "=l"(seen) : "l"(place) : "memory");
    while (seen < count);
}
// This thread's bulk copies see what other threads wrote, after it has heard so.
DEVICE void copies_see_writes() { asm volatile("fence.proxy.async;" ::: "memory"); }

// Registers of each thread of a warpgroup, a multiple of 8.
template <int COUNT> DEVICE void fewer_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT)); }
template <int COUNT> DEVICE void more_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT)); }

// Only a warpgroup; `number` is 1 to 4.
DEVICE void sync_warpgroup(int number) { asm volatile("bar.sync %0, 128;" ::"r"(number) : "memory"); }

// Only COUNT threads of a block, whole warps.
template <int COUNT> DEVICE void sync_threads(int number) { asm volatile("bar.sync %0, %1;" ::"r"(number), "n"(COUNT) : "memory"); }

// Two warpgroups take turns.
DEVICE void take_turn(int number) { asm volatile("bar.sync %0, 256;" ::"r"(number) : "memory"); }
DEVICE void give_turn(int number) { asm volatile("bar.arrive %0, 256;" ::"r"(number) : "memory"); }

DEVICE void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void end_of_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

#define REGISTERS_8(bind, v, i) bind(v[i]), bind(v[i + 1]), bind(v[i + 2]), bind(v[i + 3]), bind(v[i + 4]), \
    bind(v[i + 5]), bind(v[i + 6]), bind(v[i + 7])
#define REGISTERS_32(bind, v, i) REGISTERS_8(bind, v, i), REGISTERS_8(bind, v, i + 8), REGISTERS_8(bind, v, i + 16), \
    REGISTERS_8(bind, v, i + 24)
#define REGISTERS_64(bind, v) REGISTERS_32(bind, v, 0), REGISTERS_32(bind, v, 32)
#define READ_WRITTEN(v) "+r"(v)

// Wait until all but the last PENDING groups of products are there, among them those in `d`. It is an
// operand, so that the compiler doesn't read it earlier.
template <int PENDING> DEVICE void products_wait(int (&d)[64]) {
    asm volatile("wgmma.wait_group.sync.aligned %64;" : REGISTERS_64(READ_WRITTEN, d) : "n"(PENDING) : "memory");
}
// Registers that products read must stay as they are until these were waited for: say so after it.
template <int COUNT> DEVICE void keep(const u32 (&a)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) asm volatile("" ::"r"(a[i]));
}

// D += A B for a 64x128x32 tile of a warpgroup: signed bytes, 32-bit sums. A in registers, the fragment of
// m64nNk32; B in shared memory, see `core_matrices`.
#define MULTIPLY_64X128 "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 " \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, {%64,%65,%66,%67}, %68, "
DEVICE void multiply_add(int (&d)[64], const u32 *a, u64 b) {
    asm volatile(MULTIPLY_64X128 "1;" : REGISTERS_64(READ_WRITTEN, d)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

#endif

// The descriptor of a K-major matrix without swizzling: core matrices of 8 rows x 16 bytes, 128 bytes each; from
// one to the next along the inputs are `along` bytes, to the next 8 rows `across`.
DEVICE u64 core_matrices(u32 address, u32 along, u32 across) {
    return (u64)((address & 0x3ffffu) >> 4) | (u64)(along >> 4) << 16 | (u64)(across >> 4) << 32;
}
