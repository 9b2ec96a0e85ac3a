// y = act(up t + bias + residual), t = conv2d(x, down): the forward pass of lowrank_conv2d, and of
// gated_lowrank_conv2d, where per image s = mean of t over its positions, g = softmax(s gate^T + gate_bias), up = sum_h
// g_h up_h and bias = sum_h g_h bias_h: the heads are mixed in the weights, so that an image costs one product whatever
// their number.
//
// The first stage is a product whose rows are gathered: every output position has one pointer per tap of the window,
// to the channels of a pixel, side by side. Where x is not laid out so (channels first, bfloat16), the pixels of a few
// image rows are copied first. t stays in a block's scratch (plain) or, until the mean is known, in that of a group of
// images (gated): writing and reading it there costs about 2 % of the first stage, less than the extra read of x with
// which the gate could be had before.
#pragma once

#include <vector>

#include "inherit_kernels/conv_images.h"
#include "inherit_kernels/linear.h"

namespace inherit_kernels {

struct ConvShape {
  int64_t batch, channels, height, width, rank, out, heads, out_height, out_width;
  int64_t kernel[2], stride[2], padding[2], dilation[2];

  int64_t taps() const { return kernel[0] * kernel[1]; }
  int64_t positions() const { return out_height * out_width; }
};

// down [rank, channels, kh, kw]: row by row dense, the taps innermost or the channels.
struct DownView {
  const void* data;
  Dtype dtype;
  int64_t row_stride;
  bool taps_inner;
};

struct ConvForward {
  ConvShape shape;
  ImagesView x;
  DownView down;                            // unless packed
  HeadsView up;                             // [heads, out, rank], unless packed
  const float *down_panels, *up_panels;     // null: not packed
  MatrixView gate_weight, gate_bias, bias;  // as in LinearForward; no gate_weight: the plain op
  ImagesView residual;                      // may be absent
  Activation activation;
  Dtype dtype;
  bool channels_last;  // of y and t, which are dense
  void* y;
  void* t;  // null: not kept
};

inline int64_t down_panels_size(const Kernels& k, int64_t rank, int64_t channels, int64_t taps) {
  return round_up(rank, k.nr) * channels * taps;
}

inline int64_t up_panels_size(const Kernels& k, int64_t heads, int64_t out, int64_t rank) {
  return heads * round_up(out, k.nr) * rank;
}

inline void pack_down(const Runtime& runtime, DownView w, int64_t rank, int64_t channels, int64_t taps, float* panels) {
  const Kernels& k = *runtime.kernels;
  int64_t depth = channels * taps;
  parallel(runtime, ceil_div(rank, k.nr), 4.0 * rank * depth, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin * k.nr; j < std::min(rank, end * k.nr); j += k.nr) {
      k.pack_taps(element(w.data, w.dtype, j * w.row_stride), w.dtype, w.row_stride, std::min(k.nr, rank - j), channels,
                  taps, w.taps_inner, panels + j * depth);
    }
  });
}

inline void pack_up(const Runtime& runtime, const HeadsView& up, int64_t heads, int64_t out, int64_t rank,
                    float* panels) {
  const Kernels& k = *runtime.kernels;
  int64_t count = ceil_div(out, k.nr);
  parallel(runtime, heads * count, 4.0 * heads * out * rank, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      int64_t j = i % count * k.nr;
      k.pack(head(up, i / count), j, std::min(k.nr, out - j), 0, rank, panels + i * rank * k.nr);
    }
  });
}

// Where the pixels of x lie, channels side by side in float32, `step` floats apart.
class Pixels {
 public:
  // `span`: the most rows of an image that one call of `row` alternates between. `step` 0: as x has it.
  Pixels(const Kernels& k, const ConvShape& s, const ImagesView& x, int64_t span, int64_t step)
      : k_(k),
        s_(s),
        x_(x),
        direct_(in_place(x) && (step == 0 || step == s.channels)),
        capacity_(std::min(s.height, span)),
        step_(direct_ ? x.matrix.row_stride : std::max(step, s.channels)),
        copy_(direct_ ? 0 : capacity_ * s.width * step_) {}

  static bool in_place(const ImagesView& x) { return x.matrix.dtype == Dtype::kFloat32 && x.matrix.col_stride == 1; }

