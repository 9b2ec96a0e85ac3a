// The CPU kernels without torch, for the address and undefined-behaviour sanitizers: every way of the linear op and of
// the convolution's mixing on ragged sizes, against double precision. Inputs lie in heap blocks of exactly their size
// (a read beyond them stops the program), scratch and outputs start as NaN. Built and run by tests/test_native.py.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "inherit_kernels/conv_mix_backward.h"
#include "inherit_kernels/linear_backward.h"

namespace inherit_kernels {
extern const Kernels kernels_under_test;
}

namespace {

using namespace inherit_kernels;
using Doubles = std::vector<double>;

std::mt19937 generator(0);
int failures = 0;

// A tensor in the dtype under test with its values in double precision.
struct Data {
  Data(int64_t count, Dtype dtype, double scale = 1.0)
      : dtype(dtype), values(count), bytes(count * element_size(dtype)) {
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < count; ++i) {
      float x = static_cast<float>(normal(generator) * scale);
      uint32_t bits;
      std::memcpy(&bits, &x, 4);
      if (dtype == Dtype::kBFloat16) bits &= 0xffff0000u;
      std::memcpy(&x, &bits, 4);
      values[i] = x;
      uint16_t half = static_cast<uint16_t>(bits >> 16);
      if (dtype == Dtype::kBFloat16) {
        std::memcpy(bytes.data() + 2 * i, &half, 2);
      } else {
        std::memcpy(bytes.data() + 4 * i, &x, 4);
      }
    }
  }
  MatrixView view(int64_t row, int64_t col = 1) const { return {bytes.data(), dtype, row, col}; }

  Dtype dtype;
  Doubles values;
  std::vector<char> bytes;
};

// An output, all NaN at first.
struct Output {
  Output(int64_t count, Dtype dtype) : dtype(dtype), bytes(count * element_size(dtype), static_cast<char>(0xff)) {}
  void* data() { return bytes.data(); }
  double at(int64_t i) const {
    uint32_t bits = 0;
    if (dtype == Dtype::kBFloat16) {
      std::memcpy(reinterpret_cast<char*>(&bits) + 2, bytes.data() + 2 * i, 2);
    } else {
      std::memcpy(&bits, bytes.data() + 4 * i, 4);
    }
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  }

  Dtype dtype;
  std::vector<char> bytes;
};

void compare(const char* what, const Output& got, const Doubles& want) {
  double scale = 0.0, worst = 0.0;
  for (double w : want) scale = std::max(scale, std::abs(w));
  for (size_t i = 0; i < want.size(); ++i) {
    double error = std::abs(got.at(static_cast<int64_t>(i)) - want[i]);
    if (!(error <= worst)) worst = error;
  }
  double allowed = (got.dtype == Dtype::kFloat32 ? 2e-5 : 4e-2) * scale + 1e-6;
  if (!(worst <= allowed)) {
    std::printf("%s: error %g of %g\n", what, worst, scale);
    ++failures;
  }
}

// The gate of one row of t: softmax of H logits.
Doubles gate_of(const double* t, const Data& weight, const Data& bias, int64_t rank, int64_t heads) {
  Doubles g(heads);
  double total = 0.0;
  for (int64_t h = 0; h < heads; ++h) {
    double logit = bias.values[h];
    for (int64_t r = 0; r < rank; ++r) logit += weight.values[h * rank + r] * t[r];
    total += g[h] = std::exp(logit);
  }
  for (double& value : g) value /= total;
  return g;
}

Runtime runtime(int64_t threads) {
  auto run = [](int64_t count, RangeFunction function, void* context) {
    std::thread other([&] { function(context, 0, count / 2); });
    function(context, count / 2, count);
    other.join();
  };
  return {&kernels_under_test, threads, run};
}

