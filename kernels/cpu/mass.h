// Attention mass: what the voting rows of a step gave to each token of their lanes, for policies that score with it.
#pragma once
#include "attention.h"

namespace winnow {
namespace TARGET {

// mass[layer][head][token] += sum over voting rows and their query heads of e^(q.k - lse), rows in order.
static bool attention_mass(const KV& kv, const Batch& batch, int layer, const float* q, int q_heads, float scale,
                           int window, const float* lse) {
  if (!valid_batch(kv, batch, layer, q_heads, window) || q_heads / kv.heads > BLOCK_ROWS) return false;
  const int group = q_heads / kv.heads, block = max_i(1, BLOCK_ROWS / group);
  bool ok = true;
  for (int b = 0; b < batch.size; b++) {
    const int rows = batch.cu_rows[b + 1] - batch.cu_rows[b], vote = max_i(0, batch.first_vote[b]);
    if (vote >= rows || !batch.mass[b]) continue;
    int spans = 0;
    for (int h = 0; h < kv.heads; h++) {
      const Lane lane = lane_of(kv, batch.slots[b], layer, h);
      if (lane.kept > batch.mass_capacity[b]) return false;
      spans = max_i(spans, (groups_of(kv, lane).count + SPAN_GROUPS - 1) / SPAN_GROUPS);
    }
#pragma omp parallel for schedule(dynamic, 1) reduction(&& : ok)
    for (int i = 0; i < kv.heads * spans; i++) {
      static thread_local Scratch scratch;
      const int h = i % kv.heads, span = i / kv.heads;
      const Lane lane = lane_of(kv, batch.slots[b], layer, h);
      const Groups groups = groups_of(kv, lane);
      float* mass = batch.mass[b] + ((int64_t)layer * kv.heads + h) * batch.mass_capacity[b];
      for (int r0 = vote; r0 < rows; r0 += block) {
        const Item it = {b, h, r0, min_i(block, rows - r0), span, -1};
        Block x;
        float* total;
        if (!make_block(kv, batch, lane, groups, it, layer, q, q_heads, scale, window, scratch, &x, &total)) { ok = false; break; }
        for (int k = span * SPAN_GROUPS; k < min_i(groups.count, (span + 1) * SPAN_GROUPS); k++) {
          const Group g = group_at(groups, k);
          if (g.first >= x.last) break;
          if (!group_scores(kv, lane, g, x, groups.max_tokens)) { ok = false; break; }
          const int tokens = min_i(g.pages * g.capacity, lane.kept - g.first);
          for (int r = 0; r < x.rows; r++) {
            const int64_t at = (int64_t)(batch.cu_rows[b] + r0 + r / group) * q_heads + h * group + r % group;
            const V shift = splat(lse[at]);
            const float* s = x.scores + (int64_t)r * groups.max_tokens;
            int t = 0;
            for (; t + LANES <= tokens; t += LANES)
              store(mass + g.first + t, load(mass + g.first + t) + vexp(load(s + t) - shift));
            if (t == tokens) continue;
            const V rest = vexp(load(s + t) - shift);  // groups are whole vectors: nothing beyond them is read
            for (int e = 0; t + e < tokens; e++) mass[g.first + t + e] += rest[e];
          }
        }
      }
    }
  }
  return ok;
}

}  // namespace TARGET
}  // namespace winnow
