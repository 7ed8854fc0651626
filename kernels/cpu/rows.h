// Rows of one set against rows of another, lane by lane: which is nearest, and sums of those that go together. For
// tokens that are merged. Every number is one chain in the order of its rows, whatever thread computes it.
#pragma once
#include <cstdlib>

#include "kernels.h"
#include "simd.h"
#include "stored_product.h"

namespace winnow {
namespace TARGET {

constexpr int NEAREST_ROWS = 24, NEAREST_COLUMNS = 64;

// x / |x|, and zero where x is; dim is a multiple of 16.
INLINE void unit_row(const float* x, int dim, float* y) {
  V sum = zero();
  for (int d = 0; d < dim; d += LANES) { const V v = load(x + d); sum = fma(v, v, sum); }
  const float norm = __builtin_sqrtf(hsum(sum));
  const V inverse = splat(1.f / (norm > 1e-8f ? norm : 1e-8f));
  for (int d = 0; d < dim; d += LANES) store(y + d, load(x + d) * inverse);
}

// See nearest_rows in kernels/reference/rows.py. x [lanes][n][dim], y [lanes][m][dim], index and cosine [lanes][n].
static bool nearest_rows(const float* x, const int32_t* x_counts, const float* y, const int32_t* y_counts, int lanes,
                         int n, int m, int dim, int32_t* index, float* cosine) {
  for (int l = 0; l < lanes; l++)
    if (x_counts[l] < 0 || x_counts[l] > n || y_counts[l] < 0 || y_counts[l] > m) return false;
  const int blocks = (m + NEAREST_COLUMNS - 1) / NEAREST_COLUMNS, chunks = (n + NEAREST_ROWS - 1) / NEAREST_ROWS;
  const int64_t block_floats = (int64_t)dim * NEAREST_COLUMNS;
  // Unit rows of y, channel-major in blocks of columns, as keys lie in pages.
  float* columns = (float*)std::malloc(sizeof(float) * block_floats * lanes * blocks + 1);
  if (!columns) return false;
#pragma omp parallel for schedule(static)
  for (int i = 0; i < lanes * blocks; i++) {
    const int lane = i / blocks, first = i % blocks * NEAREST_COLUMNS;
    float* block = columns + i * block_floats;
    float unit[256];
    for (int c = 0; c < NEAREST_COLUMNS; c++) {
      const bool is_row = first + c < y_counts[lane];
      if (is_row) unit_row(y + ((int64_t)lane * m + first + c) * dim, dim, unit);
      for (int d = 0; d < dim; d++) block[(int64_t)d * NEAREST_COLUMNS + c] = is_row ? unit[d] : 0.f;
    }
  }
#pragma omp parallel for schedule(dynamic, 1)
  for (int i = 0; i < lanes * chunks; i++) {
    const int lane = i / chunks, first = i % chunks * NEAREST_ROWS;
    const int rows = max_i(0, min_i(NEAREST_ROWS, x_counts[lane] - first));
    float unit[NEAREST_ROWS * 256], products[NEAREST_ROWS * NEAREST_COLUMNS];
    int32_t* best = index + (int64_t)lane * n + first;
    float* top = cosine + (int64_t)lane * n + first;
    for (int r = 0; r < min_i(NEAREST_ROWS, n - first); r++) { best[r] = -1; top[r] = -2.f; }
    for (int r = 0; r < rows; r++) unit_row(x + ((int64_t)lane * n + first + r) * dim, dim, unit + r * dim);
    for (int b = 0; b * NEAREST_COLUMNS < y_counts[lane]; b++) {
      const uint8_t* block = (const uint8_t*)(columns + ((int64_t)lane * blocks + b) * block_floats);
      product<F32>(unit, dim, rows, block, NEAREST_COLUMNS, dim, products, NEAREST_COLUMNS, false);
      const int held = min_i(NEAREST_COLUMNS, y_counts[lane] - b * NEAREST_COLUMNS);
      for (int r = 0; r < rows; r++)
        for (int c = 0; c < held; c++)
          if (products[r * NEAREST_COLUMNS + c] > top[r]) {
            top[r] = products[r * NEAREST_COLUMNS + c];
            best[r] = b * NEAREST_COLUMNS + c;
          }
    }
  }
  std::free(columns);
  return true;
}

// See sum_rows in kernels/reference/rows.py. x [lanes][n][dim], weights and index [lanes][n], sums [lanes][m][dim] and
// totals [lanes][m] to add to.
static bool sum_rows(const float* x, const float* weights, const int32_t* index, int lanes, int n, int m, int dim,
                     float* sums, float* totals) {
  for (int64_t i = 0; i < (int64_t)lanes * n; i++)
    if (index[i] >= m) return false;
#pragma omp parallel for schedule(static)
  for (int lane = 0; lane < lanes; lane++)
    for (int i = 0; i < n; i++) {
      const int64_t row = (int64_t)lane * n + i;
      if (index[row] < 0) continue;
      const int64_t to = (int64_t)lane * m + index[row];
      const V w = splat(weights[row]);
      for (int d = 0; d < dim; d += LANES) store(sums + to * dim + d, fma(w, load(x + row * dim + d), load(sums + to * dim + d)));
      totals[to] += weights[row];
    }
  return true;
}

}  // namespace TARGET
}  // namespace winnow
