// Vectors of eight floats, and of the target's full width for the matrix product. Every kernel source is compiled once
// for each instruction set (see CMakeLists.txt); this header is the only place that knows which one.
//
// Nothing from the standard library's templates is used in kernels: an inline function compiled for AVX-512 and merged
// by the linker with the generic one would crash older machines.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

namespace winnow {
namespace TARGET {

typedef float V __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t VI __attribute__((vector_size(32), aligned(4), may_alias));
constexpr int LANES = 8;
constexpr float NEG_INF = -__builtin_inff();

INLINE int min_i(int a, int b) { return a < b ? a : b; }
INLINE int max_i(int a, int b) { return a > b ? a : b; }
INLINE V zero() { return V{}; }
INLINE V splat(float x) { return V{x, x, x, x, x, x, x, x}; }
// Dereferenced, not copied: GCC splits a memcpy of 32 bytes into halves, and what was stored so stalls the next load.
INLINE V load(const float* p) { return *(const V*)p; }
INLINE void store(float* p, V v) { *(V*)p = v; }

// One rounding where the target has it. Spelled out, because whether the compiler fuses a*b+c may differ between two
// instances of one template, and results must not depend on which instance ran.
#if defined(__FMA__)
INLINE V fma(V a, V b, V c) { return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
INLINE V vmax(V a, V b) { return (V)_mm256_max_ps((__m256)a, (__m256)b); }
INLINE V load_u8(const uint8_t* p) { return (V)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p))); }
INLINE V load_i8(const int8_t* p) { return (V)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))); }
INLINE void load_u4(const uint8_t* p, V& low, V& high) {
  const __m256i x = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
  low = (V)_mm256_cvtepi32_ps(_mm256_and_si256(x, _mm256_set1_epi32(15)));
  high = (V)_mm256_cvtepi32_ps(_mm256_srli_epi32(x, 4));
}
INLINE V load_bf16(const uint16_t* p) {
  return (V)_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
INLINE void load_u2(const uint8_t* p, V& first, V& second) {  // 16 numbers of four bytes
  int32_t word; std::memcpy(&word, p, 4);
  const __m256i x = _mm256_set1_epi32(word), three = _mm256_set1_epi32(3);
  const __m256i low = _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14);
  const __m256i high = _mm256_setr_epi32(16, 18, 20, 22, 24, 26, 28, 30);
  first = (V)_mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srlv_epi32(x, low), three));
  second = (V)_mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srlv_epi32(x, high), three));
}
INLINE V load_f16(const uint16_t* p) { return (V)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
// E4M3_UNIT times the number: e4m3's sign, exponent and fraction, each in its place of a half.
INLINE V load_e4m3(const uint8_t* p) {
  const __m128i wide = _mm_slli_epi16(_mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i*)p)), 8);
  return (V)_mm256_cvtph_ps(_mm_and_si128(_mm_srai_epi16(wide, 1), _mm_set1_epi16((short)0xbfff)));
}
INLINE uint16_t to_f16(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
INLINE float from_f16(uint16_t h) { return _cvtsh_ss(h); }
INLINE V round_near(V x) { return (V)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE VI to_int(V x) { return (VI)_mm256_cvtps_epi32((__m256)x); }
#else
INLINE V fma(V a, V b, V c) { return a * b + c; }
INLINE V vmax(V a, V b) { V r; for (int i = 0; i < LANES; i++) r[i] = a[i] > b[i] ? a[i] : b[i]; return r; }
INLINE V load_u8(const uint8_t* p) { V r; for (int i = 0; i < LANES; i++) r[i] = p[i]; return r; }
INLINE V load_i8(const int8_t* p) { V r; for (int i = 0; i < LANES; i++) r[i] = p[i]; return r; }
INLINE void load_u4(const uint8_t* p, V& low, V& high) {
  for (int i = 0; i < LANES; i++) { low[i] = p[i] & 15; high[i] = p[i] >> 4; }
}
INLINE void load_u2(const uint8_t* p, V& first, V& second) {
  for (int i = 0; i < LANES; i++) first[i] = p[i / 4] >> 2 * (i % 4) & 3;
  for (int i = 0; i < LANES; i++) second[i] = p[2 + i / 4] >> 2 * (i % 4) & 3;
}
INLINE V load_bf16(const uint16_t* p) {
  VI r; for (int i = 0; i < LANES; i++) r[i] = (int32_t)((uint32_t)p[i] << 16); return (V)r;
}
INLINE float from_f16(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 1023;
  float magnitude;
  if (exponent == 0) {
    magnitude = (float)fraction * 5.9604644775390625e-8f;  // 2^-24
  } else {
    const uint32_t bits = exponent == 31 ? 0x7f800000u | fraction << 13 : (exponent + 112) << 23 | fraction << 13;
    std::memcpy(&magnitude, &bits, 4);
  }
  uint32_t bits; std::memcpy(&bits, &magnitude, 4); bits |= sign;
  float r; std::memcpy(&r, &bits, 4); return r;
}
INLINE uint16_t to_f16(float x) {
  uint32_t bits; std::memcpy(&bits, &x, 4);
  const uint16_t sign = (bits >> 16) & 0x8000; bits &= 0x7fffffff;
  if (bits >= 0x7f800000) return sign | (bits > 0x7f800000 ? 0x7e00 : 0x7c00);
  if (bits < 0x38800000) {  // below 2^-14: subnormal, in units of 2^-24, rounded to even by the adder
    float m; std::memcpy(&m, &bits, 4);
    const float shifted = m + 0.5f; uint32_t r; std::memcpy(&r, &shifted, 4);
    return sign | (uint16_t)(r - 0x3f000000);
  }
  bits += 0xfff + ((bits >> 13) & 1);
  return bits >= 0x47800000 ? sign | 0x7c00 : sign | (uint16_t)((bits - 0x38000000) >> 13);
}
INLINE V load_f16(const uint16_t* p) { V r; for (int i = 0; i < LANES; i++) r[i] = from_f16(p[i]); return r; }
INLINE V load_e4m3(const uint8_t* p) {
  V r; for (int i = 0; i < LANES; i++) r[i] = from_f16((p[i] & 0x80) << 8 | (p[i] & 0x7f) << 7); return r;
}
INLINE V round_near(V x) { V r; for (int i = 0; i < LANES; i++) r[i] = __builtin_rintf(x[i]); return r; }
INLINE VI to_int(V x) { VI r; for (int i = 0; i < LANES; i++) r[i] = (int32_t)x[i]; return r; }
#endif

// The target's full width, for matrix products.
#if defined(__AVX512F__)
typedef float W __attribute__((vector_size(64), aligned(4), may_alias));
INLINE W wfma(W a, W b, W c) { return (W)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
INLINE W wload(const float* p) { return *(const W*)p; }
INLINE W wload(const int8_t* p) { return (W)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p))); }
INLINE W wsplat(float x) { return (W)_mm512_set1_ps(x); }
#else
typedef V W;
INLINE W wfma(W a, W b, W c) { return fma(a, b, c); }
INLINE W wload(const float* p) { return load(p); }
INLINE W wload(const int8_t* p) { return load_i8(p); }
INLINE W wsplat(float x) { return splat(x); }
#endif

