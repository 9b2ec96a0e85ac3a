// What a warp computes together: plain loops over the 32 lanes' operands. Not instrumented, as scheduler.cpp.
#include <cstring>

#include "inherit_kernels/cuda/words.h"

namespace inherit_kernels::emulation {
namespace {

template <class T>
T element(const uint32_t& pair, int i) {
  T value;
  std::memcpy(&value, reinterpret_cast<const char*>(&pair) + i * sizeof(T), sizeof(T));
  return value;
}

template <class T>
void mma(const unsigned char (*in)[64], unsigned char (*out)[64]) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    uint32_t r[6];
    std::memcpy(r, in[lane], sizeof r);
    int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 8; ++i)
      a[g + i / 2 % 2 * 8][2 * t + i % 2 + i / 4 * 8] = cuda::to_float(element<T>(r[i / 2], i % 2));
    for (int i = 0; i < 4; ++i) b[2 * t + i % 2 + i / 2 * 8][g] = cuda::to_float(element<T>(r[4 + i / 2], i % 2));
  }
  for (int lane = 0; lane < 32; ++lane) {
    float d[4];
    std::memcpy(d, in[lane] + 24, sizeof d);
    for (int i = 0; i < 4; ++i)
      for (int k = 0; k < 16; ++k) d[i] += a[lane / 4 + i / 2 * 8][k] * b[k][lane % 4 * 2 + i % 2];
    std::memcpy(out[lane], d, sizeof d);
  }
}

}  // namespace

void compute_shuffle(const unsigned char (*in)[64], unsigned char (*out)[64], int) {
  for (int lane = 0; lane < 32; ++lane) {
    int32_t source;
    std::memcpy(&source, in[lane] + 4, 4);
    std::memcpy(out[lane], in[source & 31], 4);
  }
}

void compute_mma(const unsigned char (*in)[64], unsigned char (*out)[64], int is_bf16) {
  is_bf16 ? mma<cuda::bf16>(in, out) : mma<cuda::half16>(in, out);
}

}  // namespace inherit_kernels::emulation
