// Tokens of a lane that a row was told to look at (reading.h chooses them): what attention skips, and the bytes it reads.
//
// A page without a chosen token is not touched. Of the others the whole key part is read, since a key's channels lie
// apart, and in a float format the values of the chosen tokens alone.
#pragma once
#include "codec.h"
#include "kernels.h"
#include "simd.h"

namespace winnow {
namespace TARGET {

INLINE ReadMode read_mode(const Batch& batch, int b, int layer) {
  const Reading* reading = batch.reading ? batch.reading + b : nullptr;
  return reading && reading->modes ? (ReadMode)reading->modes[layer] : READ_ALL;
}
INLINE bool reads_chosen(const Batch& batch, int b, int layer) { return read_mode(batch, b, layer) >= READ_CHOSEN; }

// The choice of row `j` of a sequence for one KV head: a byte for each token of the lane.
INLINE uint8_t* choice_of(const KV& kv, const Reading& reading, int j, int head) {
  return reading.choice + ((int64_t)j * kv.heads + head) * reading.choice_capacity;
}

// Whether any of `count` tokens is chosen; all are where there is no choice.
INLINE bool any_chosen(const uint8_t* chosen, int first, int count) {
  return !chosen || (count > 0 && std::memchr(chosen + first, 1, count));
}

// The first run [from, to) of chosen tokens within [from, count); false if there is none.
INLINE bool chosen_run(const uint8_t* chosen, int count, int& from, int& to) {
  to = count;
  if (chosen) {
    while (from < count && !chosen[from]) from++;
    for (to = from; to < count && chosen[to]; ) to++;
  }
  return from < count;
}

// Bytes that attention reads of a page for `values` of its tokens: all keys, those values, and the scales of both.
INLINE int64_t page_bytes_read(Format fmt, const PageShape& shape, int dim, int values) {
  const int64_t numbers = shape.values + row_bytes(fmt, dim) * values;
  if (!is_quantized(fmt)) return numbers;
  return numbers + shape.v_scale - shape.k_scale + (is_integer(fmt) ? 2 : 1) * (shape.v_zero - shape.v_scale);
}

}  // namespace TARGET
}  // namespace winnow