  // Makes rows [begin, end) of image b ready; rows are asked for in ascending order.
  void prepare(int64_t b, int64_t begin, int64_t end) {
    if (direct_) return;
    if (b != image_ || begin > end_ || begin < end_ - capacity_) image_ = b, end_ = begin;
    while (end_ < end) {
      int64_t slot = end_ % capacity_, rows = std::min(end - end_, capacity_ - slot), pixels = s_.width;
      k_.load(image(x_, b), end_ * pixels, rows * pixels, 0, s_.channels, copy_.get() + slot * pixels * step_, step_);
      end_ += rows;
    }
  }

  // The first pixel of row i of image b.
  const float* row(int64_t b, int64_t i) const {
    if (!direct_) return copy_.get() + i % capacity_ * s_.width * step_;
    return static_cast<const float*>(x_.matrix.data) + b * x_.image_stride + i * s_.width * step_;
  }
  int64_t step() const { return step_; }

 private:
  const Kernels& k_;
  const ConvShape& s_;
  const ImagesView& x_;
  bool direct_;
  int64_t capacity_, step_;
  Scratch copy_;  // rows of one image, the one with number i in slot i % capacity
  int64_t image_ = -1, end_ = 0;
};

// Pointers to the pixels under the windows of some positions, tap by tap; zeros where a window leaves the image.
class Windows {
 public:
  Windows(const Kernels& k, const ConvShape& s, const ImagesView& x, int64_t block, int64_t step = 0)
      : s_(s),
        ld_(block),
        pixels_(k, s, x, ceil_div(block - 1, s.out_width) * s.stride[0] + reach() + 1, step),
        padding_(std::max(step, s.channels)),
        rows_(s.taps() * block) {
    std::fill(padding_.get(), padding_.get() + std::max(step, s.channels), 0.0f);
  }

  // For positions q ... q + count, counted over all images.
  void select(int64_t q, int64_t count) {
    for (int64_t done = 0; done < count;) {
      int64_t b = (q + done) / s_.positions(), p = (q + done) % s_.positions();
      int64_t size = std::min(count - done, s_.positions() - p);
      select_in_image(b, p, size, done);
      done += size;
    }
  }

  const float* const* tap(int64_t k) const { return rows_.data() + k * ld_; }
  int64_t ld() const { return ld_; }

 private:
  int64_t reach() const { return (s_.kernel[0] - 1) * s_.dilation[0]; }

  // Positions p ... p + count of image b, from column `at` of the table on.
  void select_in_image(int64_t b, int64_t p, int64_t count, int64_t at) {
    int64_t first = p / s_.out_width, last = (p + count - 1) / s_.out_width;
    int64_t top = first * s_.stride[0] - s_.padding[0];
    int64_t bottom = last * s_.stride[0] - s_.padding[0] + reach() + 1;
    pixels_.prepare(b, std::max<int64_t>(0, top), std::min(s_.height, bottom));
    for (int64_t i = first, j = p % s_.out_width; i <= last; ++i, j = 0) {
      int64_t run = std::min(s_.out_width - j, count);
      select_in_row(b, i, j, run, at);
      at += run;
      count -= run;
    }
  }

  // The same for `run` positions of output row i from column j on.
  void select_in_row(int64_t b, int64_t i, int64_t j, int64_t run, int64_t at) {
    const float** out = rows_.data() + at;
    int64_t step = s_.stride[1] * pixels_.step();
    for (int64_t u = 0; u < s_.kernel[0]; ++u) {
      int64_t y = i * s_.stride[0] - s_.padding[0] + u * s_.dilation[0];
      bool inside = y >= 0 && y < s_.height;
      const float* row = inside ? pixels_.row(b, y) : nullptr;
      for (int64_t v = 0; v < s_.kernel[1]; ++v, out += ld_) {
        int64_t x = j * s_.stride[1] - s_.padding[1] + v * s_.dilation[1];
        // positions [begin, end) have their pixel inside the image
        int64_t begin = x < 0 ? std::min(run, ceil_div(-x, s_.stride[1])) : 0;
        int64_t end = s_.width > x ? std::min(run, (s_.width - x - 1) / s_.stride[1] + 1) : 0;
        if (!inside || end < begin) begin = end = 0;
        for (int64_t m = 0; m < begin; ++m) out[m] = padding_.get();
        for (int64_t m = begin; m < end; ++m) out[m] = row + x * pixels_.step() + m * step;
        for (int64_t m = end; m < run; ++m) out[m] = padding_.get();
      }
    }
  }

