// `alore_ext._C`: what is not a tensor op. Loading this library is also what registers the ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/extension.h>

#include <sstream>
#include <string>
#include <vector>

#include "kernels/alore.h"
#include "kernels/lora.h"
#include "kernels/lora_grouped.h"
#include "kernels/merge_plan.h"
#include "kernels/norm_lora.h"
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

py::object plan_alore(int64_t num_tokens, int64_t num_experts, int64_t num_blocks, int64_t block_dim,
                      int64_t rank, at::ScalarType dtype, at::ScalarType out_dtype,
                      at::ScalarType factor_dtype, bool norm, bool add_base, bool dropout, bool residual,
                      int capability, int num_sms, int64_t shared_per_block, bool backward) {
  using alore::ops::kernel_dtype;
  const alore::kernels::AloreShape shape{.num_tokens = num_tokens,
                                         .num_experts = num_experts,
                                         .num_blocks = num_blocks,
                                         .block_dim = block_dim,
                                         .rank = rank,
                                         .input = kernel_dtype(dtype),
                                         .output = kernel_dtype(out_dtype),
                                         .factor = kernel_dtype(factor_dtype),
                                         .affine = kernel_dtype(factor_dtype),
                                         .norm = norm,
                                         .add_base = add_base,
                                         .dropout = dropout,
                                         .residual = residual};
  const alore::kernels::DeviceLimits device{capability, num_sms, shared_per_block};
  return backward ? py::cast(alore::kernels::plan_alore_backward(shape, device))
                  : py::cast(alore::kernels::plan_alore_forward(shape, device));
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

alore::kernels::NormLoraPlan plan_norm_lora(int64_t num_tokens, int64_t in_features, int64_t out_features,
                                            int64_t rank, at::ScalarType dtype, at::ScalarType weight_dtype,
                                            int capability, int num_sms, int64_t shared_per_block) {
  const alore::kernels::NormLoraShape shape{.linear = {.num_tokens = num_tokens,
                                                       .in_features = in_features,
                                                       .out_features = out_features,
                                                       .rank = rank,
                                                       .activation = alore::ops::kernel_dtype(dtype)},
                                            .weight = alore::ops::kernel_dtype(weight_dtype)};
  return alore::kernels::plan_norm_lora(shape, {capability, num_sms, shared_per_block});
}

alore::kernels::LoraGroupedPlan plan_lora_grouped(int64_t num_samples, int64_t num_tokens,
                                                  int64_t in_features, int64_t out_features,
                                                  const std::vector<int64_t>& ranks, at::ScalarType dtype) {
  std::vector<alore::kernels::LoraShape> shapes;
  for (const int64_t rank : ranks) {
    shapes.push_back({.num_tokens = num_tokens,
                      .in_features = in_features,
                      .out_features = out_features,
                      .rank = rank,
                      .activation = alore::ops::kernel_dtype(dtype)});
  }
  return alore::kernels::plan_lora_grouped(num_samples, shapes);
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
  using alore::kernels::AloreBackwardPlan;
  using alore::kernels::AloreForwardPlan;
  py::class_<AloreForwardPlan>(m, "AloreForwardPlan")
      .def_readonly("fused", &AloreForwardPlan::fused)
      .def_readonly("reason", &AloreForwardPlan::reason)
      .def_readonly("pipelined", &AloreForwardPlan::pipelined)
      .def_readonly("groups_per_warp", &AloreForwardPlan::groups_per_warp)
      .def_readonly("warps_per_tile", &AloreForwardPlan::warps_per_tile)
      .def_readonly("tiles_per_block", &AloreForwardPlan::tiles_per_block)
      .def_readonly("even", &AloreForwardPlan::even)
      .def_readonly("blocks", &AloreForwardPlan::blocks)
      .def_readonly("shared_bytes", &AloreForwardPlan::shared_bytes)
      .def_readonly("overlaps_launches", &AloreForwardPlan::overlaps_launches)
      .def("__repr__", &AloreForwardPlan::to_string);
  py::class_<AloreBackwardPlan>(m, "AloreBackwardPlan")
      .def_readonly("fused", &AloreBackwardPlan::fused)
      .def_readonly("reason", &AloreBackwardPlan::reason)
      .def_readonly("pipelined", &AloreBackwardPlan::pipelined)
      .def_readonly("warps", &AloreBackwardPlan::warps)
      .def_readonly("row_tiles", &AloreBackwardPlan::row_tiles)
      .def_readonly("stages", &AloreBackwardPlan::stages)
      .def_readonly("key_splits", &AloreBackwardPlan::key_splits)
      .def_readonly("items_per_warp", &AloreBackwardPlan::items_per_warp)
      .def_readonly("parts", &AloreBackwardPlan::parts)
      .def_readonly("blocks", &AloreBackwardPlan::blocks)
      .def_readonly("shared_bytes", &AloreBackwardPlan::shared_bytes)
      .def_readonly("workspace_bytes", &AloreBackwardPlan::workspace_bytes)
      .def_readonly("overlaps_launches", &AloreBackwardPlan::overlaps_launches)
      .def("__repr__", &AloreBackwardPlan::to_string);
  m.def("plan_alore", &plan_alore, py::kw_only(), py::arg("num_tokens"), py::arg("num_experts"),
        py::arg("num_blocks"), py::arg("block_dim"), py::arg("rank"), py::arg("dtype"), py::arg("out_dtype"),
        py::arg("factor_dtype"), py::arg("norm"), py::arg("add_base"), py::arg("dropout"),
        py::arg("residual"), py::arg("capability"), py::arg("num_sms"), py::arg("shared_per_block"),
        py::arg("backward"));
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
  using alore::kernels::LoraPlan;
  py::class_<LoraPlan>(m, "LoraPlan")
      .def_property_readonly("forward", [](const LoraPlan& p) { return path_name(p.forward); })
      .def_property_readonly("backward", [](const LoraPlan& p) { return path_name(p.backward); })
      .def_readonly("code_width", &LoraPlan::code_width)
      .def_readonly("staged_shape", &LoraPlan::staged_shape)
      .def_readonly("operand_elements", &LoraPlan::operand_elements)
      .def_readonly("blocks", &LoraPlan::blocks)
      .def_readonly("shared_bytes", &LoraPlan::shared_bytes)
      .def_readonly("workspace_bytes", &LoraPlan::workspace_bytes)
      .def("__repr__", &LoraPlan::to_string);
  m.def("plan_lora", &plan_lora, py::arg("num_tokens"), py::arg("in_features"), py::arg("out_features"),
        py::arg("rank"), py::arg("dtype"), py::arg("weight_dtype"), py::arg("num_processors"),
        py::arg("shared_bytes"));
  using alore::kernels::NormLoraPlan;
  py::class_<NormLoraPlan>(m, "NormLoraPlan")
      .def_readonly("fused", &NormLoraPlan::fused)
      .def_readonly("reason", &NormLoraPlan::reason)
      .def_readonly("linear", &NormLoraPlan::linear)
      .def_readonly("forward_blocks", &NormLoraPlan::forward_blocks)
      .def_readonly("forward_shared_bytes", &NormLoraPlan::forward_shared_bytes)
      .def_readonly("backward_blocks", &NormLoraPlan::backward_blocks)
      .def_readonly("backward_shared_bytes", &NormLoraPlan::backward_shared_bytes)
      .def_readonly("overlaps_launches", &NormLoraPlan::overlaps_launches)
      .def_readonly("workspace_bytes", &NormLoraPlan::workspace_bytes)
      .def("__repr__", &NormLoraPlan::to_string);
  m.def("plan_norm_lora", &plan_norm_lora, py::kw_only(), py::arg("num_tokens"), py::arg("in_features"),
        py::arg("out_features"), py::arg("rank"), py::arg("dtype"), py::arg("weight_dtype"),
        py::arg("capability"), py::arg("num_sms"), py::arg("shared_per_block"));
  using alore::kernels::LoraGroupedPlan;
  py::class_<LoraGroupedPlan>(m, "LoraGroupedPlan")
      .def_readonly("fused", &LoraGroupedPlan::fused)
      .def_readonly("reason", &LoraGroupedPlan::reason)
      .def_readonly("refused", &LoraGroupedPlan::refused)
      .def_readonly("rank_tiles", &LoraGroupedPlan::rank_tiles)
      .def_readonly("workspace_bytes", &LoraGroupedPlan::workspace_bytes)
      .def("__repr__", &LoraGroupedPlan::to_string);
  m.def("plan_lora_grouped", &plan_lora_grouped, py::kw_only(), py::arg("num_samples"), py::arg("num_tokens"),
        py::arg("in_features"), py::arg("out_features"), py::arg("ranks"), py::arg("dtype"));
  m.attr("MAX_WORKSPACE_BYTES") = alore::kernels::kMaxWorkspaceBytes;
}
