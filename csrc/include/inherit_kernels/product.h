// Products of whole matrices, built from the register tiles of a kernel table.
#pragma once

#include <algorithm>

#include "inherit_kernels/runtime.h"

namespace inherit_kernels {

// The up projections of all heads, [heads, out, rank]: `matrix` is head 0 as [out, rank].
struct HeadsView {
  MatrixView matrix;
  int64_t head_stride;
};

inline MatrixView head(const HeadsView& up, int64_t h) {
  MatrixView view = up.matrix;
  view.data = element(view.data, view.dtype, h * up.head_stride);
  return view;
}

// A packed weight [outputs, depth]: see kernels.h.
struct Panels {
  const void* data;
  Dtype dtype;
  int64_t depth;
};

// Elements of one panel.
inline int64_t panel_elements(const Kernels& k, Dtype dtype, int64_t depth) {
  return k.nr * (dtype == Dtype::kFloat32 ? depth : round_up(depth, 2));
}

inline int64_t panels_elements(const Kernels& k, Dtype dtype, int64_t outputs, int64_t depth) {
  return ceil_div(outputs, k.nr) * panel_elements(k, dtype, depth);
}

inline Panels from_panel(const Kernels& k, Panels w, int64_t p) {
  w.data = element(w.data, w.dtype, p * panel_elements(k, w.dtype, w.depth));
  return w;
}

// Depths are taken in even blocks of about kPanelDepth: of 1539 three, not four of which one has three depths.
inline int64_t depth_block(int64_t depth) {
  int64_t blocks = std::max<int64_t>(1, (depth + kPanelDepth / 2) / kPanelDepth);
  return round_up(ceil_div(depth, blocks), 2);
}

// Rows of one step of `rows_of`: floats for `rows` rows of `depth`, twice where they become bfloat16.
inline int64_t loaded_ld(int64_t depth) {
  return depth + 16;
}

// x[i0 : i0 + rows, d0 : d0 + depth] as the left operand for panels of a dtype: in place where its dtype and strides
// allow, otherwise through `scratch` of 2 * rows * loaded_ld(depth) floats. Rows a multiple of 4096 bytes apart share
// one set of the first level cache, which holds 8 of the 12 lines that a tile reads: copied (12 % faster, K = 1024).
inline Rows rows_of(const Kernels& k, MatrixView x, Dtype panels, int64_t i0, int64_t rows, int64_t d0, int64_t depth,
                    float* scratch) {
  bool halves = panels == Dtype::kBFloat16 && k.multiplies_bfloat16;
  Dtype wanted = halves ? Dtype::kBFloat16 : Dtype::kFloat32;
  bool aliased = k.mr > 8 && rows > 8 && x.row_stride * element_size(x.dtype) % 4096 == 0;
  if (x.dtype == wanted && x.col_stride == 1 && !aliased) {
    return {element(x.data, x.dtype, i0 * x.row_stride + d0), wanted, x.row_stride};
  }
  int64_t ld = loaded_ld(depth);
  k.load(x, i0, rows, d0, depth, scratch, ld);
  if (!halves) return {scratch, wanted, ld};
  float* copy = scratch + rows * ld;
  k.store(scratch, ld, rows, depth, copy, wanted, ld);
  return {copy, wanted, ld};
}

inline Rows shifted(Rows a, int64_t d0) {
  a.data = element(a.data, a.dtype, d0);
  return a;
}

// c [rows, panels * nr] = a w^T for the first `panels` panels of w; block by block in order, so that every row is
// summed alike. `rows_at(d0, depth)` gives the left operand of a block.
template <class RowsAt>
void multiply_panels(const Kernels& k, const RowsAt& rows_at, int64_t rows, Panels w, int64_t panels, float* c,
                     int64_t ldc) {
  int64_t d0 = 0, block = depth_block(w.depth), b_panel = panel_elements(k, w.dtype, w.depth);
  do {
    int64_t depth = std::min(block, w.depth - d0);
    const float* init = d0 > 0 ? c : nullptr;
    k.multiply(
        {rows_at(d0, depth), rows, depth, element(w.data, w.dtype, d0 * k.nr), w.dtype, b_panel, panels, init, ldc}, c,
        ldc);
    d0 += block;
  } while (d0 < w.depth);
}

// out = act(a w^T + bias + residual) for `panels` panels; `c` is [rows, kFinishGroup * nr] scratch. bias [panels * nr]
// may be null.
constexpr int64_t kFinishGroup = 4;

inline void multiply_finish_panels(const Kernels& k, Rows a, int64_t rows, Panels w, int64_t panels, Epilogue e,
                                   float* c, const float* bias = nullptr) {
  int64_t block = depth_block(w.depth), b_panel = panel_elements(k, w.dtype, w.depth), ldc = kFinishGroup * k.nr;
  const float* start = bias;  // or the residual begins the sum where it can
  int64_t ld_start = bias ? 0 : e.residual.row_stride;
  if (!bias && e.residual.data && e.residual.dtype == Dtype::kFloat32 && e.residual.col_stride == 1 &&
      e.cols % k.nr == 0) {
    start = static_cast<const float*>(e.residual.data);
    e.residual.data = nullptr;
  }
  int64_t group = w.depth <= block ? panels : kFinishGroup;
  for (int64_t p = 0; p < panels; p += group) {
    Panels b = from_panel(k, w, p);
    int64_t count = std::min(group, panels - p), j = p * k.nr;
    Epilogue part = {shifted(e.residual, 0, j),         e.activation, element(e.out, e.dtype, j), e.dtype, e.ld_out,
                     std::min(count * k.nr, e.cols - j)};
    for (int64_t d0 = 0; d0 < w.depth; d0 += block) {
      int64_t depth = std::min(block, w.depth - d0);
      Product product = {shifted(a, d0),
                         rows,
                         depth,
                         element(b.data, b.dtype, d0 * k.nr),
                         b.dtype,
                         b_panel,
                         count,
                         d0 > 0  ? c
                         : start ? start + j
                                 : nullptr,
                         d0 > 0 ? ldc : ld_start};
      if (d0 + block < w.depth) {
        k.multiply(product, c, ldc);
      } else {
        k.multiply_finish(product, part);
      }
    }
  }
}

// c (+)= a b for any depth: blocks of kDepthBlock, in order, so that every row is summed alike.
inline void multiply(const Kernels& k, const float* a, int64_t lda, bool transposed, int64_t rows, int64_t depth,
                     const float* b, int64_t b_depth, int64_t b_panel, int64_t panels, float* c, int64_t ldc,
                     bool accumulate) {
  int64_t d0 = 0;
  do {
    int64_t block = std::min(kDepthBlock, depth - d0);
    const float* a_block = a + (transposed ? d0 * lda : d0);
    k.product(a_block, lda, transposed, rows, block, b + d0 * b_depth, b_depth, b_panel, panels, c, ldc,
              accumulate || d0 > 0);
    d0 += block;
  } while (d0 < depth);
}

// A weight to be packed: [up_1 ... up_H, bias_1 ... bias_H] as [outputs, heads * rank + heads], or without the biases.
struct PackedSource {
  HeadsView up;
  int64_t heads, rank, outputs;
  MatrixView bias;  // [heads, outputs]; may be absent

