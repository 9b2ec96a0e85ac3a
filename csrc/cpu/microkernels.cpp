// The inner loops of every CPU op, compiled once per instruction set (setup.py passes INHERIT_KERNELS_ISA and the
// flags). Knows no torch and, but for the table it exports, has internal linkage only: see kernels.h.
#include "inherit_kernels/kernels.h"
#include "inherit_kernels/panel_kernels.h"
#include "inherit_kernels/vector.h"

#ifndef INHERIT_KERNELS_ISA
#define INHERIT_KERNELS_ISA generic
#endif
#define INHERIT_KERNELS_TABLE_(isa) kernels_##isa
#define INHERIT_KERNELS_TABLE(isa) INHERIT_KERNELS_TABLE_(isa)
#define INHERIT_KERNELS_NAME_(isa) #isa
#define INHERIT_KERNELS_NAME(isa) INHERIT_KERNELS_NAME_(isa)

namespace inherit_kernels {
extern const Kernels INHERIT_KERNELS_TABLE(INHERIT_KERNELS_ISA);

namespace {

// ---- products

template <int kM, bool kTransposed>
void tile(const float* a, int64_t lda, int64_t depth, const float* b, int64_t b_depth, float* c, int64_t ldc,
          bool accumulate) {
  Vec sum[kM][kWide];
#pragma GCC unroll 16
  for (int i = 0; i < kM; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kWide; ++j) sum[i][j] = Vec{};
  }
  for (int64_t d = 0; d < depth; ++d) {
    Vec column[kWide];
#pragma GCC unroll 4
    for (int j = 0; j < kWide; ++j) column[j] = load_vec(b + j * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kM; ++i) {
      Vec value = broadcast(kTransposed ? a[i] : a[i * lda]);
#pragma GCC unroll 4
      for (int j = 0; j < kWide; ++j) sum[i][j] += value * column[j];
    }
    a += kTransposed ? lda : 1;
    b += b_depth;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kM; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kWide; ++j) {
      float* p = c + i * ldc + j * kLanes;
      store_vec(p, accumulate ? load_vec(p) + sum[i][j] : sum[i][j]);
    }
  }
}

using Tile = void (*)(const float*, int64_t, int64_t, const float*, int64_t, float*, int64_t, bool);

#if defined(__AVX512F__) || defined(INHERIT_KERNELS_EMULATED)
constexpr Tile kTiles[2][kRows] = {
    {tile<1, false>, tile<2, false>, tile<3, false>, tile<4, false>, tile<5, false>, tile<6, false>, tile<7, false>,
     tile<8, false>, tile<9, false>, tile<10, false>, tile<11, false>, tile<12, false>},
    {tile<1, true>, tile<2, true>, tile<3, true>, tile<4, true>, tile<5, true>, tile<6, true>, tile<7, true>,
     tile<8, true>, tile<9, true>, tile<10, true>, tile<11, true>, tile<12, true>}};
#else
constexpr Tile kTiles[2][kRows] = {
    {tile<1, false>, tile<2, false>, tile<3, false>, tile<4, false>, tile<5, false>, tile<6, false>},
    {tile<1, true>, tile<2, true>, tile<3, true>, tile<4, true>, tile<5, true>, tile<6, true>}};
#endif

void product(const float* a, int64_t lda, bool transposed, int64_t rows, int64_t depth, const float* b, int64_t b_depth,
             int64_t b_panel, int64_t panels, float* c, int64_t ldc, bool accumulate) {
  for (int64_t p = 0; p < panels; ++p) {
    for (int64_t i = 0; i < rows; i += kRows) {
      int64_t count = min64(kRows, rows - i);
      const float* a_tile = a + (transposed ? i : i * lda);
      kTiles[transposed][count - 1](a_tile, lda, depth, b + p * b_panel, b_depth, c + i * ldc + p * kPanel, ldc,
                                    accumulate);
    }
  }
}

inline float horizontal_sum(Vec v) {
  float lane[kLanes];
  store_vec(lane, v);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int k = 0; k < width; ++k) lane[k] += lane[k + width];
  }
  return lane[0];
}