void linear(LinearShape s, Dtype dtype, bool gated, bool packed, int64_t threads) {
  Data x(s.rows * s.in, dtype), down(s.rank * s.in, dtype, 1 / std::sqrt(s.in));
  Data up(s.heads * s.out * s.rank, dtype, 1 / std::sqrt(s.rank)), gate(s.heads * s.rank, dtype, 0.3);
  Data gate_bias(s.heads, dtype), bias(s.heads * s.out, dtype), residual(s.rows * s.out, dtype);
  Doubles y(s.rows * s.out), t(s.rows * s.rank);
  for (int64_t i = 0; i < s.rows; ++i) {
    for (int64_t r = 0; r < s.rank; ++r) {
      for (int64_t d = 0; d < s.in; ++d) t[i * s.rank + r] += x.values[i * s.in + d] * down.values[r * s.in + d];
    }
    Doubles g = gated ? gate_of(&t[i * s.rank], gate, gate_bias, s.rank, s.heads) : Doubles{1.0};
    for (int64_t n = 0; n < s.out; ++n) {
      double z = residual.values[i * s.out + n];
      for (int64_t h = 0; h < s.heads; ++h) {
        double sum = bias.values[h * s.out + n];
        for (int64_t r = 0; r < s.rank; ++r) sum += up.values[(h * s.out + n) * s.rank + r] * t[i * s.rank + r];
        z += g[h] * sum;
      }
      y[i * s.out + n] = z < 0 ? 0 : z;
    }
  }
  Runtime run = runtime(threads);
  const Kernels& k = *run.kernels;
  Output y_out(s.rows * s.out, dtype), t_out(s.rows * s.rank, dtype);
  MatrixView none{};
  HeadsView heads{up.view(s.rank), s.out * s.rank};
  PackedSource down_source{{down.view(s.in), 0}, 1, s.in, s.rank, none};
  PackedSource up_source{heads, s.heads, s.rank, s.out, bias.view(s.out)};
  WeightPanels down_panels(run, false, {}, down_source), up_panels(run, false, {}, up_source);
  LinearForward f{s,
                  x.view(s.in),
                  down.view(s.in),
                  heads,
                  packed,
                  down_panels.panels,
                  up_panels.panels,
                  gated ? gate.view(s.rank) : none,
                  gated ? gate_bias.view(0) : none,
                  bias.view(s.out),
                  residual.view(s.out),
                  Activation::kRelu,
                  dtype,
                  y_out.data(),
                  t_out.data()};
  linear_forward(run, f);
  compare("linear y", y_out, y);
  compare("linear t", t_out, t);

  Data dz(s.rows * s.out, dtype), t_in(s.rows * s.rank, dtype);
  Output dx(s.rows * s.in, dtype), d_down(s.rank * s.in, dtype), d_up(s.heads * s.out * s.rank, dtype);
  Output d_gate(s.heads * s.rank, dtype), d_gate_bias(s.heads, dtype), d_bias(s.heads * s.out, dtype);
  LinearBackward b{s,
                   dz.view(s.out),
                   x.view(s.in),
                   t_in.view(s.rank),
                   down.view(s.in),
                   heads,
                   gated ? gate.view(s.rank) : none,
                   gated ? gate_bias.view(0) : none,
                   gated ? bias.view(s.out) : none,
                   dtype,
                   dx.data(),
                   d_down.data(),
                   d_up.data(),
                   gated ? d_gate.data() : nullptr,
                   gated ? d_gate_bias.data() : nullptr,
                   d_bias.data()};
  linear_backward(run, b);
  // d_bias and d_up follow from t and dz alone; dx and the rest are checked for finiteness here, for value in Python.
  Doubles want_bias(s.heads * s.out), want_up(s.heads * s.out * s.rank);
  for (int64_t i = 0; i < s.rows; ++i) {
    Doubles g = gated ? gate_of(&t_in.values[i * s.rank], gate, gate_bias, s.rank, s.heads) : Doubles{1.0};
    for (int64_t j = 0; j < s.heads * s.out; ++j) {
      double weighted = g[j / s.out] * dz.values[i * s.out + j % s.out];
      want_bias[j] += weighted;
      for (int64_t r = 0; r < s.rank; ++r) want_up[j * s.rank + r] += weighted * t_in.values[i * s.rank + r];
    }
  }
  compare("linear d_bias", d_bias, want_bias);
  compare("linear d_up", d_up, want_up);
  double sum = 0.0;
  for (int64_t i = 0; i < s.rows * s.in; ++i) sum += dx.at(i);
  for (int64_t i = 0; i < s.rank * s.in; ++i) sum += d_down.at(i);
  for (int64_t i = 0; gated && i < s.heads * s.rank; ++i) sum += d_gate.at(i) + d_gate_bias.at(i % s.heads);
  if (!std::isfinite(sum)) std::printf("linear backward: an element was not written\n"), ++failures;
}

