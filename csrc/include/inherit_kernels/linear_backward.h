// The backward pass of linear.h. With z the pre-activation, v_h = dz up_h [rows, rank] (one product of depth out):
//   dg_h = <t, v_h> + dz bias_h,  dlogits = g (dg - sum g dg),  dt = sum_h g_h v_h + dlogits gate_weight,
//   dx = dt down,  d_down = dt^T x,  d_up_h = dz^T (g_h t),  d_bias_h = g_h^T dz,  d_gate_weight = dlogits^T t.
// The gates are recomputed from t. Every weight and every gradient is read and written in its own orientation: no
// operand is transposed. Sums have one order whatever the number of threads.
#pragma once

#include <vector>

#include "inherit_kernels/linear.h"

namespace inherit_kernels {

struct LinearBackward {
  LinearShape shape;
  MatrixView dz;           // [rows, out]
  MatrixView x;            // [rows, in]
  MatrixView t;            // [rows, rank]
  MatrixView down;         // [rank, in]
  HeadsView up;            // [heads, out, rank]
  MatrixView gate_weight;  // as in LinearForward
  MatrixView gate_bias;
  MatrixView bias;
  Dtype dtype;
  // Contiguous outputs of the shapes of their tensors; null: not needed.
  void *dx, *d_down, *d_up, *d_gate_weight, *d_gate_bias, *d_bias;
};

// dlogits = g (dg - sum g dg) over `heads` entries.
inline void softmax_backward(const float* g, const double* dg, int64_t heads, float* dlogits) {
  double mean = 0.0;
  for (int64_t h = 0; h < heads; ++h) mean += g[h] * dg[h];
  for (int64_t h = 0; h < heads; ++h) dlogits[h] = static_cast<float>(g[h] * (dg[h] - mean));
}

// Columns of dz or x that a product takes at once: a multiple of every tile's height and width.
constexpr int64_t kStripe = 96;

// Columns of [up_1 ... up_H] or of down that a product takes at once: with kDepthBlock rows, 200 KiB of a second level
// cache of 512.
constexpr int64_t kGroup = 256;

// The least leading dimension >= `cols` of an odd number of cache lines: columns of such a matrix spread over all sets
// of a cache, those of a power of two fall into a few.
inline int64_t odd_lines(int64_t cols) {
  return (ceil_div(cols, 16) | 1) * 16;
}

// Whether the rows of a register tile can be read where they lie (a copy costs 7 % of a product with 64 columns): rows
// whose distance is a multiple of 4096 bytes share one set of the first level cache, of 8 lines.
inline bool rows_in_place(const Kernels& k, MatrixView view) {
  bool crowded = view.row_stride % 1024 == 0 && k.mr > 8;
  return view.dtype == Dtype::kFloat32 && view.col_stride == 1 && !crowded;
}

// What few rows and many rows share: the sizes of scratch, the gates and their gradients.
//
// Columns of all heads lie side by side, each head padded to whole panels: v is [rows, ldv], with dz bias^T in the
// columns after the heads; [g_1 t ... g_H t] is kept as panels, ready to be the second operand of d_up.
class LinearBackwardRows {
 public:
  LinearBackwardRows(const Runtime& runtime, const LinearBackward& arguments)
      : k(*runtime.kernels),
        a(arguments),
        s(arguments.shape),
        gate(k, s, a.gate_weight, a.gate_bias, MatrixView{}),
        gated(gate.has_gate),
        wants_dt(a.dx || a.d_down || a.d_gate_weight || a.d_gate_bias),
        bias_in_gate(gated && a.bias.data),
        rank_panels(ceil_div(s.rank, k.nr)),
        ld_rank(rank_panels * k.nr),
        ld_dt(odd_lines(ld_rank)),
        ld_gate(gate.panels * k.nr),
        ldv(s.heads * ld_rank + (bias_in_gate ? ld_gate : 0)),
        gate_rows_(gated ? s.heads * ld_rank : 0) {
    for (int64_t h = 0; gated && h < s.heads; ++h) {
      float* row = gate_rows_.get() + h * ld_rank;
      std::fill(row, row + ld_rank, 0.0f);
      k.load(a.gate_weight, h, 1, 0, s.rank, row, s.rank);
    }
  }