// One vector of sums per (row, output): the same arithmetic for every output, in tiles of kJ or alone.
template <class T, int kM, int kJ>
void dot_tile(const float* x, int64_t ldx, int64_t depth, const T* w, int64_t w_row, float* out, int64_t ldo,
              bool accumulate) {
  Vec sum[kM][kJ];
  for (int i = 0; i < kM; ++i) {
    for (int j = 0; j < kJ; ++j) sum[i][j] = Vec{};
  }
  int64_t d = 0;
  for (; d + kLanes <= depth; d += kLanes) {
    Vec row[kM];
#pragma GCC unroll 8
    for (int i = 0; i < kM; ++i) row[i] = load_vec(x + i * ldx + d);
#pragma GCC unroll 8
    for (int j = 0; j < kJ; ++j) {
      Vec value = load_vec(w + j * w_row + d);
#pragma GCC unroll 8
      for (int i = 0; i < kM; ++i) sum[i][j] += row[i] * value;
    }
  }
  if (d < depth) {
    for (int j = 0; j < kJ; ++j) {
      Vec value = load_part(w + j * w_row + d, depth - d);
      for (int i = 0; i < kM; ++i) sum[i][j] += load_part(x + i * ldx + d, depth - d) * value;
    }
  }
  for (int i = 0; i < kM; ++i) {
    for (int j = 0; j < kJ; ++j) {
      float total = horizontal_sum(sum[i][j]);
      out[i * ldo + j] = accumulate ? out[i * ldo + j] + total : total;
    }
  }
}

template <class T, int kM>
void dot_rows(const float* x, int64_t ldx, int64_t depth, const T* w, int64_t w_row, int64_t count, float* out,
              int64_t ldo, bool accumulate) {
  constexpr int kJ = kM <= 2 ? 4 : 2;
  int64_t j = 0;
  for (; j + kJ <= count; j += kJ) {
    dot_tile<T, kM, kJ>(x, ldx, depth, w + j * w_row, w_row, out + j, ldo, accumulate);
  }
  for (; j < count; ++j) dot_tile<T, kM, 1>(x, ldx, depth, w + j * w_row, w_row, out + j, ldo, accumulate);
}

template <class T>
void dot_typed(const float* x, int64_t ldx, int64_t rows, int64_t depth, const T* w, int64_t w_row, int64_t count,
               float* out, int64_t ldo, bool accumulate) {
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) {
    dot_rows<T, 4>(x + i * ldx, ldx, depth, w, w_row, count, out + i * ldo, ldo, accumulate);
  }
  for (; i + 2 <= rows; i += 2) {
    dot_rows<T, 2>(x + i * ldx, ldx, depth, w, w_row, count, out + i * ldo, ldo, accumulate);
  }
  if (i < rows) dot_rows<T, 1>(x + i * ldx, ldx, depth, w, w_row, count, out + i * ldo, ldo, accumulate);
}

void dot(const float* x, int64_t ldx, int64_t rows, int64_t depth, MatrixView w, int64_t j0, int64_t count, float* out,
         int64_t ldo, bool accumulate) {
  if (w.dtype == Dtype::kFloat32) {
    const float* p = static_cast<const float*>(w.data) + j0 * w.row_stride;
    dot_typed(x, ldx, rows, depth, p, w.row_stride, count, out, ldo, accumulate);
  } else {
    const uint16_t* p = static_cast<const uint16_t*>(w.data) + j0 * w.row_stride;
    dot_typed(x, ldx, rows, depth, p, w.row_stride, count, out, ldo, accumulate);
  }
}

// ---- moving data

template <class T>
void copy_run(const T* src, int64_t count, float* dst) {
  int64_t k = 0;
  for (; k + kLanes <= count; k += kLanes) store_vec(dst + k, load_vec(src + k));
  for (; k < count; ++k) dst[k] = to_float(src[k]);
}

// dst[d * ld + j] = load(j, d) for a square of kLanes: `load` gives the vector of row j from column d on.
template <class Load>
inline void transpose_square(const Load& load, float* dst, int64_t ld) {
  Vec v[kLanes];
#pragma GCC unroll 16
  for (int j = 0; j < kLanes; ++j) v[j] = load(j);
  transpose(v);
#pragma GCC unroll 16
  for (int d = 0; d < kLanes; ++d) store_vec(dst + d * ld, v[d]);
}

