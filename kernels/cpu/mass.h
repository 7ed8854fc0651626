// Attention mass: what the voting rows of a step gave to each token of their lanes, for policies that score with it.
// The rule is that of kernels/vote.py. Rows are counted one after the other, whatever chunk they came in.
#pragma once
#include "attention.h"

namespace winnow {
namespace TARGET {

constexpr float FAINT = 7.888609052210118e-31f;  // 2^-100

INLINE bool is_attention(const Vote& vote) { return vote.temperature == 1.f && vote.heating == 0.f && !vote.noise; }

// One over the temperature of a row.
INLINE float coolness(const Vote& vote, int position) {
  return 1.f / (vote.temperature + vote.heating * (float)max_i(0, position - vote.warm_from));
}

// logits = (logits + noise) / temperature
INLINE void warm(float* logits, const float* noise, float coolness, int tokens) {
  int t = 0;
  for (; t + LANES <= tokens; t += LANES) {
    const V x = load(logits + t);
    store(logits + t, (noise ? x + load(noise + t) : x) * splat(coolness));
  }
  for (; t < tokens; t++) logits[t] = (noise ? logits[t] + noise[t] : logits[t]) * coolness;
}

INLINE void fade(float* mass, float decay, int tokens) {
  int t = 0;
  for (; t + LANES <= tokens; t += LANES) {
    const V x = load(mass + t) * splat(decay);
    store(mass + t, (V)((VI)x & ~(x < splat(FAINT))));
  }
  for (; t < tokens; t++) { mass[t] *= decay; if (mass[t] < FAINT) mass[t] = 0; }
}

// mass (+)= e^(logits - lse), or the larger of the two. Groups are whole vectors, of which the last may be part used.
template <bool is_max>
INLINE void count_row(float* mass, const float* logits, float lse, int tokens) {
  const V shift = splat(lse);
  int t = 0;
  for (; t + LANES <= tokens; t += LANES) {
    const V x = load(mass + t), p = vexp(load(logits + t) - shift);
    store(mass + t, is_max ? vmax(x, p) : x + p);
  }
  if (t == tokens) return;
  const V rest = vexp(load(logits + t) - shift);
  for (int e = 0; t + e < tokens; e++) {
    float& x = mass[t + e];
    x = !is_max ? x + rest[e] : x > rest[e] ? x : rest[e];
  }
}

// What a sequence's mass is counted from.
struct Ballot {
  const KV& kv;
  const Batch& batch;
  int b, layer;
  const float* q;
  int q_heads;
  float scale;
  int window;
  const Vote& vote;