  // t [rows, ld_rank] and g [rows, ld_gate] of the rows from i0 on.
  void recompute(int64_t i0, int64_t rows, float* t, float* g) const {
    k.load(a.t, i0, rows, 0, s.rank, t, ld_rank);
    if (gated) compute_gates(k, s, gate, t, ld_rank, rows, g);
  }

  // [g_1 t ... g_H t] as panels of `panel_rows` rows, of which these begin at `first`.
  void scale(const float* t, const float* g, int64_t first, int64_t rows, int64_t panel_rows, float* panels) const {
    for (int64_t p = 0; p < s.heads * rank_panels; ++p) {
      const float* factor = gated ? g + p / rank_panels : &kOne;
      float* panel = panels + (p * panel_rows + first) * k.nr;
      k.scale_heads(t + p % rank_panels * k.nr, ld_rank, factor, gated ? ld_gate : 0, rows, 1, k.nr, panel, k.nr);
    }
  }

  // dlogits [rows, ld_gate] and dt [rows, ld_dt] from v.
  void gate_backward(const float* t, const float* g, const float* v, int64_t rows, float* dlogits, float* dt) const {
    std::vector<double> dg(s.heads);
    for (int64_t i = 0; i < rows; ++i) {
      const float *t_row = t + i * ld_rank, *g_row = g + i * ld_gate, *v_row = v + i * ldv;
      for (int64_t h = 0; h < s.heads; ++h) {
        dg[h] = k.inner(t_row, v_row + h * ld_rank, s.rank);
        if (bias_in_gate) dg[h] += v_row[s.heads * ld_rank + h];
      }
      softmax_backward(g_row, dg.data(), s.heads, dlogits + i * ld_gate);
      k.mix(v_row, ld_rank, g_row, s.heads, ld_rank, dt + i * ld_dt);
    }
    multiply(k, dlogits, ld_gate, false, rows, s.heads, gate_rows_.get(), ld_rank, k.nr, rank_panels, dt, ld_dt, true);
  }

  // Columns [c0, c0 + cols) of [up_1 ... up_H], heads padded to ld_rank, of the outputs from n0 on.
  void load_up(int64_t n0, int64_t outputs, int64_t c0, int64_t cols, float* dst, int64_t ld) const {
    for (int64_t c = c0; c < c0 + cols;) {
      int64_t h = c / ld_rank, r = c % ld_rank, run = std::min(ld_rank - r, c0 + cols - c);
      k.load(head(a.up, h), n0, outputs, r, std::min(run, s.rank - r), dst + c - c0, ld);
      c += run;
    }
  }

  // v's columns after the heads: (+)= dz bias^T for `depth` outputs from n0 on. `biases` holds heads * depth floats.
  void add_bias_columns(const float* dz, int64_t ld, int64_t rows, int64_t n0, int64_t depth, float* v, float* biases,
                        bool more) const {
    if (!bias_in_gate) return;
    k.load(a.bias, 0, s.heads, n0, depth, biases, depth);
    MatrixView view{biases, Dtype::kFloat32, depth, 1};
    k.dot(dz, ld, rows, depth, view, 0, s.heads, v + s.heads * ld_rank, ldv, more);
  }

  const Kernels& k;
  const LinearBackward& a;
  LinearShape s;
  GateOperands gate;
  bool gated, wants_dt, bias_in_gate;
  int64_t rank_panels, ld_rank, ld_dt, ld_gate, ldv;

 private:
  Scratch gate_rows_;  // gate_weight as float32
};

// d_gate_weight and d_gate_bias, summed over all rows by one thread: 1 / (2 out) of the work.
class GateSums {
 public:
  explicit GateSums(const LinearBackwardRows& shared)
      : b_(shared), weight_(b_.a.d_gate_weight ? b_.s.heads * b_.ld_rank : 0), bias_(b_.s.heads, 0.0) {}

  void add(const float* dlogits, int64_t m0, int64_t rows) {
    if (b_.a.d_gate_weight) add_weight(dlogits, m0, rows);
    for (int64_t i = 0; b_.a.d_gate_bias && i < rows; ++i) {
      for (int64_t h = 0; h < b_.s.heads; ++h) bias_[h] += dlogits[i * b_.ld_gate + h];
    }
  }

