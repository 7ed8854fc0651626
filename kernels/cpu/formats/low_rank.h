// Keys and values by their leading coordinates in a basis of their lane, keys after RoPE (matryoshka) or before it (cskv).
// Sealing and opening sum in double, as kernels/reference/formats/low_rank.py does; attention reads coordinates in float.
#pragma once
#include "../opened.h"
#include "../product.h"

namespace winnow {
namespace TARGET {

INLINE int rank_of(const PageShape& shape) { return (int)(shape.parts[1] / (2 * shape.capacity)); }
INLINE const float* key_basis(const KV& kv, Format fmt, int layer, int head, int rank) {
  return kv.bases[fmt].keys + ((int64_t)layer * kv.heads + head) * kv.dim * rank;
}
INLINE const float* value_basis(const KV& kv, Format fmt, int layer, int head, int rank) {
  return kv.bases[fmt].values + ((int64_t)layer * kv.heads + head) * kv.dim * rank;
}

// Where a position's angles lie in the tables of RoPE, which positions of the engine's own making do not leave.
INLINE int64_t rope_row(const KV& kv, int position) {
  return (int64_t)max_i(0, min_i(position, kv.rope.positions - 1)) * (kv.dim / 2);
}

// Attention in the coordinates themselves: q.(U k') = (U^T q).k' and sum w (W v') = W (sum w v').
// Queries [rows][dim] to coordinates [rows][rank], for keys that are held after RoPE.
INLINE void project_queries(const KV& kv, Format fmt, int layer, int head, const float* q, int rows, float* projected) {
  const int rank = rank_of(kv.shapes[fmt]);
  const float* u = key_basis(kv, fmt, layer, head, rank);
  product<F32>(q, kv.dim, rows, (const uint8_t*)u, rank, kv.dim, projected, rank, false);
}
// o [rows][dim] += what coordinates [rows][rank] of values stand for.
INLINE void add_projected(const KV& kv, Format fmt, int layer, int head, const float* projected, int rows, float* o) {
  const int rank = rank_of(kv.shapes[fmt]);
  const float* w = value_basis(kv, fmt, layer, head, rank);
  product<F32>(projected, rank, rows, (const uint8_t*)w, kv.dim, rank, o, kv.dim, true);
}
// Scores of a page of keys after RoPE, by projected queries.
static void matryoshka_scores(const PageShape& shape, const uint8_t* page, const float* projected, int rows, float* scores,
                              int64_t lds) {
  const int rank = rank_of(shape);
  product<F16>(projected, rank, rows, page, shape.capacity, rank, scores, lds, false);
}
// Of keys before RoPE, by queries [rows][dim]: the keys are opened to `opened` [dim][capacity] and turned.
static void cskv_scores(const PageShape& shape, const uint8_t* page, const Place& place, float* opened, const float* q,
                        int rows, float* scores, int64_t lds) {
  const KV& kv = place.kv;
  const int rank = rank_of(shape), capacity = shape.capacity, dim = kv.dim, half = dim / 2;
  const float* u = key_basis(kv, CSKV, place.layer, place.head, rank);
  product<F16>(u, rank, dim, page, capacity, rank, opened, capacity, false);
  for (int t = 0; t < capacity; t++) {
    const int64_t row = rope_row(kv, place.position(t));
    for (int d = 0; d < half; d++) {
      float &a = opened[(int64_t)d * capacity + t], &b = opened[(int64_t)(d + half) * capacity + t];
      const float c = kv.rope.cos[row + d], s = kv.rope.sin[row + d], x = a, y = b;
      a = x * c - y * s;
      b = y * c + x * s;
    }
  }
  product<F32>(q, dim, rows, (const uint8_t*)opened, capacity, dim, scores, lds, false);
}
static void low_rank_values(const PageShape& shape, const uint8_t* page, const float* weights, int64_t ldw, int rows,
                            int count, float* projected) {
  const int rank = rank_of(shape);
  product<F16>(weights, ldw, rows, page + shape.parts[1], rank, count, projected, rank, true);
}

// Turns a key by RoPE's angles at a position, or back; tables with a factor have it in keys too.
INLINE void turn(const KV& kv, int position, bool back, double* key) {
  const int half = kv.dim / 2;
  const int64_t row = rope_row(kv, position);
  const double shrink = back ? 1.0 / (kv.rope.factor * kv.rope.factor) : 1.0;
  for (int d = 0; d < half; d++) {
    const double x = key[d], y = key[d + half], c = kv.rope.cos[row + d], s = back ? -kv.rope.sin[row + d] : kv.rope.sin[row + d];
    key[d] = (x * c - y * s) * shrink;
    key[d + half] = (y * c + x * s) * shrink;
  }
}

static void seal_low_rank(Format fmt, const PageShape& shape, int dim, uint8_t* page, const float* keys, int64_t stride,
                          const float* values, const Place& place) {
  const int rank = rank_of(shape), capacity = shape.capacity;
  const float *u = key_basis(place.kv, fmt, place.layer, place.head, rank);
  const float *w = value_basis(place.kv, fmt, place.layer, place.head, rank);
  uint16_t *k = (uint16_t*)page, *v = (uint16_t*)(page + shape.parts[1]);
  for (int t = 0; t < capacity; t++) {
    double x[256];
    for (int d = 0; d < dim; d++) x[d] = keys[d * stride + t];
    if (fmt == CSKV) turn(place.kv, place.position(t), true, x);
    for (int j = 0; j < rank; j++) {
      double key = 0, value = 0;
      for (int d = 0; d < dim; d++) key += x[d] * u[(int64_t)d * rank + j];
      for (int d = 0; d < dim; d++) value += (double)values[(int64_t)t * dim + d] * w[(int64_t)j * dim + d];
      k[(int64_t)j * capacity + t] = to_f16(clamp_f16((float)key));
      v[(int64_t)t * rank + j] = to_f16(clamp_f16((float)value));
    }
  }
}

static void open_low_rank_keys(Format fmt, const PageShape& shape, int dim, const uint8_t* page, const Place& place,
                               float* keys) {
  const int rank = rank_of(shape), capacity = shape.capacity;
  const float* u = key_basis(place.kv, fmt, place.layer, place.head, rank);
  const uint16_t* k = (const uint16_t*)page;
  for (int t = 0; t < capacity; t++) {
    double x[128], key[256];
    for (int j = 0; j < rank; j++) x[j] = from_f16(k[(int64_t)j * capacity + t]);
    for (int d = 0; d < dim; d++) {
      key[d] = 0;
      for (int j = 0; j < rank; j++) key[d] += x[j] * u[(int64_t)d * rank + j];
    }
    if (fmt == CSKV) turn(place.kv, place.position(t), false, key);
    for (int d = 0; d < dim; d++) keys[(int64_t)d * capacity + t] = (float)key[d];
  }
}
static void open_low_rank_values(Format fmt, const PageShape& shape, int dim, const uint8_t* page, const Place& place,
                                 float* values) {
  const int rank = rank_of(shape);
  const float* w = value_basis(place.kv, fmt, place.layer, place.head, rank);
  const uint16_t* v = (const uint16_t*)(page + shape.parts[1]);
  for (int t = 0; t < shape.capacity; t++, v += rank, values += dim) {
    double value[256] = {};
    for (int j = 0; j < rank; j++)
      for (int d = 0; d < dim; d++) value[d] += (double)from_f16(v[j]) * w[(int64_t)j * dim + d];
    for (int d = 0; d < dim; d++) values[d] = (float)value[d];
  }
}

}  // namespace TARGET
}  // namespace winnow
