#include "binding.h"
#include "inherit_kernels/cuda/gated_lowrank_linear.h"
#include "inherit_kernels/cuda/lowrank_linear.h"

namespace py = pybind11;
using inherit_kernels::cuda::LinearCall;

namespace {

LinearCall call_of(const py::dict& d) {
  auto pointer = [&](const char* name) { return reinterpret_cast<void*>(d[name].cast<uintptr_t>()); };
  auto size = [&](const char* name) { return d[name].cast<int64_t>(); };
  LinearCall c = {};
  c.x = pointer("x");
  c.down = pointer("down");
  c.up = pointer("up");
  c.gate_weight = pointer("gate_weight");
  c.gate_bias = pointer("gate_bias");
  c.bias = pointer("bias");
  c.residual = pointer("residual");
  c.y = pointer("y");
  c.t = pointer("t");
  c.workspace = pointer("workspace");
  c.rows = size("rows");
  c.in = size("in");
  c.rank = size("rank");
  c.out = size("out");
  c.heads = size("heads");
  c.ld_x = size("ld_x");
  c.ld_residual = size("ld_residual");
  c.ld_y = size("ld_y");
  c.dtype = static_cast<int>(size("dtype"));
  c.activation = static_cast<int>(size("activation"));
  return c;
}

}  // namespace

// The launchers only enqueue; synchronize() runs what they have enqueued.
PYBIND11_MODULE(EMULATION_MODULE, m) {
  using namespace inherit_kernels::cuda;
  inherit_kernels::emulation::bind_emulation(m);
  m.def("lowrank_linear", [](const py::dict& d) { return lowrank_linear_decode(call_of(d), nullptr); });
  m.def("gated_lowrank_linear", [](const py::dict& d) { return gated_lowrank_linear_decode(call_of(d), nullptr); });
  m.def("lowrank_linear_workspace", [](const py::dict& d) { return lowrank_linear_decode_workspace(call_of(d)); });
  m.def("scale_by_gate", [](const py::dict& d) {
    auto pointer = [&](const char* name) { return reinterpret_cast<void*>(d[name].cast<uintptr_t>()); };
    auto size = [&](const char* name) { return d[name].cast<int64_t>(); };
    ScaleByGateCall c = {};
    c.t = pointer("t");
    c.gate_weight = pointer("gate_weight");
    c.gate_bias = pointer("gate_bias");
    c.out = pointer("out");
    c.rows = size("rows");
    c.rank = size("rank");
    c.heads = size("heads");
    c.columns = size("columns");
    c.ld_t = size("ld_t");
    c.dtype = static_cast<int>(size("dtype"));
    return gated_lowrank_linear_scale(c, nullptr);
  });
  m.def("gated_lowrank_linear_workspace",
        [](const py::dict& d) { return gated_lowrank_linear_decode_workspace(call_of(d)); });
}
