// Where the tokens of a lane lie, reading them, and rewriting lanes.
#pragma once
#include <cstdlib>

#include "codec.h"
#include "kernels.h"
#include "scratch.h"
#include "simd.h"

namespace winnow {
namespace TARGET {

struct Lane {
  const int32_t* table;
  int width, kept, sealed, rest;  // pages: sealed ones, then those in the second format, then open ones
  Format fmt, rest_fmt;
  int sealed_tokens, closed_tokens;  // in the sealed pages; in all full ones
  int layer, head;
  const int32_t* positions;  // of its tokens in the text; null where they are their places in the lane

  // Floats that a page of this lane takes when it is opened; 0 where none is.
  int64_t opened_size(const KV& kv) const {
    const int first = is_opened(fmt) ? kv.shapes[fmt].capacity : 0;
    const int second = is_opened(rest_fmt) && rest ? kv.shapes[rest_fmt].capacity : 0;
    return (int64_t)max_i(first, second) * kv.dim;
  }
  // Whether there are as many positions as are looked at when its pages are opened, or with `seals` sealed.
  bool has_positions(const KV& kv, const Positions& of_slot, bool seals = false) const {
    return !of_slot.data || kept <= of_slot.capacity || !(seals || opened_size(kv));
  }
  bool can_be_read(const KV& kv) const { return can_open(kv, fmt) && can_open(kv, rest_fmt); }
  // That of a page whose first token is `first` of the lane.
  inline __attribute__((always_inline)) Place place(const KV& kv, int first) const {
    return {kv, layer, head, positions ? positions + first : nullptr, first};
  }
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

// That of a slot; F32 for a number that no format has.
INLINE Format format_of(const KV& kv, uint8_t fmt) { return fmt < FORMATS && kv.shapes[fmt].capacity ? (Format)fmt : F32; }

// `positions` are those of the slot, [layers, heads, capacity], or null.
INLINE Lane lane_of(const KV& kv, int slot, int layer, int head, const int32_t* positions = nullptr, int capacity = 0) {
  const int64_t i = ((int64_t)slot * kv.layers + layer) * kv.heads + head;
  const Format fmt = format_of(kv, kv.formats[slot]), rest_fmt = format_of(kv, kv.rest_formats[slot]);
  const int sealed_tokens = kv.sealed[i] * kv.shapes[fmt].capacity;
  if (positions) positions += ((int64_t)layer * kv.heads + head) * capacity;
  return {kv.table + i * kv.width, kv.width, kv.kept[i], kv.sealed[i], kv.rest[i], fmt, rest_fmt, sealed_tokens,
          sealed_tokens + kv.rest[i] * kv.shapes[rest_fmt].capacity, layer, head, positions};
}
INLINE Lane lane_of(const KV& kv, const Batch& batch, int b, int layer, int head) {
  return lane_of(kv, batch.slots[b], layer, head, batch.lane_positions[b], batch.positions_capacity[b]);
}

// Whether every index of the batch lies inside its array: the slots, the rows, and the lanes' lengths. Positions of lane
// tokens need only be there under a window, and where pages are opened.
INLINE bool valid_batch(const KV& kv, const Batch& batch, int layer, int q_heads, int window) {
  if (layer < 0 || layer >= kv.layers || q_heads < kv.heads || q_heads % kv.heads || kv.dim > 256) return false;
  if (batch.cu_rows[0] != 0 || batch.cu_rows[batch.size] != batch.rows) return false;
  for (int b = 0; b < batch.size; b++) {
    if (batch.slots[b] < 0 || batch.slots[b] >= kv.slots || batch.cu_rows[b + 1] < batch.cu_rows[b]) return false;
    const int rows = batch.cu_rows[b + 1] - batch.cu_rows[b];
    for (int h = 0; h < kv.heads; h++) {
      const Lane lane = lane_of(kv, batch.slots[b], layer, h);
      if (!lane.can_be_read(kv)) return false;
      if (lane.sealed < 0 || lane.rest < 0 || lane.kept < lane.closed_tokens || lane.kept < rows) return false;
      const int open = kv.shapes[kv.compute].capacity;
      const bool by_position = window > 0 || lane.opened_size(kv);
      if (by_position && batch.lane_positions[b] && lane.kept > batch.positions_capacity[b]) return false;
      if (batch.log_weights[b] && lane.kept > batch.log_weights_capacity[b]) return false;
      if (lane.sealed + lane.rest + (lane.kept - lane.closed_tokens + open - 1) / open > kv.width) return false;
    }
  }
  return true;
}

// Reads tokens of a lane one after the other; of pages that are opened it holds the last one, opened.
struct LaneReader {
  const KV& kv;
  const Lane& lane;
  float *keys, *values;  // [dim][capacity] and [capacity][dim] of that page; scratch
  int column = -1;       // where it is

