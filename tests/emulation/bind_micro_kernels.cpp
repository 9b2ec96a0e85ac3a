#include <pybind11/stl.h>

#include "binding.h"
#include "inherit_kernels/cuda/words.h"
#include "micro_kernels.h"

using inherit_kernels::cuda::MicroArgs;

PYBIND11_MODULE(EMULATION_MODULE, m) {
  inherit_kernels::emulation::bind_emulation(m);
  m.def("run", [](const char* name, uintptr_t in, uintptr_t out, uintptr_t scratch, uintptr_t flags, int64_t count) {
    MicroArgs args = {reinterpret_cast<const float*>(in), reinterpret_cast<const void*>(in),
                      reinterpret_cast<float*>(out),      reinterpret_cast<float*>(scratch),
                      reinterpret_cast<int*>(flags),      count};
    int error = inherit_kernels::cuda::micro_launch(name, args, nullptr);
    if (error) throw std::invalid_argument(std::string("no kernel is called ") + name);
    inherit_kernels::emulation::synchronize();
  });
  // float32 values through float16 (0) or bfloat16 (1) and back.
  m.def("round_trip", [](const std::string& bytes, int is_bf16) {
    using namespace inherit_kernels::cuda;
    std::vector<float> result(bytes.size() / sizeof(float));
    std::memcpy(result.data(), bytes.data(), bytes.size());
    for (float& v : result) v = is_bf16 ? to_float(from_float<bf16>(v)) : to_float(from_float<half16>(v));
    return result;
  });
}
