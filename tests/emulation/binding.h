// The part that every emulated module has: schedules, guarded memory, synchronize(). A binding is
//   PYBIND11_MODULE(EMULATION_MODULE, m) { bind_emulation(m); m.def("...", ...); }
// whose functions take addresses as integers and call a launcher.
#pragma once

#include <pybind11/pybind11.h>

#include <cstring>
#include <memory>

#include "guarded.h"
#include "scheduler.h"

namespace inherit_kernels::emulation {

inline void bind_emulation(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("configure", &configure, py::arg("seed"), py::arg("overlap") = true);
  m.def("synchronize", &synchronize);
  m.def("discard", &discard);
  // `size` bytes that end at a page nobody may touch, filled with 0xff: NaN in every floating type.
  py::class_<Guarded>(m, "Guarded", py::buffer_protocol(), py::module_local())
      .def(py::init([](size_t size, size_t alignment) {
             auto memory = std::make_unique<Guarded>(size, alignment);
             std::memset(memory->data(), 0xff, static_cast<size_t>(memory->end() - memory->data()));
             return memory;
           }),
           py::arg("size"), py::arg("alignment") = 16)
      .def_property_readonly("address", [](const Guarded& g) { return reinterpret_cast<uintptr_t>(g.data()); })
      .def_buffer([](Guarded& g) {
        return py::buffer_info(reinterpret_cast<uint8_t*>(g.data()), static_cast<py::ssize_t>(g.end() - g.data()));
      });
}

}  // namespace inherit_kernels::emulation