  const ConvShape& s_;
  int64_t ld_;
  Pixels pixels_;
  Scratch padding_;
  std::vector<const float*> rows_;  // [taps, ld]
};

// The first stage, for one thread.
class DownStage {
 public:
  DownStage(const Kernels& k, const ConvShape& s, const ImagesView& x, const float* panels, int64_t block)
      : k_(k), s_(s), panels_(panels), windows_(k, s, x, block) {}

  // t [count, ldt] for positions q ... q + count, counted over all images; the columns are whole panels.
  void run(int64_t q, int64_t count, float* t, int64_t ldt) {
    windows_.select(q, count);
    GatherProduct g{};
    g.ld = windows_.ld();
    g.count = count;
    g.b_tap = s_.channels * k_.nr;
    g.b_panel = s_.taps() * g.b_tap;
    g.cols = s_.rank;
    // Runs of about kRun depths: their part of a panel stays in the first level cache while the positions pass, and
    // longer runs of a sum lose accuracy.
    int64_t chunks = ceil_div(s_.channels, kRun), chunk = ceil_div(s_.channels, chunks);
    int64_t runs = ceil_div(s_.taps(), std::max<int64_t>(1, kRun / s_.channels)), taps = ceil_div(s_.taps(), runs);
    for (int64_t tap = 0; tap < s_.taps(); tap += taps) {
      for (g.first = 0; g.first < s_.channels; g.first += chunk) {
        g.rows = windows_.tap(tap);
        g.taps = std::min(taps, s_.taps() - tap);
        g.depth = std::min(chunk, s_.channels - g.first);
        g.b = panels_ + (tap * s_.channels + g.first) * k_.nr;
        k_.gather(g, t, ldt);
        g.accumulate = true;
      }
    }
  }

 private:
  static constexpr int64_t kRun = 256;

  const Kernels& k_;
  const ConvShape& s_;
  const float* panels_;
  Windows windows_;
};

// Some columns of up, as panels, and of the bias.
struct UpPanels {
  const float *panels, *bias;  // bias may be null
  int64_t first, count;
};

// The second stage, for one thread: some positions of one image.
class UpStage {
 public:
  UpStage(const Kernels& k, const ConvForward& f, int64_t block)
      : k_(k),
        f_(f),
        panels_(f.channels_last ? 0 : round_up(block, k.nr) * f.shape.rank),
        c_(f.channels_last ? block * kFinishGroup * k.nr : 0) {}

  // Channels `up` of y for positions p ... p + count of image b, from t [count, ldt].
  void run(int64_t b, int64_t p, int64_t count, const float* t, int64_t ldt, const UpPanels& up) {
    const ConvShape& s = f_.shape;
    int64_t positions = s.positions();
    MatrixView residual = shifted(image(f_.residual, b), p, up.first);
    if (f_.channels_last) {
      void* out = element(f_.y, f_.dtype, (b * positions + p) * s.out + up.first);
      multiply_finish_panels(k_, {t, Dtype::kFloat32, ldt}, count, {up.panels, Dtype::kFloat32, s.rank},
                             ceil_div(up.count, k_.nr), {residual, f_.activation, out, f_.dtype, s.out, up.count},
                             c_.get(), up.bias);
      return;
    }
    for (int64_t j = 0; j < count; j += k_.nr) {
      k_.pack({t, Dtype::kFloat32, ldt, 1}, j, std::min(k_.nr, count - j), 0, s.rank, panels_.get() + j * s.rank);
    }
    void* out = element(f_.y, f_.dtype, (b * s.out + up.first) * positions + p);
    k_.columns({up.panels, up.count, s.rank, panels_.get(), up.bias},
               {transposed(residual), f_.activation, out, f_.dtype, positions, count});
  }

 private:
  const Kernels& k_;
  const ConvForward& f_;
  Scratch panels_, c_;
};