  void store() const {
    const LinearBackward& a = b_.a;
    if (a.d_gate_weight) {
      b_.k.store(weight_.get(), b_.ld_rank, b_.s.heads, b_.s.rank, a.d_gate_weight, a.dtype, b_.s.rank);
    }
    if (a.d_gate_bias) {
      std::vector<float> sums(bias_.begin(), bias_.end());
      b_.k.store(sums.data(), b_.s.heads, 1, b_.s.heads, a.d_gate_bias, a.dtype, b_.s.heads);
    }
  }

 private:
  void add_weight(const float* dlogits, int64_t m0, int64_t rows) {
    Scratch t(kSumRows * b_.ld_rank);
    int64_t i0 = 0;
    do {
      int64_t run = std::min(kSumRows, rows - i0);
      b_.k.load(b_.a.t, m0 + i0, run, 0, b_.s.rank, t.get(), b_.ld_rank);
      b_.k.product(dlogits + i0 * b_.ld_gate, b_.ld_gate, true, b_.s.heads, run, t.get(), b_.ld_rank, b_.k.nr,
                   b_.rank_panels, weight_.get(), b_.ld_rank, m0 + i0 > 0);
      i0 += run;
    } while (i0 < rows);
  }

  const LinearBackwardRows& b_;
  Scratch weight_;  // [heads, ld_rank]
  std::vector<double> bias_;
};

// A weight's gradient that grows chunk by chunk: float32 in place, bfloat16 in float32 scratch until the last chunk.
class GrowingGradient {
 public:
  GrowingGradient(const Kernels& k, void* out, Dtype dtype, int64_t size, int64_t chunks)
      : k_(k), out_(out), dtype_(dtype), apart_(dtype != Dtype::kFloat32 && chunks > 1), sum_(apart_ ? size : 0) {}

  // Adds block [rows, cols] at element `offset` of the gradient, whose rows are `ld` elements apart.
  void add(const float* block, int64_t ld_block, int64_t rows, int64_t cols, int64_t offset, int64_t ld, bool first,
           bool last) const {
    if (first)
      return k_.store(block, ld_block, rows, cols, first_target(offset), apart_ ? Dtype::kFloat32 : dtype_, ld);
    float* sum = (apart_ ? sum_.get() : static_cast<float*>(out_)) + offset;
    for (int64_t i = 0; i < rows; ++i) k_.axpy(1.0f, block + i * ld_block, cols, sum + i * ld, true);
    if (apart_ && last) k_.store(sum, ld, rows, cols, element(out_, dtype_, offset), dtype_, ld);
  }

 private:
  void* first_target(int64_t offset) const {
    return apart_ ? static_cast<void*>(sum_.get() + offset) : element(out_, dtype_, offset);
  }

  const Kernels& k_;
  void* out_;
  Dtype dtype_;
  bool apart_;
  Scratch sum_;
};

// Many rows: chunks of fixed size; each is one region over rows, which leaves dt and [g_1 t ... g_H t], then one over
// the columns of each weight gradient.
class BackwardByRows {
 public:
  BackwardByRows(const Runtime& runtime, const LinearBackward& arguments)
      : runtime_(runtime),
        k_(*runtime.kernels),
        a_(arguments),
        s_(arguments.shape),
        b_(runtime, arguments),
        sums_(b_),
        chunk_(std::min(kChunk, s_.rows)),
        chunks_(ceil_div(s_.rows, kChunk)),
        d_up_(k_, a_.d_up, a_.dtype, s_.heads * s_.out * s_.rank, chunks_),
        d_down_(k_, a_.d_down, a_.dtype, s_.rank * s_.in, chunks_),
        v_(b_.gated && b_.wants_dt ? chunk_ * b_.ldv : 0),
        scaled_(a_.d_up ? chunk_ * s_.heads * b_.ld_rank : 0),
        g_(b_.gated ? chunk_ * b_.ld_gate : 0),
        dt_(b_.wants_dt ? chunk_ * b_.ld_dt : 0),
        dlogits_(b_.gated ? chunk_ * b_.ld_gate : 0),
        head_bias_(b_.gated && a_.d_bias ? s_.heads * round_up(s_.out, kStripe) : 0),
        bias_(a_.d_bias && !b_.gated ? s_.out : 0, 0.0) {}

