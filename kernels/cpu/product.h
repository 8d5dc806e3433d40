// Matrix products of a block of rows: register tiles of ROWS x COLS sums over packed weights.
//
// A row's result has the same bits whatever rows it is computed with: its sum runs over the summed axis in order. Where
// the machine has tiles for bfloat16 they compute all rows, for the same reason.

#pragma once

#include <algorithm>
#include <type_traits>

#include "amx.h"
#include "vector.h"

INLINE long round_up(long n, long to) { return (n + to - 1) / to * to; }
template <bool BF>
INLINE long units(long n) {
  return BF ? (n + 1) / 2 : n;
}

// Units of a panel: zeros follow where tiles read 16 at a time.
template <bool BF>
INLINE long panel_units(long n) {
  return BF && TILES ? round_up(units<BF>(n), TILE) : units<BF>(n);
}

// One unit of a column: the floats at `at` and one step along the summed axis.
template <bool BF>
INLINE uint32_t unit(const float* at, long along, bool has_second) {
  uint32_t bits;
  memcpy(&bits, at, 4);
  return BF ? bf16(*at) | uint32_t(has_second ? bf16(at[along]) : 0) << 16 : bits;
}

// Panels [columns / COLS][units(summed)][COLS] of a matrix [summed, columns] with row stride `ld`, or of its transpose;
// zeros pad the last panel, an odd last pair and a panel's units.
template <bool BF>
void pack(uint32_t* to, const float* w, long ld, long summed, long columns, bool transposed) {
  const long step = transposed ? ld : 1, along = transposed ? 1 : ld, ku = units<BF>(summed), each = BF ? 2 : 1,
             panel = panel_units<BF>(summed);
  for (long n0 = 0; n0 < columns; n0 += COLS, to += panel * COLS) {
    memset(to + ku * COLS, 0, size_t((panel - ku) * COLS) * 4);
    const long wide = std::min<long>(COLS, columns - n0);
    const float* from = w + n0 * step;
    if (transposed) {
      // Along a row of w, whose units go to one column: few rows at a time stay in the first-level cache.
      if (wide < COLS) memset(to, 0, size_t(ku * COLS) * 4);
      constexpr long some = 4 * LANES;
      alignas(64) uint32_t row[some];
      for (long u0 = 0; u0 < ku; u0 += some)
        for (long j = 0; j < wide; j++) {
          const float* at = from + j * step + each * u0;
          const long n = std::min(some, ku - u0);
          if (each * (u0 + some) <= summed)
            for (int i = 0; i < each * some / LANES; i++) operand<BF>(row, load(at + i * LANES), i);
          else
            for (long u = 0; u < n; u++) row[u] = unit<BF>(at + each * u, 1, each * (u0 + u) + 1 < summed);
          for (long u = 0; u < n; u++) to[(u0 + u) * COLS + j] = row[u];
        }
      continue;
    }
    for (long u = 0; u < ku; u++) {
      const float* row = from + each * u * along;
      const bool second = each * u + 1 < summed;
      for (long j = 0; j < COLS; j += LANES) {
        uint32_t* at = to + u * COLS + j;
        if (j + LANES > wide) {
          for (long i = j; i < j + LANES; i++) to[u * COLS + i] = i < wide ? unit<BF>(row + i, along, second) : 0;
        } else if (BF) {
          pairs(at, load(row + j), second ? load(row + along + j) : Vec{});
        } else {
          store(reinterpret_cast<float*>(at), load(row + j));
        }
      }
    }
  }
}
template <bool BF>
INLINE long packed_size(long summed, long columns) {
  return round_up(columns, COLS) * panel_units<BF>(summed);
}

// Where a product's sums begin: at 0, at a row of `row` (shared by all rows), at rows of `rows`, or at their sum.
struct Begin {
  const float* row = nullptr;
  const float* rows = nullptr;
  long ld = 0;
};

// Units of `b` that are asked for before they are needed: a panel is larger than what the first-level cache has left.
constexpr long AHEAD = 24;

template <bool BF, int M>
INLINE void tile(long ku, const uint32_t* a, long along_rows, long along_sum, const uint32_t* b, long ldb,
                 Vec (&c)[M][2]) {
  for (long u = 0; u < ku; u++, a += along_sum, b += ldb) {
    for (long j = 0; j < COLS; j += 16) __builtin_prefetch(b + AHEAD * ldb + j);
#pragma GCC unroll 16
    for (int i = 0; i < M; i++) {
      c[i][0] = fma_unit<BF>(c[i][0], a + i * along_rows, b);
      c[i][1] = fma_unit<BF>(c[i][1], a + i * along_rows, b + LANES);
    }
  }
}

