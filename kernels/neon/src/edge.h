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

#define KEEP_ORDER __asm__ volatile("" ::: "memory")  // one panel after the other: all at once do not fit the registers
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

// What a panel's sums become: y = q_scale * (row_scale * value - q_zero * sums) + bias + residual.
typedef struct { float32x4_t row_scale, sums, bias; const float *q_scale, *q_zero; int64_t out, residual, stride; } output;

INLINE output output_at(const int64_t *a, int64_t p) {
  int64_t at = 16 * p;
  float32x4_t bias = a[BIAS] ? vld1q_f32(AT(float, a[BIAS], at)) : vdupq_n_f32(0);
  return (output){vld1q_f32(AT(float, a[ROW_SCALE], at)), vld1q_f32(AT(float, a[SUMS], at)), bias, AT(float, a[Q_SCALE], 0),
                  AT(float, a[Q_ZERO], 0), a[OUT] + at, a[RESIDUAL] ? a[RESIDUAL] + at : 0, a[STRIDE]};
}

// Row m of the inputs.
INLINE void write_out(output o, int64_t m, float32x4_t value) {
  float32x4_t y = vsubq_f32(vmulq_f32(value, o.row_scale), vmulq_n_f32(o.sums, o.q_zero[m]));
  y = vaddq_f32(vmulq_n_f32(y, o.q_scale[m]), o.bias);
  if (o.residual) y = vaddq_f32(y, vld1q_f32(AT(float, o.residual, m * o.stride)));
  vst1q_f32((float *)(o.out + m * o.stride), y);
}
#endif
