// The backward pass of linear.h. With z the pre-activation, v_h = dz up_h [rows, rank] (one product of depth out):
//   dg_h = <t, v_h> + dz bias_h,  dlogits = g (dg - sum g dg),  dt = sum_h g_h v_h + dlogits gate_weight,
//   dx = dt down,  d_down = dt^T x,  d_up_h = (g_h t)^T dz,  d_bias_h = g_h^T dz,  d_gate_weight = dlogits^T t.
// The gates are recomputed from t. Rows go through in chunks of fixed size; each chunk is one region over rows, then
// one over the columns of each weight gradient, so that sums have one order whatever the threads.
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

class LinearBackwardPass {
 public:
  LinearBackwardPass(const Runtime& runtime, const LinearBackward& arguments)
      : runtime_(runtime),
        k_(*runtime.kernels),
        a_(arguments),
        s_(arguments.shape),
        gate_(k_, s_, a_.gate_weight, a_.gate_bias, MatrixView{}),
        wants_up_(a_.d_up || (a_.d_bias && gate_.has_gate)),
        wants_dt_(a_.dx || a_.d_down || a_.d_gate_weight || a_.d_gate_bias),
        bias_in_gate_(gate_.has_gate && a_.bias.data),
        rank_panels_(ceil_div(s_.rank, k_.nr)),
        ld_rank_(rank_panels_ * k_.nr),
        ld_gate_(gate_.panels * k_.nr),
        v_panels_(s_.heads * rank_panels_ + (bias_in_gate_ ? gate_.panels : 0)),
        width_(s_.heads * (s_.rank + 1)),
        chunk_(std::min(kChunk, s_.rows)),
        up_panels_(wants_dt_ ? v_panels_ * s_.out * k_.nr : 0),
        down_panels_(a_.dx ? round_up(s_.in, k_.nr) * s_.rank : 0),
        gate_rows_(gate_.has_gate ? s_.heads * ld_rank_ : 0),
        scaled_(wants_up_ ? chunk_ * width_ : 0),
        dt_(wants_dt_ ? chunk_ * ld_rank_ : 0),
        dlogits_(gate_.has_gate ? chunk_ * ld_gate_ : 0),
        sum_up_(wants_up_ ? width_ * round_up(s_.out, k_.nr) : 0),
        sum_down_(a_.d_down ? s_.rank * round_up(s_.in, k_.nr) : 0),
        sum_gate_(a_.d_gate_weight ? s_.heads * ld_rank_ : 0),
        sum_gate_bias_(s_.heads, 0.0) {}

  void run() {
    prepare();
    int64_t m0 = 0;
    do {  // once for zero rows too: the sums become zeros
      int64_t rows = std::min(kChunk, s_.rows - m0);
      rows_of_chunk(m0, rows);
      sums_of_chunk(m0, rows);
      m0 += rows;
    } while (m0 < s_.rows);
    store();
  }

 private:
  static constexpr int64_t kChunk = 512;

  void prepare() {
    if (wants_dt_) {
      int64_t head_panels = rank_panels_ * s_.out * k_.nr;
      for (int64_t h = 0; h < s_.heads; ++h) {
        pack_all(runtime_, transposed(head(a_.up, h)), s_.rank, s_.out, up_panels_.get() + h * head_panels);
      }
      if (bias_in_gate_) pack_all(runtime_, a_.bias, s_.heads, s_.out, up_panels_.get() + s_.heads * head_panels);
    }
    if (a_.dx) pack_all(runtime_, transposed(a_.down), s_.in, s_.rank, down_panels_.get());
    for (int64_t h = 0; gate_.has_gate && h < s_.heads; ++h) {
      float* row = gate_rows_.get() + h * ld_rank_;
      std::fill(row, row + ld_rank_, 0.0f);
      k_.load(a_.gate_weight, h, 1, 0, s_.rank, row, s_.rank);
    }
  }

