// The product of float rows with a matrix of stored numbers.
//
// Every output is one chain of multiply-adds over the depth in its order, whatever tile computes it.
#pragma once
#include "integers.h"
#include "kernels.h"
#include "simd.h"

namespace winnow {
namespace TARGET {

#if defined(__AVX512VL__)
constexpr int MAX_ROWS = 12;  // rows of a register tile
#else
constexpr int MAX_ROWS = 6;
#endif

constexpr int BLOCK_ROWS = 48;  // most rows of one call

// Columns of a stored row come in pairs of vectors; where they start (an odd last vector is computed twice).
template <Format F> INLINE int first_column(int pair) { return F == INT4 ? 8 * pair : 16 * pair; }
template <Format F> INLINE int second_column(int pair, int columns) {
  return F == INT4 ? columns / 2 + 8 * pair : min_i(16 * pair + 8, columns - 8);
}
template <Format F> INLINE void load_pair(const uint8_t* row, int a, int b, V& x, V& y) {
  if constexpr (F == F32) { x = load((const float*)row + a); y = load((const float*)row + b); }
  if constexpr (F == BF16) { x = load_bf16((const uint16_t*)row + a); y = load_bf16((const uint16_t*)row + b); }
  if constexpr (F == F16) { x = load_f16((const uint16_t*)row + a); y = load_f16((const uint16_t*)row + b); }
  if constexpr (F == INT8) { x = load_u8(row + a); y = load_u8(row + b); }
  if constexpr (F == INT4) load_u4(row + a, x, y);
  if constexpr (F == INT2) load_u2(row + a / 4, x, y);
  if constexpr (F == FP8) { x = load_e4m3(row + a); y = load_e4m3(row + b); }
}

// c[r][columns of the pair] (+)= sum over k of a[r][k] * stored[k][column].
template <Format F, int R>
INLINE void pair_tile(const float* a, int64_t lda, const uint8_t* stored, int columns, int depth, int pair, float* c,
                      int64_t ldc, bool accumulate) {
  const int x0 = first_column<F>(pair), y0 = second_column<F>(pair, columns);
  const int64_t stride = row_bytes(F, columns);
  V x[R], y[R];
#pragma GCC unroll 12
  for (int r = 0; r < R; r++) {
    x[r] = accumulate ? load(c + r * ldc + x0) : zero();
    y[r] = accumulate ? load(c + r * ldc + y0) : zero();
  }
  for (int k = 0; k < depth; k++) {
    V p, q;
    load_pair<F>(stored + k * stride, x0, y0, p, q);
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
      const V s = splat(a[r * lda + k]);
      x[r] = fma(s, p, x[r]);
      y[r] = fma(s, q, y[r]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; r++) { store(c + r * ldc + x0, x[r]); store(c + r * ldc + y0, y[r]); }
}

template <Format F>
static void product(const float* a, int64_t lda, int rows, const uint8_t* stored, int columns, int depth, float* c,
                    int64_t ldc, bool accumulate) {
  const int pairs = (columns + 15) / 16;
  for (int r = 0; r < rows; r += MAX_ROWS) {
    const float* x = a + r * lda;
    float* y = c + r * ldc;
    for (int p = 0; p < pairs; p++) switch (min_i(MAX_ROWS, rows - r)) {
#define CASE(N) case N: pair_tile<F, N>(x, lda, stored, columns, depth, p, y, ldc, accumulate); break;
      CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if defined(__AVX512VL__)
      CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
#undef CASE
    }
  }
}

}  // namespace TARGET
}  // namespace winnow
