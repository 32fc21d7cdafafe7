#include "ops/backend_cpu.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "kernels/dropout.h"
#include "kernels/kron_cpu.h"
#include "kernels/layer_norm.h"
#include "kernels/lora_cpu.h"

namespace alore::ops {
namespace {

// Rows that a thread takes at a time: enough work (about 16k multiply-adds) to be worth handing over.
int64_t row_grain(int64_t work_per_row) {
  return std::max<int64_t>(1, 16384 / std::max<int64_t>(work_per_row, 1));
}

template <typename F>
void dispatch_acc(at::ScalarType acc, F&& f) {
  acc == at::kDouble ? f(double{}) : f(float{});
}

Tensor widened(const Tensor& t) { return t.to(accumulate_type(t.scalar_type())).contiguous(); }

// The norm's affine as the kernels read it: an absent one costs them no branch.
Tensor affine_or(const OptTensor& t, double value, int64_t width, at::ScalarType acc) {
  if (t.has_value() && t->defined()) return t->to(acc).contiguous();
  return at::full({width}, value, at::TensorOptions().dtype(acc));
}

// A layer norm in front of the map, in the accumulate type.
struct WideNorm {
  Tensor weight, bias, mean, rstd;
  double eps;

  WideNorm(const CpuBackend::Norm& norm, double eps, int64_t width, at::ScalarType acc)
      : weight(affine_or(norm.weight, 1.0, width, acc)),
        bias(affine_or(norm.bias, 0.0, width, acc)),
        mean(norm.mean),
        rstd(norm.rstd),
        eps(eps) {}

  template <typename T>
  kernels::KronNormCpu<T> pointers() const {
    return {weight.const_data_ptr<T>(), bias.const_data_ptr<T>(), eps,
            // Written by forward alone, which made them.
            static_cast<T*>(mean.data_ptr()), static_cast<T*>(rstd.data_ptr())};
  }
};

Tensor pack(const kernels::KronShape& s, Factors f, at::ScalarType acc) {
  const Tensor packed = at::empty({kernels::kron_packed_size_cpu(s)}, f.scale.options().dtype(acc));
  const Tensor scale = f.scale.to(acc).contiguous(), down = f.down.to(acc).contiguous(),
               up = f.up.to(acc).contiguous();
  dispatch_acc(acc, [&](auto zero) {
    using T = decltype(zero);
    kernels::kron_pack_cpu<T>(s, scale.const_data_ptr<T>(), down.const_data_ptr<T>(), up.const_data_ptr<T>(),
                              packed.mutable_data_ptr<T>());
  });
  return packed;
}

// One row for each thread that may run.
Tensor thread_scratch(int64_t elements, const Tensor& like) {
  return at::empty({at::get_num_threads(), elements}, like.options());
}

// x and out are in the accumulate type.
void run_forward(const kernels::KronShape& s, const Tensor& x, const WideNorm* norm, Factors f, bool beta,
                 const Tensor& out) {
  const auto acc = x.scalar_type();
  const Tensor packed = pack(s, f, acc), scratch = thread_scratch(kernels::kron_scratch_size_cpu(s), x);
  dispatch_acc(acc, [&](auto zero) {
    using T = decltype(zero);
    const T *factors = packed.const_data_ptr<T>(), *in = x.const_data_ptr<T>();
    T *o = out.mutable_data_ptr<T>(), *room = scratch.mutable_data_ptr<T>();
    kernels::KronNormCpu<T> args{};
    if (norm != nullptr) args = norm->pointers<T>();
    const int64_t chunk = kernels::kron_chunk_tokens_cpu(s), chunks = (s.num_tokens + chunk - 1) / chunk;
    at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      kernels::kron_forward_cpu<T>(s, factors, in, norm != nullptr ? &args : nullptr, beta, begin * chunk,
                                   std::min(end * chunk, s.num_tokens), o,
                                   room + at::get_thread_num() * scratch.size(1));
    });
  });
}

