// ThinK: keys without some of their channels, a bitmap of those that stay, and whole values.
#pragma once
#include "../opened.h"
#include "../product.h"

namespace winnow {
namespace TARGET {

// Ids of the channels that a page has; returns how many, at most what its keys have room for.
INLINE int think_channels(const PageShape& shape, int dim, const uint8_t* page, int* ids) {
  const int most = (int)((shape.parts[2] - shape.parts[1]) / (2 * shape.capacity));
  int count = 0;
  for (int d = 0; d < dim && count < most; d++)
    if (page[d / 8] >> d % 8 & 1) ids[count++] = d;
  return count;
}

// `stays` [dim] says which channels do; as many as there is room for.
static void seal_think(const PageShape& shape, int dim, uint8_t* page, const float* keys, int64_t stride,
                       const float* values, const uint8_t* stays) {
  std::memset(page, 0, dim / 8);
  for (int d = 0; d < dim; d++)
    if (stays[d]) page[d / 8] |= 1 << d % 8;
  int ids[256];
  const int count = think_channels(shape, dim, page, ids);
  uint16_t *k = (uint16_t*)(page + shape.parts[1]), *v = (uint16_t*)(page + shape.parts[2]);
  for (int i = 0; i < count; i++)
    for (int t = 0; t < shape.capacity; t++) *k++ = to_f16(clamp_f16(keys[ids[i] * stride + t]));
  for (int64_t i = 0; i < (int64_t)shape.capacity * dim; i++) v[i] = to_f16(clamp_f16(values[i]));
}

// Of `scores_of` and `values_of` in stored_product.h, without opening the page: q [rows][dim] is gathered to `folded`.
static void think_scores(const PageShape& shape, int dim, const uint8_t* page, const float* q, int rows, float* folded,
                         float* scores, int64_t lds) {
  int ids[256];
  const int count = think_channels(shape, dim, page, ids);
  for (int r = 0; r < rows; r++)
    for (int i = 0; i < count; i++) folded[r * count + i] = q[r * dim + ids[i]];
  product<F16>(folded, count, rows, page + shape.parts[1], shape.capacity, count, scores, lds, false);
}
static void think_values(const PageShape& shape, int dim, const uint8_t* page, const float* weights, int64_t ldw, int rows,
                         int count, float* o) {
  product<F16>(weights, ldw, rows, page + shape.parts[2], dim, count, o, dim, true);
}

static void open_think_keys(const PageShape& shape, int dim, const uint8_t* page, float* keys) {
  int ids[256];
  const int count = think_channels(shape, dim, page, ids);
  const uint16_t* k = (const uint16_t*)(page + shape.parts[1]);
  std::memset(keys, 0, sizeof(float) * dim * shape.capacity);
  for (int i = 0; i < count; i++)
    for (int t = 0; t < shape.capacity; t++) keys[(int64_t)ids[i] * shape.capacity + t] = from_f16(*k++);
}
static void open_think_values(const PageShape& shape, int dim, const uint8_t* page, float* values) {
  const uint16_t* v = (const uint16_t*)(page + shape.parts[2]);
  for (int64_t i = 0; i < (int64_t)shape.capacity * dim; i++) values[i] = from_f16(v[i]);
}

}  // namespace TARGET
}  // namespace winnow
