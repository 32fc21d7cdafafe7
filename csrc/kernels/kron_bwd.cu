#include "kernels/cuda_common.cuh"
#include "kernels/gemm.h"
#include "kernels/kron.h"
#include "kernels/kron_mix.cuh"

namespace alore::kernels {
namespace {

// grad_code[t,a,w] = sum_b scale[e,a,b] * grad_mixed[t,b,w].
template <typename Acc, typename Out>
__global__ void unmix_kernel(int64_t tokens, int s_in, int s_out, int width, int rank,
                             const Acc* __restrict__ scale,       // [num_experts, s_in, s_out]
                             const Acc* __restrict__ grad_mixed,  // [tokens, s_out, width]
                             Out* __restrict__ grad_code) {       // [tokens, s_in, width]
  const int64_t total = tokens * s_in * width;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < total;
       i += int64_t{gridDim.x} * blockDim.x) {
    const int w = static_cast<int>(i % width);
    const int a = static_cast<int>(i / width % s_in);
    const int64_t t = i / (int64_t{width} * s_in);
    const Acc* s = scale + (int64_t{w / rank} * s_in + a) * s_out;
    const Acc* dh = grad_mixed + t * s_out * width + w;
    Acc sum = 0;
    for (int b = 0; b < s_out; ++b) sum += s[b] * dh[int64_t{b} * width];
    grad_code[i] = convert<Out>(sum);
  }
}

// partial[block, e, a, b] = sum over the block's tokens and the rank of code[t,a,e,k] * grad_mixed[t,b,e,k].
// A block's threads form `lanes` groups of one thread per (e,a,b); group l takes tokens begin + l, begin + l
// + lanes, ... The groups' sums meet in shared memory in a fixed order.
template <typename Acc>
__global__ void scale_grad_kernel(int64_t tokens, int64_t tokens_per_block, int s_in, int s_out, int width,
                                  int rank, int entries, int lanes,
                                  const Acc* __restrict__ code,        // [tokens, s_in, width]
                                  const Acc* __restrict__ grad_mixed,  // [tokens, s_out, width]
                                  Acc* __restrict__ partial,           // [gridDim.x, entries]
                                  bool accumulate) {
  __shared__ Acc sums[kThreads];
  const int64_t begin = blockIdx.x * tokens_per_block, end = min(tokens, begin + tokens_per_block);
  const int stride = min(entries, static_cast<int>(blockDim.x));
  const int lane = threadIdx.x / stride;
  for (int first = 0; first < entries; first += stride) {
    const int entry = first + threadIdx.x % stride;
    Acc sum = 0;
    if (lane < lanes && entry < entries) {
      const int b = entry % s_out, a = entry / s_out % s_in, e = entry / (s_in * s_out);
      for (int64_t t = begin + lane; t < end; t += lanes) {
        const Acc* z = code + (t * s_in + a) * width + e * rank;
        const Acc* dh = grad_mixed + (t * s_out + b) * width + e * rank;
        for (int k = 0; k < rank; ++k) sum += z[k] * dh[k];
      }
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x < stride && entry < entries) {
      Acc total = 0;
      for (int l = 0; l < lanes; ++l) total += sums[l * stride + threadIdx.x];
      Acc* out = partial + int64_t{blockIdx.x} * entries + entry;
      *out = accumulate ? *out + total : total;
    }
    __syncthreads();
  }
}

void unmix(const CudaContext& context, const KronShape& s, int64_t tokens, const void* scale,
           const void* grad_mixed, void* grad_code) {
  dispatch(s.activation, [&](auto tag) {
    using Out = typename decltype(tag)::type;
    using Acc = acc_t<Out>;
    unmix_kernel<<<grid_for(tokens * s.s_in * s.width()), kThreads, 0, context.stream>>>(
        tokens, static_cast<int>(s.s_in), static_cast<int>(s.s_out), static_cast<int>(s.width()),
        static_cast<int>(s.rank), static_cast<const Acc*>(scale), static_cast<const Acc*>(grad_mixed),
        static_cast<Out*>(grad_code));
  });
  check_launch("kron_unmix");
}

void scale_grad(const CudaContext& context, const KronShape& s, int64_t blocks, int64_t tokens,
                const void* code, const void* grad_mixed, void* partial, bool accumulate) {
  const int entries = static_cast<int>(s.scale_size());
  const int lanes = std::max(1, kThreads / entries);
  const int64_t tokens_per_block = (tokens + blocks - 1) / blocks;
  dispatch_acc(accumulate_type(s.activation), [&](auto tag) {
    using Acc = typename decltype(tag)::type;
    scale_grad_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, context.stream>>>(
        tokens, tokens_per_block, static_cast<int>(s.s_in), static_cast<int>(s.s_out),
        static_cast<int>(s.width()), static_cast<int>(s.rank), entries, lanes, static_cast<const Acc*>(code),
        static_cast<const Acc*>(grad_mixed), static_cast<Acc*>(partial), accumulate);
  });
  check_launch("kron_scale_grad");
}

}  // namespace

