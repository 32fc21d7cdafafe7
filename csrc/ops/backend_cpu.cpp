#include "ops/backend_cpu.h"

#include <ATen/Parallel.h>

#include <algorithm>

#include "kernels/dropout.h"
#include "kernels/kron.h"
#include "kernels/layer_norm.h"

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

OptTensor widened_to(const OptTensor& t, at::ScalarType type) {
  if (!t.has_value() || !t->defined()) return std::nullopt;
  return t->to(type).contiguous();
}

template <typename T>
const T* data_or_null(const OptTensor& t) {
  return t.has_value() ? t->const_data_ptr<T>() : nullptr;
}

// Factors as the GEMMs and the mixing loops read them.
struct PackedFactors {
  Tensor spread;  // [s_in, s_out, width]
  Tensor down;    // [p_in, width]
  Tensor up;      // [width, p_out]

  PackedFactors(const kernels::KronShape& s, Factors f, at::ScalarType acc)
      : spread(at::empty({s.s_in, s.s_out, s.width()}, f.scale.options().dtype(acc))),
        down(f.down.to(acc).permute({1, 0, 2}).reshape({s.p_in, s.width()})),
        up(f.up.to(acc).reshape({s.width(), s.p_out})) {
    const Tensor scale = f.scale.to(acc).contiguous();
    dispatch_acc(acc, [&](auto zero) {
      using T = decltype(zero);
      kernels::kron_spread_scale_cpu<T>(scale.const_data_ptr<T>(), s.num_experts, s.s_in, s.s_out, s.rank,
                                        spread.mutable_data_ptr<T>());
    });
  }
};

Tensor encode(const Tensor& x, const kernels::KronShape& s, const Tensor& down) {
  return at::mm(x.view({s.num_tokens * s.s_in, s.p_in}), down);
}

Tensor mix(const Tensor& code, const kernels::KronShape& s, const Tensor& spread) {
  Tensor mixed = at::empty({s.num_tokens * s.s_out, s.width()}, code.options());
  dispatch_acc(code.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T *z = code.const_data_ptr<T>(), *scale = spread.const_data_ptr<T>();
    T* h = mixed.mutable_data_ptr<T>();
    at::parallel_for(0, s.num_tokens, row_grain(s.s_in * s.s_out * s.width()),
                     [&](int64_t begin, int64_t end) {
                       kernels::kron_mix_cpu<T>(z, scale, begin, end, s.s_in, s.s_out, s.width(), h);
                     });
  });
  return mixed;
}

Tensor unmix(const Tensor& grad_mixed, const kernels::KronShape& s, const Tensor& spread) {
  Tensor grad_code = at::empty({s.num_tokens * s.s_in, s.width()}, grad_mixed.options());
  dispatch_acc(grad_mixed.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T *dh = grad_mixed.const_data_ptr<T>(), *scale = spread.const_data_ptr<T>();
    T* dz = grad_code.mutable_data_ptr<T>();
    at::parallel_for(0, s.num_tokens, row_grain(s.s_in * s.s_out * s.width()),
                     [&](int64_t begin, int64_t end) {
                       kernels::kron_unmix_cpu<T>(dh, scale, begin, end, s.s_in, s.s_out, s.width(), dz);
                     });
  });
  return grad_code;
}

Tensor scale_grad(const Tensor& code, const Tensor& grad_mixed, const kernels::KronShape& s) {
  // The number of partial sums depends on the shape alone, so the result does not change with the number of
  // threads.
  const int64_t entries = s.s_in * s.s_out * s.width();
  const int64_t parts = std::clamp<int64_t>(s.num_tokens / row_grain(entries), 1, 64);
  const int64_t per_part = (s.num_tokens + parts - 1) / parts;
  Tensor partial = at::empty({parts, s.s_in, s.s_out, s.num_experts, s.rank}, code.options());
  dispatch_acc(code.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T *z = code.const_data_ptr<T>(), *dh = grad_mixed.const_data_ptr<T>();
    T* out = partial.mutable_data_ptr<T>();
    at::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
      for (int64_t part = first; part < last; ++part) {
        const int64_t begin = std::min(part * per_part, s.num_tokens);
        const int64_t end = std::min(begin + per_part, s.num_tokens);
        kernels::kron_scale_grad_cpu<T>(z, dh, begin, end, s.s_in, s.s_out, s.width(), out + part * entries);
      }
    });
  });
  return partial.sum(at::IntArrayRef({0, 4})).permute({2, 0, 1}).contiguous();
}

Tensor layer_norm_rows(const Tensor& x, const OptTensor& weight, const OptTensor& bias, double eps,
                       bool statistics_known, const Tensor& mean, const Tensor& rstd) {
  const Tensor wide = widened(x);
  const auto acc = wide.scalar_type();
  const OptTensor w = widened_to(weight, acc), b = widened_to(bias, acc);
  Tensor out = at::empty_like(wide);
  dispatch_acc(acc, [&](auto zero) {
    using T = decltype(zero);
    const T *in = wide.const_data_ptr<T>(), *wp = data_or_null<T>(w), *bp = data_or_null<T>(b);
    T *m = mean.mutable_data_ptr<T>(), *r = rstd.mutable_data_ptr<T>(), *o = out.mutable_data_ptr<T>();
    at::parallel_for(0, x.size(0), row_grain(4 * x.size(1)), [&](int64_t begin, int64_t end) {
      kernels::layer_norm_cpu<T>(in, wp, bp, eps, statistics_known, begin, end, x.size(1), m, r, o);
    });
  });
  return out;
}

