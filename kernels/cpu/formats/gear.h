// GEAR: four-bit codes, outliers beside them, and the rest of the error at low rank. What is computed, and in which
// order where it matters, says kernels/reference/formats/gear.py.
#pragma once
#include "../integers.h"
#include "../opened.h"
#include "../scratch.h"

namespace winnow {
namespace TARGET {

constexpr int RANK = 2, GEAR_PARTS = 7, POWER_LOOPS = 3;

// One side of a page: rows of keys are channels, those of values tokens.
struct GearSide {
  int rows, columns, tokens, dim, apart;  // `apart` outliers a row
  bool wide;                              // their places take two bytes
  int64_t codes, scale, zero, outliers, by_token, by_channel, places;
};
INLINE GearSide gear_side(const PageShape& shape, int dim, bool is_keys) {
  const int64_t* part = shape.parts + (is_keys ? 0 : GEAR_PARTS);
  const int rows = is_keys ? dim : shape.capacity, columns = is_keys ? shape.capacity : dim;
  return {rows, columns, shape.capacity, dim, (int)((part[4] - part[3]) / (2 * rows)), columns > 256, part[0], part[1],
          part[2], part[3], part[4], part[5], part[6]};
}

// The k least numbers of a row, of equal ones the first, and the k greatest, of equal ones the last: ascending.
static void find_outliers(const float* x, int columns, int k, int* places) {
  for (int i = 0; i < 2 * k; i++) {
    const bool low = i < k;
    int found = -1;
    for (int n = 0; n < columns; n++) {
      if (found >= 0 && (low ? !(x[n] < x[found]) : x[n] < x[found])) continue;
      bool taken = false;
      for (int j = low ? 0 : k; j < i; j++) taken = taken || places[low ? j : 3 * k - 1 - j] == n;
      if (!taken) found = n;
    }
    places[low ? i : 3 * k - 1 - i] = found;  // the greatest is found first and comes last
  }
}

// Gram-Schmidt over the columns of x [rows][RANK]; zeros for a column that is a sum of those before it.
static void orthonormal(double* x, int rows) {
  for (int r = 0; r < RANK; r++) {
    double size = 0, left = 0;
    for (int i = 0; i < rows; i++) size += x[i * RANK + r] * x[i * RANK + r];
    for (int q = 0; q < r; q++) {
      double along = 0;
      for (int i = 0; i < rows; i++) along += x[i * RANK + r] * x[i * RANK + q];
      for (int i = 0; i < rows; i++) x[i * RANK + r] -= along * x[i * RANK + q];
    }
    for (int i = 0; i < rows; i++) left += x[i * RANK + r] * x[i * RANK + r];
    const double root = __builtin_sqrt(left);
    for (int i = 0; i < rows; i++) x[i * RANK + r] = left > 1e-20 * size ? x[i * RANK + r] / root : 0.0;
  }
}

// y [rows] = e x [columns], and y [columns] = e^T x [rows], for e [rows][columns].
static void times(const float* e, int rows, int columns, const double* x, double* y) {
  for (int i = 0; i < rows; i++, e += columns) {
    double sums[RANK] = {};
    for (int n = 0; n < columns; n++)
      for (int r = 0; r < RANK; r++) sums[r] += e[n] * x[n * RANK + r];
    for (int r = 0; r < RANK; r++) y[i * RANK + r] = sums[r];
  }
}
static void times_transposed(const float* e, int rows, int columns, const double* x, double* y) {
  for (int n = 0; n < columns * RANK; n++) y[n] = 0;
  for (int i = 0; i < rows; i++, e += columns)
    for (int n = 0; n < columns; n++)
      for (int r = 0; r < RANK; r++) y[n * RANK + r] += e[n] * x[i * RANK + r];
}

static void seal_gear(const PageShape& shape, int dim, bool is_keys, uint8_t* page, const float* x, int64_t stride) {
  static thread_local Scratch scratch;
  const GearSide side = gear_side(shape, dim, is_keys);
  const int rows = side.rows, columns = side.columns, k = side.apart / 2;
  const size_t doubles = (size_t)RANK * (rows + columns), floats = (size_t)rows * columns + columns;
  double* of_row = (double*)scratch.need(sizeof(double) * doubles + sizeof(float) * floats + sizeof(int) * side.apart);
  if (!of_row) return;
  double* of_column = of_row + RANK * rows;
  float *error = (float*)(of_column + RANK * columns), *level = error + (int64_t)rows * columns;
  int* places = (int*)(level + columns);
  uint16_t *scale = (uint16_t*)(page + side.scale), *zero = (uint16_t*)(page + side.zero);
  uint16_t* outliers = (uint16_t*)(page + side.outliers);
  for (int i = 0; i < rows; i++, x += stride, outliers += side.apart) {
    double sum = 0;
    for (int n = 0; n < columns; n++) { level[n] = x[n]; sum += x[n]; }
    find_outliers(x, columns, k, places);
    const float mean = (float)(sum / columns);
    for (int j = 0; j < side.apart; j++) {
      level[places[j]] = mean;
      outliers[j] = to_f16(clamp_f16(x[places[j]]));
      if (side.wide) ((uint16_t*)(page + side.places))[i * side.apart + j] = (uint16_t)places[j];
      else page[side.places + i * side.apart + j] = (uint8_t)places[j];
    }
    uint8_t* codes = page + side.codes + (int64_t)i * columns / 2;
    seal_row(INT4, level, columns, codes, scale + i, zero + i);
    const float step = from_f16(scale[i]), least = from_f16(zero[i]);
    float* e = error + (int64_t)i * columns;
    for (int n = 0; n < columns; n++) e[n] = x[n] - ((float)code_at(INT4, codes, columns, n) * step + least);
    for (int j = 0; j < side.apart; j++) e[places[j]] = 0;
  }
  // Power iteration starts from the side of channels and ends there.
  double *channels = is_keys ? of_row : of_column, *tokens = is_keys ? of_column : of_row;
  for (int i = 0; i < dim * RANK; i++) channels[i] = (double)(uint32_t)((i + 1) * 2654435761u) / 4294967296.0;
  auto to_tokens = [&] { is_keys ? times_transposed(error, rows, columns, channels, tokens) : times(error, rows, columns, channels, tokens); };
  auto to_channels = [&] { is_keys ? times(error, rows, columns, tokens, channels) : times_transposed(error, rows, columns, tokens, channels); };
  for (int loop = 1; loop < POWER_LOOPS; loop++) { to_tokens(); to_channels(); }
  orthonormal(channels, dim);
  to_tokens();
  orthonormal(tokens, side.tokens);
  to_channels();
  uint16_t *by_token = (uint16_t*)(page + side.by_token), *by_channel = (uint16_t*)(page + side.by_channel);
  for (int i = 0; i < side.tokens * RANK; i++) by_token[i] = to_f16(clamp_f16((float)tokens[i]));
  for (int i = 0; i < dim * RANK; i++) by_channel[i] = to_f16(clamp_f16((float)channels[i]));
}

// Rows of numbers, to x [rows][columns].
static void open_gear(const PageShape& shape, int dim, bool is_keys, const uint8_t* page, float* x) {
  static thread_local Scratch scratch;
  const GearSide side = gear_side(shape, dim, is_keys);
  const int columns = side.columns, half = columns / 2;
  float* first = (float*)scratch.need(sizeof(float) * RANK * columns);
  if (!first) return;
  float* second = first + columns;
  const uint16_t *scale = (const uint16_t*)(page + side.scale), *zero = (const uint16_t*)(page + side.zero);
  const uint16_t* outliers = (const uint16_t*)(page + side.outliers);
  const uint16_t* of_row = (const uint16_t*)(page + (is_keys ? side.by_channel : side.by_token));
  const uint16_t* of_column = (const uint16_t*)(page + (is_keys ? side.by_token : side.by_channel));
  for (int n = 0; n < columns; n++) { first[n] = from_f16(of_column[2 * n]); second[n] = from_f16(of_column[2 * n + 1]); }
  for (int i = 0; i < side.rows; i++, x += columns, of_row += RANK, outliers += side.apart) {
    const uint8_t* codes = page + side.codes + (int64_t)i * half;
    const float step = from_f16(scale[i]), least = from_f16(zero[i]), a = from_f16(of_row[0]), b = from_f16(of_row[1]);
    for (int n = 0; n < half; n++) x[n] = (float)(codes[n] & 15) * step + least + (a * first[n] + b * second[n]);
    for (int n = 0; n < half; n++)
      x[half + n] = (float)(codes[n] >> 4) * step + least + (a * first[half + n] + b * second[half + n]);
    for (int j = 0; j < side.apart; j++) {
      const int64_t at = (int64_t)i * side.apart + j;
      const int place = side.wide ? ((const uint16_t*)(page + side.places))[at] : page[side.places + at];
      if (place < columns) x[place] = from_f16(outliers[j]);
    }
  }
}

}  // namespace TARGET
}  // namespace winnow