  void run() {
    for (int64_t m0 = 0; m0 < s_.rows; m0 += kChunk) {
      int64_t rows = std::min(kChunk, s_.rows - m0);
      rows_of_chunk(m0, rows);
      if (a_.d_up || a_.d_bias) up_of_chunk(m0, rows);
      if (a_.d_down) down_of_chunk(m0, rows);
      if (b_.gated && b_.wants_dt) sums_.add(dlogits_.get(), m0, rows);
    }
    sums_.store();
    if (a_.d_bias) store_bias();
  }

 private:
  static constexpr int64_t kChunk = 512;
  static constexpr int64_t kBlockRows = 96;

  // Fills scaled, g, dt and dlogits of the chunk, and dx.
  void rows_of_chunk(int64_t m0, int64_t chunk) {
    double work = 2.0 * chunk * s_.rank * (s_.heads * s_.out + s_.in);
    parallel(runtime_, ceil_div(chunk, k_.mr), work, [&](int64_t begin, int64_t end) {
      int64_t i0 = begin * k_.mr, rows = std::min(end * k_.mr, chunk) - i0;
      gates(m0, i0, rows);
      if (b_.wants_dt) compute_dt(m0, i0, rows);
      if (a_.dx) store_dx(m0, i0, rows);
    });
  }

  template <class F>
  static void for_blocks(int64_t begin, int64_t count, int64_t step, const F& body) {
    for (int64_t i = 0; i < count; i += step) body(begin + i, std::min(step, count - i));
  }

  void gates(int64_t m0, int64_t begin, int64_t count) {
    Scratch t(kBlockRows * b_.ld_rank);
    for_blocks(begin, count, kBlockRows, [&](int64_t i0, int64_t rows) {
      float* g = g_.get() + i0 * b_.ld_gate;
      b_.recompute(m0 + i0, rows, t.get(), g);
      if (a_.d_up) b_.scale(t.get(), g, i0, rows, chunk_, scaled_.get());
    });
  }

  void compute_dt(int64_t m0, int64_t begin, int64_t count) {
    float* v = b_.gated ? v_.get() : dt_.get();
    int64_t ldv = b_.gated ? b_.ldv : b_.ld_dt, width = s_.heads * b_.ld_rank;
    int64_t group = round_up(ceil_div(width, ceil_div(width, kGroup)), k_.nr);  // alike
    bool in_place = rows_in_place(k_, a_.dz);
    int64_t lda = in_place ? a_.dz.row_stride : kDepthBlock;
    Scratch dz(in_place ? 0 : kBlockRows * kDepthBlock), up(kDepthBlock * odd_lines(kGroup)),
        bias(s_.heads * kDepthBlock);
    for_blocks(0, width, group, [&](int64_t c0, int64_t cols) {
      int64_t ld = odd_lines(cols);
      for_blocks(0, s_.out, kDepthBlock, [&](int64_t n0, int64_t depth) {
        b_.load_up(n0, depth, c0, cols, up.get(), ld);
        for_blocks(begin, count, kBlockRows, [&](int64_t i0, int64_t rows) {
          const float* a = in_place ? static_cast<const float*>(shifted(a_.dz, m0 + i0, n0).data) : dz.get();
          if (!in_place) k_.load(a_.dz, m0 + i0, rows, n0, depth, dz.get(), kDepthBlock);
          k_.product(a, lda, false, rows, depth, up.get(), ld, k_.nr, cols / k_.nr, v + i0 * ldv + c0, ldv, n0 > 0);
          if (c0 == 0) b_.add_bias_columns(a, lda, rows, n0, depth, v + i0 * ldv, bias.get(), n0 > 0);
        });
      });
    });
    if (!b_.gated) return;
    Scratch t(kBlockRows * b_.ld_rank);
    for_blocks(begin, count, kBlockRows, [&](int64_t i0, int64_t rows) {
      k_.load(a_.t, m0 + i0, rows, 0, s_.rank, t.get(), b_.ld_rank);
      b_.gate_backward(t.get(), g_.get() + i0 * b_.ld_gate, v + i0 * ldv, rows, dlogits_.get() + i0 * b_.ld_gate,
                       dt_.get() + i0 * b_.ld_dt);
    });
  }

