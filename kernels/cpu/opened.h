// Formats whose pages are opened: decoded to f32 in scratch, keys [dim][capacity] and values [capacity][dim], before
// the product of f32 pages reads them. Each has its file in formats/; its bytes and numbers are those of
// kernels/reference/formats.
#pragma once
#include "kernels.h"
#include "simd.h"

namespace winnow {
namespace TARGET {

constexpr bool is_opened(Format fmt) { return fmt == MUSTAFAR50 || fmt == MUSTAFAR70 || fmt == GEAR; }

// Where the tokens of a page belong, for formats that go by it.
struct Place {
  const KV& kv;
  int layer, head;
  const int32_t* positions;  // of the page's tokens in the text; null where they are those in the lane
  int first;                 // place of the page's first token in the lane
  int position(int t) const { return positions ? positions[t] : first + t; }
};

}  // namespace TARGET
}  // namespace winnow

#include "formats/gear.h"
#include "formats/mustafar.h"

namespace winnow {
namespace TARGET {

// A page's keys, to [dim][capacity], and its values, to [capacity][dim].
static void open_keys(Format fmt, const PageShape& shape, int dim, const uint8_t* page, const Place&, float* keys) {
  switch (fmt) {
    case MUSTAFAR50: case MUSTAFAR70: open_mustafar(shape, 0, dim, page, keys, 1, shape.capacity); break;
    case GEAR: open_gear(shape, dim, true, page, keys); break;
    default: break;
  }
}
static void open_values(Format fmt, const PageShape& shape, int dim, const uint8_t* page, const Place&, float* values) {
  switch (fmt) {
    case MUSTAFAR50: case MUSTAFAR70: open_mustafar(shape, 2, dim, page, values, dim, 1); break;
    case GEAR: open_gear(shape, dim, false, page, values); break;
    default: break;
  }
}

// Writes a full page of tokens, keys [dim][stride] and values [capacity][dim].
static void seal_opened(Format fmt, const PageShape& shape, int dim, uint8_t* page, const float* keys, int64_t stride,
                        const float* values, const Place&) {
  switch (fmt) {
    case MUSTAFAR50: case MUSTAFAR70:
      seal_mustafar(shape, 0, dim, page, keys, 1, stride);
      seal_mustafar(shape, 2, dim, page, values, dim, 1);
      break;
    case GEAR:
      seal_gear(shape, dim, true, page, keys, stride);
      seal_gear(shape, dim, false, page, values, dim);
      break;
    default: break;
  }
}

}  // namespace TARGET
}  // namespace winnow
