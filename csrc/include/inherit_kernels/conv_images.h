// Images as matrices, and the gate of an image.
#pragma once

#include <vector>

#include "inherit_kernels/linear.h"

namespace inherit_kernels {

// [batch, channels, positions]; `matrix` is image 0 as [positions, channels].
struct ImagesView {
  MatrixView matrix;
  int64_t image_stride;
};

inline MatrixView image(const ImagesView& images, int64_t b) {
  MatrixView view = images.matrix;
  if (view.data) view.data = element(view.data, view.dtype, b * images.image_stride);
  return view;
}

struct MixShape {
  int64_t batch, rank, out, positions, heads;
};

// Gates of every image: means [batch, rank], g [batch, panels * nr].
inline void image_gates(const Runtime& runtime, const MixShape& s, const ImagesView& t, const GateOperands& gate,
                        float* means, float* g) {
  const Kernels& k = *runtime.kernels;
  parallel(runtime, s.batch, 4.0 * s.batch * s.rank * s.positions, [&](int64_t begin, int64_t end) {
    std::vector<double> sums(s.rank);
    for (int64_t b = begin; b < end; ++b) {
      std::fill(sums.begin(), sums.end(), 0.0);
      k.column_sums(image(t, b), s.positions, s.rank, sums.data());
      for (int64_t r = 0; r < s.rank; ++r) means[b * s.rank + r] = static_cast<float>(sums[r] / s.positions);
    }
  });
  compute_gates(k, {s.batch, 0, s.rank, s.out, s.heads}, gate, means, s.rank, s.batch, g);
}

}  // namespace inherit_kernels
