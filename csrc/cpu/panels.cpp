// pack_panels and cpu_isa: what a caller needs to hold weights in this machine's own layout.
#include <string>

#include "inherit_kernels/product.h"
#include "tensors.h"

namespace inherit_kernels {
namespace {

Tensor pack_panels(Tensor weight) {
  check_dims(weight, "weight", 2);
  Dtype dtype = dtype_of(weight, "weight");
  STD_TORCH_CHECK(weight.is_cpu(), "weight: device must be cpu");
  Runtime runtime = cpu_runtime();
  int64_t outputs = weight.size(0), depth = weight.size(1);
  Tensor panels = empty_cpu({panels_size(*runtime.kernels, outputs, depth)}, Dtype::kFloat32);
  pack_all(runtime, matrix_view(weight, dtype), outputs, depth, static_cast<float*>(panels.data_ptr()));
  return panels;
}

std::string cpu_isa() {
  return active_kernels().name;
}

}  // namespace
}  // namespace inherit_kernels

STABLE_TORCH_LIBRARY_IMPL(inherit_kernels_C, CPU, m) {
  m.impl("pack_panels", TORCH_BOX(&inherit_kernels::pack_panels));
}

STABLE_TORCH_LIBRARY_IMPL(inherit_kernels_C, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&inherit_kernels::cpu_isa));
}
