// Mustafar: of each token only the numbers that are largest, a bitmap and what it says has stayed.
#pragma once
#include "../opened.h"
#include "../top.h"

namespace winnow {
namespace TARGET {

// One side of a page, whose bitmaps are part `part`. Number d of token t is x[t * by_token + d * by_channel].
static void seal_mustafar(const PageShape& shape, int part, int dim, uint8_t* page, const float* x, int64_t by_token,
                          int64_t by_channel) {
  uint8_t* bitmap = page + shape.parts[part];
  uint16_t* numbers = (uint16_t*)(page + shape.parts[part + 1]);
  const int count = (int)((shape.parts[part + 2] - shape.parts[part + 1]) / (2 * shape.capacity));
  float sizes[256];
  int32_t ones[256];
  for (int d = 0; d < dim; d++) ones[d] = 1;
  for (int t = 0; t < shape.capacity; t++, x += by_token, bitmap += dim / 8) {
    for (int d = 0; d < dim; d++) sizes[d] = __builtin_fabsf(x[d * by_channel]);
    int64_t rest;
    const uint32_t least = top_threshold(sizes, ones, dim, count, &rest);
    std::memset(bitmap, 0, dim / 8);
    for (int d = 0; d < dim; d++)
      if (is_taken(sizes[d], 1, least, &rest)) {
        bitmap[d / 8] |= 1 << d % 8;
        *numbers++ = to_f16(clamp_f16(x[d * by_channel]));
      }
  }
}

static void open_mustafar(const PageShape& shape, int part, int dim, const uint8_t* page, float* x, int64_t by_token,
                          int64_t by_channel) {
  const uint8_t* bitmap = page + shape.parts[part];
  const uint16_t* numbers = (const uint16_t*)(page + shape.parts[part + 1]);
  for (int t = 0; t < shape.capacity; t++, x += by_token, bitmap += dim / 8)
    for (int d = 0; d < dim; d++) {
      const int stays = bitmap[d / 8] >> d % 8 & 1;
      x[d * by_channel] = stays ? from_f16(*numbers) : 0.f;
      numbers += stays;
    }
}

}  // namespace TARGET
}  // namespace winnow
