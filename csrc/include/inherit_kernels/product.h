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

// c = x[i0 : i0 + rows, :] b through `scratch`, [rows, kDepthBlock] floats. float32 is copied as well: rows 4096 bytes
// apart share one set of the first level cache, which holds 8 of the 12 lines a tile reads (12 % slower, K = 1024).
inline void multiply_view(const Kernels& k, MatrixView x, int64_t i0, int64_t rows, int64_t depth, const float* b,
                          int64_t b_depth, int64_t b_panel, int64_t panels, float* c, int64_t ldc, float* scratch) {
  int64_t d0 = 0;
  do {
    int64_t block = std::min(kDepthBlock, depth - d0);
    k.load(x, i0, rows, d0, block, scratch, kDepthBlock);
    k.product(scratch, kDepthBlock, false, rows, block, b + d0 * b_depth, b_depth, b_panel, panels, c, ldc, d0 > 0);
    d0 += block;
  } while (d0 < depth);
}

// Packs all of w [outputs, depth] into panels.
inline void pack_all(const Runtime& runtime, MatrixView w, int64_t outputs, int64_t depth, float* panels) {
  const Kernels& k = *runtime.kernels;
  parallel(runtime, ceil_div(outputs, k.nr), 4.0 * outputs * depth, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      k.pack(w, p * k.nr, std::min(k.nr, outputs - p * k.nr), 0, depth, panels + p * depth * k.nr);
    }
  });
}

// Depths [d0, d0 + depth) of one panel of [up_1 ... up_H] as [out, heads * rank]; depth h * rank + r.
inline void pack_heads(const Kernels& k, const HeadsView& up, int64_t rank, int64_t j0, int64_t count, int64_t d0,
                       int64_t depth, float* dst) {
  for (int64_t d = d0; d < d0 + depth;) {
    int64_t h = d / rank, r = d % rank;
    int64_t run = std::min(rank - r, d0 + depth - d);
    k.pack(head(up, h), j0, count, r, run, dst + (d - d0) * k.nr);
    d += run;
  }
}

inline void pack_all_heads(const Runtime& runtime, const HeadsView& up, int64_t heads, int64_t rank, int64_t out,
                           float* panels) {
  const Kernels& k = *runtime.kernels;
  int64_t depth = heads * rank;
  parallel(runtime, ceil_div(out, k.nr), 4.0 * out * depth, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      pack_heads(k, up, rank, p * k.nr, std::min(k.nr, out - p * k.nr), 0, depth, panels + p * depth * k.nr);
    }
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
