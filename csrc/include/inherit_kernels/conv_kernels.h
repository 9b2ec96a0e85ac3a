// The register tiles of the convolutions: the part of csrc/cpu/microkernels.cpp that only they use, included there and
// nowhere else. See kernels.h for what each entry of the table means.
#pragma once

namespace inherit_kernels {
namespace {

template <int kM>
void gather_tile(const GatherProduct& p, int64_t i, const float* b, float* c, int64_t ldc) {
  Sums<kM, 1> sums;
  for (int64_t tap = 0; tap < p.taps; ++tap) {
    const float* row[kM];
#pragma GCC unroll 16
    for (int m = 0; m < kM; ++m) row[m] = p.rows[tap * p.ld + i + m] + p.first;
    const float* panel = b + tap * p.b_tap;
#pragma GCC unroll 4
    for (int64_t d = 0; d < p.depth; ++d) {
      Vec column[kWide];
#pragma GCC unroll 4
      for (int j = 0; j < kWide; ++j) column[j] = load_vec(panel + d * kPanel + j * kLanes);
#pragma GCC unroll 16
      for (int m = 0; m < kM; ++m) {
        Vec value = broadcast(row[m][d]);
#pragma GCC unroll 4
        for (int j = 0; j < kWide; ++j) sums.v[m][j] += value * column[j];
      }
    }
  }
  sums.store(p.accumulate ? c : nullptr, ldc, c, ldc, false);
}

// The same for a panel of which no more than the first vector is in use: the other holds zeros.
template <int kM>
void gather_half_tile(const GatherProduct& p, int64_t i, const float* b, float* c, int64_t ldc) {
  Vec sums[kM];
#pragma GCC unroll 16
  for (int m = 0; m < kM; ++m) sums[m] = Vec{};
  for (int64_t tap = 0; tap < p.taps; ++tap) {
    const float* row[kM];
#pragma GCC unroll 16
    for (int m = 0; m < kM; ++m) row[m] = p.rows[tap * p.ld + i + m] + p.first;
    const float* panel = b + tap * p.b_tap;
#pragma GCC unroll 4
    for (int64_t d = 0; d < p.depth; ++d) {
      Vec column = load_vec(panel + d * kPanel);
#pragma GCC unroll 16
      for (int m = 0; m < kM; ++m) sums[m] += broadcast(row[m][d]) * column;
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < kM; ++m) {
    store_vec(c + m * ldc, p.accumulate ? load_vec(c + m * ldc) + sums[m] : sums[m]);
    store_vec(c + m * ldc + kLanes, Vec{});
  }
}

// c [kM outputs, one panel of positions]; the outputs lie side by side in `w`.
template <int kM>
void columns_tile(const float* w, int64_t depth, const float* t, const float* bias, const float* init, int64_t ld_init,
                  float* c, int64_t ldc, bool relu) {
  Sums<kM, 1> sums;
#pragma GCC unroll 16
  for (int m = 0; m < kM; ++m) {
#pragma GCC unroll 4
    for (int j = 0; j < kWide; ++j) {
      if (bias) sums.v[m][j] = broadcast(bias[m]);
    }
  }
#pragma GCC unroll 4
  for (int64_t d = 0; d < depth; ++d) {
    Vec column[kWide];
#pragma GCC unroll 4
    for (int j = 0; j < kWide; ++j) column[j] = load_vec(t + d * kPanel + j * kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < kM; ++m) {
      Vec value = broadcast(w[d * kPanel + m]);
#pragma GCC unroll 4
      for (int j = 0; j < kWide; ++j) sums.v[m][j] += value * column[j];
    }
  }
  sums.store(init, ld_init, c, ldc, relu);
}

// c [kM columns of a, one panel] += sum over rows.
template <int kM>
void outer_tile(const float* a, int64_t lda, const float* const* rows, int64_t first, int64_t count, float* c,
                int64_t ldc) {
  Sums<kM, 1> sums;
#pragma GCC unroll 2
  for (int64_t p = 0; p < count; ++p) {
    const float* row = rows[p] + first;
    Vec column[kWide];
#pragma GCC unroll 4
    for (int j = 0; j < kWide; ++j) column[j] = load_vec(row + j * kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < kM; ++m) {
      Vec value = broadcast(a[p * lda + m]);
#pragma GCC unroll 4
      for (int j = 0; j < kWide; ++j) sums.v[m][j] += value * column[j];
    }
  }
  sums.store(c, ldc, c, ldc, false);
}

using OuterTile = void (*)(const float*, int64_t, const float* const*, int64_t, int64_t, float*, int64_t);
using GatherTile = void (*)(const GatherProduct&, int64_t, const float*, float*, int64_t);
using ColumnsTile = void (*)(const float*, int64_t, const float*, const float*, const float*, int64_t, float*, int64_t,
                             bool);
#if defined(__AVX512F__) || defined(INHERIT_KERNELS_EMULATED)
#define INHERIT_KERNELS_ROW_TILES(tile) \
  {tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>, tile<7>, tile<8>, tile<9>, tile<10>, tile<11>, tile<12>}
#else
#define INHERIT_KERNELS_ROW_TILES(tile) {tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>}
#endif
constexpr GatherTile kGatherTiles[kRows] = INHERIT_KERNELS_ROW_TILES(gather_tile);
// One vector a row needs 8 rows: an addition takes 4 cycles, and two begin in each.
#if defined(__AVX512F__) || defined(INHERIT_KERNELS_EMULATED)
constexpr int kHalfRows = kRows;
constexpr GatherTile kGatherHalfTiles[kHalfRows] = INHERIT_KERNELS_ROW_TILES(gather_half_tile);
#else
constexpr int kHalfRows = 8;
constexpr GatherTile kGatherHalfTiles[kHalfRows] = {gather_half_tile<1>, gather_half_tile<2>, gather_half_tile<3>,
                                                    gather_half_tile<4>, gather_half_tile<5>, gather_half_tile<6>,
                                                    gather_half_tile<7>, gather_half_tile<8>};
#endif
constexpr OuterTile kOuterTiles[kRows] = INHERIT_KERNELS_ROW_TILES(outer_tile);
constexpr ColumnsTile kColumnsTiles[kRows] = INHERIT_KERNELS_ROW_TILES(columns_tile);

// Calls body(first row, rows) for tiles that share `rows` out evenly: 49 rows are 4 * 6 + 5 * 5, not 8 * 6 + 1.
template <class Body>
inline void over_rows(int64_t rows, const Body& body, int64_t most = kRows) {
  int64_t count = (rows + most - 1) / most, i = 0;
  for (int64_t t = 0; t < count; ++t) {
    int64_t size = rows / count + (t < rows % count);
    body(i, size);
    i += size;
  }
}

void gather(const GatherProduct& p, float* c, int64_t ldc) {
  for (int64_t j = 0; j < p.cols; j += kPanel) {
    bool half = p.cols - j <= kLanes;
    const GatherTile* tiles = half ? kGatherHalfTiles : kGatherTiles;
    const float* b = p.b + j / kPanel * p.b_panel;
    auto tile = [&](int64_t i, int64_t rows) { tiles[rows - 1](p, i, b, c + i * ldc + j, ldc); };
    over_rows(p.count, tile, half ? kHalfRows : kRows);
  }
}

void outer(const float* a, int64_t lda, int64_t cols, const float* const* rows, int64_t first, int64_t count,
           int64_t panels, float* c, int64_t ldc) {
  for (int64_t panel = 0; panel < panels; ++panel) {
    over_rows(cols, [&](int64_t i, int64_t size) {
      kOuterTiles[size - 1](a + i, lda, rows, first + panel * kPanel, count, c + i * ldc + panel * kPanel, ldc);
    });
  }
}

void columns(const ColumnsProduct& p, const Epilogue& e) {
  bool relu = e.activation == Activation::kRelu;
  bool simple = e.dtype == Dtype::kFloat32 && (relu || e.activation == Activation::kNone) && !e.residual.data;
  bool direct = simple && p.depth <= kPanelDepth;
  for (int64_t n0 = 0; n0 < p.outputs; n0 += kPanel) {
    const float* w = p.w + n0 * p.depth;
    for (int64_t j = 0; j < e.cols; j += kPanel) {
      const float* t = p.t + j * p.depth;
      int64_t cols = min64(kPanel, e.cols - j);
      over_rows(min64(kPanel, p.outputs - n0), [&](int64_t i, int64_t rows) {
        ColumnsTile tile = kColumnsTiles[rows - 1];
        const float* bias = p.bias ? p.bias + n0 + i : nullptr;
        void* out = const_cast<void*>(offset(e.out, e.dtype, (n0 + i) * e.ld_out + j));
        if (direct && cols == kPanel) {
          return tile(w + i, p.depth, t, bias, nullptr, 0, static_cast<float*>(out), e.ld_out, relu);
        }
        float c[kRows * kPanel];
        for (int64_t d = 0; d < p.depth; d += kPanelDepth) {
          tile(w + i + d * kPanel, min64(kPanelDepth, p.depth - d), t + d * kPanel, d ? nullptr : bias, d ? c : nullptr,
               kPanel, c, kPanel, false);
        }
        MatrixView residual = e.residual;
        if (residual.data) {
          int64_t first = (n0 + i) * residual.row_stride + j * residual.col_stride;
          residual.data = offset(residual.data, residual.dtype, first);
        }
        finish(c, kPanel, rows, cols, residual, e.activation, out, e.dtype, e.ld_out);
      });
    }
  }
}

template <class T>
void pack_taps_typed(const T* w, int64_t row, int64_t count, int64_t channels, int64_t taps, bool taps_inner,
                     float* dst) {
  int64_t depth = channels * taps, d = 0;
  auto target = [&](int64_t k) { return dst + (taps_inner ? k % taps * channels + k / taps : k) * kPanel; };
  if (count == kPanel) {
    for (; d + kLanes <= depth; d += kLanes) {
      for (int64_t j = 0; j < kPanel; j += kLanes) {
        Vec v[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) v[i] = load_vec(w + (j + i) * row + d);
        transpose(v);
        for (int64_t k = 0; k < kLanes; ++k) store_vec(target(d + k) + j, v[k]);
      }
    }
  }
  for (; d < depth; ++d) {
    float* out = target(d);
    for (int64_t j = 0; j < kPanel; ++j) out[j] = j < count ? to_float(w[j * row + d]) : 0.0f;
  }
}

void pack_taps(const void* w, Dtype dtype, int64_t row, int64_t count, int64_t channels, int64_t taps, bool taps_inner,
               float* dst) {
  if (dtype == Dtype::kFloat32) {
    pack_taps_typed(static_cast<const float*>(w), row, count, channels, taps, taps_inner, dst);
  } else {
    pack_taps_typed(static_cast<const uint16_t*>(w), row, count, channels, taps, taps_inner, dst);
  }
}

}  // namespace
}  // namespace inherit_kernels
