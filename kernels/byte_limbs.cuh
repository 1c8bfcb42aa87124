// Numbers as four signed bytes, the B operand of mma.m16n8k32: four columns of it are one token.

#define LIMBS 4
#define X_BYTES 128 // of a 32-input block, as half of a word's 64 inputs: [limb][t][16 bytes]
#define WORD_BYTES (2 * X_BYTES)
#define UNIT_BYTES (4 * WORD_BYTES)
#ifndef PAIR_SHIFT
#define PAIR_SHIFT(r) (6 - 2 * (r)) // what makes up for where the bits of pair r are in a byte of the A operand
#endif
#define MAGIC 0x4b400000u // 1.5 * 2^23 as a float: integers added to it can be read off its bits

// The four signed bytes of an integer, lowest first: value = sum of byte_i * 256^i.
DEVICE u32 signed_bytes(u32 value) { return (value + 0x80808080u) ^ 0x80808080u; }

// A lane's eight numbers of a unit times factors, integers of 23 bits, as B operands of its words. Of a
// word's 64 inputs, lane t has 8 t .. 8 t + 7 in each half; pair r of them, of both halves, is register
// r. The integers are read off the bits of a float, see MAGIC; returns the sum of these bits.
DEVICE u32 put_limbs(const float (&values)[8], const float (&factors)[8], unsigned char *unit, int lane) {
    bool upper = lane / 4 & 1; // half of a word's inputs
    u32 kept[4], received[4], sum = 0;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
        u32 a = bits_of_float(values[2 * r] * factors[2 * r] + 12582912.0f);
        u32 b = bits_of_float(values[2 * r + 1] * factors[2 * r + 1] + 12582912.0f);
        sum += a + b;
        a = signed_bytes((a - MAGIC) << PAIR_SHIFT(r)), b = signed_bytes((b - MAGIC) << PAIR_SHIFT(r));
        // Lanes of the lower half take limbs 0 and 1 of both halves, those of the upper 2 and 3.
        kept[r] = permute_bytes(a, b, upper ? 0x7362u : 0x5140u);
        received[r] = shuffle_xor(permute_bytes(a, b, upper ? 0x5140u : 0x7362u), 4);
    }
    unsigned char *place = unit + lane / 8 * WORD_BYTES + (upper ? 128 : 0) + lane % 4 * 16;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        // Lanes of the upper half store their second limb first: to other banks. Of the lower half's
        // pair, the upper's, then the second of each.
        u32 pick = upper ? (i ? 0x1504u : 0x3726u) : (i ? 0x7362u : 0x5140u);
        *(quad *)(place + (upper ? 1 - i : i) * 64) =
            quad{permute_bytes(kept[0], received[0], pick), permute_bytes(kept[1], received[1], pick),
                 permute_bytes(kept[2], received[2], pick), permute_bytes(kept[3], received[3], pick)};
    }
    return sum;
}