INLINE float clamp_f16(float x) { return x > 65504.f ? 65504.f : x < -65504.f ? -65504.f : x; }
// Lane j of vector i becomes lane i of vector j.
INLINE void transpose(V (&r)[LANES]) {
  const VI low = {0, 8, 1, 9, 4, 12, 5, 13}, high = {2, 10, 3, 11, 6, 14, 7, 15};
  const VI even = {0, 1, 8, 9, 4, 5, 12, 13}, odd = {2, 3, 10, 11, 6, 7, 14, 15};
  const VI first = {0, 1, 2, 3, 8, 9, 10, 11}, second = {4, 5, 6, 7, 12, 13, 14, 15};
  V a[LANES], b[LANES];
#pragma GCC unroll 4
  for (int i = 0; i < LANES; i += 2) {
    a[i] = __builtin_shuffle(r[i], r[i + 1], low);
    a[i + 1] = __builtin_shuffle(r[i], r[i + 1], high);
  }
#pragma GCC unroll 4
  for (int i = 0; i < LANES; i += 4)
    for (int j = 0; j < 2; j++) {
      b[i + 2 * j] = __builtin_shuffle(a[i + j], a[i + j + 2], even);
      b[i + 2 * j + 1] = __builtin_shuffle(a[i + j], a[i + j + 2], odd);
    }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    r[i] = __builtin_shuffle(b[i], b[i + 4], first);
    r[i + 4] = __builtin_shuffle(b[i], b[i + 4], second);
  }
}
INLINE float hsum(V v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }
INLINE float hmax(V v) { float m = v[0]; for (int i = 1; i < LANES; i++) m = v[i] > m ? v[i] : m; return m; }
INLINE uint16_t to_bf16(float x) {  // round to nearest even
  uint32_t b; std::memcpy(&b, &x, 4);
  if ((b & 0x7fffffff) > 0x7f800000) return (uint16_t)(b >> 16 | 64);
  return (uint16_t)((b + 0x7fff + ((b >> 16) & 1)) >> 16);
}
constexpr float E4M3_UNIT = 1.f / 256;  // a half's exponent counts from 15, that of e4m3 from 7
INLINE float from_e4m3(uint8_t x) { return from_f16((uint16_t)((x & 0x80) << 8 | (x & 0x7f) << 7)) * 256.f; }
INLINE uint8_t to_e4m3(float x) {  // round to nearest even, no further than 448
  uint32_t b; std::memcpy(&b, &x, 4);
  const uint8_t sign = b >> 24 & 0x80;
  float size = __builtin_fabsf(x);
  if (!(size < 448.f)) return sign | 0x7e;
  if (size < 0.015625f) return sign | (uint8_t)__builtin_rintf(size * 512.f);  // subnormal; 8 is the least normal
  std::memcpy(&b, &size, 4);
  return sign | (uint8_t)((b + 0x7ffff + (b >> 20 & 1) - 0x3c000000) >> 20);
}

// e^x for x <= 0 within 2 ulp (Cephes' polynomial); exactly 0 at -inf.
INLINE V vexp(V x) {
  const VI dead = x < splat(-87.f);
  x = vmax(x, splat(-87.f));
  const V n = round_near(x * splat(1.44269504088896341f));
  V r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  V p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r + splat(1.f));
  const V power = (V)((to_int(n) + 127) << 23);
  return (V)((VI)(p * power) & ~dead);
}
INLINE float exp1(float x) { return vexp(splat(x))[0]; }

}  // namespace TARGET
}  // namespace winnow