// One panel of rows with unit stride, `at(j, d)` being the address of an element and T how it is read as 32 bits.
template <class T, class At, class Scalar>
void pack_rows(const At& at, const Scalar& scalar, int64_t count, int64_t depth, float* dst) {
  int64_t squares = count / kLanes * kLanes, d = 0;
  for (; d + kLanes <= depth; d += kLanes) {
    for (int64_t j0 = 0; j0 < squares; j0 += kLanes) {
      transpose_square([&](int64_t j) { return load_vec(reinterpret_cast<const T*>(at(j0 + j, d))); },
                       dst + d * kPanel + j0, kPanel);
    }
    for (int64_t j = squares; j < kPanel; ++j) {
      for (int64_t k = d; k < d + kLanes; ++k) dst[k * kPanel + j] = j < count ? scalar(at(j, k)) : 0.0f;
    }
  }
  for (; d < depth; ++d) {
    for (int64_t j = 0; j < kPanel; ++j) dst[d * kPanel + j] = j < count ? scalar(at(j, d)) : 0.0f;
  }
}

template <class T>
void pack_typed(const T* w, int64_t row, int64_t col, int64_t count, int64_t depth, float* dst) {
  if (col == 1) {
    return pack_rows<T>([&](int64_t j, int64_t d) { return w + j * row + d; }, [](const T* p) { return to_float(*p); },
                        count, depth, dst);
  }
  bool runs = row == 1;  // outputs lie side by side
  for (int64_t d = 0; d < depth; ++d) {
    if (runs) copy_run(w + d * col, count, dst + d * kPanel);
    for (int64_t j = runs ? count : 0; j < kPanel; ++j) {
      dst[d * kPanel + j] = j < count ? to_float(w[j * row + d * col]) : 0.0f;
    }
  }
}

void pack(MatrixView w, int64_t j0, int64_t count, int64_t d0, int64_t depth, float* dst) {
  int64_t offset = j0 * w.row_stride + d0 * w.col_stride;
  if (w.dtype == Dtype::kFloat32) {
    pack_typed(static_cast<const float*>(w.data) + offset, w.row_stride, w.col_stride, count, depth, dst);
  } else {
    pack_typed(static_cast<const uint16_t*>(w.data) + offset, w.row_stride, w.col_stride, count, depth, dst);
  }
}

// A pair is moved as the 32 bits of a float.
void pack_pairs(MatrixView w, int64_t j0, int64_t count, int64_t d0, int64_t depth, uint16_t* dst) {
  const uint16_t* source = static_cast<const uint16_t*>(w.data) + j0 * w.row_stride + d0 * w.col_stride;
  int64_t d = 0;
  if (w.col_stride == 1) {
    auto pair = [](const uint16_t* p) {
      float value;
      __builtin_memcpy(&value, p, sizeof value);
      return value;
    };
    d = depth / 2 * 2;
    pack_rows<float>([&](int64_t j, int64_t k) { return source + j * w.row_stride + 2 * k; }, pair, count, depth / 2,
                     reinterpret_cast<float*>(dst));
  }
  for (; d < depth; ++d) {
    for (int64_t j = 0; j < kPanel; ++j) {
      uint16_t* out = dst + d / 2 * 2 * kPanel + 2 * j;
      out[d % 2] = j < count ? source[j * w.row_stride + d * w.col_stride] : 0;
      if (d + 1 == depth && d % 2 == 0) out[1] = 0;
    }
  }
}

template <class T>
void load_typed(const T* x, int64_t row, int64_t col, int64_t rows, int64_t depth, float* dst, int64_t ld) {
  int64_t i = 0;
  if (row == 1 && col != 1) {  // transpose a cache line's worth of rows at a time: columns 4096 bytes apart share a set
    constexpr int64_t kStep = 16;
    for (int64_t d = 0; d < depth; d += kLanes) {
      for (i = 0; i + kStep <= rows; i += kStep) {
        for (int64_t m = i; m < i + kStep; m += kLanes) {
          if (d + kLanes <= depth) {
            transpose_square([&](int64_t j) { return load_vec(x + m + (d + j) * col); }, dst + m * ld + d, ld);
            continue;
          }
          for (int64_t n = d; n < depth; ++n) {
            for (int64_t j = m; j < m + kLanes; ++j) dst[j * ld + n] = to_float(x[j + n * col]);
          }
        }
      }
    }
  }
  for (; i < rows; ++i) {
    if (col == 1) {
      copy_run(x + i * row, depth, dst + i * ld);
    } else {
      for (int64_t d = 0; d < depth; ++d) dst[i * ld + d] = to_float(x[i * row + d * col]);
    }
  }
}

