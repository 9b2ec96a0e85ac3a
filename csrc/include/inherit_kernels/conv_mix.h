// Products with heads mixed per image, for the backward pass: conv_mix_backward.h.
#pragma once

#include "inherit_kernels/conv_images.h"

namespace inherit_kernels {

constexpr int64_t kImageRows = 48;

// One image's mixed weights; kept while a thread stays with the image.
class MixedWeights {
 public:
  // `weights` [heads, outputs, depth] float32, `bias` [heads, ld_bias] or null.
  MixedWeights(const Kernels& k, const float* weights, const float* bias, int64_t ld_bias, int64_t heads,
               int64_t outputs, int64_t depth, bool as_panels)
      : k_(k),
        weights_(weights),
        bias_(bias),
        ld_bias_(ld_bias),
        heads_(heads),
        outputs_(outputs),
        depth_(depth),
        as_panels_(as_panels),
        mixed_(outputs * depth),
        panels_(as_panels ? round_up(outputs, k.nr) * depth : 0),
        mixed_bias_(bias ? ld_bias : 0) {}

  void select(int64_t b, const float* g) {
    if (b == current_) return;
    current_ = b;
    k_.mix(weights_, outputs_ * depth_, g, heads_, outputs_ * depth_, mixed_.get());
    if (bias_) k_.mix(bias_, ld_bias_, g, heads_, ld_bias_, mixed_bias_.get());
    if (!as_panels_) return;
    MatrixView view{mixed_.get(), Dtype::kFloat32, depth_, 1};
    for (int64_t j = 0; j < outputs_; j += k_.nr) {
      k_.pack(view, j, std::min(k_.nr, outputs_ - j), 0, depth_, panels_.get() + j * depth_);
    }
  }

  const float* rows() const { return mixed_.get(); }
  const float* panels() const { return panels_.get(); }
  const float* bias() const { return bias_ ? mixed_bias_.get() : nullptr; }

 private:
  const Kernels& k_;
  const float *weights_, *bias_;
  int64_t ld_bias_, heads_, outputs_, depth_;
  bool as_panels_;
  Scratch mixed_, panels_, mixed_bias_;
  int64_t current_ = -1;
};

// Positions of one step with channels first: c [outputs, positions] takes at most 256 KiB, a quarter of the second
// level cache, and a row of it is up to 1 KiB long (32 positions alone: 2.5 times slower at 64 channels of 32 x 32).
inline int64_t position_block(const Kernels& k, int64_t outputs) {
  int64_t panels = 65536 / std::max<int64_t>(outputs, 1) / k.nr;
  return k.nr * std::max<int64_t>(1, std::min(256 / k.nr, panels));
}

// c [outputs, ldc] = weights [outputs, depth] x [positions p0 ... p0 + count, depth]^T + bias per row: positions side
// by side, for outputs with channels first. `packed` is [kDepthBlock, ldc], ldc = round_up(count, nr).
inline void multiply_positions(const Kernels& k, const float* weights, int64_t outputs, int64_t depth, MatrixView x,
                               int64_t p0, int64_t count, const float* bias, float* packed, float* c) {
  int64_t panels = ceil_div(count, k.nr), ldc = panels * k.nr, d0 = 0;
  do {
    int64_t block = std::min(kDepthBlock, depth - d0);
    for (int64_t p = 0; p < panels; ++p) {
      int64_t j0 = p * k.nr;
      k.pack(x, p0 + j0, std::min(k.nr, count - j0), d0, block, packed + j0 * block);
    }
    k.product(weights + d0, depth, false, outputs, block, packed, k.nr, block * k.nr, panels, c, ldc, d0 > 0);
    d0 += block;
  } while (d0 < depth);
  if (!bias) return;
  std::fill(packed, packed + k.nr, 1.0f);
  k.product(bias, 1, false, outputs, 1, packed, 0, 0, panels, c, ldc, true);
}

// Calls body(worker state, image, first position, count) over all images and blocks of positions, in parallel.
template <class MakeState, class Body>
void over_positions(const Runtime& runtime, const MixShape& s, int64_t block, double work, const MakeState& make_state,
                    const Body& body) {
  int64_t blocks = ceil_div(s.positions, block);
  parallel(runtime, s.batch * blocks, work, [&](int64_t begin, int64_t end) {
    auto state = make_state();
    for (int64_t task = begin; task < end; ++task) {
      int64_t p0 = task % blocks * block;
      body(state, task / blocks, p0, std::min(block, s.positions - p0));
    }
  });
}

struct MixState {
  MixState(const Kernels& k, const float* weights, const float* bias, int64_t ld_bias, int64_t heads, int64_t outputs,
           int64_t depth, bool channels_last)
      : weights(k, weights, bias, ld_bias, heads, outputs, depth, channels_last),
        scratch((channels_last ? kImageRows : position_block(k, outputs)) * kDepthBlock),
        c(channels_last ? kImageRows * round_up(outputs, k.nr) : outputs * position_block(k, outputs)) {}

  MixedWeights weights;
  Scratch scratch, c;
};

// c [count, ldc] = x[p0 : p0 + count, :] mixed^T + bias per column, ldc = round_up(outputs, nr): channels side by side.
inline void multiply_channels(const Kernels& k, MixState& state, int64_t outputs, int64_t depth, MatrixView x,
                              int64_t p0, int64_t count, const float* bias) {
  int64_t panels = ceil_div(outputs, k.nr), ldc = panels * k.nr;
  multiply_view(k, x, p0, count, depth, state.weights.panels(), k.nr, depth * k.nr, panels, state.c.get(), ldc,
                state.scratch.get());
  if (bias) k.product(&kOne, 0, false, count, 1, bias, 0, k.nr, panels, state.c.get(), ldc, true);
}

// [heads, outputs, depth] of any view as float32.
inline void load_heads(const Kernels& k, const HeadsView& up, int64_t heads, int64_t outputs, int64_t depth,
                       bool transpose, float* out) {
  for (int64_t h = 0; h < heads; ++h) {
    MatrixView view = transpose ? transposed(head(up, h)) : head(up, h);
    k.load(view, 0, outputs, 0, depth, out + h * outputs * depth, depth);
  }
}

}  // namespace inherit_kernels
