// Plans: pure functions from (shape, dtype) to how a call runs and what scratch memory it needs. They touch
// no device, so a test can print and assert them at their boundaries.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "kernels/dtype.h"

namespace alore::kernels {

// One Kronecker-structured linear map, x [num_tokens, s_in * p_in] -> out [num_tokens, s_out * p_out].
struct KronShape {
  int64_t num_tokens = 0;
  int64_t num_experts = 0;
  int64_t s_in = 0, s_out = 0;  // blocks that a token is cut into, and is rebuilt from
  int64_t p_in = 0, p_out = 0;  // width of a block
  int64_t rank = 0;
  DType activation = DType::kFloat32;
  DType factor = DType::kFloat32;

  int64_t width() const {
    return num_experts * rank;
  }  // of a block's low-rank code, all experts side by side
  int64_t scale_size() const { return num_experts * s_in * s_out; }
  int64_t down_size() const { return num_experts * p_in * rank; }
  int64_t up_size() const { return num_experts * rank * p_out; }
};

// How kron_forward / kron_backward run: tokens go through in chunks, so that scratch stays bounded whatever
// the batch. Offsets are bytes into the workspace, each a multiple of 256.
struct KronPlan {
  int64_t chunk_tokens = 0;            // tokens a chunk
  int64_t num_chunks = 0;              // 0 for an empty input
  int64_t scale_grad_blocks = 0;       // backward: thread blocks that each leave one partial sum of d(scale)
  size_t scale = 0, down = 0, up = 0;  // factors, in the dtype that the GEMMs read
  size_t code = 0, mixed = 0;          // Z and H of one chunk
  size_t grad_code = 0, grad_mixed = 0;                  // dZ and dH of one chunk
  size_t scale_partial = 0, grad_down = 0, grad_up = 0;  // gradient sums, accumulate type
  size_t workspace_bytes = 0;

  std::string to_string() const;
};

// Largest workspace a plan asks for, beside its copies of the factors and their gradients.
inline constexpr size_t kMaxWorkspaceBytes = size_t{192} << 20;

KronPlan plan_kron_forward(const KronShape& shape);
KronPlan plan_kron_backward(const KronShape& shape);

// Blocks of a two-stage column reduction over `rows` rows into `columns` sums: enough to fill a GPU, few
// enough that the partial sums stay small.
int64_t plan_reduce_blocks(int64_t rows, int64_t columns);

}  // namespace alore::kernels