  int64_t depth() const { return heads * rank + (bias.data ? heads : 0); }
};

// One panel of a float32 weight, or of a bfloat16 weight as pairs. Pairs may straddle two heads, so several heads are
// gathered first, into `gathered` of nr * depth bfloat16.
inline void pack_panel(const Kernels& k, const PackedSource& w, int64_t p, uint16_t* gathered, void* panel) {
  int64_t j0 = p * k.nr, count = std::min(k.nr, w.outputs - j0), depth = w.depth();
  MatrixView bias = transposed(w.bias);
  if (w.up.matrix.dtype == Dtype::kFloat32) {
    float* out = static_cast<float*>(panel);
    for (int64_t h = 0; h < w.heads; ++h) k.pack(head(w.up, h), j0, count, 0, w.rank, out + h * w.rank * k.nr);
    if (bias.data) k.pack(bias, j0, count, 0, w.heads, out + w.heads * w.rank * k.nr);
    return;
  }
  if (w.heads == 1 && !bias.data) return k.pack_pairs(w.up.matrix, j0, count, 0, depth, static_cast<uint16_t*>(panel));
  auto gather = [&](MatrixView source, int64_t d0, int64_t columns) {
    const uint16_t* in = static_cast<const uint16_t*>(source.data);
    for (int64_t j = 0; j < count; ++j) {
      const uint16_t* row = in + (j0 + j) * source.row_stride;
      for (int64_t d = 0; d < columns; ++d) gathered[j * depth + d0 + d] = row[d * source.col_stride];
    }
  };
  for (int64_t h = 0; h < w.heads; ++h) gather(head(w.up, h), h * w.rank, w.rank);
  if (bias.data) gather(bias, w.heads * w.rank, w.heads);
  k.pack_pairs({gathered, Dtype::kBFloat16, depth, 1}, 0, count, 0, depth, static_cast<uint16_t*>(panel));
}

inline void pack_source(const Runtime& runtime, const PackedSource& w, void* panels) {
  const Kernels& k = *runtime.kernels;
  Dtype dtype = w.up.matrix.dtype;
  int64_t size = panel_elements(k, dtype, w.depth());
  parallel(runtime, ceil_div(w.outputs, k.nr), 4.0 * w.outputs * w.depth(), [&](int64_t begin, int64_t end) {
    Scratch gathered(ceil_div(size, 2));
    uint16_t* halves = reinterpret_cast<uint16_t*>(gathered.get());
    for (int64_t p = begin; p < end; ++p) pack_panel(k, w, p, halves, element(panels, dtype, p * size));
  });
}

// Rows summed in one run by a weight gradient: a sum of n terms of either sign errs as sqrt(n) in its longest run, and
// 192 rows made bias gradients three times less accurate than torch's own sum.
constexpr int64_t kSumRows = 64;

// c[i, j] (+)= sum_m a[m, i] b[m, j] for i < a_cols, j < b_cols: a weight gradient over `rows` rows. a is float32
// scratch, b any view. c has round_up(b_cols, nr) columns. Parallel over columns of c, sums over m in order: the
// result does not depend on the threads.
inline void accumulate_outer(const Runtime& runtime, const float* a, int64_t lda, int64_t a_cols, MatrixView b,
                             int64_t b_cols, int64_t rows, float* c, int64_t ldc, bool accumulate) {
  const Kernels& k = *runtime.kernels;
  double work = 2.0 * a_cols * b_cols * rows;
  parallel(runtime, ceil_div(b_cols, k.nr), work, [&](int64_t begin, int64_t end) {
    Scratch panel(kSumRows * k.nr);
    for (int64_t p = begin; p < end; ++p) {
      int64_t m0 = 0;
      do {
        int64_t block = std::min(kSumRows, rows - m0);
        k.pack(transposed(b), p * k.nr, std::min(k.nr, b_cols - p * k.nr), m0, block, panel.get());
        k.product(a + m0 * lda, lda, true, a_cols, block, panel.get(), k.nr, 0, 1, c + p * k.nr, ldc,
                  accumulate || m0 > 0);
        m0 += block;
      } while (m0 < rows);
    }
  });
}

// Stores c[j, i] as out[i, j] for j < a_cols, i < b_cols (out counts rows of ld_out elements): through a square
// block, which keeps both sides in the first level cache.
inline void store_transposed(const Kernels& k, const float* c, int64_t ldc, int64_t c_rows, int64_t c_cols, void* out,
                             Dtype dtype, int64_t ld_out) {
  constexpr int64_t kBlock = 32;
  float block[kBlock * kBlock];
  MatrixView source = transposed({c, Dtype::kFloat32, ldc, 1});
  for (int64_t i = 0; i < c_cols; i += kBlock) {
    int64_t rows = std::min(kBlock, c_cols - i);
    for (int64_t j = 0; j < c_rows; j += kBlock) {
      int64_t cols = std::min(kBlock, c_rows - j);
      k.load(source, i, rows, j, cols, block, kBlock);
      k.store(block, kBlock, rows, cols, element(out, dtype, i * ld_out + j), dtype, ld_out);
    }
  }
}

}  // namespace inherit_kernels
