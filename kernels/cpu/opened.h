// Formats whose pages are opened: decoded to f32 in scratch, keys [dim][capacity] and values [capacity][dim], before
// the product of f32 pages reads them. Each has its file in formats/; its bytes and numbers are those of
// kernels/reference/formats.
#pragma once
#include "kernels.h"
#include "simd.h"

namespace winnow {
namespace TARGET {

constexpr bool is_low_rank(Format fmt) { return fmt == MATRYOSHKA || fmt == CSKV; }
constexpr bool is_opened(Format fmt) {
  return fmt == MUSTAFAR50 || fmt == MUSTAFAR70 || fmt == GEAR || fmt == THINK || is_low_rank(fmt) || fmt == MINI_CACHE;
}
constexpr bool spans_layers(Format fmt) { return fmt == MINI_CACHE; }

// Whether there is what pages of a format are opened by.
INLINE bool can_open(const KV& kv, Format fmt) {
  if (is_low_rank(fmt) && !(kv.bases[fmt].keys && kv.bases[fmt].values)) return false;
  return fmt != CSKV || (kv.rope.cos && kv.rope.sin && kv.rope.positions > 0);
}

// Where the tokens of a page belong, for formats that go by it.
struct Place {
  const KV& kv;
  int layer, head;
  const int32_t* positions;  // of the page's tokens in the text; null where they are those in the lane
  int first;                 // place of the page's first token in the lane
  // To seal pages that lack channels of keys: [dim] 1 for those that stay; null where nobody has chosen any.
  const uint8_t* channels = nullptr;
  // Of a page that spans layers, to seal it: the tokens of the upper layer, which lie as those of the lower one, and t.
  const float *upper_keys = nullptr, *upper_values = nullptr;
  double t = 0;
  int position(int t) const { return positions ? positions[t] : first + t; }
};

}  // namespace TARGET
}  // namespace winnow

#include "formats/gear.h"
#include "formats/low_rank.h"
#include "formats/mini_cache.h"
#include "formats/mustafar.h"
#include "formats/think.h"

namespace winnow {
namespace TARGET {

// A page's keys, to [dim][capacity], and its values, to [capacity][dim].
static void open_keys(Format fmt, const PageShape& shape, int dim, const uint8_t* page, const Place& place, float* keys) {
  switch (fmt) {
    case MUSTAFAR50: case MUSTAFAR70: open_mustafar(shape, 0, dim, page, keys, false); break;
    case GEAR: open_gear(shape, dim, true, page, keys); break;
    case THINK: open_think_keys(shape, dim, page, keys); break;
    case MATRYOSHKA: case CSKV: open_low_rank_keys(fmt, shape, dim, page, place, keys); break;
    case MINI_CACHE: open_mini_cache_keys(shape, dim, page, place.layer, keys); break;
    default: break;
  }
}
static void open_values(Format fmt, const PageShape& shape, int dim, const uint8_t* page, const Place& place,
                        float* values) {
  switch (fmt) {
    case MUSTAFAR50: case MUSTAFAR70: open_mustafar(shape, 2, dim, page, values, true); break;
    case GEAR: open_gear(shape, dim, false, page, values); break;
    case MINI_CACHE: open_mini_cache_values(shape, dim, page, place.layer, values); break;
    case THINK: open_think_values(shape, dim, page, values); break;
    case MATRYOSHKA: case CSKV: open_low_rank_values(fmt, shape, dim, page, place, values); break;
    default: break;
  }
}

// Writes a full page of tokens, keys [dim][stride] and values [capacity][dim].
static void seal_opened(Format fmt, const PageShape& shape, int dim, uint8_t* page, const float* keys, int64_t stride,
                        const float* values, const Place& place) {
  switch (fmt) {
    case MINI_CACHE: seal_mini_cache(shape, dim, page, keys, stride, values, place); break;
    case MUSTAFAR50: case MUSTAFAR70:
      seal_mustafar(shape, 0, dim, page, keys, 1, stride);
      seal_mustafar(shape, 2, dim, page, values, dim, 1);
      break;
    case GEAR:
      seal_gear(shape, dim, true, page, keys, stride);
      seal_gear(shape, dim, false, page, values, dim);
      break;
    case THINK: seal_think(shape, dim, page, keys, stride, values, place.channels); break;
    case MATRYOSHKA: case CSKV: seal_low_rank(fmt, shape, dim, page, keys, stride, values, place); break;
    default: break;
  }
}

}  // namespace TARGET
}  // namespace winnow