// Keeps t [count, ldt] of positions q ... q + count.
inline void keep_t(const Kernels& k, const ConvForward& f, int64_t q, int64_t count, const float* t, int64_t ldt) {
  const ConvShape& s = f.shape;
  int64_t positions = s.positions();
  if (!f.t) return;
  if (f.channels_last) return k.store(t, ldt, count, s.rank, element(f.t, f.dtype, q * s.rank), f.dtype, s.rank);
  int64_t first = q / positions * s.rank * positions + q % positions;
  store_transposed(k, t, ldt, count, s.rank, element(f.t, f.dtype, first), f.dtype, positions);
}

// [0, total) in blocks of about kBlock: `threads` or a multiple of it where there are few.
constexpr int64_t kPositionBlock = 96;

inline int64_t even_block(int64_t total, int64_t threads, int64_t multiple) {
  int64_t blocks = ceil_div(total, kPositionBlock);
  if (blocks < 8 * threads) blocks = round_up(blocks, threads), multiple = 1;
  return std::min<int64_t>(round_up(ceil_div(total, blocks), multiple), round_up(kPositionBlock, multiple));
}

// The positions of `images` images as tasks: blocks within an image, or across images where nothing forbids it.
struct Blocks {
  Blocks(const Runtime& runtime, int64_t images, int64_t positions, bool across)
      : span(across ? images * positions : positions),
        size(even_block(span, across ? runtime.threads : ceil_div(runtime.threads, images), runtime.kernels->nr)),
        per_span(ceil_div(span, size)),
        count((across ? 1 : images) * per_span) {}

  int64_t first(int64_t task) const { return task / per_span * span + task % per_span * size; }
  int64_t length(int64_t task) const { return std::min(size, span - task % per_span * size); }

  int64_t span, size, per_span, count;
};

inline void plain_conv(const Runtime& runtime, const ConvForward& given, const float* down, const float* up) {
  const Kernels& k = *runtime.kernels;
  const ConvShape& s = given.shape;
  ConvForward f = given;
  int64_t positions = s.positions(), ldt = round_up(s.rank, k.nr);
  const MatrixView& r = f.residual.matrix;
  bool across = f.channels_last && Pixels::in_place(f.x);
  bool joined = across && (!r.data || f.residual.image_stride == positions * r.row_stride);
  GateOperands bias(k, {0, 0, s.rank, s.out, 1}, MatrixView{}, MatrixView{}, f.bias);
  Blocks blocks(runtime, s.batch, positions, joined);
  double work = 2.0 * s.batch * positions * s.rank * (s.channels * s.taps() + s.out);
  balanced(runtime, blocks.count, work, 1, [&](int64_t begin, int64_t end) {
    DownStage first(k, s, f.x, down, blocks.size);
    UpStage second(k, f, blocks.size);
    Scratch t(blocks.size * ldt);
    for (int64_t task = begin; task < end; ++task) {
      int64_t q = blocks.first(task), count = blocks.length(task);
      first.run(q, count, t.get(), ldt);
      keep_t(k, f, q, count, t.get(), ldt);
      second.run(joined ? 0 : q / positions, joined ? q : q % positions, count, t.get(), ldt,
                 {up, bias.has_bias ? bias.bias_rows.get() : nullptr, 0, s.out});
    }
  });
}

// Some outputs of the heads' panels and biases, mixed for one image; kept while a thread stays with both.
class MixedPanels {
 public:
  // `panels` [heads, width, depth] with width a multiple of nr, `bias` [heads, width] or null; parts of at most `part`.
  MixedPanels(const Kernels& k, const float* panels, int64_t heads, int64_t width, int64_t outputs, int64_t depth,
              const float* bias, int64_t part)
      : k_(k),
        panels_(panels),
        bias_(bias),
        heads_(heads),
        width_(width),
        outputs_(outputs),
        depth_(depth),
        part_(std::min(part, width)),
        mixed_(part_ * depth),
        mixed_bias_(bias ? part_ : 0) {}

  UpPanels select(int64_t b, int64_t part, const float* g) {
    int64_t first = part * part_, width = std::min(part_, width_ - first);
    if (b != image_ || part != current_) {
      image_ = b, current_ = part;
      k_.mix(panels_ + first * depth_, width_ * depth_, g, heads_, width * depth_, mixed_.get());
      if (bias_) k_.mix(bias_ + first, width_, g, heads_, width, mixed_bias_.get());
    }
    return {mixed_.get(), bias_ ? mixed_bias_.get() : nullptr, first, std::min(width, outputs_ - first)};
  }