  // Fills scaled, dt and dlogits of the chunk, and dx.
  void rows_of_chunk(int64_t m0, int64_t chunk) {
    int64_t block_rows =
        std::min<int64_t>(48, round_up(ceil_div(std::max<int64_t>(chunk, 1), runtime_.threads), k_.mr));
    int64_t ldv = v_panels_ * k_.nr;
    double work = 2.0 * chunk * s_.rank * (s_.heads * s_.out + s_.in);
    parallel(runtime_, ceil_div(chunk, block_rows), work, [&](int64_t begin, int64_t end) {
      Scratch t(block_rows * ld_rank_), g(block_rows * ld_gate_), loaded(block_rows * kDepthBlock);
      Scratch v(wants_dt_ ? block_rows * ldv : 0), c(block_rows * kGroup * k_.nr);
      for (int64_t block = begin; block < end; ++block) {
        int64_t i0 = block * block_rows, rows = std::min(block_rows, chunk - i0);
        float* dt = dt_.get() + i0 * ld_rank_;
        k_.load(a_.t, m0 + i0, rows, 0, s_.rank, t.get(), ld_rank_);
        if (gate_.has_gate) compute_gates(k_, s_, gate_, t.get(), ld_rank_, rows, g.get());
        if (wants_up_) scale_rows(t.get(), g.get(), rows, scaled_.get() + i0 * width_);
        if (!wants_dt_) continue;
        float* product = gate_.has_gate ? v.get() : dt;
        int64_t ld_product = gate_.has_gate ? ldv : ld_rank_;
        multiply_view(k_, a_.dz, m0 + i0, rows, s_.out, up_panels_.get(), k_.nr, s_.out * k_.nr, v_panels_, product,
                      ld_product, loaded.get());
        if (gate_.has_gate) gate_backward(t.get(), g.get(), v.get(), ldv, rows, dlogits_.get() + i0 * ld_gate_, dt);
        if (a_.dx) store_dx(dt, m0 + i0, rows, c.get());
      }
    });
  }

  // [g_1 t ... g_H t, g_1 ... g_H]: one operand for d_up and d_bias.
  void scale_rows(const float* t, const float* g, int64_t rows, float* out) {
    bool gated = gate_.has_gate;
    k_.scale_heads(t, ld_rank_, gated ? g : &kOne, gated ? ld_gate_ : 0, rows, s_.heads, s_.rank, out, width_);
    for (int64_t i = 0; i < rows; ++i) {
      float* tail = out + i * width_ + s_.heads * s_.rank;
      for (int64_t h = 0; h < s_.heads; ++h) tail[h] = gated ? g[i * ld_gate_ + h] : 1.0f;
    }
  }

  void gate_backward(const float* t, const float* g, const float* v, int64_t ldv, int64_t rows, float* dlogits,
                     float* dt) {
    std::vector<double> dg(s_.heads);
    for (int64_t i = 0; i < rows; ++i) {
      const float *t_row = t + i * ld_rank_, *g_row = g + i * ld_gate_, *v_row = v + i * ldv;
      for (int64_t h = 0; h < s_.heads; ++h) {
        dg[h] = k_.inner(t_row, v_row + h * ld_rank_, s_.rank);
        if (bias_in_gate_) dg[h] += v_row[s_.heads * ld_rank_ + h];
      }
      softmax_backward(g_row, dg.data(), s_.heads, dlogits + i * ld_gate_);
      k_.mix(v_row, ld_rank_, g_row, s_.heads, ld_rank_, dt + i * ld_rank_);
    }
    multiply(k_, dlogits, ld_gate_, false, rows, s_.heads, gate_rows_.get(), ld_rank_, k_.nr, rank_panels_, dt,
             ld_rank_, true);
  }

  void store_dx(const float* dt, int64_t i0, int64_t rows, float* c) {
    int64_t ldc = kGroup * k_.nr, in_panels = ceil_div(s_.in, k_.nr);
    for (int64_t p = 0; p < in_panels; p += kGroup) {
      int64_t panels = std::min(kGroup, in_panels - p), j0 = p * k_.nr;
      multiply(k_, dt, ld_rank_, false, rows, s_.rank, down_panels_.get() + p * s_.rank * k_.nr, k_.nr, s_.rank * k_.nr,
               panels, c, ldc, false);
      void* out = element(a_.dx, a_.dtype, i0 * s_.in + j0);
      k_.store(c, ldc, rows, std::min(panels * k_.nr, s_.in - j0), out, a_.dtype, s_.in);
    }
  }

