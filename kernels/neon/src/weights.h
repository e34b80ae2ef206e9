// A block of a panel's codes as eight vectors: vector i holds columns 4i ... 4i + 3 of each of four rows.
#ifndef WEIGHTS_H
#define WEIGHTS_H
#include "edge.h"

enum { VECTOR = 16 };
#define BLOCK_BYTES(bits) (4 * BLOCK * (bits) / 8)


// Codes 0 ... 2^bits - 1, of 8 bits -128 ... 127.
INLINE void unpack(const uint8_t *p, int bits, int8x16_t w[QUADS]) {
  uint8x16_t v[QUADS];
  if (bits == 8) {
    UNROLL for (int i = 0; i < 8; i++) v[i] = vld1q_u8(p + VECTOR * i);
  } else if (bits == 4) {
    UNROLL for (int i = 0; i < 4; i++) {
      uint8x16_t both = vld1q_u8(p + VECTOR * i);
      v[2 * i] = vandq_u8(both, vdupq_n_u8(15));
      v[2 * i + 1] = vshrq_n_u8(both, 4);
    }
  } else if (bits == 2) {
    UNROLL for (int i = 0; i < 2; i++) {
      uint8x16_t four = vld1q_u8(p + VECTOR * i), mask = vdupq_n_u8(3);
      v[4 * i] = vandq_u8(four, mask);
      v[4 * i + 1] = vandq_u8(vshrq_n_u8(four, 2), mask);
      v[4 * i + 2] = vandq_u8(vshrq_n_u8(four, 4), mask);
      v[4 * i + 3] = vshrq_n_u8(four, 6);
    }
  } else {  // 3 bits: two vectors of low halves, one of high bits, which are shifted in above the low two
    uint8x16_t high = vld1q_u8(p + 2 * VECTOR), mask = vdupq_n_u8(7);
    UNROLL for (int i = 0; i < 2; i++) {
      uint8x16_t low = vld1q_u8(p + VECTOR * i);
#define THREE(j) vsliq_n_u8(j ? vshrq_n_u8(low, 2 * j + !j) : low, high_##j, 2)
      uint8x16_t high_0 = i ? vshrq_n_u8(high, 4) : high, high_1 = i ? vshrq_n_u8(high, 5) : vshrq_n_u8(high, 1);
      uint8x16_t high_2 = i ? vshrq_n_u8(high, 6) : vshrq_n_u8(high, 2), high_3 = i ? vshrq_n_u8(high, 7) : vshrq_n_u8(high, 3);
      v[4 * i] = vandq_u8(THREE(0), mask);
      v[4 * i + 1] = vandq_u8(THREE(1), mask);
      v[4 * i + 2] = vandq_u8(THREE(2), mask);
      v[4 * i + 3] = i ? THREE(3) : vandq_u8(THREE(3), mask);
#undef THREE
    }
  }
  UNROLL for (int i = 0; i < QUADS; i++) w[i] = vreinterpretq_s8_u8(v[i]);
}
#endif
