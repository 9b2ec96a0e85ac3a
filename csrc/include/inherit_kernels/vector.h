// Vector arithmetic for one instruction set: included only by csrc/cpu/microkernels.cpp, which is compiled once per
// set, so everything here has internal linkage. Written in the vector extensions shared by GCC and Clang.
#pragma once

#include <cstdint>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "inherit_kernels/kernels.h"

namespace inherit_kernels {
namespace {

// INHERIT_KERNELS_EMULATED: the shapes of avx512_bf16 on any machine, for tests; the compiler splits the vectors.
#if defined(__AVX512F__) || defined(INHERIT_KERNELS_EMULATED)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));
typedef uint32_t UInts __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));

// Lanes of a, and from kLanes on of b; the indices are constants.
inline __attribute__((always_inline)) Vec shuffle(Vec a, Vec b, Ints lanes) {
#if defined(__clang__)
  Vec v;
  for (int k = 0; k < kLanes; ++k) v[k] = lanes[k] < kLanes ? a[lanes[k]] : b[lanes[k] - kLanes];
  return v;
#else
  return __builtin_shuffle(a, b, lanes);
#endif
}

inline Vec broadcast(float value) {
  return value - Vec{};  // folded to a broadcast; 0 + value would stay an addition (-0 + 0 is 0)
}

