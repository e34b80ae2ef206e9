// Sums of products on any Armv8-A core: bytes times bytes to 16 bits, pairs of those to 32 bits.
#ifndef CORE_H
#define CORE_H
#include "edge.h"

typedef struct { int8x16_t quad[QUADS]; } inputs;   // 32 columns of one row, each four of them in all four lanes
typedef struct { int32x4_t low, high; } sums;       // of rows 0, 1 and 2, 3: two lanes a row

enum { SLIP = 16 };
// With 8 bits two products fill 16 bits, but for (-128)(-128) + (-128)(-128) = 32768: every such pair starts at -1, which takes 16 from a row's
// sum of a block.

INLINE inputs inputs_at(int64_t q) {
  inputs x;
  UNROLL for (int i = 0; i < QUADS; i++) x.quad[i] = vreinterpretq_s8_s32(vld1q_dup_s32(AT(int32_t, q, 4 * i)));
  return x;
}
INLINE sums no_sums(void) { return (sums){vdupq_n_s32(0), vdupq_n_s32(0)}; }
INLINE int32x4_t row_sums(sums s, int64_t blocks, int bits) {
  int32x4_t total = vpaddq_s32(s.low, s.high);
  return bits == 8 ? vaddq_s32(total, vdupq_n_s32((int32_t)(SLIP * blocks))) : total;
}

INLINE sums dots(sums s, const int8x16_t w[QUADS], inputs x, int bits) {
  int16x8_t low, high;
  if (bits == 8) {
    UNROLL for (int i = 0; i < QUADS; i += 2) {
      low = vmlal_s8(vdupq_n_s16(-1), vget_low_s8(w[i]), vget_low_s8(x.quad[i]));
      high = vmlal_high_s8(vdupq_n_s16(-1), w[i], x.quad[i]);
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

INLINE int32x4_t block_sums(int32x4_t start, const int8x16_t w[QUADS], inputs x, int bits) {
  return vaddq_s32(start, row_sums(dots(no_sums(), w, x, bits), 1, bits));
}
#endif
