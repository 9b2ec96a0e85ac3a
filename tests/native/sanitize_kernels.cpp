// The CPU kernels of the linear ops without torch, for the address and undefined-behaviour sanitizers: every way on
// ragged sizes, against double precision. Built and run by tests/test_native.py.
#include "inherit_kernels/linear_backward.h"
#include "sanitize.h"

namespace {

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

}  // namespace

// Every index once, whoever takes it.
void shares(int64_t threads, int64_t count, int64_t multiple) {
  std::vector<std::atomic<int>> seen(count);
  balanced(runtime(threads), count, 1e9, multiple, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) ++seen[i];
  });
  for (int64_t i = 0; i < count; ++i) {
    if (seen[i] == 1) continue;
    std::printf("index %ld of %ld was taken %d times\n", long(i), long(count), int(seen[i]));
    ++failures;
  }
}

int main() {
  for (int64_t threads : {1, 2, 3, 100}) {
    for (int64_t count : {0, 1, 2, 5, 16, 17, 63, 1000}) {
      for (int64_t multiple : {1, 4}) shares(threads, count, multiple);
    }
  }
  for (Dtype dtype : {Dtype::kFloat32, Dtype::kBFloat16}) {
    for (int64_t threads : {1, 2}) {
      for (int64_t rows : {0, 1, 3, 8, 9, 64, 65, 200}) {
        for (int64_t heads : {1, 2, 3}) {
          linear({rows, 1, 1, 1, heads}, dtype, true, false, threads);
          linear({rows, 63, 5, 65, heads}, dtype, true, false, threads);
          linear({rows, 200, 33, 47, heads}, dtype, true, true, threads);
        }
        linear({rows, 65, 7, 31, 1}, dtype, false, false, threads);
        linear({rows, 65, 7, 31, 1}, dtype, false, true, threads);
      }
      linear({600, 17, 3, 19, 2}, dtype, true, false, threads);
    }
  }
  if (failures == 0) std::printf("all right\n");
  return failures ? 1 : 0;
}