void mix(MixShape s, Dtype dtype, bool t_last, bool y_last, int64_t threads) {
  int64_t count = s.batch * s.positions;
  Data t(count * s.rank, dtype), up(s.heads * s.out * s.rank, dtype), gate(s.heads * s.rank, dtype);
  Data gate_bias(s.heads, dtype), bias(s.heads * s.out, dtype), residual(count * s.out, dtype),
      dz(count * s.out, dtype);
  auto at = [&](bool last, int64_t b, int64_t p, int64_t c, int64_t channels) {
    return last ? (b * s.positions + p) * channels + c : (b * channels + c) * s.positions + p;
  };
  auto images = [&](const Data& data, bool last, int64_t channels) {
    return ImagesView{last ? data.view(channels, 1) : data.view(1, s.positions), channels * s.positions};
  };
  Doubles y(count * s.out), want_bias(s.heads * s.out);
  for (int64_t b = 0; b < s.batch; ++b) {
    Doubles mean(s.rank);
    for (int64_t r = 0; r < s.rank; ++r) {
      for (int64_t p = 0; p < s.positions; ++p) mean[r] += t.values[at(t_last, b, p, r, s.rank)] / s.positions;
    }
    Doubles g = gate_of(mean.data(), gate, gate_bias, s.rank, s.heads);
    for (int64_t n = 0; n < s.out; ++n) {
      for (int64_t p = 0; p < s.positions; ++p) {
        double z = residual.values[at(y_last, b, p, n, s.out)];
        for (int64_t h = 0; h < s.heads; ++h) {
          double sum = bias.values[h * s.out + n];
          for (int64_t r = 0; r < s.rank; ++r) {
            sum += up.values[(h * s.out + n) * s.rank + r] * t.values[at(t_last, b, p, r, s.rank)];
          }
          z += g[h] * sum;
          want_bias[h * s.out + n] += g[h] * dz.values[at(y_last, b, p, n, s.out)];
        }
        y[at(y_last, b, p, n, s.out)] = z;
      }
    }
  }
  Runtime run = runtime(threads);
  Output out(count * s.out, dtype), dt(count * s.rank, dtype), d_up(s.heads * s.out * s.rank, dtype);
  Output d_gate(s.heads * s.rank, dtype), d_gate_bias(s.heads, dtype), d_bias(s.heads * s.out, dtype);
  HeadsView heads{up.view(s.rank), s.out * s.rank};
  MixForward f{s,
               images(t, t_last, s.rank),
               heads,
               gate.view(s.rank),
               gate_bias.view(0),
               bias.view(s.out),
               images(residual, y_last, s.out),
               Activation::kNone,
               dtype,
               out.data(),
               y_last};
  mix_forward(run, f);
  compare("mix y", out, y);
  MixBackward b{s,
                images(dz, y_last, s.out),
                images(t, t_last, s.rank),
                heads,
                gate.view(s.rank),
                gate_bias.view(0),
                bias.view(s.out),
                dtype,
                t_last,
                dt.data(),
                d_up.data(),
                d_gate.data(),
                d_gate_bias.data(),
                d_bias.data()};
  MixBackwardPass(run, b).run();
  compare("mix d_bias", d_bias, want_bias);
  double sum = 0.0;
  for (int64_t i = 0; i < count * s.rank; ++i) sum += dt.at(i);
  for (int64_t i = 0; i < s.heads * s.out * s.rank; ++i) sum += d_up.at(i) + d_gate.at(i % (s.heads * s.rank));
  if (!std::isfinite(sum)) std::printf("mix backward: an element was not written\n"), ++failures;
}

}  // namespace

int main() {
  for (Dtype dtype : {Dtype::kFloat32, Dtype::kBFloat16}) {
    for (int64_t threads : {1, 2}) {
      for (int64_t rows : {0, 1, 3, 8, 9, 48, 49, 130}) {
        for (int64_t heads : {1, 2, 3}) {
          linear({rows, 1, 1, 1, heads}, dtype, true, false, threads);
          linear({rows, 63, 5, 65, heads}, dtype, true, false, threads);
          linear({rows, 200, 33, 47, heads}, dtype, true, true, threads);
        }
        linear({rows, 65, 7, 31, 1}, dtype, false, false, threads);
        linear({rows, 65, 7, 31, 1}, dtype, false, true, threads);
      }
      linear({600, 17, 3, 19, 2}, dtype, true, false, threads);
      for (bool t_last : {false, true}) {
        for (bool y_last : {false, true}) {
          mix({3, 5, 33, 49, 3}, dtype, t_last, y_last, threads);
          mix({1, 1, 1, 1, 1}, dtype, t_last, y_last, threads);
          mix({2, 17, 4, 600, 2}, dtype, t_last, y_last, threads);
        }
      }
    }
  }
  if (failures == 0) std::printf("all right\n");
  return failures ? 1 : 0;
}
