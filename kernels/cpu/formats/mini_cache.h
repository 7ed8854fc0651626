// MiniCache: one direction for a token's vectors in two layers, and the norms of both.
#pragma once
#include <cmath>

#include "../opened.h"

namespace winnow {
namespace TARGET {

// One token's vectors x and y, in the lower and the upper layer, to a shared direction and two norms, `capacity` apart.
// Numbers lie `x_stride`, `y_stride` and `stride` apart.
static void merge_directions(const float* x, int64_t x_stride, const float* y, int64_t y_stride, int dim, double t,
                             uint16_t* direction, int64_t stride, uint16_t* norms, int capacity) {
  double xx = 0, yy = 0, dot = 0, ee = 0, e[256];
  for (int d = 0; d < dim; d++) {
    const double a = x[d * x_stride], b = y[d * y_stride];
    xx += a * a;
    yy += b * b;
  }
  const double nx = std::sqrt(xx), ny = std::sqrt(yy);
  const double to_u = 1 / (nx > 1e-30 ? nx : 1e-30), to_v = 1 / (ny > 1e-30 ? ny : 1e-30);
  for (int d = 0; d < dim; d++) dot += x[d * x_stride] * to_u * (y[d * y_stride] * to_v);
  const double angle = std::acos(dot > 1 ? 1 : dot < -1 ? -1 : dot), sine = std::sin(angle);
  const bool is_arc = sine >= 1e-6;
  const double of_u = is_arc ? std::sin((1 - t) * angle) / sine : 1 - t;
  const double of_v = is_arc ? std::sin(t * angle) / sine : t;
  for (int d = 0; d < dim; d++) {
    e[d] = of_u * (x[d * x_stride] * to_u) + of_v * (y[d * y_stride] * to_v);
    ee += e[d] * e[d];
  }
  const double length = std::sqrt(ee);
  for (int d = 0; d < dim; d++) direction[d * stride] = to_f16((float)(e[d] / (length > 1e-30 ? length : 1e-30)));
  norms[0] = to_f16(clamp_f16((float)nx));
  norms[capacity] = to_f16(clamp_f16((float)ny));
}

// A full page from keys [dim][stride] and values [capacity][dim] of the lower layer, and those of the upper one.
static void seal_mini_cache(const PageShape& shape, int dim, uint8_t* page, const float* keys, int64_t stride,
                            const float* values, const Place& place) {
  const int capacity = shape.capacity;
  uint16_t *k = (uint16_t*)page, *k_norms = (uint16_t*)(page + shape.parts[1]);
  uint16_t *v = (uint16_t*)(page + shape.parts[2]), *v_norms = (uint16_t*)(page + shape.parts[3]);
  for (int t = 0; t < capacity; t++) {
    merge_directions(keys + t, stride, place.upper_keys + t, stride, dim, place.t, k + t, capacity, k_norms + t, capacity);
    const int64_t row = (int64_t)t * dim;
    merge_directions(values + row, 1, place.upper_values + row, 1, dim, place.t, v + row, 1, v_norms + t, capacity);
  }
  *(int32_t*)(page + shape.parts[4]) = place.layer;
}

// The norms of a layer, [capacity], among those that begin with part `part`.
INLINE const uint16_t* norms_of(const PageShape& shape, int part, const uint8_t* page, int layer) {
  const bool is_upper = *(const int32_t*)(page + shape.parts[4]) != layer;
  return (const uint16_t*)(page + shape.parts[part]) + (is_upper ? shape.capacity : 0);
}

static void open_mini_cache_keys(const PageShape& shape, int dim, const uint8_t* page, int layer, float* keys) {
  const uint16_t *norms = norms_of(shape, 1, page, layer), *k = (const uint16_t*)page;
  for (int d = 0; d < dim; d++)
    for (int t = 0; t < shape.capacity; t += LANES, k += LANES, keys += LANES)
      store(keys, load_f16(k) * load_f16(norms + t));
}

static void open_mini_cache_values(const PageShape& shape, int dim, const uint8_t* page, int layer, float* values) {
  const uint16_t *norms = norms_of(shape, 3, page, layer), *v = (const uint16_t*)(page + shape.parts[2]);
  for (int t = 0; t < shape.capacity; t++) {
    const V norm = splat(from_f16(norms[t]));
    for (int d = 0; d < dim; d += LANES, v += LANES, values += LANES) store(values, load_f16(v) * norm);
  }
}

}  // namespace TARGET
}  // namespace winnow
