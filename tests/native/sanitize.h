// What the programs under the sanitizers share. Inputs lie in heap blocks of exactly their size (a read beyond them
// stops the program), scratch and outputs start as NaN.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "inherit_kernels/linear.h"

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

}  // namespace
