// y = act([g_1 t ... g_H t] [up_1 ... up_H]^T + g bias + residual), t = x down^T, g = softmax(t gate^T + gate_bias):
// the forward pass of lowrank_linear (one head, no gate) and gated_lowrank_linear. Heads are merged into one product
// of depth heads * rank; nothing of size heads * out per row exists.
#pragma once

#include "inherit_kernels/product.h"

namespace inherit_kernels {

struct LinearShape {
  int64_t rows, in, rank, out, heads;
};

struct LinearForward {
  LinearShape shape;
  MatrixView x;              // [rows, in]
  MatrixView down;           // [rank, in], unless packed
  HeadsView up;              // [heads, out, rank], unless packed
  const float* down_panels;  // null: not packed
  const float* up_panels;
  MatrixView gate_weight;  // [heads, rank]; absent in the plain op
  MatrixView gate_bias;    // [1, heads]; may be absent
  MatrixView bias;         // [heads, out]; may be absent
  MatrixView residual;     // [rows, out]; may be absent
  Activation activation;
  Dtype dtype;
  void* y;  // [rows, out], contiguous
  void* t;  // [rows, rank], contiguous; null: not kept
};

// Small operands as float32, prepared once per call.
struct GateOperands {
  GateOperands(const Kernels& k, const LinearShape& s, MatrixView weight, MatrixView gate_bias, MatrixView bias)
      : panels(ceil_div(s.heads, k.nr)),
        out_width(round_up(s.out, k.nr)),
        weight_panels(weight.data ? panels * s.rank * k.nr : 0),
        gate_bias_row(gate_bias.data ? panels * k.nr : 0),
        bias_rows(bias.data ? s.heads * out_width : 0),
        has_gate(weight.data),
        has_gate_bias(gate_bias.data),
        has_bias(bias.data) {
    for (int64_t p = 0; has_gate && p < panels; ++p) {
      k.pack(weight, p * k.nr, std::min(k.nr, s.heads - p * k.nr), 0, s.rank, weight_panels.get() + p * s.rank * k.nr);
    }
    if (has_gate_bias) {
      std::fill(gate_bias_row.get(), gate_bias_row.get() + panels * k.nr, 0.0f);
      k.load(gate_bias, 0, 1, 0, s.heads, gate_bias_row.get(), s.heads);
    }
    for (int64_t h = 0; has_bias && h < s.heads; ++h) {
      float* row = bias_rows.get() + h * out_width;
      k.load(bias, h, 1, 0, s.out, row, s.out);
      std::fill(row + s.out, row + out_width, 0.0f);
    }
  }

