// What a lane's candidates are judged by: q.K over some channels, or a bound of it for whole pages.
#pragma once
#include "attention.h"
#include "chosen.h"

namespace winnow {
namespace TARGET {

// Pages of a lane by column.
struct Columns {
  int sealed, sealed_tokens, sealed_capacity, open_capacity;
  int first_token(int column) const {
    return column < sealed ? column * sealed_capacity : sealed_tokens + (column - sealed) * open_capacity;
  }
  int of(int token) const {
    return token < sealed_tokens ? token / sealed_capacity : sealed + (token - sealed_tokens) / open_capacity;
  }
};
INLINE Columns columns_of(const KV& kv, const Lane& lane) {
  return {lane.sealed, lane.sealed_tokens, kv.shapes[lane.fmt].capacity, kv.shapes[kv.compute].capacity};
}

struct Row { int b, j, stride; bool again; int64_t scores; };  // that chooses; where its [q_heads][stride] scores begin

// Bounds -----------------------------------------------------------------------------------------------------------

// What e4m3 numbers of a page's keys are multiples of.
INLINE float fp8_unit(const PageShape& shape, const uint8_t* page) {
  return from_f16(*(const uint16_t*)(page + shape.k_scale)) / E4M3_UNIT;
}

// Rounded away from what lies between: a bound stays one.
INLINE uint16_t bf16_toward(float x, bool up) {
  uint32_t b; std::memcpy(&b, &x, 4);
  const bool away = (b >> 31) != (uint32_t)up;  // in magnitude
  return (uint16_t)((b >> 16) + (away && (b & 0xffff) ? 1 : 0));
}

// bounds[0][channel] and [1][channel] of a full page whose numbers have no grid, times `unit`.
template <Format F> static void page_bounds(const uint8_t* page, int capacity, int dim, float unit, uint16_t* bounds) {
  for (int d = 0; d < dim; d++) {
    const uint8_t* row = page + d * row_bytes(F, capacity);
    V low = splat(NEG_INF), high = low, x, y;
    for (int p = 0; p < (capacity + 15) / 16; p++) {
      load_pair<F>(row, first_column<F>(p), second_column<F>(p, capacity), x, y);
      high = vmax(high, vmax(x, y));
      low = vmax(low, vmax(zero() - x, zero() - y));
    }
    bounds[d] = bf16_toward(-hmax(low) * unit, false);
    bounds[dim + d] = bf16_toward(hmax(high) * unit, true);
  }
}

// Bounds of one lane's pages before `upto` that have none yet. Codes with a grid need none: it begins and ends there.
static bool bound_pages(const KV& kv, const Reading& rule, const Lane& lane, int64_t index, int upto, int64_t* touched) {
  const int skipped = is_integer(lane.fmt) ? lane.sealed : 0;
  if (upto - skipped > rule.bounds_capacity) return false;
  int32_t& known = rule.bounded[index];
  for (; known < upto - skipped; known++) {
    const int column = skipped + known;
    const Format fmt = column < lane.sealed ? lane.fmt : kv.compute;
    const PageShape& shape = kv.shapes[fmt];
    const uint8_t* page = lane.page(kv, column);
    if (!page || known < 0) return false;
    uint16_t* bounds = rule.bounds + (index * rule.bounds_capacity + known) * 2 * kv.dim;
    switch (fmt) {
      case F32: page_bounds<F32>(page, shape.capacity, kv.dim, 1.f, bounds); break;
      case BF16: page_bounds<BF16>(page, shape.capacity, kv.dim, 1.f, bounds); break;
      case F16: page_bounds<F16>(page, shape.capacity, kv.dim, 1.f, bounds); break;
      default: page_bounds<FP8>(page, shape.capacity, kv.dim, fp8_unit(shape, page), bounds);
    }
    *touched += shape.values;
  }
  return true;
}

// Scores -----------------------------------------------------------------------------------------------------------

// No key of the page has a greater product with q: sum over channels of max(q * least, q * greatest).
INLINE float bound_of(const float* q, int dim, const uint16_t* bounds) {
  V sum = zero();
  for (int d = 0; d < dim; d += LANES) {
    const V v = load(q + d);
    sum += vmax(v * load_bf16(bounds + d), v * load_bf16(bounds + dim + d));
  }
  return hsum(sum);
}
// As above, from the two ends of the grid; where blocks of tokens have grids of their own, of the highest of them.
INLINE float grid_bound(const float* q, int dim, const PageShape& shape, Format fmt, const uint8_t* page) {
  const uint16_t *scale = (const uint16_t*)(page + shape.k_scale), *least = (const uint16_t*)(page + shape.k_zero);
  const V levels = splat((float)((1 << bits_of(fmt)) - 1));
  float bound = NEG_INF;
  for (int first = 0; first < shape.capacity; first += shape.key_block, scale += dim, least += dim) {
    V sum = zero();
    for (int d = 0; d < dim; d += LANES) {
      const V v = load(q + d), low = load_f16(least + d);
      sum += vmax(v * low, v * fma(levels, load_f16(scale + d), low));
    }
    const float of_block = hsum(sum);
    bound = of_block > bound ? of_block : bound;
  }
  return bound;
}

// scores[r][token of the page] = q[r] . key over some channels; q [rows][count] of those channels.
template <Format F, int R>
INLINE void channel_tile(const float* q, int count, const int32_t* channels, int dim, const PageShape& shape,
                         const uint8_t* page, float* scores, int64_t lds, float* folded) {
  const int tokens = shape.key_block;
  const int64_t stride = row_bytes(F, tokens);
  const uint16_t *ks = (const uint16_t*)(page + shape.k_scale), *kz = (const uint16_t*)(page + shape.k_zero);
  const V unit = splat(F == FP8 ? fp8_unit(shape, page) : 1.f);
  for (int first = 0; first < shape.capacity; first += tokens, ks += dim, kz += dim, page += dim * stride) {
    float bias[R] = {};
    const float* a = q;
    if constexpr (is_integer(F)) {
      for (int r = 0; r < R; r++)
        for (int i = 0; i < count; i++) {
          folded[r * count + i] = q[r * count + i] * from_f16(ks[channels[i]]);
          bias[r] += q[r * count + i] * from_f16(kz[channels[i]]);
        }
      a = folded;
    }
    for (int p = 0; p < (tokens + 15) / 16; p++) {
      const int x0 = first_column<F>(p), y0 = second_column<F>(p, tokens);
      V x[R], y[R];
      for (int r = 0; r < R; r++) x[r] = y[r] = splat(bias[r]);
      for (int i = 0; i < count; i++) {
        V k, l;
        load_pair<F>(page + channels[i] * stride, x0, y0, k, l);
        for (int r = 0; r < R; r++) {
          const V s = splat(a[r * count + i]);
          x[r] = fma(s, k, x[r]);
          y[r] = fma(s, l, y[r]);
        }
      }
      for (int r = 0; r < R; r++) {
        store(scores + r * lds + first + x0, F == FP8 ? x[r] * unit : x[r]);
        store(scores + r * lds + first + y0, F == FP8 ? y[r] * unit : y[r]);
      }
    }
  }
}
template <Format F>
static void channel_scores(const float* q, int rows, int count, const int32_t* channels, int dim, const PageShape& shape,
                           const uint8_t* page, float* scores, int64_t lds, float* folded) {
  int r = 0;
  for (; r + 3 <= rows; r += 3)
    channel_tile<F, 3>(q + r * count, count, channels, dim, shape, page, scores + r * lds, lds, folded);
  for (; r < rows; r++) channel_tile<F, 1>(q + r * count, count, channels, dim, shape, page, scores + r * lds, lds, folded);
}

INLINE void prefetch_channels(Format fmt, const PageShape& shape, int dim, const int32_t* channels, int count,
                              const uint8_t* page) {
  const int64_t bytes = row_bytes(fmt, shape.key_block);
  for (int first = 0; first < shape.capacity; first += shape.key_block, page += dim * bytes)
    for (int i = 0; i < count; i++)
      for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(page + channels[i] * bytes + line);
}

// Scores of the pages [column, end) for the query heads of one lane, to be found from page `first` on. Adds the bytes that it reads to *touched.
static bool score_columns(const KV& kv, const Batch& batch, const Reading& rule, int layer, const Row& row, int head,
                          const float* q, int q_heads, float scale, int first, int column, int end,
                          float* scores, Scratch& scratch, int64_t* touched) {
  const Lane lane = lane_of(kv, batch.slots[row.b], layer, head);
  const Columns columns = columns_of(kv, lane);
  const int group = q_heads / kv.heads, dim = kv.dim, count = rule.by_bounds ? dim : rule.channel_count;
  const int64_t index = (int64_t)layer * kv.heads + head;
  const int32_t* channels = rule.by_bounds ? nullptr : rule.channels + index * count;
  float* mine = (float*)scratch.need(sizeof(float) * (size_t)count * (group + 3));
  if (!mine) return false;
  for (int g = 0; g < group; g++) {
    const float* from = q + ((int64_t)(batch.cu_rows[row.b] + row.j) * q_heads + head * group + g) * dim;
    for (int i = 0; i < count; i++) {
      const int channel = channels ? channels[i] : i;
      if (channel < 0 || channel >= dim) return false;
      mine[g * count + i] = from[channel] * scale;
    }
  }
  const int skipped = is_integer(lane.fmt) ? lane.sealed : 0, base = columns.first_token(first);
  for (; column < end; column++) {
    const Format fmt = column < lane.sealed ? lane.fmt : kv.compute;
    const PageShape& shape = kv.shapes[fmt];
    const uint8_t* page = lane.page(kv, column);
    if (!page) return false;
    if (rule.by_bounds) {
      const bool grid = is_integer(fmt);
      const uint16_t* bounds = rule.bounds + (index * rule.bounds_capacity + column - skipped) * 2 * dim;
      for (int g = 0; g < group; g++)
        scores[g * row.stride + column - first] =
            grid ? grid_bound(mine + g * dim, dim, shape, fmt, page) : bound_of(mine + g * dim, dim, bounds);
      *touched += grid ? shape.v_scale - shape.k_scale : 4 * dim;
      continue;
    }
    if (column + 1 < end)
      if (const uint8_t* next = lane.page(kv, column + 1)) prefetch_channels(fmt, shape, dim, channels, count, next);
    float *at = scores + columns.first_token(column) - base, *folded = mine + group * count;
#define CALL(F) channel_scores<F>(mine, group, count, channels, dim, shape, page, at, row.stride, folded)
    EACH_FORMAT(CALL)
#undef CALL
    *touched += count * row_bytes(fmt, shape.capacity);
    if (is_quantized(fmt)) *touched += is_integer(fmt) ? (shape.v_scale - shape.k_scale) / dim * count : 2;
  }
  return true;
}

}  // namespace TARGET
}  // namespace winnow
