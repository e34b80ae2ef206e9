// The one interface of every kernel: void name(const int64_t *args, int64_t first, int64_t last), parts first ... last - 1 of what args say.
// The layout of weights is that of kernels/panels.py with four rows a panel.
#ifndef EDGE_H
#define EDGE_H
#include <arm_neon.h>
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

enum { BLOCK = 32, QUADS = 8, AHEAD = 2048 };  // columns of a block; quads of four columns; bytes that weights are fetched ahead

// The args of products, in order (products.ARGS): addresses, then counts. BIAS, RESIDUAL: 0 for none. STRIDE: bytes of a row of OUT and RESIDUAL.
enum { CODES, SCALES, ZEROS, ROW_SCALE, SUMS, Q, Q_SUMS, Q_SCALE, Q_ZERO, M, BLOCKS, PANEL_BYTES, SCALE_BYTES, ZERO_BYTES, BIAS, RESIDUAL, OUT, STRIDE };

#define AT(kind, address, offset) ((const kind *)((address) + (offset)))

// float32 [4] of four scales: float16, of 8-bit weights float32.
INLINE float32x4_t scale_at(int64_t address, int64_t block, int bits) {
  if (bits == 8) return vld1q_f32(AT(float, address, 16 * block));
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(AT(uint16_t, address, 8 * block))));
}

// The zeros of four rows, int32.
INLINE int32x4_t zero_at(int64_t address, int64_t block) {
  int8x8_t bytes = vreinterpret_s8_s32(vld1_dup_s32(AT(int32_t, address, 4 * block)));
  return vmovl_s16(vget_low_s16(vmovl_s8(bytes)));
}

// The zeros of four rows, each in the four bytes that stand for its row in a quad.
INLINE int8x16_t zero_bytes_at(int64_t address, int64_t block) {
  static const uint8_t places[16] = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
  int8x16_t bytes = vreinterpretq_s8_s32(vld1q_dup_s32(AT(int32_t, address, 4 * block)));
  return vqtbl1q_s8(bytes, vld1q_u8(places));
}

// y = q_scale * (row_scale * value - q_zero * sums) + bias + residual, four rows of weights of panel p, row m of the inputs.
INLINE void write_out(const int64_t *a, int64_t p, int64_t m, float32x4_t value) {
  int64_t at = 16 * p, place = m * a[STRIDE] + at;
  float32x4_t zero = vmulq_n_f32(vld1q_f32(AT(float, a[SUMS], at)), *AT(float, a[Q_ZERO], 4 * m));
  float32x4_t y = vmulq_n_f32(vsubq_f32(vmulq_f32(value, vld1q_f32(AT(float, a[ROW_SCALE], at))), zero), *AT(float, a[Q_SCALE], 4 * m));
  if (a[BIAS]) y = vaddq_f32(y, vld1q_f32(AT(float, a[BIAS], at)));
  if (a[RESIDUAL]) y = vaddq_f32(y, vld1q_f32(AT(float, a[RESIDUAL], place)));
  vst1q_f32((float *)(a[OUT] + place), y);
}
#endif