  void store_dx(int64_t m0, int64_t begin, int64_t count) {
    bool in_place = a_.dtype == Dtype::kFloat32 && s_.in % k_.nr == 0;
    Scratch down(s_.rank * odd_lines(kGroup)), c(in_place ? 0 : kBlockRows * kGroup);
    for_blocks(0, s_.in, kGroup, [&](int64_t k0, int64_t cols) {
      int64_t ld = odd_lines(cols);
      k_.load(a_.down, 0, s_.rank, k0, cols, down.get(), ld);
      for_blocks(begin, count, kBlockRows, [&](int64_t i0, int64_t rows) {
        void* out = element(a_.dx, a_.dtype, (m0 + i0) * s_.in + k0);
        multiply(k_, dt_.get() + i0 * b_.ld_dt, b_.ld_dt, false, rows, s_.rank, down.get(), ld, k_.nr,
                 ceil_div(cols, k_.nr), in_place ? static_cast<float*>(out) : c.get(), in_place ? s_.in : kGroup,
                 false);
        if (!in_place) k_.store(c.get(), kGroup, rows, cols, out, a_.dtype, s_.in);
      });
    });
  }

  // d_up and d_bias: a stripe of dz at a time, as the first operand.
  void up_of_chunk(int64_t m0, int64_t chunk) {
    int64_t width = s_.heads * b_.ld_rank;
    double work = 2.0 * chunk * s_.out * width;
    parallel(runtime_, ceil_div(s_.out, kStripe), work, [&](int64_t begin, int64_t end) {
      Scratch dz(kSumRows * kStripe), c(a_.d_up ? kStripe * width : 0);
      for (int64_t stripe = begin; stripe < end; ++stripe) {
        int64_t n0 = stripe * kStripe, cols = std::min(kStripe, s_.out - n0);
        for (int64_t i0 = 0; i0 < chunk; i0 += kSumRows) {
          int64_t run = std::min(kSumRows, chunk - i0);
          k_.load(a_.dz, m0 + i0, run, n0, cols, dz.get(), kStripe);
          if (a_.d_bias) add_bias_sums(dz.get(), i0, run, n0, cols, m0 + i0 > 0);
          if (!a_.d_up) continue;
          k_.product(dz.get(), kStripe, true, cols, run, scaled_.get() + i0 * k_.nr, k_.nr, chunk_ * k_.nr,
                     s_.heads * b_.rank_panels, c.get(), width, i0 > 0);
        }
        for (int64_t h = 0; a_.d_up && h < s_.heads; ++h) {
          d_up_.add(c.get() + h * b_.ld_rank, width, cols, s_.rank, (h * s_.out + n0) * s_.rank, s_.rank, m0 == 0,
                    m0 + chunk == s_.rows);
        }
      }
    });
  }

  void add_bias_sums(const float* dz, int64_t i0, int64_t run, int64_t n0, int64_t cols, bool more) {
    if (!b_.gated) return k_.column_sums({dz, Dtype::kFloat32, kStripe, 1}, run, cols, bias_.data() + n0);
    k_.product(g_.get() + i0 * b_.ld_gate, b_.ld_gate, true, s_.heads, run, dz, kStripe, k_.nr, ceil_div(cols, k_.nr),
               head_bias_.get() + n0, round_up(s_.out, kStripe), more);
  }

  // d_down: a stripe of x at a time, as the second operand.
  void down_of_chunk(int64_t m0, int64_t chunk) {
    double work = 2.0 * chunk * s_.in * s_.rank;
    parallel(runtime_, ceil_div(s_.in, kStripe), work, [&](int64_t begin, int64_t end) {
      Scratch x(kSumRows * kStripe), c(s_.rank * kStripe);
      for (int64_t stripe = begin; stripe < end; ++stripe) {
        int64_t k0 = stripe * kStripe, cols = std::min(kStripe, s_.in - k0);
        for (int64_t i0 = 0; i0 < chunk; i0 += kSumRows) {
          int64_t run = std::min(kSumRows, chunk - i0);
          k_.load(a_.x, m0 + i0, run, k0, cols, x.get(), kStripe);
          k_.product(dt_.get() + i0 * b_.ld_dt, b_.ld_dt, true, s_.rank, run, x.get(), kStripe, k_.nr,
                     ceil_div(cols, k_.nr), c.get(), kStripe, i0 > 0);
        }
        d_down_.add(c.get(), kStripe, s_.rank, cols, k0, s_.in, m0 == 0, m0 + chunk == s_.rows);
      }
    });
  }

