// y = x W^T (+ bias), the weights in f32 or as 8-bit codes with one scale for every 64 columns of an output row.
//
// Every output is one chain of multiply-adds over the columns in their order, biased at its end, whatever tile, block or
// thread computes it, and a code is always widened to the same float: a row's result does not depend on the rows beside
// it.
#pragma once
#include "kernels.h"
#include "simd.h"

namespace winnow {
namespace TARGET {

constexpr int PANEL = 16;   // output rows of a panel
constexpr int GROUP = 64;   // columns that share a scale
#if defined(__AVX512F__)
constexpr int TILE_ROWS = 12, TILE_PANELS = 2;
#else
constexpr int TILE_ROWS = 6, TILE_PANELS = 1;
#endif
constexpr int WL = sizeof(W) / 4, PV = PANEL / WL;  // vectors in a panel's row

INLINE int groups_in(int cols) { return (cols + GROUP - 1) / GROUP; }

// Some neighbouring panels from one column on, as the tiles read them.
template <class T> struct Panels {
  const T* codes;
  int64_t stride;      // between panels
  const float* scale;  // [groups][16] of the first panel, null for f32
  int64_t scale_stride;
  Panels skip(int panels) const {
    return {codes + panels * stride, stride, scale ? scale + panels * scale_stride : nullptr, scale_stride};
  }
};

// acc[r][16 * panels] (+)= x[r][0:cols] . panel[0:cols][16]
template <int R, int P, class T>
INLINE void tile(const float* x, int64_t ldx, const Panels<T>& w, int cols, float* acc, int lda, bool first) {
  constexpr bool IS_INT8 = sizeof(T) == 1;
  W a[R][P * PV];
#pragma GCC unroll 12
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int v = 0; v < P * PV; v++) {
      if (first) a[r][v] = W{};
      else a[r][v] = *(const W*)(acc + r * lda + v * WL);
    }
  for (int k0 = 0; k0 < cols; k0 += IS_INT8 ? GROUP : cols) {
    const int k1 = IS_INT8 ? min_i(cols, k0 + GROUP) : cols;
    W scale[P * PV];
    if constexpr (IS_INT8)
#pragma GCC unroll 8
      for (int v = 0; v < P * PV; v++)
        scale[v] = wload(w.scale + (v / PV) * w.scale_stride + k0 / GROUP * PANEL + (v % PV) * WL);
    for (int k = k0; k < k1; k++) {
      W b[P * PV];
#pragma GCC unroll 8
      for (int v = 0; v < P * PV; v++) {
        b[v] = wload(w.codes + (v / PV) * w.stride + (int64_t)k * PANEL + (v % PV) * WL);
        if constexpr (IS_INT8) b[v] *= scale[v];
      }
#pragma GCC unroll 12
      for (int r = 0; r < R; r++) {
        const W s = wsplat(x[r * ldx + k]);
#pragma GCC unroll 8
        for (int v = 0; v < P * PV; v++) a[r][v] = wfma(s, b[v], a[r][v]);
      }
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int v = 0; v < P * PV; v++) *(W*)(acc + r * lda + v * WL) = a[r][v];
}

template <int R, class T>
INLINE void tiles(const float* x, int64_t ldx, const Panels<T>& w, int panels, int cols, float* acc, int lda, bool first) {
  // Few rows leave registers free: more panels at once hide the latency of the chains.
  constexpr int P = R == 1 ? 4 : R <= 3 ? 2 : TILE_PANELS;
  int p = 0;
  for (; p + P <= panels; p += P) tile<R, P>(x, ldx, w.skip(p), cols, acc + p * PANEL, lda, first);
  for (; p < panels; p++) tile<R, 1>(x, ldx, w.skip(p), cols, acc + p * PANEL, lda, first);
}

template <class T>
static void row_tiles(const float* x, int64_t ldx, int rows, const Panels<T>& w, int panels, int cols, float* acc,
                      int lda, bool first) {
  int r = 0;
  for (; r + TILE_ROWS <= rows; r += TILE_ROWS)
    tiles<TILE_ROWS>(x + r * ldx, ldx, w, panels, cols, acc + (int64_t)r * lda, lda, first);
  x += r * ldx;
  acc += (int64_t)r * lda;
  switch (rows - r) {
#define CASE(N) case N: tiles<N>(x, ldx, w, panels, cols, acc, lda, first); break;
    CASE(1) CASE(2) CASE(3) CASE(4) CASE(5)
#if defined(__AVX512F__)
    CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11)
#endif
#undef CASE
    default: break;
  }
}

// The codes of `cols` columns of one panel, which begin a group, as floats.
INLINE void widen(const int8_t* codes, const float* scale, int cols, float* dst) {
  for (int k0 = 0; k0 < cols; k0 += GROUP, scale += PANEL)
    for (int j = 0; j < PANEL; j += WL) {
      const W s = wload(scale + j);
      for (int k = k0; k < min_i(cols, k0 + GROUP); k++) *(W*)(dst + k * PANEL + j) = wload(codes + k * PANEL + j) * s;
    }
}

INLINE void add(float* y, const float* x, int count) {
  int i = 0;
  for (; i + WL <= count; i += WL) *(W*)(y + i) += *(const W*)(x + i);
  for (; i < count; i++) y[i] += x[i];
}

static void linear(const Matrix& w, const float* x, int count, float* out, bool accumulate) {
  constexpr int BLOCK_ROWS = 96, BLOCK_COLS = 256;
  const int panels = (w.rows + PANEL - 1) / PANEL, cols = w.cols;
  const int64_t stride = (int64_t)cols * PANEL, scale_stride = groups_in(cols) * PANEL;
  // Small batches stream the weights once: whole columns, many panels a task. Large ones block for the caches.
  const bool streams = count <= TILE_ROWS;
  const int group = streams ? 4 : 4 * TILE_PANELS;
  const int tasks_n = (panels + group - 1) / group, tasks_m = (count + BLOCK_ROWS - 1) / BLOCK_ROWS;
#pragma omp parallel for schedule(dynamic, 1)
  for (int task = 0; task < tasks_n * tasks_m; task++) {
    alignas(64) float acc[BLOCK_ROWS * 8 * PANEL];
    alignas(64) float wide[8 * BLOCK_COLS * PANEL];
    const int p0 = task / tasks_m * group, np = min_i(group, panels - p0), lda = np * PANEL;
    const int m0 = task % tasks_m * BLOCK_ROWS, m = min_i(BLOCK_ROWS, count - m0);
    const float* rows = x + (int64_t)m0 * cols;
    const int8_t* codes = (const int8_t*)w.panels + p0 * stride;
    const float *floats = (const float*)w.panels + p0 * stride, *scale = w.scale + p0 * scale_stride;
    if (streams && w.is_int8) {
      row_tiles(rows, cols, m, Panels<int8_t>{codes, stride, scale, scale_stride}, np, cols, acc, lda, true);
    } else {
      const int step = streams ? cols : BLOCK_COLS;
      for (int k = 0; k < cols; k += step) {
        const int kc = min_i(step, cols - k);
        Panels<float> part = {floats + k * PANEL, stride, nullptr, 0};
        if (w.is_int8) {
          for (int p = 0; p < np; p++)
            widen(codes + p * stride + k * PANEL, scale + p * scale_stride + k / GROUP * PANEL, kc, wide + p * kc * PANEL);
          part = {wide, (int64_t)kc * PANEL, nullptr, 0};
        }
        row_tiles(rows + k, cols, m, part, np, kc, acc, lda, k == 0);
      }
    }
    const int n0 = p0 * PANEL, n = min_i(lda, w.rows - n0);
    for (int r = 0; r < m; r++) {
      float *sum = acc + r * lda, *y = out + (int64_t)(m0 + r) * w.rows + n0;
      if (w.bias) add(sum, w.bias + n0, n);
      if (accumulate) add(y, sum, n);
      else std::memcpy(y, sum, sizeof(float) * n);
    }
  }
}

static void pack(const float* weight, int rows, int cols, bool is_int8, void* panels, float* scale) {
  const int count = (rows + PANEL - 1) / PANEL, groups = groups_in(cols);
#pragma omp parallel for schedule(static)
  for (int p = 0; p < count; p++)
    for (int j = 0; j < PANEL; j++) {
      const int n = p * PANEL + j;
      const float* row = weight + (int64_t)n * cols;
      for (int k0 = 0; k0 < cols; k0 += GROUP) {
        const int k1 = min_i(cols, k0 + GROUP);
        float top = 0;
        if (is_int8 && n < rows)
          for (int k = k0; k < k1; k++) { const float a = __builtin_fabsf(row[k]); top = a > top ? a : top; }
        const float s = top / 127.f;
        if (is_int8) scale[((int64_t)p * groups + k0 / GROUP) * PANEL + j] = s;
        for (int k = k0; k < k1; k++) {
          const int64_t at = ((int64_t)p * cols + k) * PANEL + j;
          const float v = n < rows ? row[k] : 0.f;
          if (is_int8) ((int8_t*)panels)[at] = s > 0 ? (int8_t)__builtin_rintf(v / s) : 0;
          else ((float*)panels)[at] = v;
        }
      }
    }
}

static bool embed(const Matrix& w, const int32_t* tokens, int count, float* out) {
  for (int i = 0; i < count; i++)
    if (tokens[i] < 0 || tokens[i] >= w.rows) return false;
  for (int i = 0; i < count; i++) {
    const int panel = tokens[i] / PANEL, j = tokens[i] % PANEL;
    const int64_t at = (int64_t)panel * w.cols * PANEL + j;
    float* y = out + (int64_t)i * w.cols;
    for (int k = 0; k < w.cols; k++) {
      if (w.is_int8)
        y[k] = ((const int8_t*)w.panels)[at + k * PANEL] * w.scale[((int64_t)panel * groups_in(w.cols) + k / GROUP) * PANEL + j];
      else
        y[k] = ((const float*)w.panels)[at + k * PANEL];
    }
  }
  return true;
}

}  // namespace TARGET
}  // namespace winnow