// x, the gradients and grad_x (which may be undefined) are in the accumulate type.
FactorGrads run_backward(const kernels::KronShape& s, const Tensor& x, const WideNorm* norm, Factors f,
                         const Tensor& grad_base, const Tensor& grad_branch, bool beta, const Tensor& grad_x,
                         const Tensor& grad_weight, const Tensor& grad_bias) {
  const auto acc = x.scalar_type(), factor = f.scale.scalar_type();
  const Tensor packed = pack(s, f, acc), scratch = thread_scratch(kernels::kron_scratch_size_cpu(s), x);
  const int64_t parts = kernels::kron_partials_cpu(s), per_part = (s.num_tokens + parts - 1) / parts;
  const Tensor partial = at::empty({parts, kernels::kron_partial_size_cpu(s)}, x.options());
  const auto like = [&](const Tensor& t) { return at::empty(t.sizes(), x.options()); };
  const Tensor scale = like(f.scale), down = like(f.down), up = like(f.up);
  dispatch_acc(acc, [&](auto zero) {
    using T = decltype(zero);
    const auto out_pointer = [](const Tensor& t) { return t.defined() ? t.mutable_data_ptr<T>() : nullptr; };
    const T *factors = packed.const_data_ptr<T>(), *in = x.const_data_ptr<T>();
    const T *base = grad_base.const_data_ptr<T>(), *branch = grad_branch.const_data_ptr<T>();
    T *dx = out_pointer(grad_x), *sums = out_pointer(partial), *room = out_pointer(scratch);
    kernels::KronNormCpu<T> args{};
    if (norm != nullptr) args = norm->pointers<T>();
    at::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
      T* own = room + at::get_thread_num() * scratch.size(1);
      for (int64_t part = first; part < last; ++part) {
        const int64_t begin = std::min(part * per_part, s.num_tokens);
        kernels::kron_backward_cpu<T>(s, factors, in, base, branch, norm != nullptr ? &args : nullptr, beta,
                                      grad_weight.defined() || grad_bias.defined(), begin,
                                      std::min(begin + per_part, s.num_tokens), dx,
                                      sums + part * partial.size(1), own);
      }
    });
    kernels::kron_reduce_cpu<T>(s, sums, parts, out_pointer(scale), out_pointer(down), out_pointer(up),
                                out_pointer(grad_weight), out_pointer(grad_bias));
  });
  return {scale.to(factor), down.to(factor), up.to(factor)};
}

// Where a result of `type` is computed: in place if that is the accumulate type, else in a wide copy that is
// rounded into it at the end.
Tensor wide_result(const Tensor& t, at::ScalarType acc) {
  if (!t.defined() || t.scalar_type() == acc) return t;
  return at::empty(t.sizes(), t.options().dtype(acc));
}

void round_into(const Tensor& t, const Tensor& wide) {
  if (t.defined() && !t.is_same(wide)) t.copy_(wide);
}

// The low-rank factors as the kernels read them, in the type of x.
struct PackedLora {
  kernels::LoraShapeCpu shape;
  Tensor factors;
  std::vector<int64_t> order;
  int64_t active = 0;

  PackedLora(const Tensor& x, Lora lora)
      : shape{x.size(0), lora.a.size(1), lora.b.size(0), lora.a.size(0)},
        factors(at::empty({kernels::lora_packed_size_cpu(shape)}, x.options())),
        order(shape.rank) {
    const auto acc = x.scalar_type();
    const Tensor a = lora.a.to(acc).contiguous(), b = lora.b.to(acc).contiguous(),
                 coeff = lora.coeff.to(acc).contiguous();
    dispatch_acc(acc, [&](auto zero) {
      using T = decltype(zero);
      active =
          kernels::lora_pack_cpu<T>(shape, a.const_data_ptr<T>(), b.const_data_ptr<T>(),
                                    coeff.const_data_ptr<T>(), factors.mutable_data_ptr<T>(), order.data());
    });
  }
};

}  // namespace

void CpuBackend::kron_forward(const Tensor& x, Factors f, double beta, const Tensor& out) {
  const auto s = kron_shape(x, f.scale, f.down, f.up);
  if (s.num_tokens == 0) return;
  const auto acc = accumulate_type(x.scalar_type());
  const Tensor sum = wide_result(out, acc);
  if (beta != 0.0) round_into(sum, out);
  run_forward(s, widened(x), nullptr, f, beta != 0.0, sum);
  round_into(out, sum);
}