// row and rows: those of `Begin` at this tile, or null; values, because a struct that is written in parts and read
// whole waits for all earlier stores.
template <bool BF, int M>
void forward_tile(long ku, const uint32_t* a, long lda, const uint32_t* w, float* c, long ldc, const float* row,
                  const float* rows, long ld) {
  Vec sums[M][2];
#pragma GCC unroll 16
  for (int i = 0; i < M; i++)
    for (int j = 0; j < 2; j++) {
      Vec x = {};
      if (row) x += load(row + j * LANES);
      if (rows) x += load(rows + i * ld + j * LANES);
      sums[i][j] = x;
    }
  tile<BF, M>(ku, a, lda, 1, w, COLS, sums);
#pragma GCC unroll 16
  for (int i = 0; i < M; i++)
    for (int j = 0; j < 2; j++) store(c + i * ldc + j * LANES, sums[i][j]);
}

// Register tiles for n rows: whole ones, then what is left. With few sums a tile waits for its additions, so that one of
// three rows, or of one, takes as long as one of four.
template <class Run>
INLINE void in_tiles(Run run, long n) {
  run(std::integral_constant<int, ROWS>());
  const long rest = n % ROWS;
  if (ROWS > 8 && (rest == 8 || rest == 11)) run(std::integral_constant<int, 8>());
  if (ROWS > 6) run(std::integral_constant<int, 6>());
  run(std::integral_constant<int, 4>());
  run(std::integral_constant<int, 3>());
  run(std::integral_constant<int, 1>());
}

#if TILES
// As `product`.
static void tiled_product(long rows, long columns, long panel, const uint32_t* a, long lda, const uint32_t* packed,
                          float* c, long ldc, Begin from) {
  auto run = [&](auto tiles, long first, long last) {
    constexpr int N = decltype(tiles)::value;
    const uint32_t* b = packed;
    for (long n0 = 0; n0 < columns; n0 += COLS, b += panel * COLS)
      for (long r = first; r < last; r += N * TILE) {
        const float* begin = from.row ? from.row + n0 : nullptr;
        long step = 0;
        alignas(64) float sum[N * TILE * COLS];
        if (from.rows) {
          const float* rows_of = from.rows + r * from.ld + n0;
          if (from.row) {
            const Vec low = load(begin), high = load(begin + LANES);
            for (long i = 0; i < std::min(last - r, N * TILE); i++) {
              store(sum + i * COLS, load(rows_of + i * from.ld) + low);
              store(sum + i * COLS + LANES, load(rows_of + i * from.ld + LANES) + high);
            }
          }
          begin = from.row ? sum : rows_of, step = from.row ? COLS : from.ld;
        }
        amx::multiply<N>(panel, a + r * lda, lda, b, COLS, begin, step, c + r * ldc + n0, ldc);
      }
  };
  constexpr std::integral_constant<int, 1> one;
  constexpr std::integral_constant<int, 2> two;
  const long whole = rows / (2 * TILE) * (2 * TILE), rest = rows - whole;
  if (whole) amx::configure(TILE, TILE), run(two, 0, whole);
  if (rest > TILE) amx::configure(TILE, rest - TILE), run(two, whole, rows);
  else if (rest == TILE && whole) run(one, whole, rows);
  else if (rest) amx::configure(rest, rest), run(one, whole, rows);
}

// w [inputs, columns] += a d, summed over `units` of rows, a multiple of 16: a [inputs, units], d [units, columns].
static void tiled_outer(long units, long inputs, long columns, const uint32_t* a, const uint32_t* d, long ldd, float* w,
                        long ldw) {
  amx::configure(TILE, TILE);
  for (long n0 = 0; n0 < columns; n0 += COLS)
    for (long k = 0; k < inputs; k += 2 * TILE) {
      const long high = std::min(inputs - k, 2 * TILE), wide = std::min<long>(columns - n0, COLS);
      float* to = w + k * ldw + n0;
      const bool whole = wide == COLS && (high == 2 * TILE || high == TILE);
      alignas(64) float part[2 * TILE * COLS];
      for (long i = 0; i < high && !whole; i++) memcpy(part + i * COLS, to + i * ldw, size_t(wide) * 4);
      float* sums = whole ? to : part;
      const long ld = whole ? ldw : COLS;
      if (high > TILE) amx::multiply<2>(units, a + k * units, units, d + n0, ldd, sums, ld, sums, ld);
      else amx::multiply<1>(units, a + k * units, units, d + n0, ldd, sums, ld, sums, ld);
      for (long i = 0; i < high && !whole; i++) memcpy(to + i * ldw, part + i * COLS, size_t(wide) * 4);
    }
}
#endif

