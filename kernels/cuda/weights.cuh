// Weights of 2, 3, 4 or 8 bits in the order in which the lanes of a warp want them for matrix products (`weights.py` packs them so).
//
// A tile is 16 rows. Along its columns it has steps of 256 / plane columns, plane = 2, 2, 4, 8 bits for codes of 2, 3, 4, 8 bits: 16 bytes a
// lane. Lane 4g + t holds, of rows g and g + 8, the columns 8t … 8t + 7 of every 32. Its pairs of neighbouring columns are numbered
// ((32-block · 2 + half of the eight) · 2 + half of the four) · 2 + (0: row g, 1: row g + 8). Pair i of a word stands at bit plane · i (first
// column) and plane · i + 16 (second). The high bits of 3-bit codes are a plane of their own, 16 pairs a word.
#pragma once
#include "machine.cuh"

template <int BITS> struct Form {
    static constexpr int plane = BITS == 3 ? 2 : BITS;
    static constexpr int step = 256 / (plane == 8 ? 8 : plane == 4 ? 4 : 2);  // columns: 32, 64, 128
    static constexpr int blocks = step / 32;
    static constexpr int per_word = 16 / plane;  // pairs
};

template <int BITS> struct Codes {
    Words4 low;
    Words2 high;  // of 3-bit codes
};

// Pair `pair` as two whole numbers, in the low and the high 16 bits, `up` bits too far left, beside the bits of `also`.
template <int BITS> ON_GPU u32 pair_bits(const Codes<BITS>& c, int pair, u32 also, int& up) {
    using F = Form<BITS>;
    const u32 word = c.low.v[pair / F::per_word];
    const int bit = F::plane * (pair % F::per_word);
    if constexpr (BITS == 3) {
        up = bit & 7;  // 0, 2, 4, 6: room for the third bit above
        const int place = pair % 16, to = up + 2;  // the high bit, from here to there
        const u32 high = place > to ? c.high.v[pair / 16] >> (place - to) : c.high.v[pair / 16] << (to - place);
        return and_or(high, 0x00010001u << to, and_or(word >> (bit & 8), 0x00030003u << up, also));
    }
    up = bit & 7;
    return and_or(word >> (bit & 8), ((1u << F::plane) - 1) * 0x00010001u << up, also);
}

// Pair `pair` minus its zero, two halves, exact. `zero`: 1024 + the zero, twice. A code in the last bits of a half whose exponent is that of
// 1024 reads as 1024 + code; `up` bits further left it reads as 1024 + 2^up · code, and one multiply-add brings it back.
template <int BITS> ON_GPU u32 centred(const Codes<BITS>& c, int pair, u32 zero) {
    int up;
    const u32 number = pair_bits(c, pair, 0x64006400u, up);
    if (up == 0) return half2_sub(number, zero);
    const u32 factor = up == 2 ? 0x34003400u : up == 4 ? 0x2c002c00u : 0x24002400u;  // 2^-up
    const u32 base = up == 2 ? 0x62006200u : up == 4 ? 0x63806380u : 0x63e063e0u;    // 1024 - 1024 · 2^-up
    return half2_fma(number, factor, half2_sub(base, zero));
}

// Two whole numbers below 1024 in u8 or u16 parts → 1024 + each, as halves, twice the same.
ON_GPU u32 twice_1024(u32 code) { return 0x64006400u | code | code << 16; }

// Pair `pair` looked up in `table` [16] halves.
template <int BITS> ON_GPU u32 looked_up(const Codes<BITS>& c, int pair, const u16* table) {
    int up;
    const u32 number = pair_bits(c, pair, 0u, up) >> up;
    return table[number & 15] | u32(table[number >> 16]) << 16;
}

// Where a weight of row 0 … 15 of a tile and column `col` stands: its step, lane and pair, and which of the pair it is.
template <int BITS> struct Place {
    int step, lane, pair, second;
    ON_GPU Place(int row, int col) {
        int c = col % Form<BITS>::step;
        step = col / Form<BITS>::step;
        lane = row % 8 * 4 + c % 32 / 8;
        pair = c / 32 * 8 + c % 8 / 2 * 2 + row / 8;
        second = c & 1;
    }
};
