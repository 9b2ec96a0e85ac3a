// The border between code that is compiled once and code that is compiled once per instruction set.
//
// `Kernels` is a table of plain functions over pointers and sizes. csrc/cpu/microkernels.cpp is compiled once per
// instruction set and exports one table each; everything else calls through the table chosen at run time. The files
// on the other side of the table must not instantiate anything with external linkage: the linker keeps one copy of an
// inline function, and an AVX-512 copy of it would then run on a machine without AVX-512.
#pragma once

#include <cstdint>

namespace inherit_kernels {

enum class Dtype : int32_t { kFloat32 = 0, kBFloat16 = 1 };

// Values are the `activation` argument of the native ops.
enum class Activation : int64_t { kNone = 0, kRelu = 1, kGelu = 2, kGeluTanh = 3, kSilu = 4 };

// A strided matrix; strides count elements. `data == nullptr` means "absent" where an argument is optional.
struct MatrixView {
  const void* data;
  Dtype dtype;
  int64_t row_stride;
  int64_t col_stride;
};

// The depth of one product call. 192 * 32 floats of a panel are 24 KiB: they stay in a 32 KiB first level cache while
// the rows of a block pass over them.
constexpr int64_t kDepthBlock = 192;

// About the depths of one call of `multiply` (see depth_block): 512 * 16 floats of a panel are a first level cache, and
// longer runs of a sum lose accuracy.
constexpr int64_t kPanelDepth = 512;
constexpr int64_t kMaxPanelDepth = 768;

// Rows with unit stride: the left operand of `multiply`.
struct Rows {
  const void* data;
  Dtype dtype;
  int64_t ld;
};

// c[i, j] = init[i, j] + sum_d a[i, d] b[d, j] for `panels` panels, the sum taken in order. `b` is the first panel at
// the first depth, an even one where panels are bfloat16; `b_panel` counts its elements from panel to panel. init may
// be absent; it may be c.
struct Product {
  Rows a;
  int64_t rows, depth;
  const void* b;
  Dtype b_dtype;
  int64_t b_panel, panels;
  const float* init;
  int64_t ld_init;
};

// out[i, j] = activation(product[i, j] + residual[i, j]) for j < cols; residual may be absent.
struct Epilogue {
  MatrixView residual;
  Activation activation;
  void* out;
  Dtype dtype;
  int64_t ld_out, cols;
};

// c[i, j] (+)= sum over taps k and depths d of rows[k * ld + i][first + d] b[k, d, j]: rows that lie anywhere, such as
// the pixels under a convolution's window. b[k, d, p * nr + j] is b[p * b_panel + k * b_tap + d * nr + j],
// zero from `cols` on, and c has whole panels.
struct GatherProduct {
  const float* const* rows;
  int64_t ld, first, count, taps, depth;
  const float* b;
  int64_t b_tap, b_panel, cols;
  bool accumulate;
};

// out[n, j] = activation(bias[n] + sum_d w[n, d] t[j, d] + residual[n, j]), w and t both in panels of `depth`; bias may
// be absent. `cols` of the epilogue counts positions j.
struct ColumnsProduct {
  const float* w;
  int64_t outputs, depth;
  const float* t;
  const float* bias;
};

// Panels: a weight [J, D] is cut into ceil(J / nr) panels [D, nr], padded with zeros, so that a product reads `nr`
// neighbouring outputs of one depth index as one run. bfloat16 panels hold the depths in pairs, [ceil(D / 2), nr, 2]:
// the 32-bit lanes that AVX512-BF16 multiplies, and of which a shift and a mask make two float vectors elsewhere.
struct Kernels {
  const char* name;
  int64_t mr;                // rows of one register tile
  int64_t nr;                // columns of one register tile: the panel width
  bool multiplies_bfloat16;  // bfloat16 panels take bfloat16 rows; otherwise every panel takes float32 rows

