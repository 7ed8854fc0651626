// The product of float rows with a matrix as a page stores it, keys or values of any format: attention is two of these.
//
// Every output is one chain of multiply-adds over the depth in its order, whatever tile computes it. Scales are folded
// into the float side, so that codes are multiplied as they are.
#pragma once
#include "codec.h"
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
template <Format F> INLINE int first_column(int pair, int columns) { return F == INT4 ? 8 * pair : min_i(16 * pair, max_i(columns - 16, 0)); }
template <Format F> INLINE int second_column(int pair, int columns) {
  return F == INT4 ? columns / 2 + 8 * pair : first_column<F>(pair, columns) + (columns >= 16 ? 8 : 0);
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
  const int x0 = first_column<F>(pair, columns), y0 = second_column<F>(pair, columns);
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

// scores[r][t] = q[r] . key t, for every token of a page's capacity. `folded` [rows][dim] is scratch.
template <Format F>
static void scores_of(const PageShape& shape, int dim, const uint8_t* page, const float* q, int rows, float* folded,
                      float* scores, int64_t lds) {
  if constexpr (!is_integer(F)) {
    product<F>(q, dim, rows, page, shape.capacity, dim, scores, lds, false);
    if constexpr (F == FP8) {
      const V scale = splat(from_f16(*(const uint16_t*)(page + shape.k_scale)) / E4M3_UNIT);
      for (int r = 0; r < rows; r++)
        for (int t = 0; t < shape.capacity; t += LANES) store(scores + r * lds + t, load(scores + r * lds + t) * scale);
    }
  } else {
    const uint16_t *ks = (const uint16_t*)(page + shape.k_scale), *kz = (const uint16_t*)(page + shape.k_zero);
    const int tokens = shape.key_block;
    for (int first = 0; first < shape.capacity; first += tokens, ks += dim, kz += dim) {
      float bias[BLOCK_ROWS];
      for (int r = 0; r < rows; r++) {  // q.(code * scale + zero) = (q * scale).code + q.zero
        V sum = zero();
        for (int d = 0; d < dim; d += LANES) {
          const V v = load(q + r * dim + d);
          store(folded + r * dim + d, v * load_f16(ks + d));
          sum = fma(v, load_f16(kz + d), sum);
        }
        bias[r] = hsum(sum);
      }
      product<F>(folded, dim, rows, page + first * row_bytes(F, dim), tokens, dim, scores + first, lds, false);
      for (int r = 0; r < rows; r++)
        for (int t = first; t < first + tokens; t += LANES)
          store(scores + r * lds + t, load(scores + r * lds + t) + splat(bias[r]));
    }
  }
}

// o[r] += sum over the page's first `count` tokens of weights[r][t] * value t; a quantized page is full and has them
// all. `folded` [rows][ldw] is scratch.
template <Format F>
static void values_of(const PageShape& shape, int dim, const uint8_t* page, const float* weights, int64_t ldw, int rows,
                      int count, float* folded, float* o) {
  const uint8_t* values = page + shape.values;
  const uint16_t *vs = (const uint16_t*)(page + shape.v_scale), *vz = (const uint16_t*)(page + shape.v_zero);
  const int capacity = shape.capacity, channels = shape.value_block;
  if constexpr (!is_quantized(F)) {
    product<F>(weights, ldw, rows, values, dim, count, o, dim, true);
  } else if constexpr (F == FP8) {
    const V scale = splat(from_f16(*vs) / E4M3_UNIT);
    for (int r = 0; r < rows; r++)
      for (int t = 0; t < capacity; t += LANES) store(folded + r * ldw + t, load(weights + r * ldw + t) * scale);
    product<F>(folded, ldw, rows, values, dim, capacity, o, dim, true);
  } else {
    for (int first = 0; first < dim; first += channels, vs += capacity, vz += capacity) {
      for (int r = 0; r < rows; r++) {  // w.(code * scale + zero): the zero adds alike to every channel
        V sum = zero();
        for (int t = 0; t < capacity; t += LANES) {
          const V w = load(weights + r * ldw + t);
          store(folded + r * ldw + t, w * load_f16(vs + t));
          sum = fma(w, load_f16(vz + t), sum);
        }
        const V offset = splat(hsum(sum));
        for (int d = first; d < first + channels; d += LANES) store(o + r * dim + d, load(o + r * dim + d) + offset);
      }
      product<F>(folded, ldw, rows, values + first * row_bytes(F, capacity), channels, capacity, o + first, dim, true);
    }
  }
}

// Of pages that are read as they lie.
#define EACH_FORMAT(CALL) \
  switch (fmt) { \
    case F32: CALL(F32); break; \
    case BF16: CALL(BF16); break; \
    case F16: CALL(F16); break; \
    case INT8: CALL(INT8); break; \
    case INT4: CALL(INT4); break; \
    case INT2: CALL(INT2); break; \
    default: CALL(FP8); \
  }
// A page of any format; one that is opened is opened to `opened` [dim * capacity], scratch.
static void page_scores(Format fmt, const PageShape& shape, int dim, const uint8_t* page, const Place& place,
                        float* opened, const float* q, int rows, float* folded, float* scores, int64_t lds) {
  if (is_opened(fmt)) {
    open_keys(fmt, shape, dim, page, place, opened);
    return product<F32>(q, dim, rows, (const uint8_t*)opened, shape.capacity, dim, scores, lds, false);
  }
#define CALL(F) scores_of<F>(shape, dim, page, q, rows, folded, scores, lds)
  EACH_FORMAT(CALL)
#undef CALL
}
static void page_values(Format fmt, const PageShape& shape, int dim, const uint8_t* page, const Place& place,
                        float* opened, const float* weights, int64_t ldw, int rows, int count, float* folded, float* o) {
  if (is_opened(fmt)) {
    open_values(fmt, shape, dim, page, place, opened);
    return product<F32>(weights, ldw, rows, (const uint8_t*)opened, dim, count, o, dim, true);
  }
#define CALL(F) values_of<F>(shape, dim, page, weights, ldw, rows, count, folded, o)
  EACH_FORMAT(CALL)
#undef CALL
}

}  // namespace TARGET
}  // namespace winnow
