// The product of float rows with a matrix as a page stores it, keys or values of any format: attention is two of these.
//
// Scales are folded into the float side, so that codes are multiplied as they are.
#pragma once
#include "codec.h"
#include "kernels.h"
#include "product.h"
#include "simd.h"

namespace winnow {
namespace TARGET {

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
                        float* opened, const float* q, const float* projected, int rows, float* folded, float* scores,
                        int64_t lds) {
  if (fmt == THINK) return think_scores(shape, dim, page, q, rows, folded, scores, lds);
  if (fmt == MATRYOSHKA) return matryoshka_scores(shape, page, projected, rows, scores, lds);
  if (fmt == CSKV) return cskv_scores(shape, page, place, opened, q, rows, scores, lds);
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
  if (fmt == THINK) return think_values(shape, dim, page, weights, ldw, rows, count, o);
  if (is_low_rank(fmt)) return low_rank_values(shape, page, weights, ldw, rows, count, o);
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