  LaneReader(const KV& kv_, const Lane& lane_, Scratch& scratch) : kv(kv_), lane(lane_) {
    const int64_t size = lane.opened_size(kv);
    keys = size ? (float*)scratch.need(2 * sizeof(float) * size) : nullptr;
    values = keys ? keys + size : nullptr;
  }
  // Token `index`, as numbers; false where it lies outside the lane or its pages outside the arena.
  bool read(int index, float* key, int64_t stride, float* value) {
    if (index < 0 || index >= lane.kept) return false;
    const bool in_sealed = index < lane.sealed_tokens, in_rest = !in_sealed && index < lane.closed_tokens;
    const Format fmt = in_sealed ? lane.fmt : in_rest ? lane.rest_fmt : kv.compute;
    const PageShape& shape = kv.shapes[fmt];
    const int at = index - (in_sealed ? 0 : in_rest ? lane.sealed_tokens : lane.closed_tokens);
    const int wanted = (in_sealed ? 0 : in_rest ? lane.sealed : lane.sealed + lane.rest) + at / shape.capacity;
    if (wanted >= lane.width) return false;
    const uint8_t* page = lane.page(kv, wanted);
    if (!page) return false;
    if (!is_opened(fmt)) {
      get_token(fmt, shape, kv.dim, page, at % shape.capacity, key, stride, value);
      return true;
    }
    if (!keys) return false;
    if (wanted != column) {
      const Place place = lane.place(kv, index - at % shape.capacity);
      open_keys(fmt, shape, kv.dim, page, place, keys);
      open_values(fmt, shape, kv.dim, page, place, values);
      column = wanted;
    }
    const int t = at % shape.capacity;
    for (int d = 0; d < kv.dim; d++) key[d * stride] = keys[(int64_t)d * shape.capacity + t];
    std::memcpy(value, values + (int64_t)t * kv.dim, sizeof(float) * kv.dim);
    return true;
  }
};

constexpr int RUN_TOKENS = 256;  // that one thread reads of a lane at a time

// keys and values [heads, count, dim], zeros beyond a lane's kept length.
static bool read_lanes(const KV& kv, int slot, int layer, const Positions& positions, int count, float* keys,
                       float* values) {
  if (slot < 0 || slot >= kv.slots || layer < 0 || layer >= kv.layers) return false;
  bool ok = true;
#pragma omp parallel for schedule(dynamic, 1) collapse(2) reduction(&& : ok)
  for (int h = 0; h < kv.heads; h++)
    for (int first = 0; first < count; first += RUN_TOKENS) {
      static thread_local Scratch scratch;
      const Lane lane = lane_of(kv, slot, layer, h, positions.data, positions.capacity);
      if (!lane.has_positions(kv, positions) || !lane.can_be_read(kv)) { ok = false; continue; }
      LaneReader reader(kv, lane, scratch);
      for (int t = first; t < min_i(count, first + RUN_TOKENS); t++) {
        const int64_t at = ((int64_t)h * count + t) * kv.dim;
        if (t < lane.kept) {
          ok = ok && reader.read(t, keys + at, 1, values + at);
        } else {
          std::memset(keys + at, 0, sizeof(float) * kv.dim);
          std::memset(values + at, 0, sizeof(float) * kv.dim);
        }
      }
    }
  return ok;
}

// The pages of a lane to be written: columns [first, sealed) in `fmt`, those from sealed + rest_start up to
// sealed + rest in `rest_fmt`, all full, then open ones. What lies between stays as it is. `stays` [dim] says which
// channels keys have in formats that drop some.
struct Target { int first, sealed, rest_start, rest; Format fmt, rest_fmt; const uint8_t* stays; };

// What a lane whose pages span layers is written with: keys and values of the same tokens one layer up, or null in the
// upper layer itself, whose pages are sealed already; and the other lane's table, null where it shares none.
struct Shared {
  const float *keys, *values;
  double t;
  const int32_t* table;
};

// Writes n tokens, keys [dim][n], values [n][dim] and positions [n], to the pages of `table`; `lane` is theirs. False
// where the pages do not hold them.
static bool write_lane(const KV& kv, const Lane& lane, int n, const float* keys, const float* values,
                       const int32_t* positions, const Target& to, const int32_t* table, int width,
                       const Shared& shared = {}) {
  const int dim = kv.dim, closed = to.sealed + to.rest;
  const PageShape &packed = kv.shapes[to.fmt], &second = kv.shapes[to.rest_fmt], &open = kv.shapes[kv.compute];
  if (!can_open(kv, to.fmt) || !can_open(kv, to.rest_fmt)) return false;
  if ((to.fmt == THINK || to.rest_fmt == THINK) && !to.stays) return false;
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
      const Format fmt = is_rest ? to.rest_fmt : to.fmt;
      const bool spans = spans_layers(fmt);
      if (spans && (!shared.table || shared.table[c] != id)) return false;
      Place place = {kv, lane.layer, lane.head, positions + t, t, to.stays};
      if (spans && shared.keys) {
        place.upper_keys = shared.keys + t;
        place.upper_values = shared.values + (int64_t)t * dim;
        place.t = shared.t;
      }
      if (!spans || shared.keys) seal_page(fmt, shape, dim, page, keys + t, n, values + (int64_t)t * dim, place);
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
                        const int32_t* positions, const int32_t* counts, const int32_t* start, const int32_t* dst_table, int dst_width,
                        const int32_t* dst_sealed, Format fmt, const uint8_t* stays) {
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
    float* channels = (float*)std::malloc(sizeof(float) * (int64_t)n * dim + sizeof(int32_t) * n);
    if (!channels) { ok = false; continue; }
    int32_t* at = (int32_t*)(channels + (int64_t)n * dim);
    const int64_t first = (int64_t)h * count * dim;
    for (int t = 0; t < n; t++) {
      for (int d = 0; d < dim; d++) channels[d * (int64_t)n + t] = keys[first + (int64_t)t * dim + d];
      at[t] = positions ? positions[(int64_t)h * count + t] : start[h] * kv.shapes[fmt].capacity + t;
    }
    const Target to = {start[h], dst_sealed[h], 0, 0, fmt, kv.compute,
                       stays ? stays + ((int64_t)layer * kv.heads + h) * dim : nullptr};
    const Lane lane = lane_of(kv, slot, layer, h);
    ok = write_lane(kv, lane, n, channels, values + first, at, to, dst_table + (int64_t)h * dst_width, dst_width) && ok;
    std::free(channels);
  }
  return ok;
}

// Tokens of a lane that move, as they are read: keys [dim][n], values [n][dim], and positions [n].
struct Moved {
  float *keys, *values;
  int32_t* positions;
};

// Reads the tokens `keep` of a lane, or the n ones from `first` on. False where one lies outside it; the memory is freed
// with `keys` in either case.
static bool read_moved(const KV& kv, const Lane& lane, const int32_t* keep, int n, int64_t first, bool seals, Moved* to) {
  static thread_local Scratch scratch;
  const int dim = kv.dim;
  to->keys = (float*)std::malloc(sizeof(float) * 2 * (int64_t)n * dim + sizeof(int32_t) * (n + 1));
  if (!to->keys) return false;
  to->values = to->keys + (int64_t)n * dim;
  to->positions = (int32_t*)(to->values + (int64_t)n * dim);
  LaneReader reader(kv, lane, scratch);
  for (int t = 0; t < n; t++) {
    const int source = keep ? keep[t] : (int)first + t;
    if (!reader.read(source, to->keys + t, n, to->values + (int64_t)t * dim)) return false;
    to->positions[t] = seals && lane.positions ? lane.positions[source] : source;
  }
  return true;
}

// See repack in kernels/reference/pages.py. A lane's survivors are all read before the first page is written, so
// a destination may be any of the lane's own pages. So are those of two lanes that share pages.
static bool repack(const KV& kv, int slot, const int32_t* keep, int keep_width, const int32_t* counts,
                   const int32_t* start, const int32_t* dst_table, int dst_width, const int32_t* dst_sealed,
                   Format fmt, const Rest& rest, const Positions& positions, const uint8_t* stays) {
  if (slot < 0 || slot >= kv.slots || fmt >= FORMATS || rest.fmt >= FORMATS) return false;
  if (rest.merged_from >= 0 && !rest.pages) return false;
  const int lanes = kv.layers * kv.heads;
  const bool seals = is_opened(fmt) || (rest.pages && is_opened(rest.fmt));
  bool ok = true;
#pragma omp parallel for schedule(dynamic, 1) reduction(&& : ok)
  for (int i = 0; i < lanes; i++) {
    const int layer = i / kv.heads, depth = rest.merged_from < 0 ? -1 : layer - rest.merged_from;
    if (depth > 0 && depth % 2) continue;  // comes with the layer below
    const int group = depth >= 0 && layer + 1 < kv.layers ? 2 : 1;
    Moved moved[2] = {};
    bool good = true;
    for (int k = 0; k < group; k++) {
      const int j = i + k * kv.heads, n = counts[j];
      const Lane lane = lane_of(kv, slot, layer + k, i % kv.heads, positions.data, positions.capacity);
      good = good && n >= 0 && start[j] >= 0 && !(keep && n > keep_width) && lane.has_positions(kv, positions, seals) &&
             lane.can_be_read(kv);
      const int64_t first = (int64_t)start[j] * kv.shapes[fmt].capacity;
      good = good && read_moved(kv, lane, keep ? keep + (int64_t)j * keep_width : nullptr, n, first, seals, &moved[k]);
    }
    for (int k = 0; k < group && good; k++) {
      const int j = i + k * kv.heads;
      const Lane lane = lane_of(kv, slot, layer + k, i % kv.heads);
      const Target to = {start[j], dst_sealed[j], rest.start ? rest.start[j] : 0, rest.pages ? rest.pages[j] : 0, fmt,
                         rest.fmt, stays ? stays + (int64_t)j * kv.dim : nullptr};
      const int32_t* table = dst_table + (int64_t)j * dst_width;
      Shared shared = {nullptr, nullptr, rest.t, nullptr};
      if (group == 2) {
        const int other = k ? i : i + kv.heads;
        shared.table = dst_table + (int64_t)other * dst_width;
        if (k == 0) {
          shared.keys = moved[1].keys;
          shared.values = moved[1].values;
          good = counts[j] == counts[other] && start[j] == start[other] && dst_sealed[j] == dst_sealed[other] &&
                 to.rest_start == rest.start[other] && to.rest == rest.pages[other] &&
                 !(keep && std::memcmp(keep + (int64_t)j * keep_width, keep + (int64_t)other * keep_width,
                                       sizeof(int32_t) * counts[j]));
        }
      }
      good = good && write_lane(kv, lane, counts[j], moved[k].keys, moved[k].values, moved[k].positions, to, table,
                                dst_width, shared);
    }
    for (const Moved& part : moved) std::free(part.keys);
    ok = ok && good;
  }
  return ok;
}

}  // namespace TARGET
}  // namespace winnow
