// RMS norm, SiLU gate, and the step between the QKV product and attention: head norms, RoPE, and the write to pages.
#pragma once
#include "kernels.h"
#include "pages.h"
#include "simd.h"

namespace winnow {
namespace TARGET {

constexpr int64_t WORTH_THREADS = 1 << 15;  // numbers; below, waking threads takes longer than the work

// y = x / sqrt(mean(x^2) + eps) * weight; width is a multiple of 8.
INLINE void norm_row(const float* x, const float* weight, float eps, int width, float* y) {
  V sum = zero();
  for (int i = 0; i < width; i += LANES) { const V v = load(x + i); sum = fma(v, v, sum); }
  const V inverse = splat(1.f / __builtin_sqrtf(hsum(sum) / (float)width + eps));
  for (int i = 0; i < width; i += LANES) store(y + i, load(x + i) * inverse * load(weight + i));
}

static void rms_norm(const float* x, const float* weight, float eps, int count, int width, float* out) {
#pragma omp parallel for schedule(static) if ((int64_t)count * width >= WORTH_THREADS)
  for (int r = 0; r < count; r++) norm_row(x + (int64_t)r * width, weight, eps, width, out + (int64_t)r * width);
}

// silu(g) * u = g * u / (1 + e^-g), with e^-|g| so that nothing overflows.
static void silu_mul(const float* gate_up, int count, int width, float* out) {
#pragma omp parallel for schedule(static) if ((int64_t)count * width >= WORTH_THREADS)
  for (int r = 0; r < count; r++) {
    const float *gate = gate_up + (int64_t)r * 2 * width, *up = gate + width;
    float* y = out + (int64_t)r * width;
    for (int i = 0; i < width; i += LANES) {
      const V g = load(gate + i);
      const V e = vexp((V)((VI)g | (VI)splat(-0.f)));
      const VI positive = g >= zero();
      const V numerator = (V)(((VI)splat(1.f) & positive) | ((VI)e & ~positive));
      store(y + i, g * load(up + i) * numerator / (splat(1.f) + e));
    }
  }
}

// Rotates the halves of one head: (x1 cos - x2 sin, x2 cos + x1 sin); half is a multiple of 8.
INLINE void rotate(const float* x, const float* cos, const float* sin, int half, float* y) {
  for (int i = 0; i < half; i += LANES) {
    const V a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
    store(y + i, a * c - b * s);
    store(y + half + i, b * c + a * s);
  }
}

static bool rope_write(const KV& kv, const Batch& batch, int layer, const float* qkv, int q_heads, const float* cos,
                       const float* sin, int angles, const float* q_norm, const float* k_norm, float eps,
                       float* q_out) {
  const int dim = kv.dim, heads = kv.heads, half = dim / 2;
  const PageShape& open = kv.shapes[kv.compute];
  if (!valid_batch(kv, batch, layer, q_heads, 0)) return false;
  bool ok = true;
  for (int b = 0; b < batch.size; b++) {
    const int rows = batch.cu_rows[b + 1] - batch.cu_rows[b], slot = batch.slots[b];
#pragma omp parallel for schedule(static) reduction(&& : ok) if (rows > 8)
    for (int j = 0; j < rows; j++) {
      const int row = batch.cu_rows[b] + j, angle = batch.angles[row];
      if (angle < 0 || angle >= angles) { ok = false; continue; }
      const float *c = cos + (int64_t)angle * half, *s = sin + (int64_t)angle * half;
      const float* x = qkv + (int64_t)row * (q_heads + 2 * heads) * dim;
      float normed[256], key[256];
      for (int h = 0; h < q_heads; h++) {
        const float* q = x + h * dim;
        if (q_norm) { norm_row(q, q_norm, eps, dim, normed); q = normed; }
        rotate(q, c, s, half, q_out + ((int64_t)row * q_heads + h) * dim);
      }
      for (int h = 0; h < heads; h++) {
        const Lane lane = lane_of(kv, slot, layer, h);
        const int token = lane.kept - rows + j;
        int at;
        uint8_t* page = lane.open_page(kv, token, &at);
        if (!page) { ok = false; continue; }
        const float *k = x + (q_heads + h) * dim, *v = x + (q_heads + heads + h) * dim;
        if (k_norm) { norm_row(k, k_norm, eps, dim, normed); k = normed; }
        rotate(k, c, s, half, key);
        put_token(kv.compute, open, dim, page, at, key, v);
      }
    }
  }
  return ok;
}

}  // namespace TARGET
}  // namespace winnow
