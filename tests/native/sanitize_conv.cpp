// The CPU kernels of the convolutions without torch, for the address and undefined-behaviour sanitizers: both memory
// formats, strides, paddings and dilations on ragged sizes, forward and backward, against double precision. Built and
// run by tests/test_native.py.
#include "inherit_kernels/conv_backward.h"
#include "inherit_kernels/conv_mix_backward.h"
#include "sanitize.h"

namespace {

// Element (b, c, p) of [batch, channels, positions].
struct Layout {
  int64_t channels, positions;
  bool last;

  int64_t at(int64_t b, int64_t c, int64_t p) const {
    return last ? (b * positions + p) * channels + c : (b * channels + c) * positions + p;
  }
  ImagesView view(const Data& data) const {
    return {last ? data.view(channels, 1) : data.view(1, positions), channels * positions};
  }
};

// Calls body(position, tap, pixel) for every position and every tap that sees a pixel.
template <class Body>
void over_windows(const ConvShape& s, const Body& body) {
  for (int64_t p = 0; p < s.positions(); ++p) {
    for (int64_t k = 0; k < s.taps(); ++k) {
      int64_t y = p / s.out_width * s.stride[0] - s.padding[0] + k / s.kernel[1] * s.dilation[0];
      int64_t x = p % s.out_width * s.stride[1] - s.padding[1] + k % s.kernel[1] * s.dilation[1];
      if (y >= 0 && y < s.height && x >= 0 && x < s.width) body(p, k, y * s.width + x);
    }
  }
}

void conv(ConvShape s, Dtype dtype, bool gated, bool last, bool packed, int64_t threads) {
  for (int d : {0, 1}) {
    int64_t room = (d ? s.width : s.height) + 2 * s.padding[d] - s.dilation[d] * (s.kernel[d] - 1) - 1;
    (d ? s.out_width : s.out_height) = room / s.stride[d] + 1;
  }
  if (!gated) s.heads = 1;
  int64_t taps = s.taps(), count = s.batch * s.positions(), depth = s.channels * taps;
  Layout lx{s.channels, s.height * s.width, last}, ly{s.out, s.positions(), last}, lt{s.rank, s.positions(), last};
  Data x(s.batch * s.channels * s.height * s.width, dtype), down(s.rank * depth, dtype, 1 / std::sqrt(depth));
  Data up(s.heads * s.out * s.rank, dtype, 1 / std::sqrt(s.rank)), gate(s.heads * s.rank, dtype);
  Data gate_bias(s.heads, dtype), bias(s.heads * s.out, dtype), residual(count * s.out, dtype);
  auto w = [&](int64_t r, int64_t c, int64_t k) { return down.values[(r * s.channels + c) * taps + k]; };
  Doubles t(count * s.rank), y(count * s.out), g(s.batch * s.heads, 1.0);
  for (int64_t b = 0; b < s.batch; ++b) {
    over_windows(s, [&](int64_t p, int64_t k, int64_t pixel) {
      for (int64_t r = 0; r < s.rank; ++r) {
        for (int64_t c = 0; c < s.channels; ++c) t[lt.at(b, r, p)] += w(r, c, k) * x.values[lx.at(b, c, pixel)];
      }
    });
    Doubles mean(s.rank);
    for (int64_t i = 0; i < s.rank * s.positions(); ++i) {
      mean[i / s.positions()] += t[lt.at(b, i / s.positions(), i % s.positions())] / s.positions();
    }
    Doubles gates = gated ? gate_of(mean.data(), gate, gate_bias, s.rank, s.heads) : Doubles{1.0};
    std::copy(gates.begin(), gates.end(), g.begin() + b * s.heads);
    for (int64_t i = 0; i < s.out * s.positions(); ++i) {
      int64_t n = i / s.positions(), p = i % s.positions(), at = ly.at(b, n, p);
      y[at] = residual.values[at];
      for (int64_t j = n; j < s.heads * s.out; j += s.out) {
        double sum = bias.values[j];
        for (int64_t r = 0; r < s.rank; ++r) sum += up.values[j * s.rank + r] * t[lt.at(b, r, p)];
        y[at] += gates[j / s.out] * sum;
      }
      y[at] = y[at] < 0 ? 0 : y[at];
    }
  }

  Runtime run = runtime(threads);
  const Kernels& k = *run.kernels;
  Output y_out(count * s.out, dtype), t_out(count * s.rank, dtype);
  Scratch down_panels(down_panels_size(k, s.rank, s.channels, taps));
  Scratch up_panels(up_panels_size(k, s.heads, s.out, s.rank));
  ConvForward f{};
  f.shape = s;
  f.x = lx.view(x);
  f.down = {down.bytes.data(), dtype, depth, true};
  f.up = {up.view(s.rank), s.out * s.rank};
  if (packed) {
    pack_down(run, f.down, s.rank, s.channels, taps, down_panels.get());
    pack_up(run, f.up, s.heads, s.out, s.rank, up_panels.get());
    f.down_panels = down_panels.get();
    f.up_panels = up_panels.get();
  }
  if (gated) f.gate_weight = gate.view(s.rank), f.gate_bias = gate_bias.view(0);
  f.bias = bias.view(s.out);
  f.residual = ly.view(residual);
  f.activation = Activation::kRelu;
  f.dtype = dtype;
  f.channels_last = last;
  f.y = y_out.data();
  f.t = t_out.data();
  conv_forward(run, f);
  compare("conv y", y_out, y);
  compare("conv t", t_out, t);

  Data dz(count * s.out, dtype), t_in(count * s.rank, dtype);
  Output d_up(s.heads * s.out * s.rank, dtype), d_gate(s.heads * s.rank, dtype), d_gate_bias(s.heads, dtype);
  Output d_bias(s.heads * s.out, dtype), dx(s.batch * s.channels * s.height * s.width, dtype);
  Output d_down(s.rank * depth, dtype);
  int64_t ldt = round_up(s.rank, k.nr);
  Scratch dt(count * ldt);
  MixBackward m{};
  m.shape = {s.batch, s.rank, s.out, s.positions(), s.heads};
  m.dz = ly.view(dz);
  m.t = lt.view(t_in);
  m.up = f.up;
  if (gated) m.gate_weight = f.gate_weight, m.gate_bias = f.gate_bias, m.bias = f.bias;
  m.dtype = dtype;
  m.dt = dt.get();
  m.d_up = d_up.data();
  m.d_gate_weight = gated ? d_gate.data() : nullptr;
  m.d_gate_bias = gated ? d_gate_bias.data() : nullptr;
  m.d_bias = d_bias.data();
  MixBackwardPass(run, m).run();
  DownBackward d{s, f.x, f.down, dt.get(), ldt, dtype, last, dx.data(), d_down.data()};
  DownBackwardPass(run, d).run();

  Doubles want_up(s.heads * s.out * s.rank), want_bias(s.heads * s.out), want_dx(x.values.size());
  Doubles want_down(s.rank * depth);
  for (int64_t b = 0; b < s.batch; ++b) {
    Doubles mean(s.rank);
    for (int64_t i = 0; i < s.rank * s.positions(); ++i) {
      mean[i / s.positions()] += t_in.values[lt.at(b, i / s.positions(), i % s.positions())] / s.positions();
    }
    Doubles gates = gated ? gate_of(mean.data(), gate, gate_bias, s.rank, s.heads) : Doubles{1.0};
    for (int64_t i = 0; i < s.heads * s.out * s.positions(); ++i) {
      int64_t j = i / s.positions(), p = i % s.positions();
      double weighted = gates[j / s.out] * dz.values[ly.at(b, j % s.out, p)];
      want_bias[j] += weighted;
      for (int64_t r = 0; r < s.rank; ++r) want_up[j * s.rank + r] += weighted * t_in.values[lt.at(b, r, p)];
    }
    over_windows(s, [&](int64_t p, int64_t tap, int64_t pixel) {
      const float* from = dt.get() + (b * s.positions() + p) * ldt;
      for (int64_t i = 0; i < s.rank * s.channels; ++i) {
        int64_t r = i / s.channels, c = i % s.channels;
        want_dx[lx.at(b, c, pixel)] += from[r] * w(r, c, tap);
        want_down[i * taps + tap] += from[r] * x.values[lx.at(b, c, pixel)];
      }
    });
  }
  compare("conv d_up", d_up, want_up);
  compare("conv d_bias", d_bias, want_bias);
  compare("conv dx", dx, want_dx);
  compare("conv d_down", d_down, want_down);
  double sum = 0.0;
  for (int64_t i = 0; gated && i < s.heads * s.rank; ++i) sum += d_gate.at(i) + d_gate_bias.at(i % s.heads);
  if (!std::isfinite(sum)) std::printf("conv backward: an element was not written\n"), ++failures;
}

}  // namespace