inline Vec load_vec(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

inline void store_vec(float* p, Vec v) {
  __builtin_memcpy(p, &v, sizeof v);
}

inline Vec load_vec(const uint16_t* p) {
  Halves h;
  __builtin_memcpy(&h, p, sizeof h);
  return (Vec)(__builtin_convertvector(h, UInts) << 16);
}

// Pairs of bfloat16, the even one in the low half.
inline UInts load_pairs(const uint16_t* p) {
  UInts v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

inline UInts broadcast_pair(const uint16_t* p) {
  uint32_t pair;
  __builtin_memcpy(&pair, p, sizeof pair);
  return pair - UInts{};
}

inline UInts broadcast_half(const uint16_t* p) {
  return uint32_t(*p) - UInts{};
}

#if defined(__AVX512BF16__)
#define INHERIT_KERNELS_PAIR_PRODUCTS
inline Vec add_pair_product(Vec sum, UInts a, UInts b) {
  return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
#elif defined(INHERIT_KERNELS_EMULATED)
#define INHERIT_KERNELS_PAIR_PRODUCTS
inline Vec add_pair_product(Vec sum, UInts a, UInts b) {
  sum += (Vec)(a & 0xffff0000u) * (Vec)(b & 0xffff0000u);
  return sum + (Vec)(a << 16) * (Vec)(b << 16);
}
#endif

// Round to nearest even; a NaN becomes torch's quiet 0x7fc0 (plain rounding could carry it into infinity).
inline void store_vec(uint16_t* p, Vec v) {
  UInts bits = (UInts)v;
  UInts rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  rounded = (v != v) ? UInts{} + 0x7fc0u : rounded;
  Halves h = __builtin_convertvector(rounded, Halves);
  __builtin_memcpy(p, &h, sizeof h);
}

// The transpose of kLanes vectors in place: in step `s`, blocks of s by s change sides.
template <int kStep>
inline __attribute__((always_inline)) void transpose_step(Vec (&v)[kLanes]) {
  Ints low, high;
  for (int k = 0; k < kLanes; ++k) {
    low[k] = k & kStep ? kLanes + (k ^ kStep) : k;
    high[k] = k & kStep ? kLanes + k : k | kStep;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & kStep) continue;
    Vec a = v[i], b = v[i + kStep];
    v[i] = shuffle(a, b, low);
    v[i + kStep] = shuffle(a, b, high);
  }
}

inline __attribute__((always_inline)) void transpose(Vec (&v)[kLanes]) {
  if (kLanes > 8) transpose_step<kLanes == 16 ? 8 : 1>(v);
  if (kLanes > 4) transpose_step<kLanes >= 8 ? 4 : 1>(v);
  transpose_step<2>(v);
  transpose_step<1>(v);
}

template <class T>
inline Vec load_part(const T* p, int64_t count) {
  T lane[kLanes] = {};
  for (int64_t k = 0; k < count; ++k) lane[k] = p[k];
  return load_vec(lane);
}

template <class T>
inline void store_part(T* p, Vec v, int64_t count) {
  T lane[kLanes];
  store_vec(lane, v);
  for (int64_t k = 0; k < count; ++k) p[k] = lane[k];
}

inline float to_float(float x) {
  return x;
}

inline float to_float(uint16_t x) {
  uint32_t bits = uint32_t(x) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

// exp(x) = 2^k p within 1.1 ulp, for x of a magnitude below 128: x = k log 2 + r, p = 1 + r + r^2 q(r) with q a minimax
// fit on |r| <= 0.348, evaluated as a tree: in a chain the processor waits for each term.
struct Exponential {
  Ints k;
  Vec p;
};

inline Exponential exponential(Vec x) {
  const float kMagic = 12582912.0f;  // 1.5 * 2^23: the sum's low bits are the rounded integer
  Vec shifted = x * 1.44269504f + kMagic;
  Vec n = shifted - kMagic;
  Vec r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Vec r2 = r * r;
  Vec q = (r2 * 0x1.6a2174p-10f + (r * 0x1.123b8ap-7f + 0x1.5558fcp-5f)) * r2 + (r * 0x1.555490p-3f + 0x1.fffffcp-2f);
  return {(Ints)((UInts)shifted - 0x4b400000u), q * r2 + r + 1.0f};
}

inline Vec power_of_two(Ints k) {
  return (Vec)(((UInts)k + 127u) << 23);
}

// The scale goes in as two factors, so that overflow gives infinity and underflow passes through the denormals.
inline Vec exp_vec(Vec x) {
  x = x < -104.0f ? broadcast(-104.0f) : x;
  x = x > 89.0f ? broadcast(89.0f) : x;
  Exponential e = exponential(x);
  Ints half = e.k >> 1;
  return e.p * power_of_two(half) * power_of_two(e.k - half);
}

// For x <= 0; zero below exp(-87).
inline Vec exp_negative(Vec x) {
  Exponential e = exponential(x);
  return x < -87.0f ? Vec{} : e.p * power_of_two(e.k);
}

// erfc(a) / 2 for a >= 0 within 0.5 epsilon, absolutely: exp of a fit of log erfc up to 4 (9 terms, weighted by erfc),
// continued by -a^2. One polynomial and one exp, without a division or a second branch for erf.
inline Vec half_erfc(Vec a) {
  Vec m = a > 4.0f ? broadcast(4.0f) : a;
  Vec m3 = m * m * m;
  Vec low = (m * -1.028396529367602e-01f - 6.366089848716083e-01f) * m - 1.128379742651912e+00f;
  Vec middle = (m * -1.449473975053073e-03f - 9.652159850087605e-05f) * m + 1.932501978914841e-02f;
  Vec high = (m * 6.606811497167353e-06f - 9.157101063950179e-05f) * m + 5.287938801874226e-04f;
  Vec l = (high * m3 + middle) * m3 + low;
  return 0.5f * exp_negative(l * m - (a * a - m * m));
}

// NaN must survive: every selection keeps x where the comparison is false.
template <Activation kind>
inline Vec activate(Vec x) {
  if (kind == Activation::kRelu) return x < 0.0f ? Vec{} : x;
  if (kind == Activation::kGelu) {
    Vec scaled = x * 0.707106781f, tail = half_erfc((Vec)((UInts)scaled & 0x7fffffffu));
    return x * (x < 0.0f ? tail : 1.0f - tail);
  }
  // 0.5 (1 + tanh(u)) = 1 / (1 + exp(-2u)): no cancellation for negative u.
  if (kind == Activation::kGeluTanh) {
    return x / (1.0f + exp_vec(x * (-1.595769122f - 7.135481283e-2f * (x * x))));
  }
  if (kind == Activation::kSilu) return x / (1.0f + exp_vec(-x));
  return x;
}

}  // namespace
}  // namespace inherit_kernels
