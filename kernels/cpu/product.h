// The product of float rows with a matrix of stored numbers.
//
// Every output is one chain of multiply-adds over the depth in its order, whatever tile computes it.
#pragma once
#include "integers.h"
#include "kernels.h"
#include "simd.h"

namespace winnow {
namespace TARGET {

#if defined(__AVX512F__)
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

// Two vectors, of columns that need not be neighbours.
#if defined(__AVX512F__)
typedef W Pair;
INLINE Pair pair_of(V x, V y) { return (Pair)_mm512_insertf32x8(_mm512_castps256_ps512((__m256)x), (__m256)y, 1); }
INLINE V first_of(Pair p) { return (V)_mm512_castps512_ps256((__m512)p); }
INLINE V second_of(Pair p) { return (V)_mm512_extractf32x8_ps((__m512)p, 1); }
INLINE Pair pair_fma(float s, Pair b, Pair c) { return wfma(wsplat(s), b, c); }
constexpr int pairs_at_once(int rows) { return rows <= 4 ? 4 : 2; }
#else
struct Pair { V x, y; };
INLINE Pair pair_of(V x, V y) { return {x, y}; }
INLINE V first_of(const Pair& p) { return p.x; }
INLINE V second_of(const Pair& p) { return p.y; }
INLINE Pair pair_fma(float s, const Pair& b, const Pair& c) { return {fma(splat(s), b.x, c.x), fma(splat(s), b.y, c.y)}; }
constexpr int pairs_at_once(int rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }
#endif

// c[r][columns of P pairs] (+)= sum over k of a[r][k] * stored[k][column].
template <Format F, int R, int P>
INLINE void pair_tile(const float* a, int64_t lda, const uint8_t* stored, int columns, int depth, int first, float* c,
                      int64_t ldc, bool accumulate) {
  const int64_t stride = row_bytes(F, columns);
  Pair sum[R][P];
#pragma GCC unroll 12
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) {
      const float* at = c + r * ldc;
      sum[r][p] = accumulate ? pair_of(load(at + first_column<F>(first + p)), load(at + second_column<F>(first + p, columns)))
                             : pair_of(zero(), zero());
    }
  // Rows in threes from one address each, which the compiler may not split: one for every row would not fit the registers.
  const float* thirds[(R + 2) / 3];
#pragma GCC unroll 4
  for (int i = 0; i < (R + 2) / 3; i++) thirds[i] = a + 3 * i * lda;
  for (int k = 0; k < depth; k++) {
    Pair b[P];
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) {
      V x, y;
      load_pair<F>(stored + k * stride, first_column<F>(first + p), second_column<F>(first + p, columns), x, y);
      b[p] = pair_of(x, y);
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int p = 0; p < P; p++) sum[r][p] = pair_fma(thirds[r / 3][r % 3 * lda], b[p], sum[r][p]);
#pragma GCC unroll 4
    for (int i = 0; i < (R + 2) / 3; i++) {
      thirds[i]++;
      asm("" : "+r"(thirds[i]));
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) {
      store(c + r * ldc + first_column<F>(first + p), first_of(sum[r][p]));
      store(c + r * ldc + second_column<F>(first + p, columns), second_of(sum[r][p]));
    }
}

// Few rows leave registers free: more pairs at once hide the latency of the chains.
template <Format F, int R>
INLINE void row_tile(const float* a, int64_t lda, const uint8_t* stored, int columns, int depth, float* c, int64_t ldc,
                     bool accumulate) {
  constexpr int P = pairs_at_once(R);
  const int pairs = (columns + 15) / 16;
  int p = 0;
  for (; p + P <= pairs; p += P) pair_tile<F, R, P>(a, lda, stored, columns, depth, p, c, ldc, accumulate);
  for (; p < pairs; p++) pair_tile<F, R, 1>(a, lda, stored, columns, depth, p, c, ldc, accumulate);
}

template <Format F>
static void product(const float* a, int64_t lda, int rows, const uint8_t* stored, int columns, int depth, float* c,
                    int64_t ldc, bool accumulate) {
  for (int r = 0; r < rows; r += MAX_ROWS) {
    const float* x = a + r * lda;
    float* y = c + r * ldc;
    switch (min_i(MAX_ROWS, rows - r)) {
#define CASE(N) case N: row_tile<F, N>(x, lda, stored, columns, depth, y, ldc, accumulate); break;
      CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if defined(__AVX512F__)
      CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
#undef CASE
    }
  }
}

}  // namespace TARGET
}  // namespace winnow