  int64_t panels, out_width;
  Scratch weight_panels, gate_bias_row, bias_rows;
  bool has_gate, has_gate_bias, has_bias;
};

constexpr float kOne = 1.0f;

// g [rows, panels * nr] = softmax(t gate^T + gate_bias), the first `heads` columns.
inline void compute_gates(const Kernels& k, const LinearShape& s, const GateOperands& gate, const float* t, int64_t ldt,
                          int64_t rows, float* g) {
  int64_t ldg = gate.panels * k.nr;
  multiply(k, t, ldt, false, rows, s.rank, gate.weight_panels.get(), k.nr, s.rank * k.nr, gate.panels, g, ldg, false);
  if (gate.has_gate_bias) {
    k.product(&kOne, 0, false, rows, 1, gate.gate_bias_row.get(), 0, k.nr, gate.panels, g, ldg, true);
  }
  k.softmax(g, ldg, rows, s.heads);
}

// c += g bias for `panels` panels from column j0: one more product, of depth heads.
inline void add_bias(const Kernels& k, const LinearShape& s, const GateOperands& gate, const float* g, int64_t rows,
                     int64_t j0, int64_t panels, float* c, int64_t ldc) {
  if (!gate.has_bias) return;
  const float* a = gate.has_gate ? g : &kOne;
  int64_t lda = gate.has_gate ? gate.panels * k.nr : 0;
  multiply(k, a, lda, false, rows, s.heads, gate.bias_rows.get() + j0, gate.out_width, k.nr, panels, c, ldc, true);
}

// The operand of the second product for a block of rows: t itself, or [g_1 t ... g_H t] in `scaled`.
struct HeadsOperand {
  const float* data;
  int64_t ld;
};

inline HeadsOperand gate_rows(const Kernels& k, const LinearShape& s, const GateOperands& gate, const float* t,
                              int64_t ldt, int64_t rows, float* g, float* scaled) {
  if (!gate.has_gate) return {t, ldt};
  compute_gates(k, s, gate, t, ldt, rows, g);
  k.scale_heads(t, ldt, g, gate.panels * k.nr, rows, s.heads, s.rank, scaled, s.heads * s.rank);
  return {scaled, s.heads * s.rank};
}

inline void finish_block(const Kernels& k, const LinearForward& f, const float* c, int64_t ldc, int64_t i0,
                         int64_t rows, int64_t j0, int64_t cols) {
  k.finish(c, ldc, rows, cols, shifted(f.residual, i0, j0), f.activation, element(f.y, f.dtype, i0 * f.shape.out + j0),
           f.dtype, f.shape.out);
}

// Many rows: blocks of rows go to the threads, t never leaves a block's scratch.
inline void forward_by_rows(const Runtime& runtime, const LinearForward& f) {
  const Kernels& k = *runtime.kernels;
  const LinearShape& s = f.shape;
  int64_t depth = s.heads * s.rank;
  int64_t rank_panels = ceil_div(s.rank, k.nr), out_panels = ceil_div(s.out, k.nr);
  GateOperands gate(k, s, f.gate_weight, f.gate_bias, f.bias);
  Scratch own_down(f.down_panels ? 0 : rank_panels * s.in * k.nr);
  Scratch own_up(f.up_panels ? 0 : out_panels * depth * k.nr);
  if (!f.down_panels) pack_all(runtime, f.down, s.rank, s.in, own_down.get());
  if (!f.up_panels) pack_all_heads(runtime, f.up, s.heads, s.rank, s.out, own_up.get());
  const float* down = f.down_panels ? f.down_panels : own_down.get();
  const float* up = f.up_panels ? f.up_panels : own_up.get();

  // 48 rows: 4 tiles of 12 or 8 of 6; with 192 depths and 128 columns every operand of a step fits the second level.
  int64_t block_rows = std::min<int64_t>(48, round_up(ceil_div(s.rows, runtime.threads), k.mr));
  int64_t group = std::max<int64_t>(1, 128 / k.nr);
  int64_t ldt = rank_panels * k.nr, ldc = group * k.nr;
  double work = 2.0 * s.rows * s.rank * (s.in + s.heads * s.out);
  parallel(runtime, ceil_div(s.rows, block_rows), work, [&](int64_t begin, int64_t end) {
    Scratch loaded(block_rows * kDepthBlock), t(block_rows * ldt), c(block_rows * ldc);
    Scratch g(block_rows * gate.panels * k.nr), scaled(gate.has_gate ? block_rows * depth : 0);
    for (int64_t block = begin; block < end; ++block) {
      int64_t i0 = block * block_rows, rows = std::min(block_rows, s.rows - i0);
      multiply_view(k, f.x, i0, rows, s.in, down, k.nr, s.in * k.nr, rank_panels, t.get(), ldt, loaded.get());
      if (f.t) k.store(t.get(), ldt, rows, s.rank, element(f.t, f.dtype, i0 * s.rank), f.dtype, s.rank);
      HeadsOperand a = gate_rows(k, s, gate, t.get(), ldt, rows, g.get(), scaled.get());
      for (int64_t p = 0; p < out_panels; p += group) {
        int64_t panels = std::min(group, out_panels - p), j0 = p * k.nr;
        multiply(k, a.data, a.ld, false, rows, depth, up + p * depth * k.nr, k.nr, depth * k.nr, panels, c.get(), ldc,
                 false);
        add_bias(k, s, gate, g.get(), rows, j0, panels, c.get(), ldc);
        finish_block(k, f, c.get(), ldc, i0, rows, j0, std::min(panels * k.nr, s.out - j0));
      }
    }
  });
}

// Few rows: x as [rows, in] float32 with unit stride, in place or in scratch.
struct FewRows {
  FewRows(const Kernels& k, const LinearForward& f)
      : in_place(f.x.dtype == Dtype::kFloat32 && f.x.col_stride == 1),
        copy(in_place ? 0 : f.shape.rows * f.shape.in),
        data(in_place ? static_cast<const float*>(f.x.data) : copy.get()),
        ld(in_place ? f.x.row_stride : f.shape.in) {
    if (!in_place) k.load(f.x, 0, f.shape.rows, 0, f.shape.in, copy.get(), f.shape.in);
  }

