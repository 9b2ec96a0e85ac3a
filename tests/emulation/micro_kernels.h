// The micro-kernels of micro_kernels.cu, by name.
#pragma once

#include <cstdint>
#include <string>

namespace inherit_kernels {
namespace cuda {

struct MicroArgs {
  const float* p_in;
  const void* p_bits;
  float *p_out, *p_scratch;
  int* p_flags;
  int64_t count;
};

// The value of a cudaError_t.
int micro_launch(const char* name, const MicroArgs& args, void* stream);

}  // namespace cuda
}  // namespace inherit_kernels
