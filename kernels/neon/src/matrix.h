// Sums of products by the matrix instruction (smmla): two rows of inputs by two rows of weights by eight columns at once.
#ifndef MATRIX_H
#define MATRIX_H
#define CORE_GEMM
#include "dot.h"

#define CELLS(rows) (((rows) + 1) / 2)

typedef struct { int32x4_t s[WIDE][2]; } cell;  // rows m, m + 1 of inputs by rows 0, 1 and by rows 2, 3 of a panel

// Vectors 2k, 2k + 1: eight columns of rows 0, 1 and of rows 2, 3.
INLINE void arrange(int8x16_t w[QUADS]) {
  UNROLL for (int k = 0; k < QUADS; k += 2) {
    int32x4_t one = vreinterpretq_s32_s8(w[k]), two = vreinterpretq_s32_s8(w[k + 1]);
    w[k] = vreinterpretq_s8_s32(vzip1q_s32(one, two));
    w[k + 1] = vreinterpretq_s8_s32(vzip2q_s32(one, two));
  }
}

INLINE int8x16_t lows(int8x16_t a, int8x16_t b) { return vreinterpretq_s8_s64(vzip1q_s64(vreinterpretq_s64_s8(a), vreinterpretq_s64_s8(b))); }
INLINE int8x16_t highs(int8x16_t a, int8x16_t b) { return vreinterpretq_s8_s64(vzip2q_s64(vreinterpretq_s64_s8(a), vreinterpretq_s64_s8(b))); }

// Rows m and `second`, which is the same for the last of an odd number.
INLINE void gemm_pair(const int8x16_t w[WIDE][QUADS], const float32x4_t scale[WIDE], const int32x4_t zero[WIDE], int64_t q, int64_t q_sums,
                      int64_t m, int64_t second, cell *room, int bits, int per_block, int zeros) {
  inputs a = inputs_at(q + BLOCK * m), b = inputs_at(q + BLOCK * second);
  int8x16_t x[4] = {lows(a.low, b.low), highs(a.low, b.low), lows(a.high, b.high), highs(a.high, b.high)};
  UNROLL for (int i = 0; i < WIDE; i++) {
    UNROLL for (int r = 0; r < 2; r++) {
      int32x4_t total = per_block ? vdupq_n_s32(0) : room->s[i][r];
      if (per_block && zeros && bits == 8) {
        int32x2_t z = r ? vget_high_s32(zero[i]) : vget_low_s32(zero[i]);
        total = vcombine_s32(vmul_n_s32(z, -*AT(int32_t, q_sums, 4 * m)), vmul_n_s32(z, -*AT(int32_t, q_sums, 4 * second)));
      }
      UNROLL for (int k = 0; k < 4; k++) total = vmmlaq_s32(total, x[k], w[i][2 * k + r]);
      if (per_block) {
        float32x2_t half = r ? vget_high_f32(scale[i]) : vget_low_f32(scale[i]);
        float *to = (float *)&room->s[i][r];
        vst1q_f32(to, vfmaq_f32(vld1q_f32(to), vcvtq_f32_s32(total), vcombine_f32(half, half)));
      } else {
        room->s[i][r] = total;
      }
    }
  }
}

INLINE void gemm_rows(const int8x16_t w[WIDE][QUADS], const float32x4_t scale[WIDE], const int32x4_t zero[WIDE], int64_t q, int64_t q_sums,
                      int64_t rows, cell *room, int bits, int per_block, int zeros, int fit) {
  (void)fit;
  int64_t m = 0;
  for (; m + 2 <= rows; m += 2, room++) gemm_pair(w, scale, zero, q, q_sums, m, m + 1, room, bits, per_block, zeros);
  if (m < rows) gemm_pair(w, scale, zero, q, q_sums, m, m, room, bits, per_block, zeros);
}

INLINE float32x4_t gemm_value(const cell *room, int64_t m, int i, int64_t blocks, int bits, int per_block, int32x4_t less, int fit) {
  (void)blocks, (void)bits, (void)fit;
  if (per_block) {
    const float *s = (const float *)room[m / 2].s[i] + m % 2 * 2;
    return vcombine_f32(vld1_f32(s), vld1_f32(s + 4));
  }
  const int32_t *s = (const int32_t *)room[m / 2].s[i] + m % 2 * 2;
  return vcvtq_f32_s32(vsubq_s32(vcombine_s32(vld1_s32(s), vld1_s32(s + 4)), less));
}
#endif
