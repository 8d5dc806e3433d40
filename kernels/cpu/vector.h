// Vectors of floats as wide as the machine's, and the functions of them that networks need.
//
// Written in GCC's and Clang's vector extensions, so the same lines become AVX-512, AVX2, SSE or NEON.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#define LANES 16
#define ROWS 12  // rows of a register tile: 24 of 32 registers are sums
#elif defined(__AVX2__)
#include <immintrin.h>
#define LANES 8
#define ROWS 6  // 12 of 16 registers
#elif defined(__aarch64__)
#define LANES 4
#define ROWS 12
#else
#define LANES 4
#define ROWS 6
#endif
#define COLS (2 * LANES)  // columns of a register tile, and of a panel of packed weights

// GCC's vectors are as wide as 512 bits without AVX-512 too; the ABI note about that concerns no one here.
#pragma GCC diagnostic ignored "-Wpsabi"

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t Int __attribute__((vector_size(4 * LANES)));
typedef float VecAny __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))
#define INLINE_MEMBER inline __attribute__((always_inline))

INLINE Vec load(const float* p) { return *reinterpret_cast<const VecAny*>(p); }
INLINE void store(float* p, Vec x) { *reinterpret_cast<VecAny*>(p) = x; }
// The first n lanes, fewer than all; zeros beyond.
INLINE Vec load_some(const float* p, long n) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p));
#else
  Vec x = {};
  memcpy(&x, p, size_t(n) * 4);
  return x;
#endif
}
INLINE Vec all(float x) { return Vec{} + x; }
INLINE Vec pick(Int where, Vec a, Vec b) { return where ? a : b; }
// A NaN in `a` stays: the processor's minimum returns its second operand then.
INLINE Vec smaller(Vec a, Vec b) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(_mm512_min_ps(reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(a)));
#elif defined(__AVX2__)
  return reinterpret_cast<Vec>(_mm256_min_ps(reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(a)));
#else
  return pick(a > b, b, a);
#endif
}
INLINE Vec larger(Vec a, Vec b) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(_mm512_max_ps(reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(a)));
#elif defined(__AVX2__)
  return reinterpret_cast<Vec>(_mm256_max_ps(reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(a)));
#else
  return pick(a < b, b, a);
#endif
}
INLINE Vec magnitude(Vec x) { return reinterpret_cast<Vec>(reinterpret_cast<Int>(x) & 0x7fffffff); }
INLINE Vec with_sign(Vec x, Vec sign) {
  return reinterpret_cast<Vec>(reinterpret_cast<Int>(x) | (reinterpret_cast<Int>(sign) & int32_t(0x80000000)));
}

// The sum of all lanes: halves are added until one lane is left.
INLINE float total(Vec x) {
#if defined(__AVX512F__)
  __m512 z = reinterpret_cast<__m512>(x);
  __m256 y = _mm256_add_ps(_mm512_castps512_ps256(z), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(z), 1)));
#elif defined(__AVX2__)
  __m256 y = reinterpret_cast<__m256>(x);
#endif
#if defined(__AVX512F__) || defined(__AVX2__)
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
#else
  return (x[0] + x[2]) + (x[1] + x[3]);
#endif
}

// x = n ln 2 + r with |r| <= ln 2 / 2, for x that e^x does not overflow or vanish at.
struct Reduced {
  Vec r, n;
};
INLINE Reduced reduce(Vec x) {
  x = larger(smaller(x, all(88.0f)), all(-87.0f));
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  Vec n = x * 1.44269504088896341f + magic - magic;
  return {x - n * 0.693145751953125f - n * 1.42860682030941723e-6f, n};
}
// (e^r - 1 - r) / r^2 (Cephes).
INLINE Vec exp_tail(Vec r) {
  return ((((1.9875691500e-4f * r + 1.3981999507e-3f) * r + 8.3334519073e-3f) * r + 4.1665795894e-2f) * r +
          1.6666665459e-1f) *
             r +
         5.0000001201e-1f;
}
// x 2^n.
INLINE Vec scale(Vec x, Vec n) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(_mm512_scalef_ps(reinterpret_cast<__m512>(x), reinterpret_cast<__m512>(n)));
#else
  return x * reinterpret_cast<Vec>((__builtin_convertvector(n, Int) + 127) << 23);
#endif
}

