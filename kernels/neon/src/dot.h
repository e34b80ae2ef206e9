// Sums of products by the dot-product instruction (sdot): four columns of four rows at once.
#ifndef CORE_H
#define CORE_H
#include "edge.h"

typedef struct { int8x16_t low, high; } inputs;  // 32 columns of one row
typedef int32x4_t sums;                          // of one panel, from the first column on

enum { FETCHES = 0, ABREAST = 4 };  // whether weights are fetched ahead by instructions; rows of inputs side by side in a gemm
#define SIDE(bits) 4                  // panels side by side in a gemv: four sums need not wait for each other

#ifndef CORE_GEMM
#define TILES 1
#endif

INLINE int pairs_fit(int64_t q, int64_t bytes) { (void)q, (void)bytes; return 1; }
INLINE inputs inputs_at(int64_t q) { return (inputs){vld1q_s8(AT(int8_t, q, 0)), vld1q_s8(AT(int8_t, q, 16))}; }
INLINE sums no_sums(void) { return vdupq_n_s32(0); }
INLINE int32x4_t row_sums(sums s, int64_t blocks, int bits, int fit) { (void)blocks, (void)bits, (void)fit; return s; }

INLINE sums dots(sums s, const int8x16_t w[QUADS], inputs x, int bits, int fit) {
  (void)bits, (void)fit;
  s = vdotq_laneq_s32(s, w[0], x.low, 0);
  s = vdotq_laneq_s32(s, w[1], x.low, 1);
  s = vdotq_laneq_s32(s, w[2], x.low, 2);
  s = vdotq_laneq_s32(s, w[3], x.low, 3);
  s = vdotq_laneq_s32(s, w[4], x.high, 0);
  s = vdotq_laneq_s32(s, w[5], x.high, 1);
  s = vdotq_laneq_s32(s, w[6], x.high, 2);
  return vdotq_laneq_s32(s, w[7], x.high, 3);
}

INLINE int32x4_t block_sums(int32x4_t start, const int8x16_t w[QUADS], inputs x, int bits, int fit) { return dots(start, w, x, bits, fit); }
#endif
