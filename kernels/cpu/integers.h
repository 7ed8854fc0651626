// What kinds of formats there are, and rows of integer codes with a scale and a zero.
#pragma once
#include "kernels.h"
#include "simd.h"

namespace winnow {
namespace TARGET {

constexpr bool is_integer(Format fmt) { return fmt == INT8 || fmt == INT4 || fmt == INT2; }
constexpr bool is_float(Format fmt) { return fmt == F32 || fmt == BF16 || fmt == F16; }
constexpr bool is_quantized(Format fmt) { return !is_float(fmt); }
constexpr int bits_of(Format fmt) {  // of a format whose pages are read as they lie
  return fmt == F32 ? 32 : fmt == BF16 || fmt == F16 ? 16 : fmt == INT4 ? 4 : fmt == INT2 ? 2 : 8;
}
constexpr int64_t row_bytes(Format fmt, int columns) { return (int64_t)columns * bits_of(fmt) / 8; }

// The code of column `at` of a packed row.
INLINE int code_at(Format fmt, const uint8_t* row, int columns, int at) {
  if (fmt == INT8) return row[at];
  if (fmt == INT2) return row[at / 4] >> 2 * (at % 4) & 3;
  const int half = columns / 2;
  return at < half ? row[at] & 15 : row[at - half] >> 4;
}

// One row of integer codes, with its scale and zero.
INLINE void seal_row(Format fmt, const float* x, int columns, uint8_t* out, uint16_t* scale16, uint16_t* zero16) {
  const float levels = fmt == INT8 ? 255.f : fmt == INT4 ? 15.f : 3.f;
  float low = x[0], high = x[0];
  for (int i = 1; i < columns; i++) { low = x[i] < low ? x[i] : low; high = x[i] > high ? x[i] : high; }
  const float step = (high - low) / levels;
  *scale16 = to_f16(clamp_f16(step > 1e-6f ? step : 1e-6f));
  *zero16 = to_f16(clamp_f16(low));
  const float scale = from_f16(*scale16), zero = from_f16(*zero16);
  auto code = [&](int i) {
    const float c = __builtin_floorf((x[i] - zero) / scale + 0.5f);
    return (uint8_t)(c < 0.f ? 0.f : c > levels ? levels : c);
  };
  if (fmt == INT8)
    for (int i = 0; i < columns; i++) out[i] = code(i);
  else if (fmt == INT4)
    for (int i = 0; i < columns / 2; i++) out[i] = code(i) | code(i + columns / 2) << 4;
  else
    for (int i = 0; i < columns / 4; i++)
      out[i] = code(4 * i) | code(4 * i + 1) << 2 | code(4 * i + 2) << 4 | code(4 * i + 3) << 6;
}

}  // namespace TARGET
}  // namespace winnow