void kron_backward(const CudaContext& context, const KronShape& s, const KronPlan& plan,
                   const KronFactors& factors, const void* x, const void* grad_out, float beta, void* grad_x,
                   const KronGradients& grads, void* workspace) {
  const DType acc = accumulate_type(s.activation);
  if (s.num_tokens == 0) {
    check(cudaMemsetAsync(grads.scale, 0, s.scale_size() * size_of(s.factor), context.stream),
          "kron_backward");
    check(cudaMemsetAsync(grads.down, 0, s.down_size() * size_of(s.factor), context.stream), "kron_backward");
    check(cudaMemsetAsync(grads.up, 0, s.up_size() * size_of(s.factor), context.stream), "kron_backward");
    return;
  }
  auto* base = static_cast<char*>(workspace);
  void *scale = base + plan.scale, *down = base + plan.down, *up = base + plan.up;
  void *code = base + plan.code, *mixed = base + plan.mixed;
  void *grad_code = base + plan.grad_code, *grad_mixed = base + plan.grad_mixed;
  void *partial = base + plan.scale_partial, *grad_down = base + plan.grad_down,
       *grad_up = base + plan.grad_up;
  kron_pack_factors(context, s, factors, scale, down, up);

  const size_t element = size_of(s.activation);
  const int64_t width = s.width();
  for (int64_t begin = 0; begin < s.num_tokens; begin += plan.chunk_tokens) {
    const int64_t tokens = std::min(plan.chunk_tokens, s.num_tokens - begin);
    const int64_t rows_in = tokens * s.s_in, rows_out = tokens * s.s_out;
    const char* x_chunk = static_cast<const char*>(x) + begin * s.s_in * s.p_in * element;
    const char* dy_chunk = static_cast<const char*>(grad_out) + begin * s.s_out * s.p_out * element;
    const float sum = begin == 0 ? 0.0f : 1.0f;  // factor gradients add up over the chunks

    // Z and H are recomputed: keeping them would cost memory for every layer between forward and backward.
    gemm(context, Op::kNone, Op::kNone, rows_in, width, s.p_in, s.activation, x_chunk, s.p_in, down, width,
         0.0f, acc, code, width);
    kron_mix(context, s, tokens, scale, code, mixed);
    gemm(context, Op::kNone, Op::kTranspose, rows_out, width, s.p_out, s.activation, dy_chunk, s.p_out, up,
         s.p_out, 0.0f, acc, grad_mixed, width);
    unmix(context, s, tokens, scale, grad_mixed, grad_code);
    scale_grad(context, s, plan.scale_grad_blocks, tokens, code, grad_mixed, partial, begin != 0);
    gemm(context, Op::kTranspose, Op::kNone, width, s.p_out, rows_out, s.activation, mixed, width, dy_chunk,
         s.p_out, sum, acc, grad_up, s.p_out);
    gemm(context, Op::kTranspose, Op::kNone, s.p_in, width, rows_in, s.activation, x_chunk, s.p_in, grad_code,
         width, sum, acc, grad_down, width);
    if (grad_x != nullptr) {
      char* dx_chunk = static_cast<char*>(grad_x) + begin * s.s_in * s.p_in * element;
      gemm(context, Op::kNone, Op::kTranspose, rows_in, s.p_in, width, s.activation, grad_code, width, down,
           width, beta, s.activation, dx_chunk, s.p_in);
    }
  }
  kron_unpack_gradients(context, s, plan.scale_grad_blocks, partial, grad_down, grad_up, grads);
}

}  // namespace alore::kernels
