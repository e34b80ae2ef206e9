// Sums of products on any Armv8-A core: bytes times bytes to 16 bits, pairs of those to 32 bits.
#ifndef CORE_H
#define CORE_H
#include "edge.h"

typedef struct { int8x16_t quad[QUADS]; } inputs;   // 32 columns of one row, each four of them in all four lanes
typedef struct { int32x4_t low, high; } sums;       // of rows 0, 1 and 2, 3: two lanes a row

enum { SLIP = 16, FETCHES = 1, ABREAST = 1 };
#define SIDE(bits) ((bits) == 8 ? 3 : 4)  // panels of a gemv: as many as fit the registers
// With 8 bits two products fill 16 bits, but for (-128)(-128) + (-128)(-128) = 32768. Where inputs have such a pair of -128 (`pairs_fit`), each
// sum of two starts at -1, which takes SLIP from a row's sum of a block.

// Whether no two inputs whose products are added in 16 bits are both -128.
INLINE int pairs_fit(int64_t q, int64_t bytes) {
  uint8x16_t found = vdupq_n_u8(0);
  for (int64_t i = 0; i < bytes; i += 16) {
    uint8x16_t least = vceqq_s8(vld1q_s8(AT(int8_t, q, i)), vdupq_n_s8(-128));
    found = vorrq_u8(found, vandq_u8(least, vreinterpretq_u8_u32(vrev64q_u32(vreinterpretq_u32_u8(least)))));
  }
  return vmaxvq_u8(found) == 0;
}

INLINE inputs inputs_at(int64_t q) {
  int32x4_t low = vld1q_s32(AT(int32_t, q, 0)), high = vld1q_s32(AT(int32_t, q, 16));
  return (inputs){{
      vreinterpretq_s8_s32(vdupq_laneq_s32(low, 0)), vreinterpretq_s8_s32(vdupq_laneq_s32(low, 1)),
      vreinterpretq_s8_s32(vdupq_laneq_s32(low, 2)), vreinterpretq_s8_s32(vdupq_laneq_s32(low, 3)),
      vreinterpretq_s8_s32(vdupq_laneq_s32(high, 0)), vreinterpretq_s8_s32(vdupq_laneq_s32(high, 1)),
      vreinterpretq_s8_s32(vdupq_laneq_s32(high, 2)), vreinterpretq_s8_s32(vdupq_laneq_s32(high, 3)),
  }};
}
INLINE sums no_sums(void) { return (sums){vdupq_n_s32(0), vdupq_n_s32(0)}; }
INLINE int32x4_t row_sums(sums s, int64_t blocks, int bits, int fit) {
  int32x4_t total = vpaddq_s32(s.low, s.high);
  return bits == 8 && !fit ? vaddq_s32(total, vdupq_n_s32((int32_t)(SLIP * blocks))) : total;
}

INLINE sums dots(sums s, const int8x16_t w[QUADS], inputs x, int bits, int fit) {
  int16x8_t low, high;
  if (bits == 8) {
    UNROLL for (int i = 0; i < QUADS; i += 2) {
      low = fit ? vmull_s8(vget_low_s8(w[i]), vget_low_s8(x.quad[i])) : vmlal_s8(vdupq_n_s16(-1), vget_low_s8(w[i]), vget_low_s8(x.quad[i]));
      high = fit ? vmull_high_s8(w[i], x.quad[i]) : vmlal_high_s8(vdupq_n_s16(-1), w[i], x.quad[i]);
      low = vmlal_s8(low, vget_low_s8(w[i + 1]), vget_low_s8(x.quad[i + 1]));
      high = vmlal_high_s8(high, w[i + 1], x.quad[i + 1]);
      s.low = vpadalq_s16(s.low, low);
      s.high = vpadalq_s16(s.high, high);
    }
    return s;
  }
  low = vmull_s8(vget_low_s8(w[0]), vget_low_s8(x.quad[0]));  // eight products of codes up to 15: at most 15360
  high = vmull_high_s8(w[0], x.quad[0]);
  UNROLL for (int i = 1; i < QUADS; i++) {
    low = vmlal_s8(low, vget_low_s8(w[i]), vget_low_s8(x.quad[i]));
    high = vmlal_high_s8(high, w[i], x.quad[i]);
  }
  return (sums){vpadalq_s16(s.low, low), vpadalq_s16(s.high, high)};
}

INLINE int32x4_t block_sums(int32x4_t start, const int8x16_t w[QUADS], inputs x, int bits, int fit) {
  return vaddq_s32(start, row_sums(dots(no_sums(), w, x, bits, fit), 1, bits, fit));
}
#endif
