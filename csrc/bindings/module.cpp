// `alore_ext._C`: what is not a tensor op. Loading this library is also what registers the ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/extension.h>

#include <sstream>
#include <string>
#include <vector>

#include "kernels/lora.h"
#include "kernels/plan.h"
#include "ops/common.h"

namespace py = pybind11;

namespace {

#ifdef ALORE_WITH_CUDA
constexpr bool kWithCuda = true;
const char* const kCuda = ALORE_CUDA_VERSION;
const char* const kArchs = ALORE_CUDA_ARCHS;
#else
constexpr bool kWithCuda = false;
const char* const kCuda = nullptr;
const char* const kArchs = "";
#endif

std::vector<std::string> split_archs(const std::string& list) {
  std::vector<std::string> out;
  std::string item;
  for (char c : list + ";") {
    if (c == ';' || c == ' ') {
      if (!item.empty()) out.push_back(item);
      item.clear();
    } else {
      item += c;
    }
  }
  return out;
}

py::dict build_info() {
  py::dict info;
  info["version"] = ALORE_VERSION;
  info["torch"] = ALORE_TORCH_VERSION;
  info["cuda"] = kCuda == nullptr ? py::object(py::none()) : py::str(kCuda);
  info["cuda_kernels"] = kWithCuda;
  info["archs"] = split_archs(kArchs);
  info["compiler"] = __VERSION__;
  return info;
}

alore::kernels::KronPlan plan_kron(int64_t num_tokens, int64_t num_experts, int64_t s_in, int64_t s_out,
                                   int64_t p_in, int64_t p_out, int64_t rank, at::ScalarType dtype,
                                   at::ScalarType factor_dtype, bool backward) {
  const alore::kernels::KronShape shape{num_tokens,
                                        num_experts,
                                        s_in,
                                        s_out,
                                        p_in,
                                        p_out,
                                        rank,
                                        alore::ops::kernel_dtype(dtype),
                                        alore::ops::kernel_dtype(factor_dtype)};
  return backward ? alore::kernels::plan_kron_backward(shape) : alore::kernels::plan_kron_forward(shape);
}

alore::kernels::LoraPlan plan_lora(int64_t num_tokens, int64_t in_features, int64_t out_features,
                                   int64_t rank, at::ScalarType dtype, at::ScalarType weight_dtype,
                                   int num_processors, size_t shared_bytes) {
  const alore::kernels::LoraShape shape{.num_tokens = num_tokens,
                                        .in_features = in_features,
                                        .out_features = out_features,
                                        .rank = rank,
                                        .activation = alore::ops::kernel_dtype(dtype)};
  return alore::kernels::plan_lora(shape, alore::ops::kernel_dtype(weight_dtype),
                                   {num_processors, shared_bytes});
}

const char* path_name(alore::kernels::LoraPath path) { return alore::kernels::name_of(path); }

}  // namespace

PYBIND11_MODULE(_C, m) {
  using alore::kernels::KronPlan;
  m.def("build_info", &build_info);
  py::class_<KronPlan>(m, "KronPlan")
      .def_readonly("num_chunks", &KronPlan::num_chunks)
      .def_readonly("chunk_tokens", &KronPlan::chunk_tokens)
      .def_readonly("scale_grad_blocks", &KronPlan::scale_grad_blocks)
      .def_readonly("workspace_bytes", &KronPlan::workspace_bytes)
      .def("__repr__", &KronPlan::to_string);
  m.def("plan_kron", &plan_kron, py::arg("num_tokens"), py::arg("num_experts"), py::arg("s_in"),
        py::arg("s_out"), py::arg("p_in"), py::arg("p_out"), py::arg("rank"), py::arg("dtype"),
        py::arg("factor_dtype"), py::arg("backward"));
  using alore::kernels::LoraPlan;
  py::class_<LoraPlan>(m, "LoraPlan")
      .def_property_readonly("forward", [](const LoraPlan& p) { return path_name(p.forward); })
      .def_property_readonly("backward", [](const LoraPlan& p) { return path_name(p.backward); })
      .def_readonly("code_width", &LoraPlan::code_width)
      .def_readonly("operand_elements", &LoraPlan::operand_elements)
      .def_readonly("blocks", &LoraPlan::blocks)
      .def_readonly("shared_bytes", &LoraPlan::shared_bytes)
      .def_readonly("workspace_bytes", &LoraPlan::workspace_bytes)
      .def("__repr__", &LoraPlan::to_string);
  m.def("plan_lora", &plan_lora, py::arg("num_tokens"), py::arg("in_features"), py::arg("out_features"),
        py::arg("rank"), py::arg("dtype"), py::arg("weight_dtype"), py::arg("num_processors"),
        py::arg("shared_bytes"));
  m.attr("MAX_WORKSPACE_BYTES") = alore::kernels::kMaxWorkspaceBytes;
}
