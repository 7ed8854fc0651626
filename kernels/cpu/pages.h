// Where the tokens of a lane lie, reading them, and rewriting lanes.
#pragma once
#include <cstdlib>

#include "codec.h"
#include "kernels.h"
#include "simd.h"

namespace winnow {
namespace TARGET {

struct Lane {
  const int32_t* table;
  int width, kept, sealed;
  Format fmt;  // of its sealed pages
  int sealed_tokens;

  // The page of the compute format that holds token `token`, and the token's place in it; null out of bounds.
  inline __attribute__((always_inline)) uint8_t* open_page(const KV& kv, int token, int* at) const {
    const int capacity = kv.shapes[kv.compute].capacity, index = token - sealed_tokens;
    const int column = sealed + index / capacity;
    if (index < 0 || token >= kept || column >= width) return nullptr;
    *at = index % capacity;
    return page(kv, column);
  }
  inline __attribute__((always_inline)) uint8_t* page(const KV& kv, int column) const {
    const int64_t id = table[column];
    return id < 0 || id >= kv.pages ? nullptr : kv.data + id * kv.page_bytes;
  }
};

INLINE Lane lane_of(const KV& kv, int slot, int layer, int head) {
  const int64_t i = ((int64_t)slot * kv.layers + layer) * kv.heads + head;
  const Format fmt = kv.formats[slot] < FORMATS ? (Format)kv.formats[slot] : F32;
  return {kv.table + i * kv.width, kv.width, kv.kept[i], kv.sealed[i], fmt, kv.sealed[i] * kv.shapes[fmt].capacity};
}

// Whether every index of the batch lies inside its array: the slots, the rows, and the lanes' lengths. Positions of lane
// tokens need only be there under a window.
INLINE bool valid_batch(const KV& kv, const Batch& batch, int layer, int q_heads, int window) {
  if (layer < 0 || layer >= kv.layers || q_heads < kv.heads || q_heads % kv.heads || kv.dim > 256) return false;
  if (batch.cu_rows[0] != 0 || batch.cu_rows[batch.size] != batch.rows) return false;
  for (int b = 0; b < batch.size; b++) {
    if (batch.slots[b] < 0 || batch.slots[b] >= kv.slots || batch.cu_rows[b + 1] < batch.cu_rows[b]) return false;
    const int rows = batch.cu_rows[b + 1] - batch.cu_rows[b];
    for (int h = 0; h < kv.heads; h++) {
      const Lane lane = lane_of(kv, batch.slots[b], layer, h);
      if (lane.sealed < 0 || lane.kept < lane.sealed_tokens || lane.kept < rows) return false;
      const int open = kv.shapes[kv.compute].capacity;
      if (window > 0 && batch.lane_positions[b] && lane.kept > batch.positions_capacity[b]) return false;
      if (batch.log_weights[b] && lane.kept > batch.log_weights_capacity[b]) return false;
      if (lane.sealed + (lane.kept - lane.sealed_tokens + open - 1) / open > kv.width) return false;
    }
  }
  return true;
}

// Token `index` of a lane, dequantized; false where it lies outside the lane or its pages outside the arena.
INLINE bool read_token(const KV& kv, const Lane& lane, int index, float* key, int64_t stride, float* value) {
  if (index < 0 || index >= lane.kept) return false;
  const bool in_sealed = index < lane.sealed_tokens;
  const Format fmt = in_sealed ? lane.fmt : kv.compute;
  const PageShape& shape = kv.shapes[fmt];
  const int rest = in_sealed ? index : index - lane.sealed_tokens;
  const int column = (in_sealed ? 0 : lane.sealed) + rest / shape.capacity;
  if (column >= lane.width) return false;
  const uint8_t* page = lane.page(kv, column);
  if (!page) return false;
  get_token(fmt, shape, kv.dim, page, rest % shape.capacity, key, stride, value);
  return true;
}

// keys and values [heads, count, dim], zeros beyond a lane's kept length.
static bool read_lanes(const KV& kv, int slot, int layer, int count, float* keys, float* values) {
  if (slot < 0 || slot >= kv.slots || layer < 0 || layer >= kv.layers) return false;
  bool ok = true;
#pragma omp parallel for schedule(static) collapse(2) reduction(&& : ok)
  for (int h = 0; h < kv.heads; h++)
    for (int t = 0; t < count; t++) {
      const Lane lane = lane_of(kv, slot, layer, h);
      const int64_t at = ((int64_t)h * count + t) * kv.dim;
      if (t < lane.kept) {
        ok = ok && read_token(kv, lane, t, keys + at, 1, values + at);
      } else {
        std::memset(keys + at, 0, sizeof(float) * kv.dim);
        std::memset(values + at, 0, sizeof(float) * kv.dim);
      }
    }
  return ok;
}

// Writes a lane's tokens, keys [dim][n] and values [n][dim], to the pages of `table` from column `first` on: up to
// column `sealed` in `fmt`, all full, then in the compute format. False where the pages do not hold them.
static bool write_lane(const KV& kv, int n, const float* keys, const float* values, int first, const int32_t* table,
                       int width, int sealed, Format fmt) {
  const int dim = kv.dim;
  const PageShape &packed = kv.shapes[fmt], &open = kv.shapes[kv.compute];
  const int64_t sealed_tokens = (int64_t)(sealed - first) * packed.capacity;
  const int64_t columns = sealed + (n - sealed_tokens + open.capacity - 1) / open.capacity;
  if (n < 0 || first < 0 || sealed < first || sealed_tokens > n || columns > width) return false;
  for (int c = first; c < columns; c++) {
    const int64_t id = table[c];
    if (id < 0 || id >= kv.pages) return false;
    uint8_t* page = kv.data + id * kv.page_bytes;
    if (c < sealed) {
      const int64_t t = (int64_t)(c - first) * packed.capacity;
      seal_page(fmt, packed, dim, page, keys + t, n, values + t * dim);
      continue;
    }
    const int64_t t0 = sealed_tokens + (int64_t)(c - sealed) * open.capacity;
    float key[256];
    for (int64_t t = t0; t < n && t < t0 + open.capacity; t++) {
      for (int d = 0; d < dim; d++) key[d] = keys[d * (int64_t)n + t];
      put_token(kv.compute, open, dim, page, (int)(t - t0), key, values + t * dim);
    }
  }
  return true;
}

// See write_lanes in kernels/reference/pages.py. keys and values [heads][count][dim].
static bool write_lanes(const KV& kv, int slot, int layer, int count, const float* keys, const float* values,
                        const int32_t* counts, const int32_t* start, const int32_t* dst_table, int dst_width,
                        const int32_t* dst_sealed, Format fmt) {
  if (slot < 0 || slot >= kv.slots || layer < 0 || layer >= kv.layers || fmt >= FORMATS) return false;
  const int dim = kv.dim;
  bool ok = true;
#pragma omp parallel for schedule(dynamic, 1) reduction(&& : ok)
  for (int h = 0; h < kv.heads; h++) {
    const int n = counts[h];
    if (n < 0 || n > count) { ok = false; continue; }
    if (n == 0) {
      ok = dst_sealed[h] == start[h] && ok;
      continue;
    }
    float* channels = (float*)std::malloc(sizeof(float) * (int64_t)n * dim);
    if (!channels) { ok = false; continue; }
    const int64_t lane = (int64_t)h * count * dim;
    for (int t = 0; t < n; t++)
      for (int d = 0; d < dim; d++) channels[d * (int64_t)n + t] = keys[lane + (int64_t)t * dim + d];
    ok = write_lane(kv, n, channels, values + lane, start[h], dst_table + (int64_t)h * dst_width, dst_width,
                    dst_sealed[h], fmt) && ok;
    std::free(channels);
  }
  return ok;
}

// See repack in kernels/reference/pages.py. A lane's survivors are all read before the first page is written, so
// a destination may be any of the lane's own pages.
static bool repack(const KV& kv, int slot, const int32_t* keep, int keep_width, const int32_t* counts,
                   const int32_t* start, const int32_t* dst_table, int dst_width, const int32_t* dst_sealed,
                   Format fmt) {
  if (slot < 0 || slot >= kv.slots || fmt >= FORMATS) return false;
  const int lanes = kv.layers * kv.heads, dim = kv.dim;
  bool ok = true;
#pragma omp parallel for schedule(dynamic, 1) reduction(&& : ok)
  for (int i = 0; i < lanes; i++) {
    const Lane lane = lane_of(kv, slot, i / kv.heads, i % kv.heads);
    const int n = counts[i], first = start[i];
    if (n < 0 || first < 0 || (keep && n > keep_width)) { ok = false; continue; }
    if (n == 0) {
      ok = dst_sealed[i] == first && ok;
      continue;
    }
    float* keys = (float*)std::malloc(sizeof(float) * 2 * (int64_t)n * dim);
    float* values = keys + (int64_t)n * dim;
    bool good = keys != nullptr;
    for (int t = 0; good && t < n; t++) {
      const int source = keep ? keep[(int64_t)i * keep_width + t] : first * kv.shapes[fmt].capacity + t;
      good = read_token(kv, lane, source, keys + t, n, values + (int64_t)t * dim);
    }
    ok = good && write_lane(kv, n, keys, values, first, dst_table + (int64_t)i * dst_width, dst_width, dst_sealed[i], fmt) && ok;
    std::free(keys);
  }
  return ok;
}

}  // namespace TARGET
}  // namespace winnow
