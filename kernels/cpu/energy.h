// Sums of squares of the window's queries: see kernels/reference/energy.py. In double, where the square of a float is exact;
// every number is a chain over the rows in their order, and in each over the query heads.
#pragma once
#include "elementwise.h"

namespace winnow {
namespace TARGET {

static bool query_energy(const KV& kv, const Batch& batch, int layer, const float* q, int q_heads) {
  if (!valid_batch(kv, batch, layer, q_heads, 0)) return false;
  const int dim = kv.dim, group = q_heads / kv.heads;
  for (int b = 0; b < batch.size; b++) {
    const Energy& energy = batch.energy[b];
    if (!energy.sums) continue;
    for (int row = batch.cu_rows[b]; row < batch.cu_rows[b + 1]; row++) {
      if (batch.positions[row] < energy.first || batch.positions[row] >= energy.last) continue;
      for (int h = 0; h < q_heads; h++) {
        double* sums = energy.sums + ((int64_t)layer * kv.heads + h / group) * dim;
        const float* x = q + ((int64_t)row * q_heads + h) * dim;
        for (int d = 0; d < dim; d++) sums[d] += (double)x[d] * x[d];
      }
    }
  }
  return true;
}

}  // namespace TARGET
}  // namespace winnow