  // One panel: dst[d * nr + j] = w[j0 + j, d0 + d] for j < count, zero for the rest of the nr columns.
  void (*pack)(MatrixView w, int64_t j0, int64_t count, int64_t d0, int64_t depth, float* dst);
  // The same as pairs of bfloat16, from bfloat16; the second half of an odd last pair is zero.
  void (*pack_pairs)(MatrixView w, int64_t j0, int64_t count, int64_t d0, int64_t depth, uint16_t* dst);
  // dst[i * ld + d] = x[i0 + i, d0 + d] as float32.
  void (*load)(MatrixView x, int64_t i0, int64_t rows, int64_t d0, int64_t depth, float* dst, int64_t ld);
  // dst[i * ld_dst + j] = src[i * ld_src + j], rounded to nearest even for bfloat16. dst counts elements.
  void (*store)(const float* src, int64_t ld_src, int64_t rows, int64_t cols, void* dst, Dtype dtype, int64_t ld_dst);
  // c[i, j] (+)= sum_d a[i, d] b[d, j] over `panels` panels, depth <= kDepthBlock. a[i, d] is a[i * lda + d], or
  // a[d * lda + i] if transposed; b[d, p * nr + j] is b[p * b_panel + d * b_depth + j]. c has panels * nr columns.
  // The sum over d is taken in order and for every element alike, whatever the row, its neighbours and the tiling.
  void (*product)(const float* a, int64_t lda, bool transposed, int64_t rows, int64_t depth, const float* b,
                  int64_t b_depth, int64_t b_panel, int64_t panels, float* c, int64_t ldc, bool accumulate);
  // The product into c [rows, panels * nr], or finished.
  void (*multiply)(const Product& product, float* c, int64_t ldc);
  void (*multiply_finish)(const Product& product, const Epilogue& epilogue);
  // out[i, j] (+)= sum_d x[i, d] w[j0 + j, d] for j < count, w.col_stride == 1: for few rows (<= kDotRows), straight
  // from the weight. x is [rows, ldx] float32 with ldx >= padded(depth), its padding is not read.
  void (*dot)(const float* x, int64_t ldx, int64_t rows, int64_t depth, MatrixView w, int64_t j0, int64_t count,
              float* out, int64_t ldo, bool accumulate);
  // out[i, j] = activation(c[i, j] + residual[i, j]); residual may be absent.
  void (*finish)(const float* c, int64_t ldc, int64_t rows, int64_t cols, MatrixView residual, Activation activation,
                 void* out, Dtype dtype, int64_t ldo);
  // Softmax over the first `heads` entries of every row, in place.
  void (*softmax)(float* logits, int64_t ld, int64_t rows, int64_t heads);
  // out[i * ldo + h * rank + r] = g[i * ldg + h] * t[i * ldt + r].
  void (*scale_heads)(const float* t, int64_t ldt, const float* g, int64_t ldg, int64_t rows, int64_t heads,
                      int64_t rank, float* out, int64_t ldo);
  // out[k] = sum_h g[h] * w[h * stride + k] for k < count.
  void (*mix)(const float* w, int64_t stride, const float* g, int64_t heads, int64_t count, float* out);
  // y[k] (+)= a * x[k].
  void (*axpy)(float a, const float* x, int64_t count, float* y, bool accumulate);
  // sum_k x[k] * y[k].
  double (*inner)(const float* x, const float* y, int64_t count);
  // sums[j] += sum_i x[i0 + i, j] for j < cols, in blocks of float32 added up in double.
  void (*column_sums)(MatrixView x, int64_t rows, int64_t cols, double* sums);

  // Convolutions (conv_kernels.h).
  void (*gather)(const GatherProduct& product, float* c, int64_t ldc);
  void (*columns)(const ColumnsProduct& product, const Epilogue& epilogue);
  // c[i, j] += sum_p a[p * lda + i] rows[p][first + j] for i < cols, j < panels * nr.
  void (*outer)(const float* a, int64_t lda, int64_t cols, const float* const* rows, int64_t first, int64_t count,
                int64_t panels, float* c, int64_t ldc);
  // One panel of a convolution's weight: dst[(k * channels + c) * nr + j] = w[j, c, k] for j < count, zero for the
  // rest. w[j] begins at j * row and is [channels, taps] if taps_inner, else [taps, channels].
  void (*pack_taps)(const void* w, Dtype dtype, int64_t row, int64_t count, int64_t channels, int64_t taps,
                    bool taps_inner, float* dst);
};

constexpr int64_t kDotRows = 8;

}  // namespace inherit_kernels
