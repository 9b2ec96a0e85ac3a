// Products of packed panels with their epilogue, for one instruction set: included only by csrc/cpu/microkernels.cpp,
// everything with internal linkage (see kernels.h).
#pragma once

#include "inherit_kernels/kernels.h"
#include "inherit_kernels/vector.h"

namespace inherit_kernels {
namespace {

// A register tile is kRows x (kWide vectors): 24 of 32 registers hold sums with AVX-512, 12 of 16 otherwise.
constexpr int kWide = 2;
#if defined(__AVX512F__) || defined(INHERIT_KERNELS_EMULATED)
constexpr int kRows = 12;
#else
constexpr int kRows = 6;
#endif
constexpr int kPanel = kWide * kLanes;

inline int64_t min64(int64_t a, int64_t b) {
  return a < b ? a : b;
}

// The line `bytes` ahead, of a kLanes * 8 byte step; an address beyond the array does no harm.
inline void prefetch(const void* data, int64_t bytes) {
  const char* line = static_cast<const char*>(data) + bytes;
#pragma GCC unroll 2
  for (int k = 0; k < kPanel * 4; k += 64) __builtin_prefetch(line + k);
}

// A tile's sums: kM rows of kP panels.
template <int kM, int kP>
struct Sums {
  static constexpr int kVectors = kP * kWide;

  inline __attribute__((always_inline)) Sums() {
#pragma GCC unroll 16
    for (int i = 0; i < kM; ++i) {
#pragma GCC unroll 16
      for (int j = 0; j < kVectors; ++j) v[i][j] = Vec{};
    }
  }

  // init joins at the end: begun with, it would make one long run of all blocks, which errs more than the rule allows.
  inline __attribute__((always_inline)) void store(const float* init, int64_t ld_init, float* c, int64_t ldc,
                                                   bool relu) const {
#pragma GCC unroll 16
    for (int i = 0; i < kM; ++i) {
#pragma GCC unroll 16
      for (int j = 0; j < kVectors; ++j) {
        Vec sum = init ? load_vec(init + i * ld_init + j * kLanes) + v[i][j] : v[i][j];
        store_vec(c + i * ldc + j * kLanes, relu ? activate<Activation::kRelu>(sum) : sum);
      }
    }
  }

