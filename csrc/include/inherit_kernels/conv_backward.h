// The backward pass of a convolution t = conv2d(x, down), for a narrow t that lies channels last in float32:
// dx[i] = sum over the windows that pixel i is in of dt[p] down[tap], and d_down[tap] = sum_p dt[p]^T x[pixel(p, tap)].
//
// Both gather pixels as the forward pass does. With strides the pixels of dx fall into classes by their remainder;
// those of a class are in the same taps' windows, so that each class is a convolution of dt with stride 1.
#pragma once

#include <cstring>
#include <numeric>

#include "inherit_kernels/conv.h"

namespace inherit_kernels {

struct DownBackward {
  ConvShape shape;
  ImagesView x;
  DownView down;
  const float* dt;  // [batch * positions, ldt], dense images
  int64_t ldt;
  Dtype dtype;
  bool channels_last;  // of dx
  void* dx;            // dense; null: not needed
  void* d_down;        // laid out as down; null: not needed
};

// One dimension of a class: the taps first, first - step, ... (count of them) see pixel `remainder` + stride * m at
// position m - padding, m - padding + dilation, ... of dt.
struct ClassAxis {
  int64_t remainder, pixels, first, step, count, padding, dilation;

  ClassAxis(const ConvShape& s, int d, int64_t size, int64_t remainder) : remainder(remainder) {
    int64_t common = std::gcd(s.stride[d], s.dilation[d]);
    pixels = ceil_div(size - remainder, s.stride[d]);
    step = s.stride[d] / common;
    dilation = s.dilation[d] / common;
    first = s.kernel[d] - 1;
    auto offset = [&](int64_t tap) { return remainder + s.padding[d] - tap * s.dilation[d]; };
    while (first >= 0 && offset(first) % s.stride[d] != 0) --first;
    count = first >= 0 ? first / step + 1 : 0;
    padding = first >= 0 ? -offset(first) / s.stride[d] : 0;
  }
};

class DownBackwardPass {
 public:
  DownBackwardPass(const Runtime& runtime, const DownBackward& arguments)
      : runtime_(runtime), k_(*runtime.kernels), a_(arguments), s_(arguments.shape) {}

  void run() {
    if (a_.dx && s_.batch > 0) dx();
    if (a_.d_down) d_down();
  }

 private:
  bool strided() const { return s_.stride[0] > 1 || s_.stride[1] > 1; }
  int64_t pixels() const { return s_.height * s_.width; }