FactorGrads CpuBackend::kron_backward(const Tensor& x, const Tensor& grad_out, Factors f, double beta,
                                      const Tensor& grad_x) {
  const auto s = kron_shape(x, f.scale, f.down, f.up);
  if (s.num_tokens == 0) return zero_grads(f);
  const auto acc = accumulate_type(x.scalar_type());
  const Tensor grad = widened(grad_out), sum = wide_result(grad_x, acc);
  if (beta != 0.0) round_into(sum, grad_x);
  auto grads = run_backward(s, widened(x), nullptr, f, grad, grad, beta != 0.0, sum, Tensor(), Tensor());
  round_into(grad_x, sum);
  return grads;
}

Tensor CpuBackend::norm_kron_forward(const Tensor& x, Norm norm, double eps, Factors f,
                                     at::ScalarType out_dtype) {
  const auto s = kron_shape(x, f.scale, f.down, f.up);
  const Tensor wide = widened(x), out = at::empty_like(wide);
  if (s.num_tokens > 0) {
    const WideNorm wide_norm(norm, eps, x.size(1), wide.scalar_type());
    run_forward(s, wide, &wide_norm, f, true, out);
  }
  return out.to(out_dtype);
}

FactorGrads CpuBackend::norm_kron_backward(const Tensor& x, Norm norm, Factors f, const Tensor& grad_base,
                                           const Tensor& grad_branch, const Tensor& grad_x,
                                           const Tensor& grad_weight, const Tensor& grad_bias) {
  const auto s = kron_shape(x, f.scale, f.down, f.up);
  if (s.num_tokens == 0) {
    for (const Tensor& t : {grad_weight, grad_bias}) {
      if (t.defined()) t.zero_();
    }
    return zero_grads(f);
  }
  const Tensor wide = widened(x);
  const auto acc = wide.scalar_type();
  const WideNorm wide_norm(norm, 0.0, x.size(1), acc);
  const Tensor base = widened(grad_base),
               branch = grad_branch.is_same(grad_base) ? base : widened(grad_branch);
  const Tensor sum = wide_result(grad_x, acc), weight = wide_result(grad_weight, acc),
               bias = wide_result(grad_bias, acc);
  auto grads = run_backward(s, wide, &wide_norm, f, base, branch, false, sum, weight, bias);
  round_into(grad_x, sum);
  round_into(grad_weight, weight);
  round_into(grad_bias, bias);
  return grads;
}

Tensor CpuBackend::layer_norm_forward(const Tensor& x, const OptTensor& weight, const OptTensor& bias,
                                      double eps, at::ScalarType out_dtype, const Tensor& mean,
                                      const Tensor& rstd) {
  const Tensor wide = widened(x), out = at::empty_like(wide);
  const WideNorm norm({weight, bias, mean, rstd}, eps, x.size(1), wide.scalar_type());
  dispatch_acc(wide.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T* in = wide.const_data_ptr<T>();
    T* o = out.mutable_data_ptr<T>();
    const auto args = norm.pointers<T>();
    at::parallel_for(0, x.size(0), row_grain(4 * x.size(1)), [&](int64_t begin, int64_t end) {
      kernels::layer_norm_cpu<T>(in, args.weight, args.bias, eps, false, begin, end, x.size(1), args.mean,
                                 args.rstd, o);
    });
  });
  return out.to(out_dtype);
}

