// D += A B for a tile of 64 outputs x COLUMNS tokens x 16 inputs of a warpgroup: float16 or bfloat16 (ACTIVATION_BF16),
// float32 sums. A in registers, the fragment of m64nNk16; B in shared memory, see `core_matrices`. COLUMNS is
// a multiple of 16, 256 at most. Included after hopper.cuh, by kernels that define COLUMNS.

#define SUMS (COLUMNS / 2) // of a thread
#ifdef ACTIVATION_BF16
#define IS_BFLOAT 1
#define HALF_TYPES "f32.bf16.bf16 "
#else
#define IS_BFLOAT 0
#define HALF_TYPES "f32.f16.f16 "
#endif

#ifndef QTOOL_HOST

// The registers of D, by name and by number, eight at a time: PTX has no other way to say which.
#define D_8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define D_16 D_8 "," "%8,%9,%10,%11,%12,%13,%14,%15"
#define D_24 D_16 "," "%16,%17,%18,%19,%20,%21,%22,%23"
#define D_32 D_24 "," "%24,%25,%26,%27,%28,%29,%30,%31"
#define D_40 D_32 "," "%32,%33,%34,%35,%36,%37,%38,%39"
#define D_48 D_40 "," "%40,%41,%42,%43,%44,%45,%46,%47"
#define D_56 D_48 "," "%48,%49,%50,%51,%52,%53,%54,%55"
#define D_64 D_56 "," "%56,%57,%58,%59,%60,%61,%62,%63"
#define D_72 D_64 "," "%64,%65,%66,%67,%68,%69,%70,%71"
#define D_80 D_72 "," "%72,%73,%74,%75,%76,%77,%78,%79"
#define D_88 D_80 "," "%80,%81,%82,%83,%84,%85,%86,%87"
#define D_96 D_88 "," "%88,%89,%90,%91,%92,%93,%94,%95"
#define D_104 D_96 "," "%96,%97,%98,%99,%100,%101,%102,%103"
#define D_112 D_104 "," "%104,%105,%106,%107,%108,%109,%110,%111"
#define D_120 D_112 "," "%112,%113,%114,%115,%116,%117,%118,%119"
#define D_128 D_120 "," "%120,%121,%122,%123,%124,%125,%126,%127"
#define R_8(v) REGISTERS_8(FLOAT, v, 0)
#define R_16(v) R_8(v), REGISTERS_8(FLOAT, v, 8)
#define R_24(v) R_16(v), REGISTERS_8(FLOAT, v, 16)
#define R_32(v) R_24(v), REGISTERS_8(FLOAT, v, 24)
#define R_40(v) R_32(v), REGISTERS_8(FLOAT, v, 32)
#define R_48(v) R_40(v), REGISTERS_8(FLOAT, v, 40)
#define R_56(v) R_48(v), REGISTERS_8(FLOAT, v, 48)
#define R_64(v) R_56(v), REGISTERS_8(FLOAT, v, 56)
#define R_72(v) R_64(v), REGISTERS_8(FLOAT, v, 64)
#define R_80(v) R_72(v), REGISTERS_8(FLOAT, v, 72)
#define R_88(v) R_80(v), REGISTERS_8(FLOAT, v, 80)
#define R_96(v) R_88(v), REGISTERS_8(FLOAT, v, 88)
#define R_104(v) R_96(v), REGISTERS_8(FLOAT, v, 96)
#define R_112(v) R_104(v), REGISTERS_8(FLOAT, v, 104)
#define R_120(v) R_112(v), REGISTERS_8(FLOAT, v, 112)
#define R_128(v) R_120(v), REGISTERS_8(FLOAT, v, 120)
#define FLOAT(v) "+f"(v)
#if COLUMNS == 16
#define PRODUCT "m64n16k16." HALF_TYPES "{" D_8 "}, {%8,%9,%10,%11}, %12, "
#define WAIT "%8;"
#define SUM_REGISTERS(v) R_8(v)
#elif COLUMNS == 32
#define PRODUCT "m64n32k16." HALF_TYPES "{" D_16 "}, {%16,%17,%18,%19}, %20, "
#define WAIT "%16;"
#define SUM_REGISTERS(v) R_16(v)
#elif COLUMNS == 48
#define PRODUCT "m64n48k16." HALF_TYPES "{" D_24 "}, {%24,%25,%26,%27}, %28, "
#define WAIT "%24;"
#define SUM_REGISTERS(v) R_24(v)
#elif COLUMNS == 64
#define PRODUCT "m64n64k16." HALF_TYPES "{" D_32 "}, {%32,%33,%34,%35}, %36, "
#define WAIT "%32;"
#define SUM_REGISTERS(v) R_32(v)
#elif COLUMNS == 80
#define PRODUCT "m64n80k16." HALF_TYPES "{" D_40 "}, {%40,%41,%42,%43}, %44, "
#define WAIT "%40;"
#define SUM_REGISTERS(v) R_40(v)
#elif COLUMNS == 96
#define PRODUCT "m64n96k16." HALF_TYPES "{" D_48 "}, {%48,%49,%50,%51}, %52, "
#define WAIT "%48;"
#define SUM_REGISTERS(v) R_48(v)
#elif COLUMNS == 112
#define PRODUCT "m64n112k16." HALF_TYPES "{" D_56 "}, {%56,%57,%58,%59}, %60, "
#define WAIT "%56;"
#define SUM_REGISTERS(v) R_56(v)
#elif COLUMNS == 128
#define PRODUCT "m64n128k16." HALF_TYPES "{" D_64 "}, {%64,%65,%66,%67}, %68, "
#define WAIT "%64;"
#define SUM_REGISTERS(v) R_64(v)
#elif COLUMNS == 144
#define PRODUCT "m64n144k16." HALF_TYPES "{" D_72 "}, {%72,%73,%74,%75}, %76, "
#define WAIT "%72;"
#define SUM_REGISTERS(v) R_72(v)
#elif COLUMNS == 160
#define PRODUCT "m64n160k16." HALF_TYPES "{" D_80 "}, {%80,%81,%82,%83}, %84, "
#define WAIT "%80;"
#define SUM_REGISTERS(v) R_80(v)
#elif COLUMNS == 176
#define PRODUCT "m64n176k16." HALF_TYPES "{" D_88 "}, {%88,%89,%90,%91}, %92, "
#define WAIT "%88;"
#define SUM_REGISTERS(v) R_88(v)
#elif COLUMNS == 192
#define PRODUCT "m64n192k16." HALF_TYPES "{" D_96 "}, {%96,%97,%98,%99}, %100, "
#define WAIT "%96;"
#define SUM_REGISTERS(v) R_96(v)
#elif COLUMNS == 208
#define PRODUCT "m64n208k16." HALF_TYPES "{" D_104 "}, {%104,%105,%106,%107}, %108, "
#define WAIT "%104;"
#define SUM_REGISTERS(v) R_104(v)
#elif COLUMNS == 224
#define PRODUCT "m64n224k16." HALF_TYPES "{" D_112 "}, {%112,%113,%114,%115}, %116, "
#define WAIT "%112;"
#define SUM_REGISTERS(v) R_112(v)
#elif COLUMNS == 240
#define PRODUCT "m64n240k16." HALF_TYPES "{" D_120 "}, {%120,%121,%122,%123}, %124, "
#define WAIT "%120;"
#define SUM_REGISTERS(v) R_120(v)
#elif COLUMNS == 256
#define PRODUCT "m64n256k16." HALF_TYPES "{" D_128 "}, {%128,%129,%130,%131}, %132, "
#define WAIT "%128;"
#define SUM_REGISTERS(v) R_128(v)
#endif

template <int BFLOAT> DEVICE void multiply_add_16(float (&d)[SUMS], const u32 *a, u64 b) { // BFLOAT: IS_BFLOAT
    asm volatile("wgmma.mma_async.sync.aligned." PRODUCT "1, 1, 1, 0;" : SUM_REGISTERS(d)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
// As for integers.
template <int PENDING> DEVICE void products_wait(float (&d)[SUMS]) {
    asm volatile("wgmma.wait_group.sync.aligned " WAIT : SUM_REGISTERS(d) : "n"(PENDING) : "memory");
}

#endif
