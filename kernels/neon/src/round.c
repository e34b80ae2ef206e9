// Inputs to bytes with a scale and a zero a row, as the products read them (rounding.ROUND_ARGS). Compiled for each core like products.c.
#include "edge.h"

enum { R_X, R_BLOCKS, R_STRIDE, R_M, R_SHIFT, R_Q, R_Q_SUMS, R_Q_SCALE, R_Q_ZERO };

INLINE void round_row(const int64_t *a, int64_t m) {
  const int64_t x = a[R_X] + m * a[R_STRIDE], blocks = a[R_BLOCKS];
  float32x4_t lows = vdupq_n_f32(0), highs = lows;
  for (int64_t i = 0; i < blocks * BLOCK; i += 8) {
    float32x4_t one = vld1q_f32(AT(float, x, 4 * i)), two = vld1q_f32(AT(float, x, 4 * i + 16));
    lows = vminnmq_f32(lows, vminnmq_f32(one, two));
    highs = vmaxnmq_f32(highs, vmaxnmq_f32(one, two));
  }
  float low = vminnmvq_f32(lows), high = vmaxnmvq_f32(highs), step = (high - low) / 255.0f;
  if (step < 0x1p-126f) step = 1; /* its inverse would be no number */
  float inverse = 1.0f / step, least = (float)a[R_SHIFT] - 128, zero = vrndns_f32(least - low * inverse);
  ((float *)a[R_Q_SCALE])[m] = step;
  ((float *)a[R_Q_ZERO])[m] = zero;
  float32x4_t lowest = vdupq_n_f32(least), most = vdupq_n_f32(least + 255), offset = vdupq_n_f32(zero);
  for (int64_t g = 0; g < blocks; g++) {
    int64_t place = g * a[R_M] + m;
    int16x8_t half[4];
    UNROLL for (int i = 0; i < 4; i++) {
      int32x4_t whole[2];
      UNROLL for (int j = 0; j < 2; j++) {
        float32x4_t value = vfmaq_n_f32(offset, vld1q_f32(AT(float, x, 4 * (g * BLOCK + 8 * i + 4 * j))), inverse);
        whole[j] = vcvtnq_s32_f32(vminnmq_f32(vmaxnmq_f32(value, lowest), most));
      }
      half[i] = vcombine_s16(vmovn_s32(whole[0]), vmovn_s32(whole[1]));
    }
    int8_t *q = (int8_t *)(a[R_Q] + BLOCK * place);
    vst1q_s8(q, vcombine_s8(vmovn_s16(half[0]), vmovn_s16(half[1])));
    vst1q_s8(q + 16, vcombine_s8(vmovn_s16(half[2]), vmovn_s16(half[3])));
    ((int32_t *)a[R_Q_SUMS])[place] = vaddlvq_s16(vaddq_s16(vaddq_s16(half[0], half[1]), vaddq_s16(half[2], half[3])));
  }
}

#define JOINED(core, name) core##_##name
#define NAMED(core, name) JOINED(core, name)
void NAMED(CORE, round)(const int64_t *args, int64_t first, int64_t last) {
  for (int64_t m = first; m < last; m++) round_row(args, m);
}