void CpuBackend::dropout_add(const Tensor& base, const Tensor& branch, const Tensor& seed, double p,
                             const Tensor& out) {
  const Tensor wide = widened(branch);
  const auto acc = wide.scalar_type();
  const Tensor wide_base = base.defined() ? base.to(acc).contiguous() : Tensor();
  Tensor sum = out.scalar_type() == acc ? out : at::empty_like(wide);
  dispatch_acc(acc, [&](auto zero) {
    using T = decltype(zero);
    const T* b = wide_base.defined() ? wide_base.const_data_ptr<T>() : nullptr;
    const T* in = wide.const_data_ptr<T>();
    T* o = sum.mutable_data_ptr<T>();
    const int64_t key = *seed.const_data_ptr<int64_t>(), elements = wide.numel();
    at::parallel_for(0, (elements + 3) / 4, 4096, [&](int64_t begin, int64_t end) {
      kernels::dropout_add_cpu<T>(b, in, key, p, begin * 4, std::min(end * 4, elements), o);
    });
  });
  if (!sum.is_same(out)) out.copy_(sum);
}

void CpuBackend::lora_forward(const Tensor& x, Lora lora, const Tensor& out) {
  const auto acc = accumulate_type(x.scalar_type());
  const Tensor wide = widened(x), sum = wide_result(out, acc);
  round_into(sum, out);
  const PackedLora packed(wide, lora);
  const auto& s = packed.shape;
  const Tensor scratch = thread_scratch(kernels::lora_scratch_size_cpu(s), wide);
  dispatch_acc(acc, [&](auto zero) {
    using T = decltype(zero);
    const T *factors = packed.factors.const_data_ptr<T>(), *in = wide.const_data_ptr<T>();
    T *o = sum.mutable_data_ptr<T>(), *room = scratch.mutable_data_ptr<T>();
    const int64_t chunk = kernels::lora_chunk_tokens_cpu(s), chunks = (s.num_tokens + chunk - 1) / chunk;
    at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      kernels::lora_forward_cpu<T>(s, factors, packed.active, in, begin * chunk,
                                   std::min(end * chunk, s.num_tokens), o,
                                   room + at::get_thread_num() * scratch.size(1));
    });
  });
  round_into(out, sum);
}

LoraGrads CpuBackend::lora_backward(const Tensor& x, const Tensor& grad_out, Lora lora,
                                    const Tensor& grad_x) {
  const auto acc = accumulate_type(x.scalar_type()), factor = lora.a.scalar_type();
  const Tensor wide = widened(x), grad = widened(grad_out), sum = wide_result(grad_x, acc);
  round_into(sum, grad_x);
  const PackedLora packed(wide, lora);
  const auto& s = packed.shape;
  const Tensor scratch = thread_scratch(kernels::lora_scratch_size_cpu(s), wide);
  const int64_t parts = kernels::lora_partials_cpu(s), per_part = (s.num_tokens + parts - 1) / parts;
  const Tensor partial = at::empty({parts, kernels::lora_partial_size_cpu(s)}, wide.options());
  const auto like = [&](const Tensor& t) { return at::empty(t.sizes(), wide.options()); };
  const Tensor grad_a = like(lora.a), grad_b = like(lora.b), grad_coeff = like(lora.coeff);
  dispatch_acc(acc, [&](auto zero) {
    using T = decltype(zero);
    const T *factors = packed.factors.const_data_ptr<T>(), *in = wide.const_data_ptr<T>();
    const T* dy = grad.const_data_ptr<T>();
    T* dx = sum.defined() ? sum.mutable_data_ptr<T>() : nullptr;
    T *sums = partial.mutable_data_ptr<T>(), *room = scratch.mutable_data_ptr<T>();
    at::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
      T* own = room + at::get_thread_num() * scratch.size(1);
      for (int64_t part = first; part < last; ++part) {
        const int64_t begin = std::min(part * per_part, s.num_tokens);
        kernels::lora_backward_cpu<T>(s, factors, packed.active, in, dy, begin,
                                      std::min(begin + per_part, s.num_tokens), dx,
                                      sums + part * partial.size(1), own);
      }
    });
    kernels::lora_reduce_cpu<T>(s, packed.active, packed.order.data(), sums, parts,
                                grad_a.mutable_data_ptr<T>(), grad_b.mutable_data_ptr<T>(),
                                grad_coeff.mutable_data_ptr<T>());
  });
  round_into(grad_x, sum);
  return {grad_a.to(factor), grad_b.to(factor), grad_coeff.to(factor)};
}

}  // namespace alore::ops