  void store_bias() {
    if (b_.gated) {
      return k_.store(head_bias_.get(), round_up(s_.out, kStripe), s_.heads, s_.out, a_.d_bias, a_.dtype, s_.out);
    }
    std::vector<float> row(bias_.begin(), bias_.end());
    k_.store(row.data(), s_.out, 1, s_.out, a_.d_bias, a_.dtype, s_.out);
  }

  const Runtime& runtime_;
  const Kernels& k_;
  const LinearBackward& a_;
  LinearShape s_;
  LinearBackwardRows b_;
  GateSums sums_;
  int64_t chunk_, chunks_;
  GrowingGradient d_up_, d_down_;
  Scratch v_, scaled_, g_, dt_, dlogits_;  // of one chunk
  Scratch head_bias_;                      // d_bias of the gated op so far
  std::vector<double> bias_;               // d_bias of the plain op so far: torch's own sum is as exact
};

// Few rows: the weights are read where they lie, once, and their gradients written once. One region over outputs takes
// a part of v and all of d_up and d_bias; one over rows adds the parts in order; one over inputs takes dx and d_down.
class BackwardByColumns {
 public:
  BackwardByColumns(const Runtime& runtime, const LinearBackward& arguments)
      : runtime_(runtime),
        k_(*runtime.kernels),
        a_(arguments),
        s_(arguments.shape),
        b_(runtime, arguments),
        part_(std::max(kStripe, round_up(ceil_div(s_.out, kParts), kStripe))),
        parts_(ceil_div(s_.out, part_)),
        columns_(s_.rows == 1 ? 1152 : 288),
        plain_rank_(a_.dtype == Dtype::kFloat32 && s_.rank % k_.nr == 0),
        plain_in_(a_.dtype == Dtype::kFloat32 && s_.in % k_.nr == 0),
        t_(s_.rows * b_.ld_rank),
        g_(b_.gated ? s_.rows * b_.ld_gate : 0),
        scaled_(a_.d_up ? s_.rows * s_.heads * b_.ld_rank : 0),
        v_(b_.wants_dt ? std::max<int64_t>(parts_, 1) * s_.rows * b_.ldv : 0),
        dt_(b_.wants_dt ? s_.rows * b_.ld_dt : 0),
        dlogits_(b_.gated ? s_.rows * b_.ld_gate : 0) {}

  void run() {
    b_.recompute(0, s_.rows, t_.get(), g_.get());
    if (a_.d_up) b_.scale(t_.get(), g_.get(), 0, s_.rows, s_.rows, scaled_.get());
    outputs();
    if (!b_.wants_dt) return;
    rows();
    if (a_.dx || a_.d_down) inputs();
    GateSums sums(b_);
    if (b_.gated) sums.add(dlogits_.get(), 0, s_.rows);
    sums.store();
  }

 private:
  static constexpr int64_t kParts = 16;  // at most so many parts of v

  void outputs() {
    parallel(runtime_, parts_, 4.0 * s_.rows * s_.out * b_.ldv, [&](int64_t begin, int64_t end) {
      Scratch dz(s_.rows * kStripe), b(kStripe * std::max(b_.ld_rank, s_.heads));
      Scratch c(std::max(k_.mr * b_.ld_rank, s_.heads * kStripe));
      for (int64_t part = begin; part < end; ++part) {
        int64_t last = std::min(s_.out, (part + 1) * part_);
        float* v = v_.get() + part * s_.rows * b_.ldv;
        for (int64_t n0 = part * part_; n0 < last; n0 += kStripe) {
          int64_t cols = std::min(kStripe, last - n0);
          k_.load(a_.dz, 0, s_.rows, n0, cols, dz.get(), kStripe);
          if (b_.wants_dt) add_v(dz.get(), n0, cols, b.get(), v, n0 > part * part_);
          if (a_.d_up) store_up(dz.get(), n0, cols, c.get());
          if (a_.d_bias) store_bias(dz.get(), n0, cols, c.get());
        }
      }
    });
  }