int main() {
  // batch, channels, height, width, rank, out, heads, then computed sizes, kernel, stride, padding, dilation
  const ConvShape shapes[] = {
      {1, 1, 1, 1, 1, 1, 1, 0, 0, {1, 1}, {1, 1}, {0, 0}, {1, 1}},
      {2, 16, 9, 12, 16, 33, 3, 0, 0, {3, 3}, {1, 1}, {1, 1}, {1, 1}},
      {3, 5, 8, 7, 7, 40, 2, 0, 0, {3, 2}, {2, 3}, {2, 1}, {1, 2}},
      {2, 3, 11, 10, 4, 6, 4, 0, 0, {1, 1}, {2, 2}, {0, 1}, {1, 1}},
      {1, 17, 13, 12, 33, 20, 2, 0, 0, {3, 5}, {1, 2}, {0, 3}, {2, 1}},
      {2, 32, 4, 4, 5, 16, 3, 0, 0, {2, 3}, {4, 3}, {5, 4}, {3, 2}},
      {1, 300, 3, 5, 3, 300, 2, 0, 0, {3, 3}, {1, 1}, {1, 1}, {1, 1}},
      {0, 4, 5, 5, 3, 7, 2, 0, 0, {3, 3}, {2, 2}, {1, 1}, {1, 1}},
      {2, 4, 12, 11, 3, 5, 2, 0, 0, {3, 3}, {2, 4}, {2, 1}, {2, 2}},
      {1, 2, 4, 5, 600, 7, 2, 0, 0, {1, 1}, {1, 1}, {0, 0}, {1, 1}},
      {1, 2, 21, 20, 2, 3, 2, 0, 0, {3, 3}, {1, 1}, {1, 1}, {1, 1}},
  };
  for (const ConvShape& shape : shapes) {
    for (Dtype dtype : {Dtype::kFloat32, Dtype::kBFloat16}) {
      for (int64_t threads : {1, 2}) {
        for (bool gated : {false, true}) {
          for (bool last : {false, true}) conv(shape, dtype, gated, last, threads == 2, threads);
        }
      }
    }
  }
  if (failures == 0) std::printf("all right\n");
  return failures ? 1 : 0;
}
