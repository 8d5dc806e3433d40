// Products of bfloat16 by Intel's tiles (AMX): eight registers of 16 rows of 64 bytes.
//
// A panel of packed weights is a B tile as it is, rows of an operand are an A tile. Units are summed 16 at a time, and
// what is left of them with zeros: a row's sum is the same whichever rows of a tile are in use.

#pragma once

#include "vector.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define HAS_TILES 1
#include <sys/syscall.h>
#include <unistd.h>
#else
#define HAS_TILES 0
#endif
#define TILES (HAS_TILES && PAIRS)  // used by this library

constexpr long TILE = 16;  // rows of a tile, units of a row, columns of sums

namespace amx {

// The system saves tiles only for a process that has asked to use them; children inherit that.
static bool ask() {
#if HAS_TILES
  constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request, tile_data) == 0;
#else
  return false;
#endif
}

#if TILES

static const bool allowed = ask();

// The rows of the two row tiles that this thread's tiles are configured for; 0: not by us.
static thread_local long configured = 0;

// Sums in tiles 0 to 3 ([first rows: 0 1, second rows: 2 3]), rows of `a` in 4 and 5, `b` in 6 and 7.
static void configure(long first, long second) {
  const long wanted = first * 64 + second;
  if (configured == wanted) return;
  struct alignas(64) {
    uint8_t palette = 1, start = 0, none[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  const long rows[] = {first, first, second, second, first, second, TILE, TILE};
  for (int i = 0; i < 8; i++) config.bytes[i] = rows[i] ? 64 : 0, config.rows[i] = uint8_t(rows[i]);
  asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
  configured = wanted;
}

// While a thread computes. Others, such as torch's products, configure the same registers; empty ones cost no time when
// the system changes threads.
struct Session {
  Session() { configured = 0; }
  ~Session() {
    if (configured) asm volatile("tilerelease" ::: "memory");
    configured = 0;
  }
  Session(const Session&) = delete;
};

// Not the compiler's intrinsics: GCC 12's do not say that they read memory.
#define TILE_LOAD(tile, at, step) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"(at), "r"(4 * (step)) : "memory")
#define TILE_STORE(tile, at, step) \
  asm volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(at), "r"(4 * (step)) : "memory")
#define TILE_ZERO(tile) asm volatile("tilezero %%tmm" #tile ::)
#define TILE_FMA(sum, a, b) asm volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #sum ::)

// c [rows, 32] = begin + a b for one or two tiles of rows, as configured: a [rows, units], b [units, 32], `units` a
// multiple of 16. begin: null for 0; a step of 0 repeats its row.
template <int N>
INLINE void multiply(long units, const uint32_t* a, long lda, const uint32_t* b, long ldb, const float* begin,
                     long ld_begin, float* c, long ldc) {
  if (begin) {
    TILE_LOAD(0, begin, ld_begin);
    TILE_LOAD(1, begin + TILE, ld_begin);
    if (N == 2) {
      TILE_LOAD(2, begin + TILE * ld_begin, ld_begin);
      TILE_LOAD(3, begin + TILE * ld_begin + TILE, ld_begin);
    }
  } else {
    TILE_ZERO(0);
    TILE_ZERO(1);
    if (N == 2) {
      TILE_ZERO(2);
      TILE_ZERO(3);
    }
  }
  for (long u = 0; u < units; u += TILE, a += TILE, b += TILE * ldb) {
    TILE_LOAD(6, b, ldb);
    TILE_LOAD(4, a, lda);
    TILE_LOAD(7, b + TILE, ldb);
    TILE_FMA(0, 4, 6);
    TILE_FMA(1, 4, 7);
    if (N == 2) {
      TILE_LOAD(5, a + TILE * lda, lda);
      TILE_FMA(2, 5, 6);
      TILE_FMA(3, 5, 7);
    }
  }
  TILE_STORE(0, c, ldc);
  TILE_STORE(1, c + TILE, ldc);
  if (N == 2) {
    TILE_STORE(2, c + TILE * ldc, ldc);
    TILE_STORE(3, c + TILE * ldc + TILE, ldc);
  }
}

// 16 x 16 units.
INLINE void transpose(uint32_t* to, long ld, __m512i (&x)[16]) {
  __m512i y[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {
    __m512i low = _mm512_unpacklo_epi32(x[i], x[i + 1]), high = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    __m512i low_2 = _mm512_unpacklo_epi32(x[i + 2], x[i + 3]), high_2 = _mm512_unpackhi_epi32(x[i + 2], x[i + 3]);
    y[i] = _mm512_unpacklo_epi64(low, low_2), y[i + 1] = _mm512_unpackhi_epi64(low, low_2);
    y[i + 2] = _mm512_unpacklo_epi64(high, high_2), y[i + 3] = _mm512_unpackhi_epi64(high, high_2);
  }
  // y[4 g + j] holds columns j, j + 4, j + 8, j + 12 of rows 4 g ... 4 g + 3.
#pragma GCC unroll 16
  for (int j = 0; j < 4; j++) {
    __m512i a = _mm512_shuffle_i32x4(y[j], y[4 + j], 0x88), b = _mm512_shuffle_i32x4(y[j], y[4 + j], 0xdd);
    __m512i c = _mm512_shuffle_i32x4(y[8 + j], y[12 + j], 0x88), d = _mm512_shuffle_i32x4(y[8 + j], y[12 + j], 0xdd);
    _mm512_storeu_si512(to + j * ld, _mm512_shuffle_i32x4(a, c, 0x88));
    _mm512_storeu_si512(to + (j + 8) * ld, _mm512_shuffle_i32x4(a, c, 0xdd));
    _mm512_storeu_si512(to + (j + 4) * ld, _mm512_shuffle_i32x4(b, d, 0x88));
    _mm512_storeu_si512(to + (j + 12) * ld, _mm512_shuffle_i32x4(b, d, 0xdd));
  }
}

// Rows of bfloat16 as the transposed operand [width, units(rows)] of a sum over rows, with zeros up to a multiple of 16
// units, for a width that is padded to 16.
static void transposed(uint32_t* to, long ld, const uint32_t* from, long ld_from, long rows, long width) {
  for (long k = 0; k < width; k += TILE)
    for (long u = 0; u < ld; u += TILE) {
      __m512i x[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) {
        const long r = 2 * (u + i);
        auto row = [&](long at) {
          const auto* units = reinterpret_cast<const uint16_t*>(from + at * ld_from) + k;
          return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(units)));
        };
        x[i] = r < rows ? row(r) : _mm512_setzero_si512();
        if (r + 1 < rows) x[i] = _mm512_or_si512(x[i], _mm512_slli_epi32(row(r + 1), 16));
      }
      transpose(to + k * ld + u, ld, x);
    }
}

#else

struct Session {};

#endif

}  // namespace amx