  // v (+)= dz [up_1 ... up_H], and dz bias^T after it, for a stripe of dz.
  void add_v(const float* dz, int64_t n0, int64_t cols, float* b, float* v, bool more) {
    // As many depths as their lines of one panel, ld_rank floats apart, can stay in a first level cache of 8 ways.
    int64_t depth = std::clamp<int64_t>(8192 / b_.ld_rank, 16, kStripe);
    bool in_place = plain_rank_ && a_.up.matrix.col_stride == 1;
    for (int64_t h = 0; h < s_.heads; ++h) {
      MatrixView up = head(a_.up, h);
      if (in_place && s_.rows == 1) {
        add_rows(dz, shifted(up, n0, 0), cols, s_.rank, b, v + h * b_.ld_rank, more);
        continue;
      }
      for (int64_t d = 0; d < cols; d += depth) {
        int64_t run = std::min(depth, cols - d);
        const float* weights = b;
        if (in_place) {
          weights = static_cast<const float*>(shifted(up, n0 + d, 0).data);
        } else {
          k_.load(up, n0 + d, run, 0, s_.rank, b, b_.ld_rank);
        }
        k_.product(dz + d, kStripe, false, s_.rows, run, weights, in_place ? up.row_stride : b_.ld_rank, k_.nr,
                   b_.rank_panels, v + h * b_.ld_rank, b_.ldv, more || d > 0);
      }
    }
    b_.add_bias_columns(dz, kStripe, s_.rows, n0, cols, v, b, more);
  }

  // For one row, sums and multiples of whole rows are twice as fast as register tiles of one row or one depth.

  // out (+)= sum_i a[i] w[i, :], in runs as short as those of a product.
  void add_rows(const float* a, MatrixView w, int64_t count, int64_t width, float* run, float* out, bool more) const {
    for (int64_t i = 0; i < count; ++i) {
      const float* row = static_cast<const float*>(shifted(w, i, 0).data);
      k_.axpy(a[i], row, width, run, i % kStripe > 0);
      if ((i + 1) % kStripe && i + 1 < count) continue;
      k_.axpy(1.0f, run, width, out, more || i >= kStripe);
    }
  }

  // out[i, :] = a[i] b.
  void scaled_rows(const float* a, int64_t count, const float* b, int64_t width, float* out, int64_t ld) const {
    for (int64_t i = 0; i < count; ++i) k_.axpy(a[i], b, width, out + i * ld, false);
  }

  // A few rows of d_up at a time, so that they are written from end to end.
  void store_up(const float* dz, int64_t n0, int64_t cols, float* c) {
    for (int64_t h = 0; h < s_.heads; ++h) {
      const float* scaled = scaled_.get() + h * b_.ld_rank * s_.rows;
      if (plain_rank_ && s_.rows == 1) {
        scaled_rows(dz, cols, scaled, s_.rank, static_cast<float*>(a_.d_up) + (h * s_.out + n0) * s_.rank, s_.rank);
        continue;
      }
      for (int64_t j = 0; j < cols; j += k_.mr) {
        int64_t count = std::min(k_.mr, cols - j);
        void* out = element(a_.d_up, a_.dtype, (h * s_.out + n0 + j) * s_.rank);
        k_.product(dz + j, kStripe, true, count, s_.rows, scaled, k_.nr, s_.rows * k_.nr, b_.rank_panels,
                   plain_rank_ ? static_cast<float*>(out) : c, b_.ld_rank, false);
        if (!plain_rank_) k_.store(c, b_.ld_rank, count, s_.rank, out, a_.dtype, s_.rank);
      }
    }
  }

  void store_bias(const float* dz, int64_t n0, int64_t cols, float* c) {
    if (b_.gated) {
      k_.product(g_.get(), b_.ld_gate, true, s_.heads, s_.rows, dz, kStripe, k_.nr, ceil_div(cols, k_.nr), c, kStripe,
                 false);
    } else {
      std::vector<double> sums(cols, 0.0);
      k_.column_sums({dz, Dtype::kFloat32, kStripe, 1}, s_.rows, cols, sums.data());
      std::copy(sums.begin(), sums.end(), c);
    }
    k_.store(c, kStripe, s_.heads, cols, element(a_.d_bias, a_.dtype, n0), a_.dtype, s_.out);
  }

