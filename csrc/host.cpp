// The pybind11 module n3kernels._host: facts of this build and the host-executable maths the kernels compile, for
// tests and tools. Nothing that computes imports it.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "common/cpu.h"
#include "common/numerics.h"
#include "nvfp4/linear_plan.h"
#include "nvfp4/quantize_plan.h"

#ifndef N3_ARCHS
#define N3_ARCHS ""
#endif
#ifndef N3_REVISION
#define N3_REVISION "unknown"
#endif
#ifndef N3_TORCH_VERSION
#define N3_TORCH_VERSION "unknown"
#endif

namespace py = pybind11;

PYBIND11_MODULE(_host, m) {
  m.def("build_info", [] {
    py::dict info;
    info["archs"] = N3_ARCHS;
    info["revision"] = N3_REVISION;
    info["torch"] = N3_TORCH_VERSION;
    return info;
  });
  m.def("cpu_isa", [] { return n3::isa_name(n3::cpu_isa()); });
  m.def("e2m1_from_float", py::vectorize([](float v) { return n3::e2m1_from_float(v); }));
  m.def("e2m1_to_float", py::vectorize([](uint8_t code) { return n3::e2m1_to_float(code); }));
  m.def("e4m3_from_float", py::vectorize([](float v) { return n3::e4m3_from_float(v); }));
  m.def("e4m3_to_float", py::vectorize([](uint8_t code) { return n3::e4m3_to_float(code); }));
  m.def("scale_128x4",
        py::vectorize([](int64_t r, int64_t ks, int64_t ks_total) { return n3::scale_128x4(r, ks, ks_total); }),
        py::arg("r"), py::arg("ks"), py::arg("ks_total"));
  // Plans of the CUDA kernels: (kernel, blocks, threads, tokens); (blocks of the first launch, of the second, places).
  m.def(
      "nvfp4_linear_plan",
      [](int64_t rows, int64_t n, bool float32, bool invariant) {
        const auto p = n3::nvfp4_linear::plan(rows, n, float32, invariant);
        return py::make_tuple(int(p.kernel), p.blocks, p.threads, p.tokens);
      },
      py::arg("m"), py::arg("n"), py::arg("float32"), py::arg("invariant"));
  m.def("nvfp4_linear_slot_k", &n3::nvfp4_linear::slot_k, py::arg("t"), py::arg("step"), py::arg("i"));
  m.def(
      "nvfp4_quantize_plan",
      [](int64_t rows, int64_t k, bool swizzled) {
        const auto p = n3::nvfp4_quantize::plan(rows, k, swizzled);
        return py::make_tuple(p.partials, p.blocks, p.places);
      },
      py::arg("rows"), py::arg("k"), py::arg("swizzled"));
}
