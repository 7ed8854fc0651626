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

// Which of the numbers that follow each other belongs to each of eight channels, by the byte of their bitmap.
struct Ranks {
  uint8_t of[256][8];
  constexpr Ranks() : of{} {
    for (int byte = 0; byte < 256; byte++)
      for (int d = 0, rank = 0; d < 8; d++) {
        of[byte][d] = (uint8_t)rank;
        rank += byte >> d & 1;
      }
  }
};
static constexpr Ranks RANKS;

// One token, to x [dim]; `end` is that of the page's numbers. Returns where the next token's begin.
INLINE const uint16_t* open_token(const uint8_t* bitmap, const uint16_t* numbers, const uint16_t* end, int dim, float* x) {
  typedef uint8_t Bytes __attribute__((vector_size(8), aligned(1), may_alias));
  const VI bits = {1, 2, 4, 8, 16, 32, 64, 128};
  for (int b = 0; b < dim / 8; b++) {
    const int byte = bitmap[b];
    uint16_t last[8] = {};
    const uint16_t* from = numbers;
    if (end - numbers < 8) {
      for (int i = 0; i < end - numbers; i++) last[i] = numbers[i];
      from = last;
    }
    const VI rank = __builtin_convertvector(*(const Bytes*)RANKS.of[byte], VI);
    const VI stays = (bits & byte) != 0;
    store(x + 8 * b, (V)((VI)__builtin_shuffle(load_f16(from), rank) & stays));
    numbers += __builtin_popcount(byte);
  }
  return numbers;
}

// One side of a page, to x [dim][capacity] or, by token, [capacity][dim].
static void open_mustafar(const PageShape& shape, int part, int dim, const uint8_t* page, float* x, bool by_token) {
  const uint8_t* bitmap = page + shape.parts[part];
  const uint16_t* numbers = (const uint16_t*)(page + shape.parts[part + 1]);
  const uint16_t* end = (const uint16_t*)(page + shape.parts[part + 2]);
  float tokens[LANES][256];
  for (int t = 0; t < shape.capacity; t += LANES) {
    for (int i = 0; i < LANES; i++, bitmap += dim / 8)
      numbers = open_token(bitmap, numbers, end, dim, by_token ? x + (int64_t)(t + i) * dim : tokens[i]);
    if (by_token) continue;
    for (int d = 0; d < dim; d += LANES) {
      V block[LANES];
      for (int i = 0; i < LANES; i++) block[i] = load(tokens[i] + d);
      transpose(block);
      for (int i = 0; i < LANES; i++) store(x + (int64_t)(d + i) * shape.capacity + t, block[i]);
    }
  }
}

}  // namespace TARGET
}  // namespace winnow