  bool in_place;
  Scratch copy;
  const float* data;
  int64_t ld;
};

// Few rows: each of two regions shares out the columns, and a weight is packed by the thread that uses it, one depth
// block at a time.
inline void forward_by_columns(const Runtime& runtime, const LinearForward& f) {
  const Kernels& k = *runtime.kernels;
  const LinearShape& s = f.shape;
  int64_t depth = s.heads * s.rank;
  int64_t rank_panels = ceil_div(s.rank, k.nr), out_panels = ceil_div(s.out, k.nr), ldt = rank_panels * k.nr;
  GateOperands gate(k, s, f.gate_weight, f.gate_bias, f.bias);
  FewRows x(k, f);
  Scratch t(s.rows * ldt), g(s.rows * gate.panels * k.nr), scaled(gate.has_gate ? s.rows * depth : 0);

  parallel(runtime, rank_panels, 2.0 * s.rows * s.rank * s.in, [&](int64_t begin, int64_t end) {
    Scratch panel(kDepthBlock * k.nr);
    for (int64_t p = begin; p < end; ++p) {
      int64_t d0 = 0;
      do {
        int64_t block = std::min(kDepthBlock, s.in - d0);
        const float* b = f.down_panels ? f.down_panels + (p * s.in + d0) * k.nr : panel.get();
        if (!f.down_panels) k.pack(f.down, p * k.nr, std::min(k.nr, s.rank - p * k.nr), d0, block, panel.get());
        k.product(x.data + d0, x.ld, false, s.rows, block, b, k.nr, 0, 1, t.get() + p * k.nr, ldt, d0 > 0);
        d0 += block;
      } while (d0 < s.in);
    }
  });
  if (f.t) k.store(t.get(), ldt, s.rows, s.rank, f.t, f.dtype, s.rank);
  HeadsOperand a = gate_rows(k, s, gate, t.get(), ldt, s.rows, g.get(), scaled.get());

  parallel(runtime, out_panels, 2.0 * s.rows * depth * s.out, [&](int64_t begin, int64_t end) {
    Scratch panel(kDepthBlock * k.nr), c(s.rows * k.nr);
    for (int64_t p = begin; p < end; ++p) {
      int64_t j0 = p * k.nr, cols = std::min(k.nr, s.out - j0);
      for (int64_t d0 = 0; d0 < depth; d0 += kDepthBlock) {
        int64_t block = std::min(kDepthBlock, depth - d0);
        const float* b = f.up_panels ? f.up_panels + (p * depth + d0) * k.nr : panel.get();
        if (!f.up_panels) pack_heads(k, f.up, s.rank, j0, cols, d0, block, panel.get());
        k.product(a.data + d0, a.ld, false, s.rows, block, b, k.nr, 0, 1, c.get(), k.nr, d0 > 0);
      }
      add_bias(k, s, gate, g.get(), s.rows, j0, 1, c.get(), k.nr);
      finish_block(k, f, c.get(), k.nr, 0, s.rows, j0, cols);
    }
  });
}

// At most kDotRows rows and weights with unit stride along the depth: every weight is read once, where it lies.
inline void forward_by_dots(const Runtime& runtime, const LinearForward& f) {
  const Kernels& k = *runtime.kernels;
  const LinearShape& s = f.shape;
  constexpr int64_t kColumns = 64;
  int64_t depth = s.heads * s.rank;
  GateOperands gate(k, s, f.gate_weight, f.gate_bias, f.bias);
  FewRows x(k, f);
  Scratch t(s.rows * s.rank), g(s.rows * gate.panels * k.nr), scaled(gate.has_gate ? s.rows * depth : 0);

  parallel(runtime, s.rank, 2.0 * s.rows * s.rank * s.in, [&](int64_t begin, int64_t end) {
    k.dot(x.data, x.ld, s.rows, s.in, f.down, begin, end - begin, t.get() + begin, s.rank, false);
  });
  if (f.t) k.store(t.get(), s.rank, s.rows, s.rank, f.t, f.dtype, s.rank);
  HeadsOperand a = gate_rows(k, s, gate, t.get(), s.rank, s.rows, g.get(), scaled.get());

  parallel(runtime, ceil_div(s.out, kColumns), 2.0 * s.rows * depth * s.out, [&](int64_t begin, int64_t end) {
    Scratch c(s.rows * kColumns);
    for (int64_t block = begin; block < end; ++block) {
      int64_t j0 = block * kColumns, cols = std::min(kColumns, s.out - j0);
      for (int64_t h = 0; h < s.heads; ++h) {
        k.dot(a.data + h * s.rank, a.ld, s.rows, s.rank, head(f.up, h), j0, cols, c.get(), kColumns, h > 0);
      }
      for (int64_t p = 0; p * k.nr < cols; ++p) {
        add_bias(k, s, gate, g.get(), s.rows, j0 + p * k.nr, 1, c.get() + p * k.nr, kColumns);
      }
      finish_block(k, f, c.get(), kColumns, 0, s.rows, j0, cols);
    }
  });
}

// The way depends on sizes and strides only, never on values: a row's bits do not depend on its neighbours.
inline void linear_forward(const Runtime& runtime, const LinearForward& f) {
  constexpr int64_t kColumnRows = 48;
  if (f.shape.rows == 0) return;
  bool dots = !f.down_panels && f.down.col_stride == 1 && f.up.matrix.col_stride == 1;
  if (dots && f.shape.rows <= kDotRows) return forward_by_dots(runtime, f);
  if (f.shape.rows <= kColumnRows) return forward_by_columns(runtime, f);
  forward_by_rows(runtime, f);
}

}  // namespace inherit_kernels
