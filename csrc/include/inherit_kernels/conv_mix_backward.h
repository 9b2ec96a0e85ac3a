// The backward pass of the second stage of the convolutions. Per image b, with G_b = [t_b | 1]^T dz_b [rank + 1, out]
// (one product):
//   dg_bh = <up_h, G_b> + <bias_h, sum_p dz_b>,  dlogits = g (dg - sum g dg),  ds = dlogits gate_weight,
//   dt_b = up_eff^T dz_b + ds / positions,  d_up_h = sum_b g_bh G_b,  d_bias_h = sum_b g_bh sum_p dz_b,
//   d_gate_weight = sum_b dlogits_b s_b. Sums over images are taken in order. Without a gate g = 1 and ds = 0.
#pragma once

#include <vector>

#include "inherit_kernels/conv.h"
#include "inherit_kernels/linear_backward.h"

namespace inherit_kernels {

struct MixBackward {
  MixShape shape;
  ImagesView dz, t;
  HeadsView up;
  MatrixView gate_weight, gate_bias, bias;  // no gate_weight: the plain op
  Dtype dtype;
  float* dt;                                          // [batch * positions, round_up(rank, nr)]; null: not needed
  void *d_up, *d_gate_weight, *d_gate_bias, *d_bias;  // contiguous; null: not needed
};

class MixBackwardPass {
 public:
  MixBackwardPass(const Runtime& runtime, const MixBackward& arguments)
      : runtime_(runtime),
        k_(*runtime.kernels),
        a_(arguments),
        s_(arguments.shape),
        gate_(k_, {s_.batch, 0, s_.rank, s_.out, s_.heads}, a_.gate_weight, a_.gate_bias, a_.bias),
        ld_gate_(gate_.panels * k_.nr),
        ld_out_(round_up(s_.out, k_.nr)),
        ld_rank_(round_up(s_.rank, k_.nr)),
        outer_((s_.rank + 1) * ld_out_),
        means_(s_.batch * s_.rank),
        g_(s_.batch * ld_gate_),
        dlogits_(s_.batch * s_.heads),
        ds_(s_.batch * ld_rank_),
        weights_(gate_.has_gate ? s_.heads * s_.rank * s_.out : 0),
        sums_(s_.heads * outer_) {}

  void run() {
    std::fill(sums_.get(), sums_.get() + s_.heads * outer_, 0.0f);
    if (s_.batch * s_.positions > 0) {
      if (gate_.has_gate) {
        image_gates(runtime_, s_, a_.t, gate_, means_.get(), g_.get());
        load_heads();
      } else {
        std::fill(g_.get(), g_.get() + s_.batch * ld_gate_, 1.0f);
      }
      if (gate_.has_gate || a_.d_up || a_.d_bias) outer_products();
      if (a_.dt) dt();
    }
    store();
  }

 private:
  void load_heads() {
    for (int64_t h = 0; h < s_.heads; ++h) {
      MatrixView up = transposed(head(a_.up, h));
      k_.load(up, 0, s_.rank, 0, s_.out, weights_.get() + h * s_.rank * s_.out, s_.out);
    }
  }