  void sums_of_chunk(int64_t m0, int64_t rows) {
    bool more = m0 > 0;
    if (wants_up_) {
      accumulate_outer(runtime_, scaled_.get(), width_, width_, shifted(a_.dz, m0, 0), s_.out, rows, sum_up_.get(),
                       round_up(s_.out, k_.nr), more);
    }
    if (a_.d_down) {
      accumulate_outer(runtime_, dt_.get(), ld_rank_, s_.rank, shifted(a_.x, m0, 0), s_.in, rows, sum_down_.get(),
                       round_up(s_.in, k_.nr), more);
    }
    if (a_.d_gate_weight) {
      accumulate_outer(runtime_, dlogits_.get(), ld_gate_, s_.heads, shifted(a_.t, m0, 0), s_.rank, rows,
                       sum_gate_.get(), ld_rank_, more);
    }
    for (int64_t i = 0; a_.d_gate_bias && i < rows; ++i) {
      for (int64_t h = 0; h < s_.heads; ++h) sum_gate_bias_[h] += dlogits_.get()[i * ld_gate_ + h];
    }
  }

  void store() {
    int64_t ld_out = round_up(s_.out, k_.nr);
    if (a_.d_down) k_.store(sum_down_.get(), round_up(s_.in, k_.nr), s_.rank, s_.in, a_.d_down, a_.dtype, s_.in);
    if (a_.d_up) {
      parallel(runtime_, s_.heads, 4.0 * s_.heads * s_.out * s_.rank, [&](int64_t begin, int64_t end) {
        for (int64_t h = begin; h < end; ++h) {
          void* out = element(a_.d_up, a_.dtype, h * s_.out * s_.rank);
          store_transposed(k_, sum_up_.get() + h * s_.rank * ld_out, ld_out, s_.rank, s_.out, out, a_.dtype, s_.rank);
        }
      });
    }
    if (a_.d_bias && !gate_.has_gate) store_column_sums();
    if (a_.d_bias && gate_.has_gate) {
      k_.store(sum_up_.get() + s_.heads * s_.rank * ld_out, ld_out, s_.heads, s_.out, a_.d_bias, a_.dtype, s_.out);
    }
    if (a_.d_gate_weight) {
      k_.store(sum_gate_.get(), ld_rank_, s_.heads, s_.rank, a_.d_gate_weight, a_.dtype, s_.rank);
    }
    if (a_.d_gate_bias) {
      std::vector<float> sums(sum_gate_bias_.begin(), sum_gate_bias_.end());
      k_.store(sums.data(), s_.heads, 1, s_.heads, a_.d_gate_bias, a_.dtype, s_.heads);
    }
  }

  // d_bias of the plain op: what a product would sum in one long run is added up in short ones.
  void store_column_sums() {
    constexpr int64_t kColumns = 64;
    std::vector<double> sums(s_.out, 0.0);
    parallel(runtime_, ceil_div(s_.out, kColumns), 1.0 * s_.rows * s_.out, [&](int64_t begin, int64_t end) {
      int64_t j0 = begin * kColumns, cols = std::min(end * kColumns, s_.out) - j0;
      k_.column_sums(shifted(a_.dz, 0, j0), s_.rows, cols, sums.data() + j0);
    });
    std::vector<float> row(sums.begin(), sums.end());
    k_.store(row.data(), s_.out, 1, s_.out, a_.d_bias, a_.dtype, s_.out);
  }

  static constexpr int64_t kGroup = 4;  // panels of dx at once

  const Runtime& runtime_;
  const Kernels& k_;
  const LinearBackward& a_;
  LinearShape s_;
  GateOperands gate_;
  bool wants_up_, wants_dt_, bias_in_gate_;
  int64_t rank_panels_, ld_rank_, ld_gate_, v_panels_, width_, chunk_;
  Scratch up_panels_, down_panels_, gate_rows_;  // operands
  Scratch scaled_, dt_, dlogits_;                // of one chunk
  Scratch sum_up_, sum_down_, sum_gate_;         // [heads (rank + 1), out], [rank, in], [heads, rank]
  std::vector<double> sum_gate_bias_;
};

}  // namespace inherit_kernels
