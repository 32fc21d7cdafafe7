// `alore_ext._C`: what is not a tensor op. Loading this library is also what registers the ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/extension.h>

#include <sstream>
#include <string>
#include <vector>

#include "kernels/merge_plan.h"
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

alore::kernels::MergePlan plan_merge(int64_t num_tokens, int64_t num_experts, int64_t s_in, int64_t s_out,
                                     int64_t p_in, int64_t p_out, int64_t rank, bool low_rank,
                                     at::ScalarType dtype, at::ScalarType factor_dtype, int64_t token_stride,
                                     int64_t element_stride, size_t shared_limit) {
  const alore::kernels::MergeShape shape{num_tokens,
                                         num_experts,
                                         s_in,
                                         s_out,
                                         p_in,
                                         p_out,
                                         rank,
                                         low_rank,
                                         alore::ops::kernel_dtype(dtype),
                                         alore::ops::kernel_dtype(factor_dtype),
                                         token_stride,
                                         element_stride};
  return alore::kernels::plan_merge(shape, shared_limit);
}

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
  using alore::kernels::MergePlan;
  py::class_<MergePlan>(m, "MergePlan")
      .def_readonly("taken", &MergePlan::taken)
      .def_readonly("reason", &MergePlan::reason)
      .def_readonly("rows", &MergePlan::rows)
      .def_readonly("tokens_per_tile", &MergePlan::tokens_per_tile)
      .def_readonly("num_tiles", &MergePlan::num_tiles)
      .def_readonly("splits", &MergePlan::splits)
      .def_readonly("shared_bytes", &MergePlan::shared_bytes)
      .def("__repr__", &MergePlan::to_string);
  m.def("plan_merge", &plan_merge, py::kw_only(), py::arg("num_tokens"), py::arg("num_experts"),
        py::arg("s_in"), py::arg("s_out"), py::arg("p_in"), py::arg("p_out"), py::arg("rank"),
        py::arg("low_rank"), py::arg("dtype"), py::arg("factor_dtype"), py::arg("token_stride"),
        py::arg("element_stride"), py::arg("shared_limit"));
  m.attr("LEAST_SHARED_LIMIT") = alore::kernels::kLeastSharedLimit;
  m.attr("MAX_WORKSPACE_BYTES") = alore::kernels::kMaxWorkspaceBytes;
}