  void rows() {
    int64_t ld = b_.ldv, size = s_.rows * ld;
    parallel(runtime_, s_.rows, 2.0 * parts_ * size, [&](int64_t begin, int64_t end) {
      float* v = v_.get() + begin * ld;
      if (parts_ == 0) std::fill(v, v_.get() + end * ld, 0.0f);
      for (int64_t part = 1; part < parts_; ++part) k_.axpy(1.0f, v + part * size, (end - begin) * ld, v, true);
      float* dt = dt_.get() + begin * b_.ld_dt;
      if (b_.gated) {
        b_.gate_backward(t_.get() + begin * b_.ld_rank, g_.get() + begin * b_.ld_gate, v, end - begin,
                         dlogits_.get() + begin * b_.ld_gate, dt);
      } else {
        k_.store(v, ld, end - begin, ld, dt, Dtype::kFloat32, b_.ld_dt);
      }
    });
  }

  void inputs() {
    parallel(runtime_, ceil_div(s_.in, k_.nr), 4.0 * s_.rows * s_.in * s_.rank, [&](int64_t begin, int64_t end) {
      Scratch x(s_.rows * columns_), b(kDepth * columns_), c(std::max(s_.rows, k_.mr) * columns_);
      int64_t last = std::min(end * k_.nr, s_.in);
      for (int64_t k0 = begin * k_.nr; k0 < last; k0 += columns_) {
        int64_t cols = std::min(columns_, last - k0);
        if (a_.dx) store_dx(k0, cols, b.get(), c.get());
        if (a_.d_down) store_down(k0, cols, x.get(), c.get());
      }
    });
  }

  void store_dx(int64_t k0, int64_t cols, float* b, float* c) {
    bool in_place = plain_in_ && a_.down.col_stride == 1 && s_.rows <= kDotRows;
    if (in_place && s_.rows == 1) {
      return add_rows(dt_.get(), shifted(a_.down, 0, k0), s_.rank, cols, b, static_cast<float*>(a_.dx) + k0, false);
    }
    int64_t panels = ceil_div(cols, k_.nr);
    for (int64_t d = 0; d < s_.rank; d += kDepth) {
      int64_t run = std::min(kDepth, s_.rank - d);
      const float* weights = b;
      if (in_place) {
        weights = static_cast<const float*>(shifted(a_.down, d, k0).data);
      } else {
        k_.load(a_.down, d, run, k0, cols, b, columns_);
      }
      k_.product(dt_.get() + d, b_.ld_dt, false, s_.rows, run, weights, in_place ? a_.down.row_stride : columns_, k_.nr,
                 panels, c, columns_, d > 0);
    }
    k_.store(c, columns_, s_.rows, cols, element(a_.dx, a_.dtype, k0), a_.dtype, s_.in);
  }

  void store_down(int64_t k0, int64_t cols, float* x, float* c) {
    k_.load(a_.x, 0, s_.rows, k0, cols, x, columns_);
    if (plain_in_ && s_.rows == 1) {
      return scaled_rows(dt_.get(), s_.rank, x, cols, static_cast<float*>(a_.d_down) + k0, s_.in);
    }
    for (int64_t r = 0; r < s_.rank; r += k_.mr) {
      int64_t count = std::min(k_.mr, s_.rank - r);
      void* out = element(a_.d_down, a_.dtype, r * s_.in + k0);
      k_.product(dt_.get() + r, b_.ld_dt, true, count, s_.rows, x, columns_, k_.nr, ceil_div(cols, k_.nr),
                 plain_in_ ? static_cast<float*>(out) : c, plain_in_ ? s_.in : columns_, false);
      if (!plain_in_) k_.store(c, columns_, count, cols, out, a_.dtype, s_.in);
    }
  }

  static constexpr int64_t kDepth = 32;  // of dx

  const Runtime& runtime_;
  const Kernels& k_;
  const LinearBackward& a_;
  LinearShape s_;
  LinearBackwardRows b_;
  int64_t part_, parts_;
  int64_t columns_;             // of x, dx and d_down at once
  bool plain_rank_, plain_in_;  // float32 whose rows, of up or of down, are whole panels
  Scratch t_, g_, scaled_, v_, dt_, dlogits_;
};

// The way depends on sizes only.
inline void linear_backward(const Runtime& runtime, const LinearBackward& a) {
  constexpr int64_t kColumnRows = 64;
  if (a.shape.rows <= kColumnRows) return BackwardByColumns(runtime, a).run();
  BackwardByRows(runtime, a).run();
}

}  // namespace inherit_kernels