Tensor total_grad(const Tensor& grad_a, const Tensor& grad_b, at::ScalarType acc) {
  const Tensor a = grad_a.to(acc);
  return grad_b.defined() ? a + grad_b.to(acc) : a;
}

}  // namespace

void CpuBackend::kron_forward(const Tensor& x, Factors f, double beta, const Tensor& out) {
  const auto s = kron_shape(x, f.scale, f.down, f.up);
  if (s.num_tokens == 0) return;
  const auto acc = accumulate_type(x.scalar_type());
  const PackedFactors packed(s, f, acc);
  const Tensor mixed = mix(encode(widened(x), s, packed.down), s, packed.spread);
  if (out.scalar_type() == acc) {
    Tensor blocks = out.view({s.num_tokens * s.s_out, s.p_out});
    at::addmm_out(blocks, blocks, mixed, packed.up, beta);
    return;
  }
  Tensor sum = at::mm(mixed, packed.up).view(out.sizes());
  if (beta != 0.0) sum.add_(out);
  out.copy_(sum);
}

FactorGrads CpuBackend::kron_backward(const Tensor& x, const Tensor& grad_out, Factors f, double beta,
                                      const Tensor& grad_x) {
  const auto s = kron_shape(x, f.scale, f.down, f.up);
  if (s.num_tokens == 0) return zero_grads(f);
  const auto acc = accumulate_type(x.scalar_type()), factor = f.scale.scalar_type();
  const PackedFactors packed(s, f, acc);
  const Tensor wide_x = widened(x).view({s.num_tokens * s.s_in, s.p_in});
  const Tensor wide_grad = widened(grad_out).view({s.num_tokens * s.s_out, s.p_out});

  // Z and H are recomputed: keeping them would cost memory for every layer between forward and backward.
  const Tensor code = at::mm(wide_x, packed.down);
  const Tensor grad_up = at::mm(mix(code, s, packed.spread).t(), wide_grad);
  const Tensor grad_mixed = at::mm(wide_grad, packed.up.t());
  const Tensor grad_code = unmix(grad_mixed, s, packed.spread);
  const Tensor grad_down = at::mm(wide_x.t(), grad_code);
  if (grad_x.defined() && grad_x.scalar_type() == acc) {
    Tensor blocks = grad_x.view({s.num_tokens * s.s_in, s.p_in});
    at::addmm_out(blocks, blocks, grad_code, packed.down.t(), beta);
  } else if (grad_x.defined()) {
    Tensor sum = at::mm(grad_code, packed.down.t()).view(grad_x.sizes());
    if (beta != 0.0) sum.add_(grad_x);
    grad_x.copy_(sum);
  }
  return {scale_grad(code, grad_mixed, s).to(factor),
          grad_down.view({s.p_in, s.num_experts, s.rank}).permute({1, 0, 2}).contiguous().to(factor),
          grad_up.view({s.num_experts, s.rank, s.p_out}).to(factor)};
}

Tensor CpuBackend::layer_norm_forward(const Tensor& x, const OptTensor& weight, const OptTensor& bias,
                                      double eps, at::ScalarType out_dtype, const Tensor& mean,
                                      const Tensor& rstd) {
  return layer_norm_rows(x, weight, bias, eps, false, mean, rstd).to(out_dtype);
}

Tensor CpuBackend::layer_norm_recompute(const Tensor& x, const OptTensor& weight, const OptTensor& bias,
                                        const Tensor& mean, const Tensor& rstd, at::ScalarType out_dtype) {
  return layer_norm_rows(x, weight, bias, 0.0, true, mean, rstd).to(out_dtype);
}

Tensor CpuBackend::layer_norm_backward(const Tensor& grad_a, const Tensor& grad_b, const Tensor& x,
                                       const OptTensor& weight, const Tensor& mean, const Tensor& rstd) {
  const Tensor wide = widened(x);
  const auto acc = wide.scalar_type();
  const Tensor grad = total_grad(grad_a, grad_b, acc).contiguous();
  const OptTensor w = widened_to(weight, acc);
  Tensor grad_x = at::empty_like(wide);
  dispatch_acc(acc, [&](auto zero) {
    using T = decltype(zero);
    const T *g = grad.const_data_ptr<T>(), *in = wide.const_data_ptr<T>(), *wp = data_or_null<T>(w);
    const T *m = mean.const_data_ptr<T>(), *r = rstd.const_data_ptr<T>();
    T* dx = grad_x.mutable_data_ptr<T>();
    at::parallel_for(0, x.size(0), row_grain(6 * x.size(1)), [&](int64_t begin, int64_t end) {
      kernels::layer_norm_backward_cpu<T>(g, in, wp, m, r, begin, end, x.size(1), dx);
    });
  });
  return grad_x.to(x.scalar_type());
}

std::pair<Tensor, Tensor> CpuBackend::layer_norm_affine_backward(const Tensor& grad_a, const Tensor& grad_b,
                                                                 const Tensor& x, const Tensor& mean,
                                                                 const Tensor& rstd,
                                                                 at::ScalarType affine_dtype) {
  const Tensor grad = total_grad(grad_a, grad_b, mean.scalar_type());
  const Tensor normalised = (x.to(mean.scalar_type()) - mean.unsqueeze(1)) * rstd.unsqueeze(1);
  return {(grad * normalised).sum(0).to(affine_dtype), grad.sum(0).to(affine_dtype)};
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

}  // namespace alore::ops
