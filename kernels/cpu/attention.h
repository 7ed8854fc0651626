// Causal attention of a step's rows over the pages of their lanes, decode rows and prefill chunks alike.
//
//   o = softmax(q.K / sqrt(d)) V;  parts merge by  m = max m_i,  l = sum l_i e^(m_i - m),  o = sum o_i e^(m_i - m) / l
//
// A lane is read in groups of pages (about 128 tokens) that share one softmax update, groups form spans, and spans are
// merged in order. Groups and spans lie at fixed places of the lane, every number is a chain in token order, and a
// masked token adds an exact zero: so a row's result is the same bits alone, in any batch, decoded or prefilled in any
// chunk, and by any number of threads.
#pragma once
#include <cstdlib>

#include "chosen.h"
#include "kernels.h"
#include "pages.h"
#include "simd.h"
#include "stored_product.h"

namespace winnow {
namespace TARGET {

constexpr int GROUP_TOKENS = 128, SPAN_GROUPS = 4;

// How a lane is cut: groups of sealed pages, of those in the second format, and of open ones.
struct Part { Format fmt; int column, pages, first, capacity, step, groups; };
struct Groups { Part parts[3]; int count, max_tokens; };
INLINE Part part_of(const KV& kv, Format fmt, int column, int pages, int first) {
  const int capacity = kv.shapes[fmt].capacity, step = max_i(1, GROUP_TOKENS / capacity);
  return {fmt, column, pages, first, capacity, step, (pages + step - 1) / step};
}
INLINE Groups groups_of(const KV& kv, const Lane& lane) {
  const int open = kv.shapes[kv.compute].capacity;
  Groups g = {{part_of(kv, lane.fmt, 0, lane.sealed, 0),
               part_of(kv, lane.rest_fmt, lane.sealed, lane.rest, lane.sealed_tokens),
               part_of(kv, kv.compute, lane.sealed + lane.rest, (lane.kept - lane.closed_tokens + open - 1) / open,
                       lane.closed_tokens)}, 0, 0};
  for (const Part& part : g.parts) {
    g.count += part.groups;
    g.max_tokens = max_i(g.max_tokens, part.step * part.capacity);
  }
  return g;
}
struct Group { Format fmt; int column, pages, first, capacity; };  // `first`: lane index of its first token
INLINE Group group_at(const Groups& g, int i) {
  const Part* part = g.parts;
  while (i >= part->groups && part < g.parts + 2) i -= part++->groups;
  const int page = i * part->step;
  return {part->fmt, part->column + page, min_i(part->step, part->pages - page), part->first + page * part->capacity,
          part->capacity};
}

// Query rows of one KV head: `rows` times its query heads, with the lane tokens [low, high) each may see.
struct Block {
  int rows;
  float* q;       // [rows][dim], scaled
  float* folded;  // [rows][max of dim and max_tokens] scratch
  float* scores;  // [rows][max_tokens]
  float *m, *l, *o;
  int *low, *high;
  int first, last;  // min low, max high
  const float* log_weights;  // of the lane's tokens, or null
  const uint8_t* chosen;     // lane tokens that its one token may see, null for all
  float* opened;             // scratch for a page's keys or values, where pages are opened
  float *projected, *sums;   // [rows][rank] where pages hold coordinates: of queries, and scratch for those of values
  int64_t* touched;          // bytes read are added here, null where nobody asks
};

// Whether page `p` of a group holds tokens that the block looks at.
INLINE bool looks_at(const Block& x, const Group& g, int p) {
  const int first = g.first + p * g.capacity;
  return any_chosen(x.chosen, first, min_i(g.capacity, x.last - first));
}

// Fetches the keys of the page that holds the first chosen token from `token` on: it may lie groups away.
INLINE void prefetch_chosen(const KV& kv, const Lane& lane, const Block& x, int token) {
  const void* found = token < x.last ? std::memchr(x.chosen + token, 1, x.last - token) : nullptr;
  if (!found) return;
  token = (int)((const uint8_t*)found - x.chosen);
  const bool in_sealed = token < lane.sealed_tokens;
  const PageShape& shape = kv.shapes[in_sealed ? lane.fmt : kv.compute];
  const int at = in_sealed ? token : token - lane.closed_tokens;
  if (at < 0) return;  // in a second format: rules are not for such lanes
  if (const uint8_t* page = lane.page(kv, (in_sealed ? 0 : lane.sealed + lane.rest) + at / shape.capacity))
    for (int64_t line = 0; line < shape.values; line += 64) __builtin_prefetch(page + line);
}

// Scores of a group for every row, -inf where a row may not look. False where a page lies outside the arena.
static bool group_scores(const KV& kv, const Lane& lane, const Group& g, const Block& x, int64_t lds) {
  const PageShape& shape = kv.shapes[g.fmt];
  for (int p = 0; p < g.pages; p++) {
    float* scores = x.scores + p * g.capacity;
    if (!looks_at(x, g, p)) {
      for (int r = 0; r < x.rows; r++)
        for (int t = 0; t < g.capacity; t += LANES) store(scores + r * lds + t, splat(NEG_INF));
      continue;
    }
    const uint8_t* page = lane.page(kv, g.column + p);
    if (!page) return false;
    // The processor's own prefetching ends with a page, and the next one lies anywhere.
    if (x.chosen) {
      for (int64_t line = 0; line < shape.values; line += 64) __builtin_prefetch(page + shape.values + line);
      prefetch_chosen(kv, lane, x, g.first + (p + 1) * g.capacity);
    } else if (p + 1 < g.pages) {
      if (const uint8_t* next = lane.page(kv, g.column + p + 1))
        for (int64_t line = 0; line < shape.values; line += 64) __builtin_prefetch(next + line);
    }
    const Place place = lane.place(kv, g.first + p * g.capacity);
    page_scores(g.fmt, shape, kv.dim, page, place, x.opened, x.q, x.projected, x.rows, x.folded, scores, lds);
  }
  const int tokens = g.pages * g.capacity;
  if (x.log_weights) {
    const int held = min_i(tokens, lane.kept - g.first);
    for (int r = 0; r < x.rows; r++)
      for (int t = 0; t < held; t++) x.scores[r * lds + t] += x.log_weights[g.first + t];
  }
  for (int r = 0; r < x.rows; r++) {
    const int low = max_i(0, min_i(tokens, x.low[r] - g.first)), high = max_i(low, min_i(tokens, x.high[r] - g.first));
    for (int t = 0; t < low; t++) x.scores[r * lds + t] = NEG_INF;
    for (int t = high; t < tokens; t++) x.scores[r * lds + t] = NEG_INF;
    if (x.chosen)
      for (int t = low; t < high; t++) if (!x.chosen[g.first + t]) x.scores[r * lds + t] = NEG_INF;
  }
  return true;
}

// One softmax update of the block by a group.
static bool attend_group(const KV& kv, const Lane& lane, const Group& g, const Block& x, int64_t lds) {
  if (!group_scores(kv, lane, g, x, lds)) return false;
  const PageShape& shape = kv.shapes[g.fmt];
  const int tokens = g.pages * g.capacity, dim = kv.dim;
  for (int r = 0; r < x.rows; r++) {
    float* s = x.scores + r * lds;
    V top = splat(x.m[r]);
    for (int t = 0; t < tokens; t += LANES) top = vmax(top, load(s + t));
    const float m = hmax(top);
    if (m == NEG_INF) {  // the row sees nothing here
      std::memset(s, 0, sizeof(float) * tokens);
      continue;
    }
    const float fade = exp1(x.m[r] - m);
    V sum = zero();
    for (int t = 0; t < tokens; t += LANES) {
      const V w = vexp(load(s + t) - splat(m));
      sum += w;
      store(s + t, w);
    }
    x.l[r] = x.l[r] * fade + hsum(sum);
    x.m[r] = m;
    const V f = splat(fade);
    for (int d = 0; d < dim; d += LANES) store(x.o + r * dim + d, load(x.o + r * dim + d) * f);
  }
  const bool in_basis = is_low_rank(g.fmt);
  if (in_basis) std::memset(x.sums, 0, sizeof(float) * x.rows * rank_of(shape));
  for (int p = 0; p < g.pages; p++) {
    const int n = min_i(g.capacity, x.last - g.first - p * g.capacity);
    if (n <= 0) break;
    if (!looks_at(x, g, p)) continue;
    const uint8_t* page = lane.page(kv, g.column + p);
    if (p + 1 < g.pages && !x.chosen)
      if (const uint8_t* next = lane.page(kv, g.column + p + 1))
        for (int64_t line = 0; line < shape.values; line += 64) __builtin_prefetch(next + shape.values + line);
    // Of a page in a float format only the values of chosen tokens are read; others share scales and are read whole.
    const uint8_t* chosen = x.chosen && !is_quantized(g.fmt) ? x.chosen + g.first + p * g.capacity : nullptr;
    const Place place = lane.place(kv, g.first + p * g.capacity);
    int64_t read = 0;
    for (int from = 0, to; chosen_run(chosen, n, from, to); read += to - from, from = to)
      page_values(g.fmt, shape, dim, page + row_bytes(g.fmt, dim) * from, place, x.opened,
                  x.scores + p * g.capacity + from, lds, x.rows, to - from, x.folded, in_basis ? x.sums : x.o);
    if (x.touched) *x.touched += page_bytes_read(g.fmt, shape, dim, read);
  }
  if (in_basis) add_projected(kv, g.fmt, lane.layer, lane.head, x.sums, x.rows, x.o);
  return true;
}

// One span into the block's m, l, o (not yet divided by l).
static bool attend_span(const KV& kv, const Lane& lane, const Groups& groups, int span, const Block& x) {
  for (int r = 0; r < x.rows; r++) { x.m[r] = NEG_INF; x.l[r] = 0; }
  std::memset(x.o, 0, sizeof(float) * x.rows * kv.dim);
  const int end = min_i(groups.count, (span + 1) * SPAN_GROUPS);
  for (int i = span * SPAN_GROUPS; i < end; i++) {
    Group g = group_at(groups, i);
    if (g.first >= x.last) break;
    g.pages = min_i(g.pages, (x.last - g.first + g.capacity - 1) / g.capacity);  // none beyond: a sum of exact zeros
    if (g.first + g.pages * g.capacity <= x.first) continue;
    if (!any_chosen(x.chosen, g.first, min_i(g.pages * g.capacity, x.last - g.first))) continue;
    if (!attend_group(kv, lane, g, x, groups.max_tokens)) return false;
  }
  return true;
}

// (m, l, o) += a span's.
INLINE void merge(float& m, float& l, float* o, float span_m, float span_l, const float* span_o, int dim) {
  if (span_m == NEG_INF) return;
  const float top = m > span_m ? m : span_m, a = exp1(m - top), b = exp1(span_m - top);
  m = top;
  l = l * a + span_l * b;
  const V va = splat(a), vb = splat(b);
  for (int d = 0; d < dim; d += LANES) store(o + d, load(o + d) * va + load(span_o + d) * vb);
}

// A unit of work: rows [row, row + rows) of sequence b for one KV head, over one span or (span < 0) all of them.
struct Item { int b, head, row, rows, span, part; };

// First lane token that a row of a sliding window sees: positions ascend along a lane.
static int window_start(const Batch& batch, const KV& kv, int b, int layer, int head, int row_index, int position,
                        int window) {
  if (window <= 0) return 0;
  const int32_t* positions = batch.lane_positions[b];
  if (!positions) return max_i(0, row_index - window + 1);
  positions += ((int64_t)layer * kv.heads + head) * batch.positions_capacity[b];
  int low = 0, high = row_index + 1;
  while (low < high) {
    const int mid = (low + high) / 2;
    if (positions[mid] > position - window) high = mid; else low = mid + 1;
  }
  return low;
}

static bool make_block(const KV& kv, const Batch& batch, const Lane& lane, const Groups& groups, const Item& it,
                       int layer, const float* q, int q_heads, float scale, int window, Scratch& scratch, Block* x,
                       float** total) {
  const int group = q_heads / kv.heads, dim = kv.dim, rows = it.rows * group;
  const int n = batch.cu_rows[it.b + 1] - batch.cu_rows[it.b];
  const bool in_basis = is_low_rank(lane.fmt) || is_low_rank(lane.rest_fmt);
  const size_t wide = max_i(dim, groups.max_tokens);
  const size_t floats = rows * ((in_basis ? 4 : 3) * dim + groups.max_tokens + wide + 4);
  const size_t opened = lane.opened_size(kv);
  float* f = (float*)scratch.need((opened + floats) * sizeof(float) + 2 * rows * sizeof(int));
  if (!f) return false;
  x->rows = rows;
  x->opened = f; f += opened;
  x->q = f; f += rows * dim;
  x->folded = f; f += rows * wide;
  x->o = f; f += rows * dim;
  x->projected = x->sums = nullptr;
  if (in_basis) {  // ranks are half of dim
    x->projected = f; f += rows * dim / 2;
    x->sums = f; f += rows * dim / 2;
  }
  *total = f; f += rows * (dim + 2);
  x->scores = f; f += (size_t)rows * groups.max_tokens;
  x->m = f; f += rows;
  x->l = f; f += rows;
  x->low = (int*)f;
  x->high = x->low + rows;
  x->first = lane.kept;
  x->last = 0;
  x->chosen = nullptr;
  x->touched = nullptr;
  x->log_weights = batch.log_weights[it.b];
  if (x->log_weights) x->log_weights += ((int64_t)layer * kv.heads + it.head) * batch.log_weights_capacity[it.b];
  for (int j = 0; j < it.rows; j++) {
    const int row = batch.cu_rows[it.b] + it.row + j, index = lane.kept - n + it.row + j;
    const int low = window_start(batch, kv, it.b, layer, it.head, index, batch.positions[row], window);
    for (int g = 0; g < group; g++) {
      const int r = j * group + g;
      const float* src = q + ((int64_t)row * q_heads + it.head * group + g) * dim;
      for (int d = 0; d < dim; d++) x->q[r * dim + d] = src[d] * scale;
      x->low[r] = low;
      x->high[r] = index + 1;
    }
    x->first = min_i(x->first, low);
    x->last = max_i(x->last, index + 1);
  }
  if (lane.fmt == MATRYOSHKA || lane.rest_fmt == MATRYOSHKA)
    project_queries(kv, MATRYOSHKA, layer, it.head, x->q, rows, x->projected);
  return true;
}

// Splits the batch into items. With items == null only counts.
static int make_items(const KV& kv, const Batch& batch, int layer, int q_heads, Item* items, int* parts) {
  const int group = q_heads / kv.heads, block = max_i(1, BLOCK_ROWS / group);
  int count = 0;
  *parts = 0;
  for (int b = 0; b < batch.size; b++) {
    const int rows = batch.cu_rows[b + 1] - batch.cu_rows[b];
    const bool chosen = reads_chosen(batch, b, layer);  // by each row for itself
    for (int h = 0; h < kv.heads; h++) {
      if (rows > block && !chosen) {
        // The last rows look furthest: they come first, so that no thread is left with a long one at the end.
        for (int r = (rows - 1) / block * block; r >= 0; r -= block, count++)
          if (items) items[count] = {b, h, r, min_i(block, rows - r), -1, -1};
      } else if (rows > 0) {
        const Lane lane = lane_of(kv, batch.slots[b], layer, h);
        const int spans = max_i(1, (groups_of(kv, lane).count + SPAN_GROUPS - 1) / SPAN_GROUPS);
        const int together = chosen ? 1 : rows;
        for (int r = 0; r < rows; r += together)
          for (int s = 0; s < spans; s++, count++) {
            if (items) items[count] = {b, h, r, together, s, *parts};
            *parts += together * group;
          }
      }
    }
  }
  return count;
}

static Scratch shared_scratch;  // of the one thread that calls: items, then the partial results of spans

static bool attention(const KV& kv, const Batch& batch, int layer, const float* q, int q_heads, float scale,
                      int window, float* out, float* lse) {
  if (!valid_batch(kv, batch, layer, q_heads, window) || q_heads / kv.heads > BLOCK_ROWS) return false;
  const int group = q_heads / kv.heads, dim = kv.dim;
  int parts;
  const int count = make_items(kv, batch, layer, q_heads, nullptr, &parts);
  char* memory = shared_scratch.need(sizeof(Item) * count + sizeof(float) * (size_t)parts * (dim + 2));
  if (!memory) return false;
  Item* items = (Item*)memory;
  float *part_o = (float*)(items + count), *part_m = part_o + (size_t)parts * dim, *part_l = part_m + parts;
  make_items(kv, batch, layer, q_heads, items, &parts);
  bool ok = true;
#pragma omp parallel for schedule(dynamic, 1) reduction(&& : ok)
  for (int i = 0; i < count; i++) {
    static thread_local Scratch scratch;
    const Item& it = items[i];
    const Lane lane = lane_of(kv, batch, it.b, layer, it.head);
    const Groups groups = groups_of(kv, lane);
    Block x;
    float* total;
    if (!make_block(kv, batch, lane, groups, it, layer, q, q_heads, scale, window, scratch, &x, &total)) { ok = false; continue; }
    int64_t touched = 0;
    if (reads_chosen(batch, it.b, layer)) {
      if (lane.kept > batch.reading[it.b].choice_capacity) { ok = false; continue; }
      x.chosen = choice_of(kv, batch.reading[it.b], it.row, it.head);
      x.touched = &touched;
    }
    if (it.span >= 0) {
      x.o = part_o + (size_t)it.part * dim;
      x.m = part_m + it.part;
      x.l = part_l + it.part;
      ok = attend_span(kv, lane, groups, it.span, x) && ok;
      if (touched) {
#pragma omp atomic
        batch.reading[it.b].touched[0] += touched;
      }
      continue;
    }
    float *tm = total + x.rows * dim, *tl = tm + x.rows;
    std::memset(total, 0, sizeof(float) * x.rows * dim);
    for (int r = 0; r < x.rows; r++) { tm[r] = NEG_INF; tl[r] = 0; }
    for (int s = 0; s * SPAN_GROUPS < groups.count; s++) {
      if (group_at(groups, s * SPAN_GROUPS).first >= x.last) break;
      ok = attend_span(kv, lane, groups, s, x) && ok;
      for (int r = 0; r < x.rows; r++) merge(tm[r], tl[r], total + r * dim, x.m[r], x.l[r], x.o + r * dim, dim);
    }
    for (int r = 0; r < x.rows; r++) {
      const int64_t at = (int64_t)(batch.cu_rows[it.b] + it.row + r / group) * q_heads + it.head * group + r % group;
      for (int d = 0; d < dim; d++) out[at * dim + d] = total[r * dim + d] / tl[r];
      if (lse) lse[at] = tm[r] + __builtin_logf(tl[r]);
    }
  }
  for (int i = 0; ok && i < count; i++) {  // decode rows: their spans lie side by side, in order
    if (items[i].span != 0) continue;
    int spans = 1;
    while (i + spans < count && items[i + spans].span == spans) spans++;
    const Item& it = items[i];
    const int rows = it.rows * group;
    for (int r = 0; r < rows; r++) {
      const int64_t at = (int64_t)(batch.cu_rows[it.b] + it.row + r / group) * q_heads + it.head * group + r % group;
      float m = NEG_INF, l = 0, *o = out + at * dim;
      std::memset(o, 0, sizeof(float) * dim);
      for (int s = 0; s < spans; s++) {
        const size_t part = it.part + (size_t)s * rows + r;
        merge(m, l, o, part_m[part], part_l[part], part_o + part * dim, dim);
      }
      for (int d = 0; d < dim; d++) o[d] /= l;
      if (lse) lse[at] = m + __builtin_logf(l);
    }
  }
  return ok;
}

}  // namespace TARGET
}  // namespace winnow