void load(MatrixView x, int64_t i0, int64_t rows, int64_t d0, int64_t depth, float* dst, int64_t ld) {
  int64_t offset = i0 * x.row_stride + d0 * x.col_stride;
  if (x.dtype == Dtype::kFloat32) {
    load_typed(static_cast<const float*>(x.data) + offset, x.row_stride, x.col_stride, rows, depth, dst, ld);
  } else {
    load_typed(static_cast<const uint16_t*>(x.data) + offset, x.row_stride, x.col_stride, rows, depth, dst, ld);
  }
}

// ---- epilogues

// Whole vectors without a residual: most tiles.
template <Activation kind, class T>
void finish_whole(const float* c, int64_t ldc, int64_t rows, int64_t cols, T* out, int64_t ldo) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; j += kLanes) store_vec(out + i * ldo + j, activate<kind>(load_vec(c + i * ldc + j)));
  }
}

template <Activation kind, class T>
void finish_typed(const float* c, int64_t ldc, int64_t rows, int64_t cols, const T* residual, int64_t row, int64_t col,
                  T* out, int64_t ldo) {
  if (!residual && cols % kLanes == 0) return finish_whole<kind>(c, ldc, rows, cols, out, ldo);
  for (int64_t i = 0; i < rows; ++i) {
    const float* c_row = c + i * ldc;
    const T* r_row = residual ? residual + i * row : nullptr;
    T* o_row = out + i * ldo;
    for (int64_t j = 0; j < cols; j += kLanes) {
      int64_t count = min64(kLanes, cols - j);
      bool full = count == kLanes;
      Vec v = full ? load_vec(c_row + j) : load_part(c_row + j, count);
      if (residual && col == 1) {
        v += full ? load_vec(r_row + j) : load_part(r_row + j, count);
      } else if (residual) {
        float lane[kLanes] = {};
        for (int64_t k = 0; k < count; ++k) lane[k] = to_float(r_row[(j + k) * col]);
        v += load_vec(lane);
      }
      v = activate<kind>(v);
      if (full) {
        store_vec(o_row + j, v);
      } else {
        store_part(o_row + j, v, count);
      }
    }
  }
}

template <class T>
void finish_activation(const float* c, int64_t ldc, int64_t rows, int64_t cols, MatrixView residual,
                       Activation activation, T* out, int64_t ldo) {
  const T* r = static_cast<const T*>(residual.data);
  int64_t row = residual.row_stride, col = residual.col_stride;
  switch (activation) {
    case Activation::kNone:
      return finish_typed<Activation::kNone>(c, ldc, rows, cols, r, row, col, out, ldo);
    case Activation::kRelu:
      return finish_typed<Activation::kRelu>(c, ldc, rows, cols, r, row, col, out, ldo);
    case Activation::kGelu:
      return finish_typed<Activation::kGelu>(c, ldc, rows, cols, r, row, col, out, ldo);
    case Activation::kGeluTanh:
      return finish_typed<Activation::kGeluTanh>(c, ldc, rows, cols, r, row, col, out, ldo);
    case Activation::kSilu:
      return finish_typed<Activation::kSilu>(c, ldc, rows, cols, r, row, col, out, ldo);
  }
}

void finish(const float* c, int64_t ldc, int64_t rows, int64_t cols, MatrixView residual, Activation activation,
            void* out, Dtype dtype, int64_t ldo) {
  if (dtype == Dtype::kFloat32) {
    finish_activation(c, ldc, rows, cols, residual, activation, static_cast<float*>(out), ldo);
  } else {
    finish_activation(c, ldc, rows, cols, residual, activation, static_cast<uint16_t*>(out), ldo);
  }
}

void store(const float* src, int64_t ld_src, int64_t rows, int64_t cols, void* dst, Dtype dtype, int64_t ld_dst) {
  finish(src, ld_src, rows, cols, MatrixView{}, Activation::kNone, dst, dtype, ld_dst);
}

// ---- heads

void softmax(float* logits, int64_t ld, int64_t rows, int64_t heads) {
  for (int64_t i = 0; i < rows; ++i) {
    float* row = logits + i * ld;
    float highest = row[0];
    for (int64_t h = 1; h < heads; ++h) highest = row[h] < highest ? highest : row[h];  // keeps a NaN of row[h]
    float total = 0.0f;
    for (int64_t h = 0; h < heads; h += kLanes) {
      int64_t count = min64(kLanes, heads - h);
      store_part(row + h, exp_vec(load_part(row + h, count) - highest), count);
    }
    for (int64_t h = 0; h < heads; ++h) total += row[h];
    for (int64_t h = 0; h < heads; ++h) row[h] /= total;
  }
}