// c [rows, columns] = begin + a [rows, summed] @ packed. Rows of c, of a begin and of packed panels are padded to COLS.
template <bool BF>
void product(long rows, long columns, long ku, const uint32_t* a, long lda, const uint32_t* packed, float* c, long ldc,
             Begin from) {
  const long panel = BF && TILES ? round_up(ku, TILE) : ku;
#if TILES
  if (BF && amx::allowed) return tiled_product(rows, columns, panel, a, lda, packed, c, ldc, from);
#endif
  for (long n0 = 0; n0 < columns; n0 += COLS, packed += panel * COLS) {
    long r = 0;
    const float* row = from.row ? from.row + n0 : nullptr;
    auto run = [&](auto tile_rows) {
      constexpr int M = decltype(tile_rows)::value;
      for (; rows - r >= M; r += M)
        forward_tile<BF, M>(ku, a + r * lda, lda, packed, c + r * ldc + n0, ldc, row,
                            from.rows ? from.rows + r * from.ld + n0 : nullptr, from.ld);
    };
    in_tiles(run, rows - r);
  }
}

template <bool BF, int M>
void outer_tile(long ru, const uint32_t* a, long lda, const uint32_t* d, long ldd, float* w, long ldw, long wide) {
  for (int i = 0; i < M; i++) __builtin_prefetch(w + i * ldw), __builtin_prefetch(w + i * ldw + LANES);
  Vec sums[M][2] = {};
  tile<BF, M>(ru, a, 1, lda, d, ldd, sums);
  for (int i = 0; i < M; i++, w += ldw) {
    if (wide >= COLS) {
      store(w, load(w) + sums[i][0]);
      store(w + LANES, load(w + LANES) + sums[i][1]);
    } else {
      float t[COLS];
      memcpy(t, sums[i], sizeof t);
      for (long j = 0; j < wide; j++) w[j] += t[j];
    }
  }
}

// Operands of `outer` this wide are copied first: rows so far apart lie in few sets of the first-level cache.
constexpr long WIDE = 384;

// w [inputs, columns] += a^T d, summed over `ru` units of rows; a [ru, inputs] and d [ru, columns] hold units. For
// tiles a is transposed already, [inputs, ru padded to 16], and zeros pad d's units likewise. Room for copies of floats:
// `room_a` [ru, inputs], `room_d` [ru, COLS].
template <bool BF>
void outer(long ru, long inputs, long columns, const uint32_t* a, long lda, const uint32_t* d, long ldd, float* w,
           long ldw, uint32_t* room_a, uint32_t* room_d) {
#if TILES
  if (BF && amx::allowed) return tiled_outer(round_up(ru, TILE), inputs, columns, a, d, ldd, w, ldw);
#endif
  const bool copied = !BF && inputs >= WIDE && columns >= WIDE;
  const long whole = copied ? inputs / ROWS * ROWS : 0;
  for (long k = 0; k < whole; k += ROWS)
    for (long r = 0; r < ru; r++) memcpy(room_a + k * ru + r * ROWS, a + r * lda + k, ROWS * 4);
  for (long n0 = 0; n0 < columns; n0 += COLS) {
    const uint32_t* from = d + n0;
    const long ld = copied ? COLS : ldd;
    for (long r = 0; copied && r < ru; r++) memcpy(room_d + r * COLS, from + r * ldd, COLS * 4);
    if (copied) from = room_d;
    long k = 0;
    for (; k < whole; k += ROWS)
      outer_tile<BF, ROWS>(ru, room_a + k * ru, ROWS, from, ld, w + k * ldw + n0, ldw, columns - n0);
    auto run = [&](auto tile_rows) {
      constexpr int M = decltype(tile_rows)::value;
      for (; inputs - k >= M; k += M)
        outer_tile<BF, M>(ru, a + k, lda, from, ld, w + k * ldw + n0, ldw, columns - n0);
    };
    in_tiles(run, inputs - k);
  }
}
