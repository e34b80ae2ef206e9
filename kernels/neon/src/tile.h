// 8-bit weights with one scale a row, by dot products: nothing is to be unpacked, so the sums of eight rows of inputs and two panels stay in registers from the first
// column to the last.
#ifndef TILE_H
#define TILE_H
#include "weights.h"

enum { TALL = 8 };

INLINE void tile(const int64_t *a, int64_t group, int64_t m, int count, int zeros) {
  const int64_t blocks = a[BLOCKS], rows = a[M];
  int64_t codes[WIDE], q = a[Q] + BLOCK * m;
  int32x4_t s[TALL][WIDE];
  UNROLL for (int i = 0; i < WIDE; i++) {
    codes[i] = a[CODES] + (group * WIDE + i) * a[PANEL_BYTES];
    UNROLL for (int r = 0; r < count; r++) s[r][i] = vdupq_n_s32(0);
  }
  for (int64_t g = 0; g < blocks; g++) {
    UNROLL for (int half = 0; half < 2; half++) {
      int8x16_t x[TALL], w[WIDE][4];
      UNROLL for (int i = 0; i < WIDE; i++) {
        UNROLL for (int k = 0; k < 4; k++) w[i][k] = vld1q_s8(AT(int8_t, codes[i], VECTOR * (4 * half + k)));
      }
      UNROLL for (int r = 0; r < count; r++) x[r] = vld1q_s8(AT(int8_t, q, BLOCK * r + 16 * half));
#define LANE(k)                            \
  UNROLL for (int r = 0; r < count; r++) { \
    UNROLL for (int i = 0; i < WIDE; i++) s[r][i] = vdotq_laneq_s32(s[r][i], w[i][k], x[r], k); \
  }
      LANE(0) LANE(1) LANE(2) LANE(3)
#undef LANE
      KEEP_ORDER;
    }
    UNROLL for (int i = 0; i < WIDE; i++) codes[i] += BLOCK_BYTES(8);
    q += BLOCK * rows;
  }
  int32_t total[TALL] = {0};
  if (zeros)
    for (int64_t g = 0; g < blocks; g++) {
      UNROLL for (int r = 0; r < count; r++) total[r] += *AT(int32_t, a[Q_SUMS], 4 * (g * rows + m + r));
    }
  UNROLL for (int i = 0; i < WIDE; i++) {
    int64_t p = group * WIDE + i;
    output to = output_at(a, p);
    to.row_scale = vmulq_f32(to.row_scale, scale_at(a[SCALES] + p * a[SCALE_BYTES], 0, 8));
    int32x4_t middle = zeros ? zero_at(a[ZEROS] + p * a[ZERO_BYTES], 0) : vdupq_n_s32(0);
    UNROLL for (int r = 0; r < count; r++) write_out(to, m + r, vcvtq_f32_s32(vmlsq_n_s32(s[r][i], middle, total[r])));
  }
}

INLINE void tiles(const int64_t *a, int64_t first, int64_t last, int zeros) {
  for (int64_t group = first; group < last; group++) {
    int64_t m = 0;
    for (; m + TALL <= a[M]; m += TALL) tile(a, group, m, TALL, zeros);
    for (; m + 2 <= a[M]; m += 2) tile(a, group, m, 2, zeros);
    for (; m < a[M]; m++) tile(a, group, m, 1, zeros);
  }
}
#endif