  Vec v[kM][kVectors];
};

// Bytes ahead that are prefetched where two panels pass at once (2 rows, weights beyond the L2 cache: 1.1 to 1.3 times
// faster; where four pass, at one row, it was 5 % slower).
constexpr int64_t kAhead = 1024;

// Three rows of two panels fill the 16 registers of AVX2 with sums and columns: values kept from one panel to the next
// would drive sums out (1.8 times slower).
template <int kM, int kP>
inline __attribute__((always_inline)) void reload_rows(const float*& a) {
  if (kM == 3 && kP > 1) asm("" : "+r"(a));
}

template <int kM, int kP>
void panel_tile(const void* rows, int64_t lda, int64_t depth, const void* panels, int64_t b_panel, const void* ahead,
                const float* init, int64_t ld_init, float* c, int64_t ldc, bool relu) {
  const float *a = static_cast<const float*>(rows), *b = static_cast<const float*>(panels);
  Sums<kM, kP> sums;
#pragma GCC unroll 4
  for (int64_t d = 0; d < depth; ++d) {
    if (kP == 1) prefetch(ahead, d * kPanel * 4);
#pragma GCC unroll 4
    for (int p = 0; p < kP; ++p) {
      if (kP == 2) prefetch(b + p * b_panel, kAhead);
      Vec column[kWide];
#pragma GCC unroll 4
      for (int w = 0; w < kWide; ++w) column[w] = load_vec(b + p * b_panel + w * kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < kM; ++i) {
        Vec value = broadcast(a[i * lda + d]);
#pragma GCC unroll 4
        for (int w = 0; w < kWide; ++w) sums.v[i][p * kWide + w] += value * column[w];
      }
      reload_rows<kM, kP>(a);
    }
    b += kPanel;
  }
  sums.store(init, ld_init, c, ldc, relu);
}

// Pairs of bfloat16 widened on the way: a shift gives the even depth, a mask the odd one. The columns are read for each
// of the two, so that no more of them are in registers than in panel_tile.
template <bool kOdd>
inline Vec widen(UInts pairs) {
  return (Vec)(kOdd ? pairs & 0xffff0000u : pairs << 16);
}

template <int kM, int kP, bool kOdd>
inline __attribute__((always_inline)) void add_widened(Sums<kM, kP>& sums, const float* a, int64_t lda,
                                                       const uint16_t* b, int64_t b_panel) {
#pragma GCC unroll 4
  for (int p = 0; p < kP; ++p) {
    if (kP == 2 && !kOdd) prefetch(b + p * b_panel, kAhead);
    Vec column[kWide];
#pragma GCC unroll 4
    for (int w = 0; w < kWide; ++w) column[w] = widen<kOdd>(load_pairs(b + p * b_panel + w * 2 * kLanes));
#pragma GCC unroll 16
    for (int i = 0; i < kM; ++i) {
      Vec value = broadcast(a[i * lda + kOdd]);
#pragma GCC unroll 4
      for (int w = 0; w < kWide; ++w) sums.v[i][p * kWide + w] += value * column[w];
    }
    reload_rows<kM, kP>(a);
  }
}

template <int kM, int kP>
void widening_tile(const void* rows, int64_t lda, int64_t depth, const void* panels, int64_t b_panel, const void* ahead,
                   const float* init, int64_t ld_init, float* c, int64_t ldc, bool relu) {
  const float* a = static_cast<const float*>(rows);
  const uint16_t* b = static_cast<const uint16_t*>(panels);
  Sums<kM, kP> sums;
  for (int64_t d = 0; d + 1 < depth; d += 2) {
    if (kP == 1) prefetch(ahead, d * kPanel * 2);
    add_widened<kM, kP, false>(sums, a + d, lda, b, b_panel);
    // The columns are read again: kept in registers, they drive sums out (2 times slower at one row).
    asm("" : "+r"(b));
    add_widened<kM, kP, true>(sums, a + d, lda, b, b_panel);
    b += 2 * kPanel;
  }
  if (depth % 2) add_widened<kM, kP, false>(sums, a + depth - 1, lda, b, b_panel);
  sums.store(init, ld_init, c, ldc, relu);
}

#ifdef INHERIT_KERNELS_PAIR_PRODUCTS
// bfloat16 rows and panels, two depths an instruction.
template <int kM, int kP>
void pair_tile(const void* rows, int64_t lda, int64_t depth, const void* panels, int64_t b_panel, const void* ahead,
               const float* init, int64_t ld_init, float* c, int64_t ldc, bool relu) {
  const uint16_t *a = static_cast<const uint16_t*>(rows), *b = static_cast<const uint16_t*>(panels);
  Sums<kM, kP> sums;
  for (int64_t d = 0; d < depth; d += 2) {
    bool odd = d + 1 == depth;
    if (kP == 1) prefetch(ahead, d * kPanel * 2);
    UInts column[kP * kWide];
#pragma GCC unroll 16
    for (int j = 0; j < kP * kWide; ++j) {
      column[j] = load_pairs(b + (j / kWide) * b_panel + (j % kWide) * 2 * kLanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kM; ++i) {
      UInts value = odd ? broadcast_half(a + i * lda + d) : broadcast_pair(a + i * lda + d);
#pragma GCC unroll 16
      for (int j = 0; j < kP * kWide; ++j) sums.v[i][j] = add_pair_product(sums.v[i][j], value, column[j]);
    }
    b += 2 * kPanel;
  }
  sums.store(init, ld_init, c, ldc, relu);
}
#endif

// `ahead` is what the tile prefetches while it runs: the next panel, once beside the first rows on this one, as it may
// come from memory (1.1 to 1.2 times faster at 16 rows and 25 MB of weights), and once beside the last, by which time
// the rows between have driven it out of the first level cache (3 to 6 % faster).
using PanelTile = void (*)(const void*, int64_t, int64_t, const void*, int64_t, const void*, const float*, int64_t,
                           float*, int64_t, bool);

// One panel for each number of rows, and few rows of several panels: a row alone would wait for its two sums.
struct PanelTiles {
  PanelTile one[kRows], several[3];
};
constexpr int kSeveral[3] = {4, 2, 2};

#if defined(__AVX512F__) || defined(INHERIT_KERNELS_EMULATED)
#define INHERIT_KERNELS_TILES(tile)                                                                                \
  {                                                                                                                \
      {tile<1, 1>, tile<2, 1>, tile<3, 1>, tile<4, 1>, tile<5, 1>, tile<6, 1>, tile<7, 1>, tile<8, 1>, tile<9, 1>, \
       tile<10, 1>, tile<11, 1>, tile<12, 1>},                                                                     \
      {tile<1, 4>, tile<2, 2>, tile<3, 2>},                                                                        \
  }
#else
#define INHERIT_KERNELS_TILES(tile)                                             \
  {                                                                             \
      {tile<1, 1>, tile<2, 1>, tile<3, 1>, tile<4, 1>, tile<5, 1>, tile<6, 1>}, \
      {tile<1, 4>, tile<2, 2>, tile<3, 2>},                                     \
  }
#endif

constexpr PanelTiles kFloatTiles = INHERIT_KERNELS_TILES(panel_tile);
#ifdef INHERIT_KERNELS_PAIR_PRODUCTS
constexpr PanelTiles kPairTiles = INHERIT_KERNELS_TILES(pair_tile);
constexpr bool kMultipliesPairs = true;
#else
constexpr PanelTiles kPairTiles = INHERIT_KERNELS_TILES(widening_tile);
constexpr bool kMultipliesPairs = false;
#endif

// Tiles of up to 4 rows widen their columns themselves (with 6 the registers do not suffice: 30 % slower). More than
// two such tiles share a panel that was widened before.
constexpr int64_t kWideningRows = 4;

// One bfloat16 panel as a float32 panel.
void widen_panel(const uint16_t* pairs, int64_t depth, const void* ahead, float* out) {
  for (int64_t d = 0; d < depth; d += 2) {
    prefetch(ahead, d * kPanel * 2);
#pragma GCC unroll 4
    for (int w = 0; w < kWide; ++w) {
      UInts columns = load_pairs(pairs + d * kPanel + w * 2 * kLanes);
      store_vec(out + d * kPanel + w * kLanes, widen<false>(columns));
      store_vec(out + (d + 1) * kPanel + w * kLanes, widen<true>(columns));
    }
  }
}

// Calls body(tile, a, b, first row, rows, first column, columns) for all tiles, panels outermost: a panel stays in the
// first level cache while the rows pass.
// Rows are shared out evenly: 32 rows are 2 * 6 + 4 * 5, not 5 * 6 + 2.
template <class Body>
void over_tiles(const Product& p, const Body& body) {
  if (p.rows == 0) return;
  bool pairs = p.b_dtype == Dtype::kBFloat16, widens = pairs && !kMultipliesPairs && p.rows > 2 * kWideningRows;
  const PanelTiles& tiles = pairs && !widens ? kPairTiles : kFloatTiles;
  int64_t most = pairs && !widens && !kMultipliesPairs ? kWideningRows : kRows;
  int64_t count = (p.rows + most - 1) / most, rows = p.rows / count, larger = p.rows % count;
  int64_t b_size = pairs ? 2 : 4, a_size = p.a.dtype == Dtype::kFloat32 ? 4 : 2;
  alignas(64) float widened[kMultipliesPairs ? 1 : kMaxPanelDepth * kPanel];
  for (int64_t panel = 0, step; panel < p.panels; panel += step) {
    step = p.rows <= 3 && panel + kSeveral[p.rows - 1] <= p.panels ? kSeveral[p.rows - 1] : 1;
    const char *b = static_cast<const char*>(p.b) + panel * p.b_panel * b_size, *next = b + step * p.b_panel * b_size;
    if (widens) {
      widen_panel(reinterpret_cast<const uint16_t*>(b), p.depth, next, widened);
      b = reinterpret_cast<const char*>(widened);
    }
    for (int64_t t = 0, i = 0; t < count; ++t) {
      int64_t tile_rows = rows + (t < larger);
      PanelTile tile = step > 1 ? tiles.several[tile_rows - 1] : tiles.one[tile_rows - 1];
      body(tile, static_cast<const char*>(p.a.data) + i * p.a.ld * a_size, b,
           (t == 0 || t + 1 == count) && !widens ? next : b, i, tile_rows, panel * kPanel, step * kPanel);
      i += tile_rows;
    }
  }
}

void multiply(const Product& p, float* c, int64_t ldc) {
  over_tiles(
      p, [&](PanelTile tile, const void* a, const void* b, const void* ahead, int64_t i, int64_t, int64_t j, int64_t) {
        const float* init = p.init ? p.init + i * p.ld_init + j : nullptr;
        tile(a, p.a.ld, p.depth, b, p.b_panel, ahead, init, p.ld_init, c + i * ldc + j, ldc, false);
      });
}

void finish(const float* c, int64_t ldc, int64_t rows, int64_t cols, MatrixView residual, Activation activation,
            void* out, Dtype dtype, int64_t ldo);

inline const void* offset(const void* data, Dtype dtype, int64_t index) {
  return static_cast<const char*>(data) + index * (dtype == Dtype::kFloat32 ? 4 : 2);
}

// Full float32 tiles without transcendental functions go from the registers to the output (10 % faster at depth 64);
// others through a buffer of one tile.
void multiply_finish(const Product& p, const Epilogue& e) {
  bool relu = e.activation == Activation::kRelu;
  bool direct = e.dtype == Dtype::kFloat32 && (relu || e.activation == Activation::kNone) && !e.residual.data;
  over_tiles(p, [&](PanelTile tile, const void* a, const void* b, const void* ahead, int64_t i, int64_t rows, int64_t j,
                    int64_t cols) {
    const float* init = p.init ? p.init + i * p.ld_init + j : nullptr;
    void* out = const_cast<void*>(offset(e.out, e.dtype, i * e.ld_out + j));
    if (direct && j + cols <= e.cols) {
      return tile(a, p.a.ld, p.depth, b, p.b_panel, ahead, init, p.ld_init, static_cast<float*>(out), e.ld_out, relu);
    }
    float c[kRows * kPanel];
    tile(a, p.a.ld, p.depth, b, p.b_panel, ahead, init, p.ld_init, c, cols, false);
    MatrixView residual = e.residual;
    if (residual.data) {
      residual.data = offset(residual.data, residual.dtype, i * residual.row_stride + j * residual.col_stride);
    }
    finish(c, cols, rows, min64(cols, e.cols - j), residual, e.activation, out, e.dtype, e.ld_out);
  });
}

}  // namespace
}  // namespace inherit_kernels