  // dx itself where its pixels can be written one by one, else a float32 copy that is transposed at the end.
  void dx() {
    bool copied = strided() && !a_.channels_last;
    Scratch copy(copied ? s_.batch * pixels() * s_.channels : 0);
    void* out = copied ? copy.get() : a_.dx;
    Dtype dtype = copied ? Dtype::kFloat32 : a_.dtype;
    if (strided()) std::memset(out, 0, s_.batch * pixels() * s_.channels * element_size(dtype));  // pixels in no window
    for (int64_t i = 0; i < std::min(s_.stride[0], s_.height); ++i) {
      for (int64_t j = 0; j < std::min(s_.stride[1], s_.width); ++j) {
        dx_class(ClassAxis(s_, 0, s_.height, i), ClassAxis(s_, 1, s_.width, j), out, dtype);
      }
    }
    if (!copied) return;
    parallel(runtime_, s_.batch, 2e1 * s_.batch * pixels() * s_.channels, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        int64_t first = b * pixels() * s_.channels;
        store_transposed(k_, copy.get() + first, s_.channels, pixels(), s_.channels, element(a_.dx, a_.dtype, first),
                         a_.dtype, pixels());
      }
    });
  }

  void dx_class(const ClassAxis& y, const ClassAxis& x, void* out, Dtype dtype) {
    if (y.count * x.count == 0) return;
    ConvShape c{};  // from dt [out_height, out_width, rank] to the pixels of the class
    c.batch = s_.batch;
    c.channels = s_.rank;
    c.rank = s_.channels;
    c.height = s_.out_height;
    c.width = s_.out_width;
    c.out_height = y.pixels;
    c.out_width = x.pixels;
    int axis = 0;
    for (const ClassAxis* a : {&y, &x}) {
      c.kernel[axis] = a->count;
      c.stride[axis] = 1;
      c.padding[axis] = a->padding;
      c.dilation[axis++] = a->dilation;
    }
    Scratch panels(down_panels_size(k_, s_.channels, s_.rank, c.taps()));
    pack_class(y, x, panels.get());
    ImagesView dt{{a_.dt, Dtype::kFloat32, a_.ldt, 1}, s_.positions() * a_.ldt};
    int64_t ld = round_up(s_.channels, k_.nr);
    bool direct = a_.channels_last && !strided() && dtype == Dtype::kFloat32 && ld == s_.channels;
    Blocks blocks(runtime_, s_.batch, c.positions(), a_.channels_last);
    double work = 2.0 * s_.batch * c.positions() * c.taps() * s_.channels * s_.rank;
    parallel(runtime_, blocks.count, work, [&](int64_t begin, int64_t end) {
      DownStage stage(k_, c, dt, panels.get(), blocks.size);
      Scratch rows(direct ? 0 : blocks.size * ld);
      for (int64_t task = begin; task < end; ++task) {
        int64_t q = blocks.first(task), count = blocks.length(task);
        if (direct) {
          stage.run(q, count, static_cast<float*>(out) + q * ld, ld);
          continue;
        }
        stage.run(q, count, rows.get(), ld);
        store_class(c, y, x, q, count, rows.get(), ld, out, dtype);
      }
    });
  }

  // Panels of the channels, [taps of the class, rank, nr] each.
  void pack_class(const ClassAxis& y, const ClassAxis& x, float* panels) {
    int64_t taps = s_.taps(), tap_stride = a_.down.taps_inner ? 1 : s_.channels;
    int64_t channel_stride = a_.down.taps_inner ? taps : 1;
    parallel(runtime_, ceil_div(s_.channels, k_.nr), 4.0 * s_.channels * s_.rank * y.count * x.count,
             [&](int64_t begin, int64_t end) {
               for (int64_t p = begin; p < end; ++p) {
                 int64_t j = p * k_.nr;
                 float* panel = panels + p * y.count * x.count * s_.rank * k_.nr;
                 for (int64_t m = 0; m < y.count * x.count; ++m, panel += s_.rank * k_.nr) {
                   int64_t u = y.first - m / x.count * y.step, v = x.first - m % x.count * x.step;
                   MatrixView w{element(a_.down.data, a_.down.dtype, (u * s_.kernel[1] + v) * tap_stride),
                                a_.down.dtype, channel_stride, a_.down.row_stride};
                   k_.pack(w, j, std::min(k_.nr, s_.channels - j), 0, s_.rank, panel);
                 }
               }
             });
  }

  void store_class(const ConvShape& c, const ClassAxis& y, const ClassAxis& x, int64_t q, int64_t count,
                   const float* rows, int64_t ld, void* out, Dtype dtype) {
    if (!strided() && a_.channels_last) {
      return k_.store(rows, ld, count, s_.channels, element(out, dtype, q * s_.channels), dtype, s_.channels);
    }
    if (!strided()) {
      int64_t first = q / pixels() * pixels() * s_.channels + q % pixels();
      return store_transposed(k_, rows, ld, count, s_.channels, element(out, dtype, first), dtype, pixels());
    }
    for (int64_t done = 0, run; done < count; done += run) {
      int64_t b = (q + done) / c.positions(), p = (q + done) % c.positions();
      int64_t i = p / x.pixels, j = p % x.pixels;
      run = std::min(count - done, x.pixels - j);
      int64_t pixel = b * pixels() + (y.remainder + i * s_.stride[0]) * s_.width + x.remainder + j * s_.stride[1];
      k_.store(rows + done * ld, ld, run, s_.channels, element(out, dtype, pixel * s_.channels), dtype,
               s_.stride[1] * s_.channels);
    }
  }

  // Taps and panels of channels are shared out; every thread passes over all positions, in blocks that do not depend on
  // the threads.
  void d_down() {
    int64_t panels = ceil_div(s_.channels, k_.nr), ld = panels * k_.nr, taps = s_.taps();
    Scratch sums(taps * s_.rank * ld);
    std::fill(sums.get(), sums.get() + taps * s_.rank * ld, 0.0f);
    if (s_.batch > 0) sum_down(panels, sums.get());
    store_down(sums.get(), ld);
  }

  void sum_down(int64_t panels, float* sums) {
    int64_t ld = panels * k_.nr, taps = s_.taps();
    Runtime serial = runtime_;
    serial.threads = 1;
    Blocks blocks(serial, s_.batch, s_.positions(), Pixels::in_place(a_.x) && ld == s_.channels);
    double work = 2.0 * s_.batch * s_.positions() * taps * s_.channels * s_.rank;
    parallel(runtime_, taps * panels, work, [&](int64_t begin, int64_t end) {
      Windows windows(k_, s_, a_.x, blocks.size, ld);
      for (int64_t task = 0; task < blocks.count; ++task) {
        int64_t q = blocks.first(task), count = blocks.length(task);
        windows.select(q, count);
        for (int64_t i = begin; i < end;) {
          int64_t tap = i / panels, first = i % panels, run = std::min(end - i, panels - first);
          k_.outer(a_.dt + q * a_.ldt, a_.ldt, s_.rank, windows.tap(tap), first * k_.nr, count, run,
                   sums + tap * s_.rank * ld + first * k_.nr, ld);
          i += run;
        }
      }
    });
  }

  void store_down(const float* sums, int64_t ld) {
    int64_t taps = s_.taps(), size = s_.channels * taps;
    parallel(runtime_, s_.rank, 4.0 * s_.rank * size, [&](int64_t begin, int64_t end) {
      Scratch row(size);
      for (int64_t r = begin; r < end; ++r) {
        for (int64_t k = 0; k < taps; ++k) {
          const float* from = sums + (k * s_.rank + r) * ld;
          int64_t at = a_.down.taps_inner ? k : k * s_.channels, step = a_.down.taps_inner ? taps : 1;
          for (int64_t c = 0; c < s_.channels; ++c) row.get()[at + c * step] = from[c];
        }
        k_.store(row.get(), size, 1, size, element(a_.d_down, a_.dtype, r * size), a_.dtype, size);
      }
    });
  }

  const Runtime& runtime_;
  const Kernels& k_;
  const DownBackward& a_;
  const ConvShape& s_;
};

}  // namespace inherit_kernels