void axpy(float a, const float* x, int64_t count, float* y, bool accumulate) {
  if (accumulate) {
    for (int64_t k = 0; k < count; ++k) y[k] += a * x[k];
  } else {
    for (int64_t k = 0; k < count; ++k) y[k] = a * x[k];
  }
}

void scale_heads(const float* t, int64_t ldt, const float* g, int64_t ldg, int64_t rows, int64_t heads, int64_t rank,
                 float* out, int64_t ldo) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t h = 0; h < heads; ++h) axpy(g[i * ldg + h], t + i * ldt, rank, out + i * ldo + h * rank, false);
  }
}

void mix(const float* w, int64_t stride, const float* g, int64_t heads, int64_t count, float* out) {
  constexpr int64_t kBlock = 2048;  // of `out`, which stays in the first level cache
  for (int64_t k = 0; k < count; k += kBlock) {
    for (int64_t h = 0; h < heads; ++h) axpy(g[h], w + h * stride + k, min64(kBlock, count - k), out + k, h > 0);
  }
}

// ---- sums

double inner(const float* x, const float* y, int64_t count) {
  double total = 0.0;
  constexpr int64_t kBlock = 16 * kLanes;
  for (int64_t k0 = 0; k0 < count; k0 += kBlock) {
    int64_t end = min64(count, k0 + kBlock), k = k0;
    Vec sum = Vec{};
    for (; k + kLanes <= end; k += kLanes) sum += load_vec(x + k) * load_vec(y + k);
    if (k < end) sum += load_part(x + k, end - k) * load_part(y + k, end - k);
    total += horizontal_sum(sum);
  }
  return total;
}

template <class T>
double run_sum(const T* x, int64_t count) {
  double total = 0.0;
  constexpr int64_t kBlock = 32 * kLanes;
  for (int64_t k0 = 0; k0 < count; k0 += kBlock) {
    int64_t end = min64(count, k0 + kBlock), k = k0;
    Vec sum = Vec{};
    for (; k + kLanes <= end; k += kLanes) sum += load_vec(x + k);
    if (k < end) sum += load_part(x + k, end - k);
    total += horizontal_sum(sum);
  }
  return total;
}

template <class T>
void column_sums_typed(const T* x, int64_t row, int64_t col, int64_t rows, int64_t cols, double* sums) {
  if (row == 1) {  // a column is one run
    for (int64_t j = 0; j < cols; ++j) sums[j] += run_sum(x + j * col, rows);
    return;
  }
  constexpr int64_t kBlock = 16;  // rows added in float32
  for (int64_t i0 = 0; i0 < rows; i0 += kBlock) {
    int64_t end = min64(rows, i0 + kBlock);
    for (int64_t j0 = 0; j0 < cols; j0 += kLanes) {
      int64_t count = min64(kLanes, cols - j0);
      float lane[kLanes] = {};
      if (col == 1 && count == kLanes) {
        Vec sum = Vec{};
        for (int64_t i = i0; i < end; ++i) sum += load_vec(x + i * row + j0);
        store_vec(lane, sum);
      } else {
        for (int64_t i = i0; i < end; ++i) {
          const T* p = x + i * row + j0 * col;
          for (int64_t k = 0; k < count; ++k) lane[k] += to_float(p[k * col]);
        }
      }
      for (int64_t k = 0; k < count; ++k) sums[j0 + k] += lane[k];
    }
  }
}

void column_sums(MatrixView x, int64_t rows, int64_t cols, double* sums) {
  if (x.dtype == Dtype::kFloat32) {
    column_sums_typed(static_cast<const float*>(x.data), x.row_stride, x.col_stride, rows, cols, sums);
  } else {
    column_sums_typed(static_cast<const uint16_t*>(x.data), x.row_stride, x.col_stride, rows, cols, sums);
  }
}

}  // namespace
}  // namespace inherit_kernels

#include "inherit_kernels/conv_kernels.h"

namespace inherit_kernels {

const Kernels INHERIT_KERNELS_TABLE(INHERIT_KERNELS_ISA) = {
    INHERIT_KERNELS_NAME(INHERIT_KERNELS_ISA),
    kRows,
    kPanel,
    kMultipliesPairs,
    pack,
    pack_pairs,
    load,
    store,
    product,
    multiply,
    multiply_finish,
    dot,
    finish,
    softmax,
    scale_heads,
    mix,
    axpy,
    inner,
    column_sums,
    gather,
    columns,
    outer,
    pack_taps,
};

}  // namespace inherit_kernels
