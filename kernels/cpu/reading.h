// Choosing what decode rows read: the rule is that of kernels/reference/reading.py.
//
//   1  page_bounds     least and greatest key channel of pages that became full      by sequence and head
//   2  score_columns   q.K of candidates, or what bounds it                          by row, head and run of pages
//   3  choose_row      softmax, vote, pooling, the highest votes                     by row and voting heads
//
// Every number is a chain over channels, tokens or heads in their order, whatever shares the batch.
#pragma once
#include <cstdlib>

#include "attention.h"
#include "chosen.h"
#include "scoring.h"
#include "top.h"

namespace winnow {
namespace TARGET {

constexpr int RUN_COLUMNS = 64;  // pages that one thread scores at a time

// What a row may choose from in one lane: the units [first, last), pages or tokens, between the tokens that it reads
// anyway: those in [low, from) and [to, seen).
struct Candidates {
  int low, seen, first, last, from, to;
  int first_column, last_column;  // pages to score
  int full;                       // pages before the newest protected token: they hold all they ever will
  bool all;                       // no more than the row may choose
};
static Candidates candidates_of(const KV& kv, const Batch& batch, const Reading& rule, int layer, int b, int j, int head,
                                int window) {
  const Lane lane = lane_of(kv, batch.slots[b], layer, head);
  const Columns columns = columns_of(kv, lane);
  const int rows = batch.cu_rows[b + 1] - batch.cu_rows[b];
  Candidates c;
  c.seen = lane.kept - rows + j + 1;
  c.low = window_start(batch, kv, b, layer, head, c.seen - 1, batch.positions[batch.cu_rows[b] + j], window);
  const int newest = max_i(c.low, c.seen - max_i(1, rule.recent));
  c.full = columns.of(newest);
  if (rule.by_bounds) {  // pages that hold protected tokens are read whole
    const int sinks = min_i(rule.sinks, c.seen);
    c.first = max_i(columns.of(c.low), sinks > 0 ? columns.of(sinks - 1) + 1 : 0);
    c.last = max_i(c.first, c.full);
    c.from = min_i(c.seen, max_i(c.low, columns.first_token(c.first)));
    c.to = min_i(c.seen, max_i(c.from, columns.first_token(c.last)));
    c.first_column = c.first;
    c.last_column = c.last;
  } else {
    c.first = c.from = min_i(c.seen, max_i(c.low, rule.sinks));
    c.last = c.to = max_i(c.first, newest);
    c.first_column = columns.of(c.first);
    c.last_column = c.last > c.first ? columns.of(c.last - 1) + 1 : c.first_column;
  }
  const int wanted = rule.share > 0 ? max_i(1, (int)(c.seen * rule.share)) : rule.tokens;
  c.all = c.to - c.from <= wanted;
  return c;
}

// Bytes of reading all of a lane for a row that sees the tokens [low, seen).
static int64_t bytes_of_all(const KV& kv, const Lane& lane, int low, int seen) {
  const Groups groups = groups_of(kv, lane);
  int64_t bytes = 0;
  for (int i = 0; i < groups.count; i++) {
    const Group g = group_at(groups, i);
    if (g.first >= seen) break;
    if (g.first + g.pages * g.capacity <= low) continue;
    for (int p = 0; p < g.pages && g.first + p * g.capacity < seen; p++)
      bytes += page_bytes_read(g.fmt, kv.shapes[g.fmt], kv.dim, min_i(g.capacity, seen - g.first - p * g.capacity));
  }
  return bytes;
}

// Choice -----------------------------------------------------------------------------------------------------------

// Adds softmax(scores) of one query head to the votes; both have room for whole vectors.
static void vote(float* scores, int count, float* votes) {
  for (int t = count; t % LANES; t++) scores[t] = NEG_INF;
  V top = splat(NEG_INF), sum = zero();
  for (int t = 0; t < count; t += LANES) top = vmax(top, load(scores + t));
  const V m = splat(hmax(top));
  for (int t = 0; t < count; t += LANES) {
    const V w = vexp(load(scores + t) - m);
    sum += w;
    store(scores + t, w);
  }
  const V part = splat(1.f / hsum(sum));
  for (int t = 0; t < count; t += LANES) store(votes + t, fma(load(scores + t), part, load(votes + t)));
}

// The greatest of the `width` neighbours, `width` odd.
static void max_pool(const float* votes, int count, int width, float* pooled) {
  const int reach = width / 2;
  for (int t = 0; t < count; t++) {
    float top = votes[t];
    for (int u = max_i(0, t - reach); u < min_i(count, t + reach + 1); u++) top = votes[u] > top ? votes[u] : top;
    pooled[t] = top;
  }
}

// The choice of one row for the heads [head, head + heads) that vote together.
static bool choose_row(const KV& kv, const Batch& batch, const Reading& rule, int layer, const Row& row, int head,
                       int heads, int q_heads, const Candidates& c, float* scores, Scratch& scratch) {
  const Lane lane = lane_of(kv, batch.slots[row.b], layer, head);
  const Columns columns = columns_of(kv, lane);
  uint8_t* choice = choice_of(kv, rule, row.j, head);
  std::memset(choice, 0, rule.choice_capacity);
  std::memset(choice + c.low, 1, c.from - c.low);
  std::memset(choice + c.to, 1, c.seen - c.to);
  uint8_t* anchor = rule.anchor_choice ? rule.anchor_choice + (int64_t)layer * rule.anchor_capacity : nullptr;
  if (c.all) {
    std::memset(choice + c.from, 1, c.to - c.from);
  } else if (row.again) {
    for (int t = c.from; t < c.to; t++) choice[t] |= anchor[t];
  } else {
    const int group = q_heads / kv.heads, count = c.last - c.first, room = (count + LANES) / LANES * LANES;
    float* votes = (float*)scratch.need((sizeof(float) * 2 + sizeof(int32_t)) * (size_t)room);
    if (!votes) return false;
    float* pooled = votes + room;
    int32_t* weights = (int32_t*)(pooled + room);
    std::memset(votes, 0, sizeof(float) * room);
    const int skip = rule.by_bounds ? 0 : c.first - columns.first_token(c.first_column);
    for (int g = 0; g < heads * group; g++) vote(scores + (int64_t)g * row.stride + skip, count, votes);
    if (rule.pool > 1) max_pool(votes, count, rule.pool, pooled);
    for (int u = 0; u < count; u++)
      weights[u] = rule.by_bounds ? columns.first_token(c.first + u + 1) - max_i(c.from, columns.first_token(c.first + u)) : 1;
    const int wanted = rule.share > 0 ? max_i(1, (int)(c.seen * rule.share)) : rule.tokens;
    const float* by = rule.pool > 1 ? pooled : votes;
    int64_t rest;
    const uint32_t least = top_threshold(by, weights, count, wanted, &rest);
    for (int u = 0; u < count; u++) {
      if (!is_taken(by[u], weights[u], least, &rest)) continue;
      const int from = rule.by_bounds ? max_i(c.from, columns.first_token(c.first + u)) : c.first + u;
      std::memset(choice + from, 1, rule.by_bounds ? columns.first_token(c.first + u + 1) - from : 1);
    }
    if (rule.similarity <= 1) {
      std::memset(anchor, 0, rule.anchor_capacity);
      std::memcpy(anchor + c.from, choice + c.from, c.to - c.from);
    }
  }
  for (int h = 1; h < heads; h++) std::memcpy(choice_of(kv, rule, row.j, head + h), choice, rule.choice_capacity);
  return true;
}

// Whether the row's queries still point where those of the last choice did; if not, they are the next to be compared.
static bool chooses_again(const Reading& rule, int layer, int seen, const float* q, int count) {
  float* anchor = rule.anchors + (int64_t)layer * count;
  V qq = zero(), aa = zero(), qa = zero();
  if (rule.anchored[layer] > 0)
    for (int i = 0; i < count; i += LANES) {
      const V x = load(q + i), y = load(anchor + i);
      qq = fma(x, x, qq);
      aa = fma(y, y, aa);
      qa = fma(x, y, qa);
    }
  if (rule.anchored[layer] > 0 && hsum(qa) >= rule.similarity * __builtin_sqrtf(hsum(qq) * hsum(aa))) return true;
  std::memcpy(anchor, q, sizeof(float) * count);
  rule.anchored[layer] = seen;
  return false;
}

static bool valid_reading(const KV& kv, const Batch& batch, int layer, int b, int q_heads) {
  const Reading& rule = batch.reading[b];
  const int first = lane_of(kv, batch.slots[b], layer, 0).kept;
  for (int h = 0; h < kv.heads; h++) {
    const Lane lane = lane_of(kv, batch.slots[b], layer, h);
    if (lane.rest || lane.opened_size(kv) || lane.kept > rule.choice_capacity || (rule.by_layer && lane.kept != first)) return false;
  }
  if (rule.similarity <= 1 && (!rule.by_layer || rule.anchor_heads != q_heads || first > rule.anchor_capacity)) return false;
  return rule.by_bounds ? rule.bounds && rule.bounded : rule.channels != nullptr;
}

static Scratch reading_scratch;  // of the one thread that calls: rows, then their scores

// Writes the choices of the rows that choose in this layer, and counts the bytes of what is not attention itself.
static bool choose_reads(const KV& kv, const Batch& batch, int layer, const float* q, int q_heads, float scale, int window) {
  if (!batch.reading) return true;
  if (!valid_batch(kv, batch, layer, q_heads, window) || q_heads / kv.heads > BLOCK_ROWS) return false;
  int count = 0, runs = 0;
  int64_t floats = 0;
  Row* rows = (Row*)reading_scratch.need(sizeof(Row) * batch.rows + LANES * sizeof(float));
  if (!rows) return false;
  for (int b = 0; b < batch.size; b++) {
    const Reading& rule = batch.reading[b];
    if (!rule.modes) continue;
    const ReadMode mode = read_mode(batch, b, layer);
    const bool chooses = mode == READ_CHOSEN || mode == READ_ALL_AND_CHOOSE;
    if (!valid_reading(kv, batch, layer, b, q_heads)) return false;
    for (int j = 0; j < batch.cu_rows[b + 1] - batch.cu_rows[b]; j++) {
      Row row = {b, j, 0, false, floats};
      bool all = true;
      int seen = 0;
      for (int h = 0; h < kv.heads; h++) {
        const Candidates c = candidates_of(kv, batch, rule, layer, b, j, h, window);
        const Lane lane = lane_of(kv, batch.slots[b], layer, h);
        const int64_t bytes = bytes_of_all(kv, lane, c.low, c.seen);
        rule.touched[1] += bytes;
        if (!reads_chosen(batch, b, layer)) rule.touched[0] += bytes;
        const Columns columns = columns_of(kv, lane);
        const int units = rule.by_bounds ? c.last - c.first
                                         : columns.first_token(c.last_column) - columns.first_token(c.first_column);
        row.stride = max_i(row.stride, units / LANES * LANES + 2 * LANES);
        runs = max_i(runs, (c.last_column - c.first_column + RUN_COLUMNS - 1) / RUN_COLUMNS);
        all = all && c.all;
        seen = c.seen;
      }
      if (layer == 0) rule.touched[2]++;
      if (!chooses) continue;
      if (rule.similarity <= 1 && !all)
        row.again = chooses_again(rule, layer, seen, q + (int64_t)(batch.cu_rows[b] + j) * q_heads * kv.dim, q_heads * kv.dim);
      rows[count++] = row;
      floats += (int64_t)row.stride * q_heads;
    }
  }
  if (!count) return true;
  static Scratch score_scratch;
  float* scores = (float*)score_scratch.need(sizeof(float) * floats);
  if (!scores) return false;
  bool ok = true;
#pragma omp parallel for schedule(dynamic, 1) collapse(2) reduction(&& : ok)
  for (int i = 0; i < count; i++)
    for (int h = 0; h < kv.heads; h++) {
      const Row& row = rows[i];
      const Reading& rule = batch.reading[row.b];
      if (!rule.by_bounds || row.j + 1 < batch.cu_rows[row.b + 1] - batch.cu_rows[row.b]) continue;
      const Candidates c = candidates_of(kv, batch, rule, layer, row.b, row.j, h, window);
      int64_t touched = 0;
      const int64_t index = (int64_t)layer * kv.heads + h;
      ok = bound_pages(kv, rule, lane_of(kv, batch.slots[row.b], layer, h), index, c.full, &touched) && ok;
#pragma omp atomic
      rule.touched[0] += touched;
    }
  if (!ok) return false;
#pragma omp parallel for schedule(dynamic, 1) collapse(3) reduction(&& : ok)
  for (int i = 0; i < count; i++)
    for (int h = 0; h < kv.heads; h++)
      for (int run = 0; run < runs; run++) {
        static thread_local Scratch scratch;
        const Row& row = rows[i];
        const Reading& rule = batch.reading[row.b];
        const Candidates c = candidates_of(kv, batch, rule, layer, row.b, row.j, h, window);
        const int column = c.first_column + run * RUN_COLUMNS, end = min_i(c.last_column, column + RUN_COLUMNS);
        if (row.again || c.all || column >= end) continue;
        float* mine = scores + row.scores + (int64_t)h * (q_heads / kv.heads) * row.stride;
        int64_t touched = 0;
        ok = score_columns(kv, batch, rule, layer, row, h, q, q_heads, scale, c.first_column, column, end, mine, scratch, &touched) && ok;
#pragma omp atomic
        rule.touched[0] += touched;
      }
  if (!ok) return false;
#pragma omp parallel for schedule(dynamic, 1) collapse(2) reduction(&& : ok)
  for (int i = 0; i < count; i++)
    for (int h = 0; h < kv.heads; h++) {
      static thread_local Scratch scratch;
      const Row& row = rows[i];
      const Reading& rule = batch.reading[row.b];
      // Rows that may take over what an earlier one chose come one after the other.
      const bool in_order = rule.similarity <= 1;
      if ((rule.by_layer && h) || (in_order && row.j)) continue;
      for (int k = i; k < count && rows[k].b == row.b && (in_order || k == i); k++) {
        const Candidates c = candidates_of(kv, batch, rule, layer, row.b, rows[k].j, h, window);
        float* mine = scores + rows[k].scores + (int64_t)h * (q_heads / kv.heads) * rows[k].stride;
        ok = choose_row(kv, batch, rule, layer, rows[k], h, rule.by_layer ? kv.heads : 1, q_heads, c, mine, scratch) && ok;
      }
    }
  return ok;
}

}  // namespace TARGET
}  // namespace winnow
