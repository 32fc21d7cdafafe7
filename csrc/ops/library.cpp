// Every operator's schema: the one-page API of torch.ops.alore_ext. Kernels are registered in register_*.cpp
// (CPU, CUDA, Meta) and autograd_*.cpp / autocast.cpp.
//
// Shapes: x [..., s_in * p_in]; scale [E, s_in, s_out]; down [E, p_in, r]; up [E, r, p_out]; seed one int64
// on x's device; lora_a [R, in]; lora_b [out, R]; coeff [R]; output_mask: which gradients are wanted, in the
// order of the outputs.
#include <ATen/core/enum_tag.h>
#include <torch/library.h>

#include <vector>

// These operators read their inputs through their strides and bring to rows what is none. Without the tag
// Inductor copies an input into the very strides that eager has, by a kernel of its own making: behind
// attention's backward that took 286 us where the layout it would have chosen takes 111 (H200, ViT-B, batch
// 256).
static const std::vector<at::Tag> kAnyStrides{at::Tag::flexible_layout};

TORCH_LIBRARY(alore_ext, m) {
  m.def("kron_linear(Tensor x, Tensor scale, Tensor down, Tensor up) -> Tensor", kAnyStrides);
  m.def(
      "kron_linear_backward(Tensor grad_out, Tensor x, Tensor scale, Tensor down, Tensor up, bool[4] "
      "output_mask)"
      " -> (Tensor, Tensor, Tensor, Tensor)",
      kAnyStrides);

  m.def(
      "alore(Tensor x, Tensor scale, Tensor down, Tensor up, Tensor? seed=None, float dropout_p=0.0) -> "
      "Tensor",
      kAnyStrides);
  m.def(
      "alore_backward(Tensor grad_out, Tensor x, Tensor scale, Tensor down, Tensor up, Tensor? seed, float "
      "dropout_p,"
      " bool[4] output_mask) -> (Tensor, Tensor, Tensor, Tensor)",
      kAnyStrides);

  // Returns y, mean, rstd; the statistics are x's leading axes, in the accumulate type.
  m.def(
      "layer_norm_alore(Tensor x, Tensor? weight, Tensor? bias, float eps, Tensor scale, Tensor down, Tensor "
      "up,"
      " Tensor? seed=None, float dropout_p=0.0, ScalarType? out_dtype=None) -> (Tensor, Tensor, Tensor)",
      kAnyStrides);
  // The same on x + residual; returns y, the sum, mean, rstd.
  m.def(
      "add_layer_norm_alore(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps, Tensor "
      "scale, "
      "Tensor down, Tensor up, Tensor? seed=None, float dropout_p=0.0, ScalarType? out_dtype=None)"
      " -> (Tensor, Tensor, Tensor, Tensor)",
      kAnyStrides);
  // Gradients of x, weight, bias, scale, down, up. After add_layer_norm_alore x is the sum, grad_sum its
  // gradient as an output, and x's gradient is residual's too.
  m.def(
      "layer_norm_alore_backward(Tensor grad_out, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, "
      "Tensor rstd,"
      " Tensor scale, Tensor down, Tensor up, Tensor? seed, float dropout_p, bool[6] output_mask,"
      " Tensor? grad_sum=None)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
      kAnyStrides);

  // Returns y and what backward reads again: the code x A^T (empty where W folds), and the packed factors or
  // the folded weight.
  m.def(
      "masked_lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, Tensor coeff)"
      " -> (Tensor, Tensor, Tensor)",
      kAnyStrides);
  // coeff [num_experts]; each is masked with probability mask_p where `training`. Returns the mask too,
  // [num_experts] in the accumulate type: 0, or 1/(1-p) for a kept expert.
  m.def(
      "mlae_linear(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, Tensor coeff,"
      " float mask_p=0.0, bool training=True) -> (Tensor, Tensor, Tensor, Tensor)",
      {at::Tag::nondeterministic_seeded, at::Tag::flexible_layout});
  // Gradients of x, weight, bias, lora_a, lora_b, coeff, for both: coeff is [num_experts] where a mask is
  // given, else [R].
  m.def(
      "masked_lora_linear_backward(Tensor grad_out, Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b,"
      " Tensor coeff, Tensor? mask, Tensor code, Tensor operand, bool[6] output_mask)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
      kAnyStrides);

  // mlae_linear of layer_norm(x), which is returned as well: [..., in_features], in rows that are longer than
  // that where the fused kernels keep the code behind it. Then what backward reads again, the mask, and the
  // norm's statistics.
  m.def(
      "layer_norm_mlae_linear(Tensor x, Tensor? norm_weight, Tensor? norm_bias, float eps, Tensor weight,"
      " Tensor? bias, Tensor lora_a, Tensor lora_b, Tensor coeff, float mask_p=0.0, bool training=True)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
      {at::Tag::nondeterministic_seeded, at::Tag::flexible_layout});
  // Gradients of x, norm_weight, norm_bias, weight, bias, lora_a, lora_b, coeff.
  m.def(
      "layer_norm_mlae_linear_backward(Tensor grad_out, Tensor? grad_normalised, Tensor x, Tensor? "
      "norm_weight,"
      " Tensor? norm_bias, float eps, Tensor mean, Tensor rstd, Tensor weight, Tensor lora_a, Tensor lora_b,"
      " Tensor coeff, Tensor mask, Tensor code, Tensor operand, bool[8] output_mask)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
      kAnyStrides);

  m.def(
      "merge_kron_(Tensor(a!) weight, Tensor(b!)? bias, Tensor scale, Tensor down, Tensor up, str side) -> "
      "()");
  m.def("merge_lora_(Tensor(a!) weight, Tensor lora_a, Tensor lora_b, Tensor coeff) -> ()");
  // The same for many layers at once: entry i of every list belongs together, bias[j] to entry bias_of[j].
  // (Not a Tensor?[]: torch's functionalization fails on a None in a list that is written.) At least one
  // entry. With `source`, weight[i] becomes the merge of source[i] and its old values are not read.
  m.def(
      "merge_kron_grouped_(Tensor(a!)[] weight, Tensor(b!)[] bias, int[] bias_of, Tensor[] scale, Tensor[] "
      "down,"
      " Tensor[] up, str[] side, Tensor[]? source=None) -> ()");
  m.def(
      "merge_lora_grouped_(Tensor(a!)[] weight, Tensor[] lora_a, Tensor[] lora_b, Tensor[] coeff,"
      " Tensor[]? source=None) -> ()");

  // One adapter a sample (axis 0 of x): entry i of the lists is adapter i, index [batch] int64 names each
  // sample's, -1 none. Inference only.
  m.def("kron_linear_grouped(Tensor x, Tensor[] scale, Tensor[] down, Tensor[] up, Tensor index) -> Tensor");
  m.def("alore_grouped(Tensor x, Tensor[] scale, Tensor[] down, Tensor[] up, Tensor index) -> Tensor");
  m.def(
      "layer_norm_alore_grouped(Tensor x, Tensor? weight, Tensor? bias, float eps, Tensor[] scale, Tensor[] "
      "down,"
      " Tensor[] up, Tensor index, ScalarType? out_dtype=None) -> Tensor");
  m.def(
      "masked_lora_linear_grouped(Tensor x, Tensor weight, Tensor? bias, Tensor[] lora_a, Tensor[] lora_b,"
      " Tensor[] coeff, Tensor index) -> Tensor");

  // AS-MLP's shift of x [B, C, H, W] along dim, 2 (H) or 3 (W): see kernels/axial_shift.h. The pair is both,
  // along W and along H.
  m.def("axial_shift(Tensor x, int shift_size, int dim) -> Tensor");
  m.def("axial_shift_backward(Tensor grad_out, int shift_size, int dim) -> Tensor");
  m.def("axial_shift_pair(Tensor x, int shift_size) -> (Tensor, Tensor)");
  m.def("axial_shift_pair_backward(Tensor grad_width, Tensor grad_height, int shift_size) -> Tensor");
}
