// All products of one core: compiled once for each, with -DCORE=<name> and -DCORE_FILE="<file>" (kernels/neon/build.py).
#include "gemm.h"
#include "gemv.h"

#define JOINED(core, name) core##_##name
#define NAMED(core, name) JOINED(core, name)
#define FORM(name, bits, per_block, zeros)                                                                                      \
  void NAMED(CORE, gemv_##name)(const int64_t *args, int64_t first, int64_t last) { gemv(args, first, last, bits, per_block, zeros); } \
  void NAMED(CORE, gemm_##name)(const int64_t *args, int64_t first, int64_t last) { gemm(args, first, last, bits, per_block, zeros); }
#define FORMS(bits)                     \
  FORM(bits##_row, bits, 0, 0)          \
  FORM(bits##_row_zeros, bits, 0, 1)    \
  FORM(bits##_block, bits, 1, 0)        \
  FORM(bits##_block_zeros, bits, 1, 1)

FORMS(8)
FORMS(4)
FORMS(3)
FORMS(2)
