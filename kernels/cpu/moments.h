// Sums of queries before RoPE and of their outer products: see kernels/reference/moments.py.
//
// In double, where the product of two floats is exact; every number is a chain over the rows in their order.
#pragma once
#include "elementwise.h"

namespace winnow {
namespace TARGET {

typedef double Doubles __attribute__((vector_size(64), aligned(8), may_alias));
constexpr int WIDE = 8, MOMENT_ROWS = 32;

// moments [1 + dim][dim] += of queries [rows][dim], the upper triangle of the products in whole vectors.
static void add_moments(double* moments, const double* queries, int rows, int dim) {
  for (int i = -1; i < dim; i++) {
    double* sums = moments + (int64_t)(i + 1) * dim;
    for (int j = max_i(0, i) / WIDE * WIDE; j < dim; j += WIDE) {
      Doubles sum = *(const Doubles*)(sums + j);
      for (int r = 0; r < rows; r++) {
        const double factor = i < 0 ? 1.0 : queries[(int64_t)r * dim + i];
        sum += factor * *(const Doubles*)(queries + (int64_t)r * dim + j);
      }
      *(Doubles*)(sums + j) = sum;
    }
  }
}

static bool query_moments(const KV& kv, const Batch& batch, int layer, const float* qkv, int q_heads,
                          const float* q_norm, float eps) {
  if (!valid_batch(kv, batch, layer, q_heads, 0)) return false;
  const int dim = kv.dim, width = (q_heads + 2 * kv.heads) * dim;
  for (int b = 0; b < batch.size; b++) {
    const int rows = batch.cu_rows[b + 1] - batch.cu_rows[b], vote = max_i(0, batch.first_vote[b]);
    if (vote >= rows || !batch.moments[b]) continue;
#pragma omp parallel for schedule(static) if ((int64_t)(rows - vote) * q_heads * dim * dim >= 16 * WORTH_THREADS)
    for (int h = 0; h < q_heads; h++) {
      double queries[MOMENT_ROWS * 256], *moments = batch.moments[b] + ((int64_t)layer * q_heads + h) * (1 + dim) * dim;
      for (int first = vote; first < rows; first += MOMENT_ROWS) {
        const int count = min_i(MOMENT_ROWS, rows - first);
        for (int r = 0; r < count; r++) {
          const float* q = qkv + (int64_t)(batch.cu_rows[b] + first + r) * width + h * dim;
          float normed[256];
          if (q_norm) { norm_row(q, q_norm, eps, dim, normed); q = normed; }
          for (int d = 0; d < dim; d++) queries[r * dim + d] = q[d];
        }
        add_moments(moments, queries, count, dim);
      }
    }
  }
  return true;
}

}  // namespace TARGET
}  // namespace winnow