  void outer_products() {
    int64_t group = std::min(s_.batch, std::max<int64_t>(runtime_.threads, 1));
    Scratch outer(group * outer_);
    Runtime serial = runtime_;
    serial.threads = 1;
    double work = 2.0 * s_.positions * (s_.rank + 1) * s_.out;
    for (int64_t b0 = 0; b0 < s_.batch; b0 += group) {
      int64_t count = std::min(group, s_.batch - b0);
      parallel(runtime_, count, count * work, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          outer_product(count > 1 ? serial : runtime_, b0 + i, outer.get() + i * outer_);
          if (gate_.has_gate) gate_gradient(b0 + i, outer.get() + i * outer_);
        }
      });
      add_up(b0, count, outer.get());
    }
  }

  // G_b: the positions in chunks, the columns in parallel.
  void outer_product(const Runtime& runtime, int64_t b, float* outer) {
    constexpr int64_t kChunk = 512;
    int64_t width = s_.rank + 1;
    Scratch t(kChunk * width);
    for (int64_t p0 = 0; p0 < s_.positions; p0 += kChunk) {
      int64_t rows = std::min(kChunk, s_.positions - p0);
      k_.load(image(a_.t, b), p0, rows, 0, s_.rank, t.get(), width);
      for (int64_t i = 0; i < rows; ++i) t.get()[i * width + s_.rank] = 1.0f;
      accumulate_outer(runtime, t.get(), width, width, shifted(image(a_.dz, b), p0, 0), s_.out, rows, outer, ld_out_,
                       p0 > 0);
    }
  }

  void gate_gradient(int64_t b, const float* outer) {
    std::vector<double> dg(s_.heads, 0.0);
    for (int64_t h = 0; h < s_.heads; ++h) {
      const float* up = weights_.get() + h * s_.rank * s_.out;
      for (int64_t r = 0; r < s_.rank; ++r) dg[h] += k_.inner(up + r * s_.out, outer + r * ld_out_, s_.out);
      if (gate_.has_bias) {
        dg[h] += k_.inner(gate_.bias_rows.get() + h * gate_.out_width, outer + s_.rank * ld_out_, s_.out);
      }
    }
    float* dlogits = dlogits_.get() + b * s_.heads;
    softmax_backward(g_.get() + b * ld_gate_, dg.data(), s_.heads, dlogits);
    float* ds = ds_.get() + b * ld_rank_;
    std::fill(ds, ds + ld_rank_, 0.0f);
    std::vector<float> row(s_.rank);
    for (int64_t h = 0; h < s_.heads; ++h) {
      k_.load(a_.gate_weight, h, 1, 0, s_.rank, row.data(), s_.rank);
      k_.axpy(dlogits[h] / static_cast<float>(s_.positions), row.data(), s_.rank, ds, true);
    }
  }

  // sums_h += g_bh G_b for the images of a group, in order; the elements in parallel.
  void add_up(int64_t b0, int64_t count, const float* outer) {
    if (!a_.d_up && !a_.d_bias) return;
    constexpr int64_t kRun = 4096;
    parallel(runtime_, ceil_div(outer_, kRun), 2.0 * count * s_.heads * outer_, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        int64_t first = block * kRun, run = std::min(kRun, outer_ - first);
        for (int64_t i = 0; i < count; ++i) {
          for (int64_t h = 0; h < s_.heads; ++h) {
            float g = g_.get()[(b0 + i) * ld_gate_ + h];
            k_.axpy(g, outer + i * outer_ + first, run, sums_.get() + h * outer_ + first, true);
          }
        }
      }
    });
  }

  void dt() {
    int64_t rank_panels = ld_rank_ / k_.nr;
    Scratch up(s_.heads * ld_rank_ * s_.out);  // the heads transposed, as panels of the rank
    for (int64_t i = 0; i < s_.heads * rank_panels; ++i) {
      int64_t j = i % rank_panels * k_.nr;
      k_.pack(transposed(head(a_.up, i / rank_panels)), j, std::min(k_.nr, s_.rank - j), 0, s_.out,
              up.get() + i * s_.out * k_.nr);
    }
    Blocks blocks(runtime_, s_.batch, s_.positions, false);
    double work = 2.0 * s_.batch * s_.positions * s_.out * s_.rank;
    parallel(runtime_, blocks.count, work, [&](int64_t begin, int64_t end) {
      MixedPanels mixed(k_, up.get(), s_.heads, ld_rank_, s_.rank, s_.out, nullptr, ld_rank_);
      Scratch loaded(2 * blocks.size * loaded_ld(depth_block(s_.out)));
      for (int64_t task = begin; task < end; ++task) {
        int64_t q = blocks.first(task), b = q / s_.positions, count = blocks.length(task);
        MatrixView dz = shifted(image(a_.dz, b), q % s_.positions, 0);
        Panels w{mixed.select(b, 0, g_.get() + b * ld_gate_).panels, Dtype::kFloat32, s_.out};
        auto rows = [&](int64_t d0, int64_t depth) {
          return rows_of(k_, dz, Dtype::kFloat32, 0, count, d0, depth, loaded.get());
        };
        float* dt = a_.dt + q * ld_rank_;
        multiply_panels(k_, rows, count, w, rank_panels, dt, ld_rank_);
        if (!gate_.has_gate) continue;
        k_.product(&kOne, 0, false, count, 1, ds_.get() + b * ld_rank_, 0, k_.nr, rank_panels, dt, ld_rank_, true);
      }
    });
  }

  void store() {
    for (int64_t h = 0; h < s_.heads; ++h) {
      const float* sums = sums_.get() + h * outer_;
      if (a_.d_up) {
        void* out = element(a_.d_up, a_.dtype, h * s_.out * s_.rank);
        store_transposed(k_, sums, ld_out_, s_.rank, s_.out, out, a_.dtype, s_.rank);
      }
      if (a_.d_bias) {
        k_.store(sums + s_.rank * ld_out_, ld_out_, 1, s_.out, element(a_.d_bias, a_.dtype, h * s_.out), a_.dtype,
                 s_.out);
      }
    }
    for (int64_t h = 0; gate_.has_gate && h < s_.heads; ++h) store_gate(h);
  }

  void store_gate(int64_t h) {
    double bias = 0.0;
    std::vector<double> weight(s_.rank, 0.0);
    for (int64_t b = 0; b < s_.batch; ++b) {
      double d = dlogits_.get()[b * s_.heads + h];
      bias += d;
      for (int64_t r = 0; r < s_.rank; ++r) weight[r] += d * means_.get()[b * s_.rank + r];
    }
    std::vector<float> row(weight.begin(), weight.end());
    float bias_value = static_cast<float>(bias);
    if (a_.d_gate_weight) {
      k_.store(row.data(), s_.rank, 1, s_.rank, element(a_.d_gate_weight, a_.dtype, h * s_.rank), a_.dtype, s_.rank);
    }
    if (a_.d_gate_bias) k_.store(&bias_value, 1, 1, 1, element(a_.d_gate_bias, a_.dtype, h), a_.dtype, 1);
  }

  const Runtime& runtime_;
  const Kernels& k_;
  const MixBackward& a_;
  MixShape s_;
  GateOperands gate_;
  int64_t ld_gate_, ld_out_, ld_rank_, outer_;
  Scratch means_, g_, dlogits_, ds_;  // [batch, rank], [batch, heads], [batch, heads], [batch, rank] (over positions)
  Scratch weights_;                   // up transposed, [heads, rank, out]
  Scratch sums_;                      // [heads, rank + 1, out]: d_up and d_bias
};

}  // namespace inherit_kernels
