// Any number of rows of inputs: a block of two panels is unpacked into registers once, and all rows pass by. Their sums lie in the first cache.
#ifndef GEMM_H
#define GEMM_H
#include "weights.h"

enum { WIDE = 2, CHUNK = 128 };  // panels at a time; rows of inputs whose sums are kept
#include CORE_FILE

// Where the core has no loop of its own (matrix.h has one): a cell holds the sums of a row and two panels, float32 [4] or the integers of `sums`.
#ifndef CORE_GEMM
#define CELLS(rows) (rows)
typedef struct { sums s[WIDE]; } cell;

INLINE void arrange(int8x16_t w[QUADS]) { (void)w; }

// `count` rows from row m on.
INLINE void gemm_some(const int8x16_t w[WIDE][QUADS], const float32x4_t scale[WIDE], const int32x4_t zero[WIDE], int64_t q, int64_t q_sums,
                      int64_t m, int count, cell *room, int bits, int per_block, int zeros, int fit) {
  inputs x[ABREAST];
  UNROLL for (int r = 0; r < count; r++) x[r] = inputs_at(q + BLOCK * (m + r));
  UNROLL for (int r = 0; r < count; r++) {
    UNROLL for (int i = 0; i < WIDE; i++) {
      if (per_block) {
        int32x4_t start = vdupq_n_s32(0);
        if (bits == 8 && zeros) start = vmulq_n_s32(zero[i], -*AT(int32_t, q_sums, 4 * (m + r)));
        float *to = (float *)&room[m + r].s[i];
        vst1q_f32(to, vfmaq_f32(vld1q_f32(to), vcvtq_f32_s32(block_sums(start, w[i], x[r], bits, fit)), scale[i]));
      } else {
        room[m + r].s[i] = dots(room[m + r].s[i], w[i], x[r], bits, fit);
      }
    }
  }
}

INLINE void gemm_rows(const int8x16_t w[WIDE][QUADS], const float32x4_t scale[WIDE], const int32x4_t zero[WIDE], int64_t q, int64_t q_sums,
                      int64_t rows, cell *room, int bits, int per_block, int zeros, int fit) {
  int64_t m = 0;
  const int step = per_block && ABREAST > 2 ? 2 : ABREAST;  // registers for two rows' floats
  for (; m + step <= rows; m += step) gemm_some(w, scale, zero, q, q_sums, m, step, room, bits, per_block, zeros, fit);
  for (; m < rows; m++) gemm_some(w, scale, zero, q, q_sums, m, 1, room, bits, per_block, zeros, fit);
}

INLINE float32x4_t gemm_value(const cell *room, int64_t m, int i, int64_t blocks, int bits, int per_block, int32x4_t less, int fit) {
  if (per_block) return vld1q_f32((const float *)&room[m].s[i]);
  return vcvtq_f32_s32(vsubq_s32(row_sums(room[m].s[i], blocks, bits, fit), less));
}
#endif

INLINE void gemm_parts(const int64_t *a, int64_t first, int64_t last, int bits, int per_block, int zeros, int fit) {
  const int64_t blocks = a[BLOCKS], rows = a[M];
  const int whole_zeros = zeros && bits == 8;  // these are taken off the sums; those of fewer bits off the codes
  cell room[CELLS(CHUNK)];
  for (int64_t group = first; group < last; group++) {
    for (int64_t start = 0; start < rows; start += CHUNK) {
      int64_t count = rows - start < CHUNK ? rows - start : CHUNK;
      __builtin_memset(room, 0, sizeof(cell) * (uint64_t)CELLS(count));
      for (int64_t g = 0; g < blocks; g++) {
        int8x16_t w[WIDE][QUADS];
        float32x4_t scale[WIDE];
        int32x4_t zero[WIDE];
        UNROLL for (int i = 0; i < WIDE; i++) {
          int64_t p = group * WIDE + i, zero_base = a[ZEROS] + p * a[ZERO_BYTES];
          unpack(AT(uint8_t, a[CODES], p * a[PANEL_BYTES] + g * BLOCK_BYTES(bits)), bits, w[i]);
          scale[i] = scale_at(a[SCALES] + p * a[SCALE_BYTES], per_block ? g : 0, bits);
          zero[i] = whole_zeros ? zero_at(zero_base, per_block ? g : 0) : vdupq_n_s32(0);
          if (bits != 8) {
            int8x16_t middle = zeros ? zero_bytes_at(zero_base, per_block ? g : 0) : vdupq_n_s8(1 << (bits - 1));
            UNROLL for (int k = 0; k < QUADS; k++) w[i][k] = vsubq_s8(w[i][k], middle);
          }
          arrange(w[i]);
        }
        int64_t place = g * rows + start;
        gemm_rows(w, scale, zero, a[Q] + BLOCK * place, a[Q_SUMS] + 4 * place, count, room, bits, per_block, zeros, fit);
      }
      UNROLL for (int i = 0; i < WIDE; i++) {
        int64_t p = group * WIDE + i;
        output to = output_at(a, p);
        if (!per_block) to.row_scale = vmulq_f32(to.row_scale, scale_at(a[SCALES] + p * a[SCALE_BYTES], 0, bits));
        int32x4_t zero = whole_zeros && !per_block ? zero_at(a[ZEROS] + p * a[ZERO_BYTES], 0) : vdupq_n_s32(0);
        for (int64_t m = 0; m < count; m++) {
          int32_t sum = 0;
          if (whole_zeros && !per_block)
            for (int64_t g = 0; g < blocks; g++) sum += *AT(int32_t, a[Q_SUMS], 4 * (g * rows + start + m));
          write_out(to, start + m, gemm_value(room, m, i, blocks, bits, per_block, vmulq_n_s32(zero, sum), fit));
        }
      }
    }
  }
}

#ifdef TILES
#include "tile.h"
#else
INLINE void tiles(const int64_t *a, int64_t first, int64_t last, int zeros) { (void)a, (void)first, (void)last, (void)zeros; }
enum { TILES = 0 };
#endif

INLINE void gemm(const int64_t *a, int64_t first, int64_t last, int bits, int per_block, int zeros) {
  if (TILES && bits == 8 && !per_block) tiles(a, first, last, zeros);
  else if (bits != 8 || pairs_fit(a[Q], BLOCK * a[BLOCKS] * a[M])) gemm_parts(a, first, last, bits, per_block, zeros, 1);
  else gemm_parts(a, first, last, bits, per_block, zeros, 0);
}
#endif