 private:
  const Kernels& k_;
  const float *panels_, *bias_;
  int64_t heads_, width_, outputs_, depth_, part_;
  Scratch mixed_, mixed_bias_;
  int64_t image_ = -1, current_ = -1;
};

// Images in groups whose t takes about 1 MiB a thread: three regions a group, which few small images would feel.
inline void gated_conv(const Runtime& runtime, const ConvForward& f, const float* down, const float* up) {
  const Kernels& k = *runtime.kernels;
  const ConvShape& s = f.shape;
  int64_t positions = s.positions(), ldt = round_up(s.rank, k.nr), size = positions * ldt;
  int64_t group = std::min(s.batch, std::max<int64_t>(1, (1 << 18) / size) * runtime.threads);
  bool across = f.channels_last && Pixels::in_place(f.x);
  GateOperands gate(k, {0, 0, s.rank, s.out, s.heads}, f.gate_weight, f.gate_bias, f.bias);
  int64_t ldg = gate.panels * k.nr;
  Scratch t(group * size), means(group * s.rank), g(group * ldg);
  for (int64_t b0 = 0; b0 < s.batch; b0 += group) {
    int64_t images = std::min(group, s.batch - b0);
    Blocks down_blocks(runtime, images, positions, across), up_blocks(runtime, images, positions, false);
    double work = 2.0 * images * positions * s.rank;
    balanced(runtime, down_blocks.count, work * s.channels * s.taps(), 1, [&](int64_t begin, int64_t end) {
      DownStage first(k, s, f.x, down, down_blocks.size);
      for (int64_t task = begin; task < end; ++task) {
        int64_t q = down_blocks.first(task), count = down_blocks.length(task);
        first.run(b0 * positions + q, count, t.get() + q * ldt, ldt);
        keep_t(k, f, b0 * positions + q, count, t.get() + q * ldt, ldt);
      }
    });
    MixShape mix{images, s.rank, s.out, positions, s.heads};
    image_gates(runtime, mix, {{t.get(), Dtype::kFloat32, ldt, 1}, size}, gate, means.get(), g.get());
    // Parts of up of at most 64 KiB, the images innermost: a part and the heads it comes from stay in the second level
    // cache while the images pass (1.1 times faster at 256 -> 64 -> 1024 channels).
    int64_t part = k.nr * std::max<int64_t>(1, 16384 / (s.rank * k.nr)), parts = ceil_div(gate.out_width, part);
    balanced(runtime, parts * up_blocks.count, work * s.out, 1, [&](int64_t begin, int64_t end) {
      UpStage second(k, f, up_blocks.size);
      MixedPanels mixed(k, up, s.heads, gate.out_width, s.out, s.rank, gate.has_bias ? gate.bias_rows.get() : nullptr,
                        part);
      for (int64_t task = begin; task < end; ++task) {
        int64_t block = task % up_blocks.count, q = up_blocks.first(block), b = q / positions;
        UpPanels columns = mixed.select(b, task / up_blocks.count, g.get() + b * ldg);
        second.run(b0 + b, q % positions, up_blocks.length(block), t.get() + q * ldt, ldt, columns);
      }
    });
  }
}

inline void conv_forward(const Runtime& runtime, const ConvForward& f) {
  const Kernels& k = *runtime.kernels;
  const ConvShape& s = f.shape;
  if (s.batch * s.positions() == 0) return;
  Scratch own_down(f.down_panels ? 0 : down_panels_size(k, s.rank, s.channels, s.taps()));
  Scratch own_up(f.up_panels ? 0 : up_panels_size(k, s.heads, s.out, s.rank));
  if (!f.down_panels) pack_down(runtime, f.down, s.rank, s.channels, s.taps(), own_down.get());
  if (!f.up_panels) pack_up(runtime, f.up, s.heads, s.out, s.rank, own_up.get());
  const float* down = f.down_panels ? f.down_panels : own_down.get();
  const float* up = f.up_panels ? f.up_panels : own_up.get();
  if (f.gate_weight.data) {
    gated_conv(runtime, f, down, up);
  } else {
    plain_conv(runtime, f, down, up);
  }
}

}  // namespace inherit_kernels
