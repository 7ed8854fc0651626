// How a page stores numbers: one token in and out of a page of any format, and sealing a full page. The layout is that
// of kernels/layout.py, the arithmetic that of kernels/reference/codec.py, bit for bit.
#pragma once
#include "integers.h"
#include "kernels.h"
#include "opened.h"
#include "product.h"
#include "simd.h"

namespace winnow {
namespace TARGET {

// Writes one token in a float format: key channel d to [d][at], value to [at].
INLINE uint16_t to_half(Format fmt, float x) { return fmt == BF16 ? to_bf16(x) : to_f16(clamp_f16(x)); }
INLINE void put_token(Format fmt, const PageShape& shape, int dim, uint8_t* page, int at, const float* key,
                      const float* value) {
  if (fmt == F32) {
    float *k = (float*)page + at, *v = (float*)(page + shape.values) + (int64_t)at * dim;
    for (int d = 0; d < dim; d++) k[(int64_t)d * shape.capacity] = key[d];
    std::memcpy(v, value, sizeof(float) * dim);
  } else {
    uint16_t *k = (uint16_t*)page + at, *v = (uint16_t*)(page + shape.values) + (int64_t)at * dim;
    for (int d = 0; d < dim; d++) k[(int64_t)d * shape.capacity] = to_half(fmt, key[d]);
    for (int d = 0; d < dim; d++) v[d] = to_half(fmt, value[d]);
  }
}

INLINE float from_half(Format fmt, uint16_t h) {
  if (fmt == F16) return from_f16(h);
  const uint32_t b = (uint32_t)h << 16; float f; std::memcpy(&f, &b, 4); return f;
}

// Reads one token of a page that is read as it lies: its key channels to key[d * stride], its value to value[d].
static void get_token(Format fmt, const PageShape& shape, int dim, const uint8_t* page, int at, float* key,
                      int64_t stride, float* value) {
  const int capacity = shape.capacity;
  const uint8_t* values = page + shape.values;
  const uint16_t *ks = (const uint16_t*)(page + shape.k_scale), *kz = (const uint16_t*)(page + shape.k_zero);
  const uint16_t *vs = (const uint16_t*)(page + shape.v_scale), *vz = (const uint16_t*)(page + shape.v_zero);
  if (fmt == F32) {
    for (int d = 0; d < dim; d++) key[d * stride] = ((const float*)page)[(int64_t)d * capacity + at];
    std::memcpy(value, (const float*)values + (int64_t)at * dim, sizeof(float) * dim);
  } else if (is_float(fmt)) {
    for (int d = 0; d < dim; d++) key[d * stride] = from_half(fmt, ((const uint16_t*)page)[(int64_t)d * capacity + at]);
    for (int d = 0; d < dim; d++) value[d] = from_half(fmt, ((const uint16_t*)values)[(int64_t)at * dim + d]);
  } else if (fmt == FP8) {
    const float k = from_f16(*ks), v = from_f16(*vs);
    for (int d = 0; d < dim; d++) key[d * stride] = from_e4m3(page[(int64_t)d * capacity + at]) * k;
    for (int d = 0; d < dim; d++) value[d] = from_e4m3(values[(int64_t)at * dim + d]) * v;
  } else {
    const int tokens = shape.key_block, channels = shape.value_block, block = at / tokens;
    const int64_t key_row = row_bytes(fmt, tokens), value_row = row_bytes(fmt, channels);
    for (int d = 0; d < dim; d++) {
      const int64_t row = (int64_t)block * dim + d;
      const int code = code_at(fmt, page + row * key_row, tokens, at % tokens);
      key[d * stride] = (float)code * from_f16(ks[row]) + from_f16(kz[row]);
    }
    for (int first = 0; first < dim; first += channels) {
      const int64_t row = (int64_t)(first / channels) * capacity + at;
      const float scale = from_f16(vs[row]), zero = from_f16(vz[row]);
      for (int d = 0; d < channels; d++)
        value[first + d] = (float)code_at(fmt, values + row * value_row, channels, d) * scale + zero;
    }
  }
}

// One side of an fp8 page: `rows` rows of `columns` numbers, `stride` apart.
static void seal_fp8(const float* x, int rows, int columns, int64_t stride, uint8_t* out, uint16_t* scale16) {
  float peak = 0;
  for (int r = 0; r < rows; r++)
    for (int i = 0; i < columns; i++) {
      const float size = __builtin_fabsf(x[r * stride + i]);
      peak = size > peak ? size : peak;
    }
  const float step = peak / 448.f;
  *scale16 = to_f16(clamp_f16(step > 1e-6f ? step : 1e-6f));
  const float scale = from_f16(*scale16);
  for (int r = 0; r < rows; r++)
    for (int i = 0; i < columns; i++) out[(int64_t)r * columns + i] = to_e4m3(x[r * stride + i] / scale);
}

// Packs a full page: keys [dim][stride] and values [capacity][dim] in f32.
static void seal_page(Format fmt, const PageShape& shape, int dim, uint8_t* page, const float* keys, int64_t stride,
                      const float* values, const Place& place) {
  if (is_opened(fmt)) return seal_opened(fmt, shape, dim, page, keys, stride, values, place);
  const int capacity = shape.capacity;
  uint8_t* vpart = page + shape.values;
  uint16_t *ks = (uint16_t*)(page + shape.k_scale), *kz = (uint16_t*)(page + shape.k_zero);
  uint16_t *vs = (uint16_t*)(page + shape.v_scale), *vz = (uint16_t*)(page + shape.v_zero);
  if (fmt == FP8) {
    seal_fp8(keys, dim, capacity, stride, page, ks);
    seal_fp8(values, capacity, dim, dim, vpart, vs);
  } else if (fmt == F32) {
    for (int d = 0; d < dim; d++)
      std::memcpy((float*)page + (int64_t)d * capacity, keys + d * stride, sizeof(float) * capacity);
    std::memcpy(vpart, values, sizeof(float) * (int64_t)capacity * dim);
  } else if (is_float(fmt)) {
    for (int d = 0; d < dim; d++)
      for (int t = 0; t < capacity; t++) ((uint16_t*)page)[(int64_t)d * capacity + t] = to_half(fmt, keys[d * stride + t]);
    for (int64_t i = 0; i < (int64_t)capacity * dim; i++) ((uint16_t*)vpart)[i] = to_half(fmt, values[i]);
  } else {
    const int tokens = shape.key_block, channels = shape.value_block;
    int64_t row = 0;
    for (int first = 0; first < capacity; first += tokens)
      for (int d = 0; d < dim; d++, row++)
        seal_row(fmt, keys + d * stride + first, tokens, page + row * row_bytes(fmt, tokens), ks + row, kz + row);
    row = 0;
    for (int first = 0; first < dim; first += channels)
      for (int t = 0; t < capacity; t++, row++)
        seal_row(fmt, values + (int64_t)t * dim + first, channels, vpart + row * row_bytes(fmt, channels), vs + row,
                 vz + row);
  }
}

}  // namespace TARGET
}  // namespace winnow
