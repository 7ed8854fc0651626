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
  int width, kept, sealed, rest;  // pages: sealed ones, then those in the second format, then open ones
  Format fmt, rest_fmt;
  int sealed_tokens, closed_tokens;  // in the sealed pages; in all full ones

  // The page of the compute format that holds token `token`, and the token's place in it; null out of bounds.
  inline __attribute__((always_inline)) uint8_t* open_page(const KV& kv, int token, int* at) const {
    const int capacity = kv.shapes[kv.compute].capacity, index = token - closed_tokens;
    const int column = sealed + rest + index / capacity;
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
  const Format rest_fmt = kv.rest_formats[slot] < FORMATS ? (Format)kv.rest_formats[slot] : F32;
  const int sealed_tokens = kv.sealed[i] * kv.shapes[fmt].capacity;
  return {kv.table + i * kv.width, kv.width, kv.kept[i], kv.sealed[i], kv.rest[i], fmt, rest_fmt, sealed_tokens,
          sealed_tokens + kv.rest[i] * kv.shapes[rest_fmt].capacity};
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
      if (lane.sealed < 0 || lane.rest < 0 || lane.kept < lane.closed_tokens || lane.kept < rows) return false;
      const int open = kv.shapes[kv.compute].capacity;
      if (window > 0 && batch.lane_positions[b] && lane.kept > batch.positions_capacity[b]) return false;
      if (batch.log_weights[b] && lane.kept > batch.log_weights_capacity[b]) return false;
      if (lane.sealed + lane.rest + (lane.kept - lane.closed_tokens + open - 1) / open > kv.width) return false;
    }
  }
  return true;
}

// Token `index` of a lane, dequantized; false where it lies outside the lane or its pages outside the arena.
INLINE bool read_token(const KV& kv, const Lane& lane, int index, float* key, int64_t stride, float* value) {
  if (index < 0 || index >= lane.kept) return false;
  const bool in_sealed = index < lane.sealed_tokens, in_rest = !in_sealed && index < lane.closed_tokens;
  const Format fmt = in_sealed ? lane.fmt : in_rest ? lane.rest_fmt : kv.compute;
  const PageShape& shape = kv.shapes[fmt];
  const int at = index - (in_sealed ? 0 : in_rest ? lane.sealed_tokens : lane.closed_tokens);
  const int column = (in_sealed ? 0 : in_rest ? lane.sealed : lane.sealed + lane.rest) + at / shape.capacity;
  if (column >= lane.width) return false;
  const uint8_t* page = lane.page(kv, column);
  if (!page) return false;
  get_token(fmt, shape, kv.dim, page, at % shape.capacity, key, stride, value);
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

// The pages of a lane to be written: columns [first, sealed) in `fmt`, those from sealed + rest_start up to
// sealed + rest in `rest_fmt`, all full, then open ones. What lies between stays as it is.
struct Target { int first, sealed, rest_start, rest; Format fmt, rest_fmt; };

// Writes n tokens, keys [dim][n] and values [n][dim], to the pages of `table`. False where the pages do not hold them.
static bool write_lane(const KV& kv, int n, const float* keys, const float* values, const Target& to,
                       const int32_t* table, int width) {
  const int dim = kv.dim, closed = to.sealed + to.rest;
  const PageShape &packed = kv.shapes[to.fmt], &second = kv.shapes[to.rest_fmt], &open = kv.shapes[kv.compute];
  if (n < 0 || to.first < 0 || to.sealed < to.first || to.rest_start < 0 || to.rest < to.rest_start) return false;
  const int64_t full = (int64_t)(to.sealed - to.first) * packed.capacity +
                       (int64_t)(to.rest - to.rest_start) * second.capacity;
  const int64_t columns = closed + (n - full + open.capacity - 1) / open.capacity;
  if (full > n || (n > 0 && columns > width)) return false;
  int t = 0;
  for (int c = to.first; t < n; c++) {
    if (c >= to.sealed && c < to.sealed + to.rest_start) continue;
    const int64_t id = table[c];
    if (id < 0 || id >= kv.pages) return false;
    uint8_t* page = kv.data + id * kv.page_bytes;
    if (c < closed) {
      const bool is_rest = c >= to.sealed;
      const PageShape& shape = is_rest ? second : packed;
      seal_page(is_rest ? to.rest_fmt : to.fmt, shape, dim, page, keys + t, n, values + (int64_t)t * dim);
      t += shape.capacity;
      continue;
    }
    float key[256];
    for (int at = 0; t < n && at < open.capacity; t++, at++) {
      for (int d = 0; d < dim; d++) key[d] = keys[d * (int64_t)n + t];
      put_token(kv.compute, open, dim, page, at, key, values + (int64_t)t * dim);
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
    const Target to = {start[h], dst_sealed[h], 0, 0, fmt, kv.compute};
    ok = write_lane(kv, n, channels, values + lane, to, dst_table + (int64_t)h * dst_width, dst_width) && ok;
    std::free(channels);
  }
  return ok;
}

// See repack in kernels/reference/pages.py. A lane's survivors are all read before the first page is written, so
// a destination may be any of the lane's own pages.
static bool repack(const KV& kv, int slot, const int32_t* keep, int keep_width, const int32_t* counts,
                   const int32_t* start, const int32_t* dst_table, int dst_width, const int32_t* dst_sealed,
                   Format fmt, const Rest& rest) {
  if (slot < 0 || slot >= kv.slots || fmt >= FORMATS || rest.fmt >= FORMATS) return false;
  const int lanes = kv.layers * kv.heads, dim = kv.dim;
  bool ok = true;
#pragma omp parallel for schedule(dynamic, 1) reduction(&& : ok)
  for (int i = 0; i < lanes; i++) {
    const Lane lane = lane_of(kv, slot, i / kv.heads, i % kv.heads);
    const Target to = {start[i], dst_sealed[i], rest.start ? rest.start[i] : 0, rest.pages ? rest.pages[i] : 0, fmt,
                       rest.fmt};
    const int n = counts[i], first = start[i];
    if (n < 0 || first < 0 || (keep && n > keep_width)) { ok = false; continue; }
    if (n == 0) {
      ok = to.sealed == first && to.rest == to.rest_start && ok;
      continue;
    }
    float* keys = (float*)std::malloc(sizeof(float) * 2 * (int64_t)n * dim);
    float* values = keys + (int64_t)n * dim;
    bool good = keys != nullptr;
    for (int t = 0; good && t < n; t++) {
      const int source = keep ? keep[(int64_t)i * keep_width + t] : first * kv.shapes[fmt].capacity + t;
      good = read_token(kv, lane, source, keys + t, n, values + (int64_t)t * dim);
    }
    ok = good && write_lane(kv, n, keys, values, to, dst_table + (int64_t)i * dst_width, dst_width) && ok;
    std::free(keys);
  }
  return ok;
}

}  // namespace TARGET
}  // namespace winnow
