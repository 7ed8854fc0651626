// The highest numbers of a row until their weights reach a sum, without sorting: equal numbers are taken from the left.
#pragma once
#include "simd.h"

namespace winnow {
namespace TARGET {

// Numbers that are not negative order as their bits do.
INLINE uint32_t order_of(float x) { uint32_t b; std::memcpy(&b, &x, 4); return b; }

// The order of the least number that is taken when the highest are, one after the other, until their weights reach
// `wanted`; *rest is what those of that very order must still bring. All together weigh at least `wanted`.
static uint32_t top_threshold(const float* x, const int32_t* weights, int count, int64_t wanted, int64_t* rest) {
  uint32_t found = 0, known = 0;  // the leading bits of the answer, and which bits these are
  *rest = wanted;
  for (int shift = 24; shift >= 0; shift -= 8) {
    int64_t sums[256] = {};
    for (int i = 0; i < count; i++) {
      const uint32_t order = order_of(x[i]);
      if ((order & known) == found) sums[order >> shift & 255] += weights[i];
    }
    int digit = 255;
    for (; digit > 0 && sums[digit] < *rest; digit--) *rest -= sums[digit];
    found |= (uint32_t)digit << shift;
    known |= 255u << shift;
  }
  return found;
}

// Whether a number is taken; to be asked from the left.
INLINE bool is_taken(float x, int32_t weight, uint32_t least, int64_t* rest) {
  const uint32_t order = order_of(x);
  if (order != least) return order > least;
  const bool taken = *rest > 0;
  *rest -= weight;
  return taken;
}

}  // namespace TARGET
}  // namespace winnow