  int group() const { return q_heads / kv.heads; }
  int64_t row(const Item& it, int r) const { return batch.cu_rows[b] + it.row + r / group(); }
  // Place of a block's row in [rows, q_heads].
  int64_t place(const Item& it, int r) const { return row(it, r) * q_heads + it.head * group() + r % group(); }
  bool block(const Item& it, const Lane& lane, const Groups& groups, Scratch& scratch, Block* x) const {
    float* total;
    return make_block(kv, batch, lane, groups, it, layer, q, q_heads, scale, window, scratch, x, &total);
  }
  // Logits of a group as the rows vote with them, -inf where a row may not look.
  bool logits(const Item& it, const Lane& lane, const Groups& groups, const Group& g, const Block& x) const {
    if (!group_scores(kv, lane, g, x, groups.max_tokens)) return false;
    if (is_attention(vote)) return true;
    const float* noise = vote.noise;
    if (noise) noise += ((int64_t)layer * kv.heads + it.head) * batch.mass_capacity[b] + g.first;
    const int tokens = min_i(g.pages * g.capacity, lane.kept - g.first);
    for (int r = 0; r < x.rows; r++)
      warm(x.scores + (int64_t)r * groups.max_tokens, noise, coolness(vote, batch.positions[row(it, r)]), tokens);
    return true;
  }
};

// log of the sum of e^logits over what each row of the item sees, to lse [rows, q_heads].
static bool normalise(const Ballot& ballot, const Item& it, float* lse) {
  static thread_local Scratch scratch;
  const Lane lane = lane_of(ballot.kv, ballot.batch, it.b, ballot.layer, it.head);
  const Groups groups = groups_of(ballot.kv, lane);
  Block x;
  if (!ballot.block(it, lane, groups, scratch, &x)) return false;
  for (int r = 0; r < x.rows; r++) { x.m[r] = NEG_INF; x.l[r] = 0; }
  for (int k = 0; k < groups.count; k++) {
    const Group g = group_at(groups, k);
    if (g.first >= x.last) break;
    if (!ballot.logits(it, lane, groups, g, x)) return false;
    for (int r = 0; r < x.rows; r++) {
      const float* s = x.scores + (int64_t)r * groups.max_tokens;
      V top = splat(x.m[r]), sum = zero();
      for (int t = 0; t < g.pages * g.capacity; t += LANES) top = vmax(top, load(s + t));
      const float m = hmax(top);
      if (m == NEG_INF) continue;
      for (int t = 0; t < g.pages * g.capacity; t += LANES) sum += vexp(load(s + t) - splat(m));
      x.l[r] = x.l[r] * exp1(x.m[r] - m) + hsum(sum);
      x.m[r] = m;
    }
  }
  for (int r = 0; r < x.rows; r++) lse[ballot.place(it, r)] = x.m[r] + __builtin_logf(x.l[r]);
  return true;
}

// Counts rows [vote, rows) of a sequence into one span of one lane.
static bool count_span(const Ballot& ballot, int head, int span, int vote, int rows, const float* lse) {
  static thread_local Scratch scratch;
  const KV& kv = ballot.kv;
  const int block = max_i(1, BLOCK_ROWS / ballot.group());
  const Lane lane = lane_of(kv, ballot.batch, ballot.b, ballot.layer, head);
  const Groups groups = groups_of(kv, lane);
  const int64_t capacity = ballot.batch.mass_capacity[ballot.b];
  float* mass = ballot.batch.mass[ballot.b] + ((int64_t)ballot.layer * kv.heads + head) * capacity;
  for (int r0 = vote; r0 < rows; r0 += block) {
    const Item it = {ballot.b, head, r0, min_i(block, rows - r0), span, -1};
    Block x;
    if (!ballot.block(it, lane, groups, scratch, &x)) return false;
    for (int k = span * SPAN_GROUPS; k < min_i(groups.count, (span + 1) * SPAN_GROUPS); k++) {
      const Group g = group_at(groups, k);
      if (g.first >= x.last) break;
      if (!ballot.logits(it, lane, groups, g, x)) return false;
      const int tokens = min_i(g.pages * g.capacity, lane.kept - g.first);
      for (int r = 0; r < x.rows; r++) {
        const float *s = x.scores + (int64_t)r * groups.max_tokens, shift = lse[ballot.place(it, r)];
        if (r % ballot.group() == 0 && ballot.vote.decay != 1.f) fade(mass + g.first, ballot.vote.decay, tokens);
        if (ballot.vote.is_max) count_row<true>(mass + g.first, s, shift, tokens);
        else count_row<false>(mass + g.first, s, shift, tokens);
      }
    }
  }
  return true;
}

static bool attention_mass(const KV& kv, const Batch& batch, int layer, const float* q, int q_heads, float scale,
                           int window, const float* lse) {
  if (!valid_batch(kv, batch, layer, q_heads, window) || q_heads / kv.heads > BLOCK_ROWS) return false;
  const int block = max_i(1, BLOCK_ROWS / (q_heads / kv.heads));
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
    const Ballot ballot = {kv, batch, b, layer, q, q_heads, scale, window, batch.votes[b]};
    const float* shift = lse;
    if (!is_attention(batch.votes[b])) {  // the rows' own normalisers, where attention's do not fit
      float* own = (float*)shared_scratch.need(sizeof(float) * (size_t)batch.rows * q_heads);
      if (!own) return false;
      const int blocks = (rows - vote + block - 1) / block;
#pragma omp parallel for schedule(dynamic, 1) reduction(&& : ok)
      for (int i = 0; i < kv.heads * blocks; i++) {
        const int row = vote + i / kv.heads * block;
        ok = normalise(ballot, {b, i % kv.heads, row, min_i(block, rows - row), -1, -1}, own) && ok;
      }
      shift = own;
    }
#pragma omp parallel for schedule(dynamic, 1) reduction(&& : ok)
    for (int i = 0; i < kv.heads * spans; i++)
      ok = count_span(ballot, i % kv.heads, i / kv.heads, vote, rows, shift) && ok;
  }
  return ok;
}

}  // namespace TARGET
}  // namespace winnow