// e^x to about one unit in the last place, between e^-87 and e^88.
INLINE Vec exp_of(Vec x) {
  Reduced at = reduce(x);
  return scale(exp_tail(at.r) * (at.r * at.r) + (at.r + 1.0f), at.n);
}
// e^x - 1, exact near 0 where the difference would cancel.
INLINE Vec exp_minus_one(Vec x) {
  Reduced at = reduce(x);
  Vec whole = scale(all(1.0f), at.n);
  return (exp_tail(at.r) * (at.r * at.r) + at.r) * whole + (whole - 1.0f);
}
INLINE Vec sigmoid(Vec x) { return 1.0f / (1.0f + exp_of(-x)); }
// The same to some 1e-4, for results that are rounded to bfloat16, whose neighbours are 4e-3 apart.
INLINE Vec rough_sigmoid(Vec x) {
#if defined(__AVX512F__)
  __m512 p = reinterpret_cast<__m512>(larger(smaller(x * -1.44269504088896341f, all(126.0f)), all(-126.0f)));
  __m512 n = _mm512_roundscale_ps(p, 8);
  Vec f = reinterpret_cast<Vec>(p) - reinterpret_cast<Vec>(n);
  Vec e = scale((((0.0096181291f * f + 0.0555041087f) * f + 0.2402265070f) * f + 0.6931471806f) * f + 1.0f,
                reinterpret_cast<Vec>(n));
  return reinterpret_cast<Vec>(_mm512_rcp14_ps(reinterpret_cast<__m512>(1.0f + e)));
#else
  return sigmoid(x);
#endif
}
// tanh |x| = (1 - e^-2|x|) / (1 + e^-2|x|).
INLINE Vec tanh_of(Vec x) {
  Vec e = exp_minus_one(magnitude(x) * -2.0f);
  return with_sign(-e / (e + 2.0f), x);
}
// Minimax fits: of erf(x) / x in x^2 up to 1, of -log(1 - erf x) above. Absolute error 1.3e-7.
INLINE Vec erf_of(Vec x) {
  Vec m = magnitude(x), s = m * m;
  Vec low = ((((((7.889117719e-05f * s - 8.020840738e-04f) * s + 5.189535279e-03f) * s - 2.685444456e-02f) * s +
               1.128360018e-01f) *
                  s -
              3.761262714e-01f) *
                 s +
             1.128379166e+00f) *
            m;
  Vec c = smaller(m, all(4.1f));
  Vec p = (((((((1.697323533e-07f * c + 1.926292428e-05f) * c - 4.265065312e-04f) * c + 4.153779927e-03f) * c -
              2.510176910e-02f) *
                 c +
             1.082784948e-01f) *
                c +
            6.333328399e-01f) *
               c +
           1.129527363e+00f) *
              c -
          1.781247777e-04f;
  Vec high = 1.0f - exp_of(-p);
  return with_sign(pick(m < 1.0f, low, high), x);
}

// Activations, as named by `fastflow.kernels.cpu.ACTIVATIONS`.
enum Activation { GELU_TANH, GELU, SILU, RELU, ELU, MISH, TANH };

// The value, and its derivative where `slope` is asked for: both share the exponential. ROUGH where the value becomes an
// operand of bfloat16.
template <int A, bool SLOPE, bool ROUGH>
INLINE Vec activate(Vec x, Vec& slope) {
  if (A == GELU_TANH) {
    const float c = 1.5957691216057308f;  // 2 sqrt(2 / pi): tanh as a sigmoid
    Vec xx = x * x;
    Vec u = x * (c + (c * 0.044715f) * xx), s = ROUGH ? rough_sigmoid(u) : sigmoid(u);
    if (SLOPE) slope = s + x * s * (1.0f - s) * (c + (c * 3 * 0.044715f) * xx);
    return x * s;
  }
  if (A == GELU) {
    Vec half = x * 0.5f, p = erf_of(x * 0.70710678118654752f);
    if (SLOPE) slope = 0.5f + 0.5f * p + x * exp_of(x * x * -0.5f) * 0.3989422804014327f;
    return half + half * p;
  }
  if (A == SILU) {
    Vec s = ROUGH ? rough_sigmoid(x) : sigmoid(x);
    if (SLOPE) slope = s * (1.0f + x * (1.0f - s));
    return x * s;
  }
  if (A == RELU) {
    if (SLOPE) slope = pick(x > 0.0f, all(1.0f), Vec{});
    return larger(x, Vec{});
  }
  if (A == ELU) {
    Vec e = exp_minus_one(smaller(x, Vec{}));
    if (SLOPE) slope = e + 1.0f;
    return pick(x > 0.0f, x, e);
  }
  if (A == MISH) {
    // tanh(log(1 + e)) = (e^2 + 2 e) / (e^2 + 2 e + 2), e = e^x; 1 to the last bit above 20.
    Vec e = exp_of(smaller(x, all(20.0f)));
    Vec w = e * (e + 2.0f), t = w / (w + 2.0f);
    if (SLOPE) slope = t + x * (1.0f - t * t) * (e / (1.0f + e));
    return x * t;
  }
  Vec t = tanh_of(x);
  if (SLOPE) slope = 1.0f - t * t;
  return t;
}

// Operands of products ------------------------------------------------------------------------------------------------
//
// A product's operand is made of 32-bit units: one float, or two neighbouring bfloat16 of the summed axis.

template <bool BF>
INLINE void operand(uint32_t* to, Vec x, int i) {  // lanes i * LANES ... of a row
  if (!BF) {
    store(reinterpret_cast<float*>(to) + i * LANES, x);
    return;
  }
#if defined(__AVX512BF16__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(reinterpret_cast<uint16_t*>(to) + i * LANES),
                      reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(x))));
#endif
}

#if defined(__AVX512BF16__)
// 0 16 1 17 2 18 ... of 32 numbers of 16 bits.
INLINE __m512i interleaved(__m512i x) {
  __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  lane = _mm512_or_si512(lane, _mm512_slli_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(16)), 16));
  return _mm512_permutexvar_epi16(lane, x);
}
#endif

// Two rows as pairs: the summed axis is that of rows.
INLINE void pairs(uint32_t* to, Vec even, Vec odd) {
#if defined(__AVX512BF16__)
  __m512i both = reinterpret_cast<__m512i>(
      _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(odd), reinterpret_cast<__m512>(even)));
  _mm512_storeu_si512(to, interleaved(both));
#endif
}

INLINE uint16_t bf16(float x) {  // to nearest, ties to even
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// sum + a * b, where a is one unit for all lanes.
template <bool BF>
INLINE Vec fma_unit(Vec sum, const uint32_t* a, const uint32_t* b) {
  if (!BF) {
    float scalar;
    memcpy(&scalar, a, 4);
    return sum + scalar * load(reinterpret_cast<const float*>(b));
  }
#if defined(__AVX512BF16__)
  return reinterpret_cast<Vec>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum),
                                                reinterpret_cast<__m512bh>(_mm512_set1_epi32(int(*a))),
                                                reinterpret_cast<__m512bh>(_mm512_loadu_si512(b))));
#else
  return sum;
#endif
}
