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
  MatrixView x;     // [rows, in]
  MatrixView down;  // [rank, in], unless packed
  HeadsView up;     // [heads, out, rank], unless packed
  bool packed;
  Panels down_panels;  // as PackedSource lays them out, with the biases
  Panels up_panels;
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
      : weight(weight),
        dots(s.rows <= kDotRows && weight.col_stride == 1),
        panels(ceil_div(s.heads, k.nr)),
        out_width(round_up(s.out, k.nr)),
        weight_panels(weight.data && !dots ? panels * s.rank * k.nr : 0),
        gate_bias_row(gate_bias.data ? panels * k.nr : 0),
        bias_rows(bias.data ? s.heads * out_width : 0),
        has_gate(weight.data),
        has_gate_bias(gate_bias.data),
        has_bias(bias.data) {
    for (int64_t p = 0; has_gate && !dots && p < panels; ++p) {
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

  MatrixView weight;
  bool dots;  // few rows: logits straight from the weight
  int64_t panels, out_width;
  Scratch weight_panels, gate_bias_row, bias_rows;
  bool has_gate, has_gate_bias, has_bias;
};

constexpr float kOne = 1.0f;

// g [rows, panels * nr] = softmax(t gate^T + gate_bias), the first `heads` columns.
inline void compute_gates(const Kernels& k, const LinearShape& s, const GateOperands& gate, const float* t, int64_t ldt,
                          int64_t rows, float* g) {
  int64_t ldg = gate.panels * k.nr;
  if (gate.dots) {
    k.dot(t, ldt, rows, s.rank, gate.weight, 0, s.heads, g, ldg, false);
  } else {
    multiply(k, t, ldt, false, rows, s.rank, gate.weight_panels.get(), k.nr, s.rank * k.nr, gate.panels, g, ldg, false);
  }
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

// A row length that does not put a tile's rows into one set of the first level cache.
inline int64_t leading(int64_t columns) {
  return columns % 1024 == 0 ? columns + 16 : columns;
}

// What stands between the products, for a block of rows: t with columns to spare, the gates, the right factor.
struct Between {
  Between(const Kernels& k, const LinearShape& s, const GateOperands& gate, int64_t depth, int64_t rows)
      : ldt(leading(std::max(round_up(s.rank, k.nr), depth))),
        ld_scaled(leading(depth)),
        t(rows * ldt),
        g(gate.has_gate ? rows * gate.panels * k.nr : 0),
        scaled(gate.has_gate ? rows * ld_scaled : 0),
        halves(k.multiplies_bfloat16 ? rows * ceil_div(ld_scaled, 2) : 0) {}

  int64_t ldt, ld_scaled;
  Scratch t, g, scaled, halves;
};

// The left operand of the second product: [g_1 t ... g_H t], followed by the gates where the panels hold the biases.
// Without a gate it is t itself, followed by a one.
inline Rows scaled_rows(const Kernels& k, const LinearShape& s, const GateOperands& gate, Panels up, int64_t rows,
                        Between& b) {
  bool biased = up.depth > s.heads * s.rank;
  float* a = b.t.get();
  int64_t ld = b.ldt, ldg = gate.panels * k.nr;
  if (gate.has_gate) {
    compute_gates(k, s, gate, b.t.get(), b.ldt, rows, b.g.get());
    a = b.scaled.get(), ld = b.ld_scaled;
    k.scale_heads(b.t.get(), b.ldt, b.g.get(), ldg, rows, s.heads, s.rank, a, ld);
  }
  for (int64_t i = 0; biased && i < rows; ++i) {
    for (int64_t h = 0; h < s.heads; ++h) a[i * ld + s.heads * s.rank + h] = gate.has_gate ? b.g.get()[i * ldg + h] : 1;
  }
  if (up.dtype == Dtype::kFloat32 || !k.multiplies_bfloat16) return {a, Dtype::kFloat32, ld};
  k.store(a, ld, rows, up.depth, b.halves.get(), Dtype::kBFloat16, b.ld_scaled);
  return {b.halves.get(), Dtype::kBFloat16, b.ld_scaled};
}

inline Epilogue epilogue_of(const LinearForward& f, int64_t i0, int64_t j0, int64_t cols) {
  void* out = element(f.y, f.dtype, i0 * f.shape.out + j0);
  return {shifted(f.residual, i0, j0), f.activation, out, f.dtype, f.shape.out, cols};
}

inline PackedSource down_source(const LinearForward& f) {
  return {{f.down, 0}, 1, f.shape.in, f.shape.rank, {}};
}

inline PackedSource up_source(const LinearForward& f) {
  return {f.up, f.shape.heads, f.shape.rank, f.shape.out, f.bias};
}

// The panels of a weight: given, or made in scratch.
struct WeightPanels {
  WeightPanels(const Runtime& runtime, bool packed, Panels given, const PackedSource& source)
      : own(packed ? 0 : size(*runtime.kernels, source)), panels(given) {
    if (packed) return;
    pack_source(runtime, source, own.get());
    panels = {own.get(), source.up.matrix.dtype, source.depth()};
  }

  static int64_t size(const Kernels& k, const PackedSource& w) {
    Dtype dtype = w.up.matrix.dtype;
    return ceil_div(panels_elements(k, dtype, w.outputs, w.depth()) * element_size(dtype), 4);
  }

  Scratch own;
  Panels panels;
};

// Many rows: blocks of rows go to the threads, t never leaves a block's scratch.
inline void forward_by_rows(const Runtime& runtime, const LinearForward& f) {
  const Kernels& k = *runtime.kernels;
  const LinearShape& s = f.shape;
  GateOperands gate(k, s, f.gate_weight, f.gate_bias, MatrixView{});
  WeightPanels down_panels(runtime, f.packed, f.down_panels, down_source(f));
  WeightPanels up_panels(runtime, f.packed, f.up_panels, up_source(f));
  Panels down = down_panels.panels, up = up_panels.panels;

  // At most 96 rows, shared out evenly: their factors stay in the second level cache and the weights pass once a block
  // (48 rows: 5 % slower where the weights exceed it).
  constexpr int64_t kBlockRows = 96;
  int64_t blocks = runtime.threads * ceil_div(s.rows, runtime.threads * kBlockRows);
  blocks = std::max(blocks, runtime.threads * std::min(kShares, s.rows / (runtime.threads * kBlockRows / 2)));
  int64_t block_rows = ceil_div(s.rows, blocks);
  int64_t rank_panels = ceil_div(s.rank, k.nr), out_panels = ceil_div(s.out, k.nr);
  double work = 2.0 * s.rows * s.rank * (s.in + s.heads * s.out);
  balanced(runtime, ceil_div(s.rows, block_rows), work, 1, [&](int64_t begin, int64_t end) {
    Between between(k, s, gate, up.depth, block_rows);
    Scratch loaded(2 * block_rows * loaded_ld(depth_block(s.in))), c(block_rows * kFinishGroup * k.nr);
    for (int64_t block = begin; block < end; ++block) {
      int64_t i0 = block * block_rows, rows = std::min(block_rows, s.rows - i0);
      auto rows_at = [&](int64_t d0, int64_t depth) {
        return rows_of(k, f.x, down.dtype, i0, rows, d0, depth, loaded.get());
      };
      multiply_panels(k, rows_at, rows, down, rank_panels, between.t.get(), between.ldt);
      if (f.t) k.store(between.t.get(), between.ldt, rows, s.rank, element(f.t, f.dtype, i0 * s.rank), f.dtype, s.rank);
      Rows a = scaled_rows(k, s, gate, up, rows, between);
      multiply_finish_panels(k, a, rows, up, out_panels, epilogue_of(f, i0, 0, s.out), c.get());
    }
  });
}

// Runs body(panels, first panel, count) over the panels of a weight, in parallel: some at a time where they are packed,
// otherwise one, packed by the thread that uses it.
template <class Body>
void over_panels(const Runtime& runtime, bool packed, Panels given, const PackedSource& source, double work,
                 const Body& body) {
  const Kernels& k = *runtime.kernels;
  Dtype dtype = packed ? given.dtype : source.up.matrix.dtype;
  int64_t depth = packed ? given.depth : source.depth(), size = panel_elements(k, dtype, depth);
  balanced(runtime, ceil_div(source.outputs, k.nr), work, kFinishGroup, [&](int64_t begin, int64_t end) {
    Scratch panel(packed ? 0 : size), gathered(packed ? 0 : size);
    uint16_t* halves = reinterpret_cast<uint16_t*>(gathered.get());
    for (int64_t p = begin, step; p < end; p += step) {
      step = packed ? std::min(kFinishGroup, end - p) : 1;
      if (!packed) pack_panel(k, source, p, halves, panel.get());
      body(packed ? from_panel(k, given, p) : Panels{panel.get(), dtype, depth}, p, step);
    }
  });
}

// Few rows: each of two regions shares out the columns.
inline void forward_by_columns(const Runtime& runtime, const LinearForward& f) {
  const Kernels& k = *runtime.kernels;
  const LinearShape& s = f.shape;
  GateOperands gate(k, s, f.gate_weight, f.gate_bias, MatrixView{});
  Dtype dtype = f.packed ? f.down_panels.dtype : f.down.dtype;
  PackedSource up = up_source(f);
  int64_t depth = f.packed ? f.up_panels.depth : up.depth();
  Scratch loaded(2 * s.rows * loaded_ld(s.in));
  Rows x = rows_of(k, f.x, dtype, 0, s.rows, 0, s.in, loaded.get());
  Between between(k, s, gate, depth, s.rows);

  double work = 2.0 * s.rows * s.rank * s.in;
  over_panels(runtime, f.packed, f.down_panels, down_source(f), work, [&](Panels w, int64_t p, int64_t count) {
    auto rows_at = [&](int64_t d0, int64_t) { return shifted(x, d0); };
    multiply_panels(k, rows_at, s.rows, w, count, between.t.get() + p * k.nr, between.ldt);
  });
  if (f.t) k.store(between.t.get(), between.ldt, s.rows, s.rank, f.t, f.dtype, s.rank);
  Rows a = scaled_rows(k, s, gate, {nullptr, dtype, depth}, s.rows, between);
  work = 2.0 * s.rows * depth * s.out;
  over_panels(runtime, f.packed, f.up_panels, up, work, [&](Panels w, int64_t p, int64_t count) {
    Scratch c(s.rows * kFinishGroup * k.nr);
    int64_t j0 = p * k.nr, cols = std::min(count * k.nr, s.out - j0);
    multiply_finish_panels(k, a, s.rows, w, count, epilogue_of(f, 0, j0, cols), c.get());
  });
}

// Few rows as float32 with unit stride, in place or in scratch.
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

// At most kDotRows rows and weights with unit stride along the depth: every weight is read once, where it lies.
inline void forward_by_dots(const Runtime& runtime, const LinearForward& f) {
  const Kernels& k = *runtime.kernels;
  const LinearShape& s = f.shape;
  constexpr int64_t kColumns = 64;
  int64_t depth = s.heads * s.rank;
  GateOperands gate(k, s, f.gate_weight, f.gate_bias, f.bias);
  FewRows x(k, f);
  Scratch t(s.rows * s.rank), g(s.rows * gate.panels * k.nr), scaled(gate.has_gate ? s.rows * depth : 0);

  balanced(runtime, s.rank, 2.0 * s.rows * s.rank * s.in, 8, [&](int64_t begin, int64_t end) {
    k.dot(x.data, x.ld, s.rows, s.in, f.down, begin, end - begin, t.get() + begin, s.rank, false);
  });
  if (f.t) k.store(t.get(), s.rank, s.rows, s.rank, f.t, f.dtype, s.rank);
  const float* a = t.get();
  if (gate.has_gate) {
    compute_gates(k, s, gate, t.get(), s.rank, s.rows, g.get());
    k.scale_heads(t.get(), s.rank, g.get(), gate.panels * k.nr, s.rows, s.heads, s.rank, scaled.get(), depth);
    a = scaled.get();
  }

  balanced(runtime, ceil_div(s.out, kColumns), 2.0 * s.rows * depth * s.out, 1, [&](int64_t begin, int64_t end) {
    Scratch c(s.rows * kColumns);
    for (int64_t block = begin; block < end; ++block) {
      int64_t j0 = block * kColumns, cols = std::min(kColumns, s.out - j0);
      for (int64_t h = 0; h < s.heads; ++h) {
        k.dot(a + h * s.rank, depth, s.rows, s.rank, head(f.up, h), j0, cols, c.get(), kColumns, h > 0);
      }
      for (int64_t p = 0; p * k.nr < cols; ++p) {
        add_bias(k, s, gate, g.get(), s.rows, j0 + p * k.nr, 1, c.get() + p * k.nr, kColumns);
      }
      Epilogue e = epilogue_of(f, 0, j0, cols);
      k.finish(c.get(), kColumns, s.rows, cols, e.residual, e.activation, e.out, e.dtype, e.ld_out);
    }
  });
}

// The way depends on sizes and strides only, never on values: a row's bits do not depend on its neighbours.
inline void linear_forward(const Runtime& runtime, const LinearForward& f) {
  constexpr int64_t kColumnRows = 64;
  if (f.shape.rows == 0) return;
  bool dots = !f.packed && f.down.col_stride == 1 && f.up.matrix.col_stride == 1;
  if (dots && f.shape.rows <= kDotRows) return forward_by_dots(runtime, f);
  if (f.shape.rows <= kColumnRows) return forward_by_columns(runtime, f);
  forward_by_rows(runtime, f);
}

}  // namespace inherit_kernels
