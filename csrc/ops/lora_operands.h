// The small tensors of a low-rank call as CUDA kernels read them, and where its mask comes from.
#pragma once

#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <ATen/cuda/PhiloxCudaState.h>

#include <mutex>

#include "ops/cuda_call.h"
#include "ops/lora.h"

namespace alore::ops {

// The fused kernels load 16 bytes at a time; a view into the middle of a tensor may start elsewhere.
inline Tensor dense_aligned(const Tensor& t) { return aligned(t.contiguous()); }

// The generator's state as ATen's dropout takes it: under graph capture the kernel reads it from the device.
inline kernels::PhiloxSource next_philox() {
  auto* generator = at::get_generator_or_default<at::CUDAGeneratorImpl>(
      std::nullopt, at::cuda::detail::getDefaultCUDAGenerator());
  const std::lock_guard<std::mutex> lock(generator->mutex_);
  const at::PhiloxCudaState state = generator->philox_cuda_state(kernels::kPhiloxIncrement);
  if (state.captured_) return {0, state.offset_intragraph_, state.seed_.ptr, state.offset_.ptr};
  return {state.seed_.val, state.offset_.val, nullptr, nullptr};
}

// Holds its tensors for as long as they are needed.
struct LoraOperands {
  kernels::LoraShape shape;
  Tensor a, b, coeff, mask;
  kernels::Coefficients coefficients;

  LoraOperands(const LoraCall& call, const LoraMask& source)
      : shape(lora_shape(call.x, call.weight, call.lora_a, call.expert_rank())),
        a(call.lora_a.contiguous()),
        b(call.lora_b.contiguous()),
        coeff(call.coeff.contiguous()),
        mask(source.given.value_or(Tensor())) {
    coefficients.coeff = read(coeff);
    coefficients.mask = read(mask);
    coefficients.draw = source.draw;
    coefficients.p = source.p;
    coefficients.mask_out = write(source.drawn);
    if (source.draw) coefficients.philox = next_philox();
  }

  kernels::Factors2 factors() const { return {read(a), read(b)}; }

  // `coefficients` once the mask exists in memory.
  kernels::Coefficients drawn(const LoraMask& source) const {
    kernels::Coefficients known;
    known.coeff = coefficients.coeff;
    known.mask = source.drawn.defined() ? read(source.drawn) : coefficients.mask;
    return known;
  }
};

}  // namespace alore::ops
