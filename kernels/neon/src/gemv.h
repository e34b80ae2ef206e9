// One row of inputs: every panel is read once. `many` panels pass side by side, so that inputs are read once for all of them.
#ifndef GEMV_H
#define GEMV_H
#include "weights.h"
#include CORE_FILE

enum { MOST = 4 };

// The sum of the inputs of all blocks.
INLINE int32_t inputs_sum(const int64_t *a) {
  int32_t total = 0;
  for (int64_t g = 0; g < a[BLOCKS]; g++) total += *AT(int32_t, a[Q_SUMS], 4 * g);
  return total;
}

INLINE void gemv_panels(const int64_t *a, int64_t p, int many, int bits, int per_block, int zeros, int fit) {
  const int64_t blocks = a[BLOCKS];
  int64_t codes[MOST], scales[MOST], zero[MOST], q = a[Q], q_sums = a[Q_SUMS];
  float32x4_t whole[MOST];
  sums total[MOST];
  UNROLL for (int i = 0; i < many; i++) {
    codes[i] = a[CODES] + (p + i) * a[PANEL_BYTES];
    scales[i] = a[SCALES] + (p + i) * a[SCALE_BYTES];
    zero[i] = a[ZEROS] + (p + i) * a[ZERO_BYTES];
    whole[i] = vdupq_n_f32(0);
    total[i] = no_sums();
  }
  for (int64_t g = 0; g < blocks; g++) {
    inputs x = inputs_at(q);
    int32_t sum = *AT(int32_t, q_sums, 0);
    UNROLL for (int i = 0; i < many; i++) {
      int8x16_t w[QUADS];
      if (FETCHES) UNROLL for (int line = 0; line < BLOCK_BYTES(bits); line += 64) __builtin_prefetch(AT(uint8_t, codes[i], AHEAD + line));
      unpack(AT(uint8_t, codes[i], 0), bits, w);
      if (per_block) {
        int32x4_t start = vdupq_n_s32(bits == 8 ? 0 : -sum * (1 << (bits - 1)));
        if (zeros) start = vmulq_n_s32(zero_at(zero[i], 0), -sum);
        whole[i] = vfmaq_f32(whole[i], vcvtq_f32_s32(block_sums(start, w, x, bits, fit)), scale_at(scales[i], 0, bits));
        scales[i] += bits == 8 ? 16 : 8;
        zero[i] += 4;
      } else {
        total[i] = dots(total[i], w, x, bits, fit);
      }
      codes[i] += BLOCK_BYTES(bits);
      KEEP_ORDER;
    }
    q += BLOCK;
    q_sums += 4;
  }
  int32_t sum = per_block || (bits == 8 && !zeros) ? 0 : inputs_sum(a);
  UNROLL for (int i = 0; i < many; i++) {
    if (!per_block) {
      int32x4_t middle = zeros ? zero_at(zero[i], 0) : vdupq_n_s32(bits == 8 ? 0 : 1 << (bits - 1));
      int32x4_t ints = vmlsq_n_s32(row_sums(total[i], blocks, bits, fit), middle, sum);
      whole[i] = vmulq_f32(vcvtq_f32_s32(ints), scale_at(scales[i], 0, bits));
    }
    write_out(output_at(a, p + i), 0, whole[i]);
  }
}

INLINE void gemv_parts(const int64_t *a, int64_t first, int64_t last, int bits, int per_block, int zeros, int fit) {
  int64_t p = first;
  for (; p + SIDE(bits) <= last; p += SIDE(bits)) gemv_panels(a, p, SIDE(bits), bits, per_block, zeros, fit);
  for (; p < last; p++) gemv_panels(a, p, 1, bits, per_block, zeros, fit);
}

INLINE void gemv(const int64_t *a, int64_t first, int64_t last, int bits, int per_block, int zeros) {
  if (bits != 8 || pairs_fit(a[Q], BLOCK * a[BLOCKS])) gemv_parts(a, first, last, bits, per_block, zeros, 1);
  else gemv_parts(a, first, last, bits, per_block, zeros, 0);
}
#endif
