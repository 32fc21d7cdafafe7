// Backward of the fused ALoRE adapter for any shape of its domain; alore_bwd_pipelined.cu takes the common
// ones. grad_out and the kept rows are read once, grad_x is written once, and every block leaves one partial
// sum of the factors' gradients.
//
// A block runs through tiles of 16 * row_tiles tokens that cp.async brings into shared memory ahead of time.
// A tile takes three steps with a barrier after each:
//   1. codes: Z = base @ down and dH = dY @ up^T on the tensor cores, and the row sums that the norm's
//      gradient needs
//
//   2. mixing: H and dZ over blocks in fp32, d(scale) summed in registers
//
//   3. outputs: grad_x = norm'(grad_out + dZ @ down^T), d(up) += H^T dY and d(down) += base^T dZ, sums in
//      registers
//
// The norm's gradient needs, per row, the means of g = weight * d(base) and of g * n over columns that no
// single warp has, before any of d(base) exists. The adapter's part of them follows from the codes:
//   sum_j weight_j (dZ down^T)_j = sum_w dZ_w (weight @ down)_w
//   sum_j n_j weight_j (dZ down^T)_j = sum_w dZ_w (Z - bias @ down)_w          since base = n * weight + bias
// so that d(base) is made once, in the last step.
#include "kernels/alore_bwd_tiles.cuh"
#include "kernels/alore_fused.cuh"

namespace alore::kernels {
namespace {

// One block's work: the kernel runs the steps, each of which is a method.
template <typename In, typename Out, int kBlocks, int kItems, Path kPath>
class TilesBackward : public TilesMemory<In, Out, kBlocks, kPath> {
  using Memory = TilesMemory<In, Out, kBlocks, kPath>;
  using Stage = typename Memory::Stage;
  using Memory::c, Memory::warp, Memory::warps, Memory::dim, Memory::per_block, Memory::image_stride;
  using Memory::code_tiles, Memory::padded, Memory::code_stride, Memory::log_width, Memory::lane, Memory::g;
  using Memory::kWide, Memory::kFast, Memory::p, Memory::d, Memory::layout, Memory::norm, Memory::num_blocks;
  using Memory::rows, Memory::row_blocks, Memory::stage_at;

  const bool add_base, drops;
  const int code_elements;  // of one key split
  // Pieces of the factor gradients that this warp sums: 32 block columns by 16 code columns each, over its
  // part of a tile's row blocks.
  const int items, item0, part;
  float up_sum[kItems][4][4] = {}, down_sum[kItems][4][4] = {};
  float scale_sum[kBlocks][kBlocks] = {};  // of code column threadIdx.x % padded

  template <typename T>
  __device__ __forceinline__ T* at(int offset) const {
    return Memory::template at<T>(offset);
  }

 public:
  __device__ __forceinline__ TilesBackward(const TilesParams<In, Out>& params, unsigned char* memory)
      : Memory(params, memory),
        add_base(kPath == Path::kNorm || p.add_base),
        drops(!kFast && p.dropout.seed != nullptr),
        code_elements(row_blocks * kTileRows * padded),
        items(per_block * code_tiles),
        item0(kItems > 1 || warps <= items ? warp : warp % items),
        part(kItems > 1 || warps <= items ? 0 : warp / items) {}

  // This warp's shares of Z = base @ down and dH = dY @ up^T, and of the row sums that the norm's gradient
  // needs.
  __device__ __forceinline__ void codes(int64_t first_row, int stage) const {
    const Stage in = stage_at(stage);
    auto *down = at<Out>(layout.down), *up = at<Out>(layout.up), *affine_image = at<Out>(layout.affine_image);
    auto *weight = at<float>(layout.weight), *bias = at<float>(layout.bias);
    auto *code = at<float>(layout.code), *grad_mixed = at<float>(layout.grad_mixed);
    auto* row_sums = at<float2>(layout.row_sums);
#pragma unroll 1
    for (int i = warp; i < row_blocks * p.key_splits; i += warps) {
      const int split = i % p.key_splits, block = i / p.key_splits % num_blocks;
      const int row_tile = i / p.key_splits / num_blocks;
      const int row0 = row_tile * kTileRows + g, row1 = row0 + 8;
      const RowNorm n0{norm ? in.means[row0] : 0.0f, norm ? in.rstds[row0] : 1.0f};
      const RowNorm n1{norm ? in.means[row1] : 0.0f, norm ? in.rstds[row1] : 1.0f};
      const int begin = per_block * split / p.key_splits, end = per_block * (split + 1) / p.key_splits;
      // Of the undropped gradient with weight and bias (their 16-bit halves in two columns each), and with
      // the base's rows, of which the diagonal counts.
      float affine_sums[4] = {}, gram0[4] = {}, gram1[4] = {};
#pragma unroll 1
      for (int t = 0; t < code_tiles; ++t) {
        float z[2][4] = {}, dh[2][4] = {};
#pragma unroll(kFast ? 2 : 1)
        for (int group = begin; group < end; ++group) {
          const int local = group * kGroupColumns + c * 8, column = block * d.block_dim + local;
          const bool inside = kFast || local < d.block_dim;
          uint4 base0{}, base1{}, grad0{}, grad1{}, undropped0{}, undropped1{};
          if (inside) {
            grad0 = *reinterpret_cast<const uint4*>(in.grad + row0 * layout.grad_stride + column);
            grad1 = *reinterpret_cast<const uint4*>(in.grad + row1 * layout.grad_stride + column);
            if (norm) {
              const Eight w = shared8(weight + column), o = shared8(bias + column);
              base0 =
                  pack8<Out>(affine(normalised(shared8(in.x + row0 * layout.x_stride + column), n0), w, o));
              base1 =
                  pack8<Out>(affine(normalised(shared8(in.x + row1 * layout.x_stride + column), n1), w, o));
            } else if constexpr (!kWide) {
              base0 = *reinterpret_cast<const uint4*>(in.x + row0 * layout.x_stride + column);
              base1 = *reinterpret_cast<const uint4*>(in.x + row1 * layout.x_stride + column);
            }
            if (drops) {
              undropped0 = grad0;
              undropped1 = grad1;
              grad0 = dropped<Out>(grad0, p.dropout, (first_row + row0) * dim + column);
              grad1 = dropped<Out>(grad1, p.dropout, (first_row + row1) * dim + column);
            }
          }
          if (norm && t == 0) {
            const uint4 &u = drops ? undropped0 : grad0, &v = drops ? undropped1 : grad1;
            const uint32_t low[4] = {u.x, v.x, u.y, v.y}, high[4] = {u.z, v.z, u.w, v.w};
            const uint4 b =
                g < 4 ? load_shared_16(affine_image + g * layout.grad_stride + (inside ? column : 0))
                      : uint4{0, 0, 0, 0};
            mma<Out>(affine_sums, low, b.x, b.y);
            mma<Out>(gram0, low, base0.x, base0.y);
            mma<Out>(gram1, low, base1.x, base1.y);
            mma<Out>(affine_sums, high, b.z, b.w);
            mma<Out>(gram0, high, base0.z, base0.w);
            mma<Out>(gram1, high, base1.z, base1.w);
          }
          accumulate_code<Out>(z, base0, base1, down, image_stride, t, local, g);
          accumulate_code<Out>(dh, grad0, grad1, up, image_stride, t, local, g);
        }
        const int to =
            split * code_elements + (row_tile * num_blocks + block) * kTileRows * padded + t * kCodeTile;
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const int upper = to + g * padded + n * 8 + 2 * c, lower = upper + 8 * padded;
          *reinterpret_cast<float2*>(code + upper) = {z[n][0], z[n][1]};
          *reinterpret_cast<float2*>(code + lower) = {z[n][2], z[n][3]};
          *reinterpret_cast<float2*>(grad_mixed + upper) = {dh[n][0], dh[n][1]};
          *reinterpret_cast<float2*>(grad_mixed + lower) = {dh[n][2], dh[n][3]};
        }
      }
      if (norm) {
        // Lane 0 of a row has the weight's columns, lane 1 the bias's, lane g / 2 the diagonal's entry.
        const int quad = lane & ~3;
        const float diagonal0 = __shfl_sync(0xffffffffu, g % 2 ? gram0[1] : gram0[0], quad | g / 2);
        const float diagonal1 = __shfl_sync(0xffffffffu, g % 2 ? gram1[3] : gram1[2], quad | g / 2);
        const float bias0 = __shfl_sync(0xffffffffu, affine_sums[0] + affine_sums[1], quad | 1);
        const float bias1 = __shfl_sync(0xffffffffu, affine_sums[2] + affine_sums[3], quad | 1);
        if (c == 0) {
          row_sums[i * kTileRows + g] = {affine_sums[0] + affine_sums[1], diagonal0 - bias0};
          row_sums[i * kTileRows + g + 8] = {affine_sums[2] + affine_sums[3], diagonal1 - bias1};
        }
      }
    }
  }

  // H and dZ over blocks; a thread takes code column threadIdx.x % padded of some rows. d(scale).
  __device__ __forceinline__ void mix() {
    auto *code = at<float>(layout.code), *grad_mixed = at<float>(layout.grad_mixed);
    auto *mixed = at<Out>(layout.mixed), *grad_code = at<Out>(layout.grad_code);
    auto* mixing = at<float>(layout.mixing);
    auto *down_weight = at<float>(layout.down_weight), *down_bias = at<float>(layout.down_bias);
    auto *row_sums = at<float2>(layout.row_sums), *row_means = at<float2>(layout.row_means);
    const int w = threadIdx.x & (padded - 1);
#pragma unroll 1
    for (int row = threadIdx.x >> log_width; row < rows; row += blockDim.x >> log_width) {
      const int row_tile = row / kTileRows, t = row % kTileRows;
      const int from = (row_tile * num_blocks * kTileRows + t) * padded + w;
      float z[kBlocks] = {}, dh[kBlocks] = {};
#pragma unroll 1
      for (int split = 0; split < p.key_splits; ++split) {
#pragma unroll
        for (int a = 0; a < kBlocks; ++a) {
          if (a >= num_blocks) continue;
          const int element = split * code_elements + from + a * kTileRows * padded;
          z[a] += code[element];
          dh[a] += grad_mixed[element];
        }
      }
      float of_weight = 0.0f, of_normalised = 0.0f;
#pragma unroll
      for (int a = 0; a < kBlocks; ++a) {
        if (a >= num_blocks) continue;
        float h = 0.0f, dz = 0.0f;
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
          if (b >= num_blocks) continue;
          h += mixing[(b * num_blocks + a) * padded + w] * z[b];
          dz += mixing[(a * num_blocks + b) * padded + w] * dh[b];
          scale_sum[a][b] += z[a] * dh[b];
        }
        const int to = ((row_tile * num_blocks + a) * kTileRows + t) * code_stride + w;
        mixed[to] = convert<Out>(h);
        grad_code[to] = convert<Out>(dz);
        if (norm) {
          of_weight += dz * down_weight[a * padded + w];
          of_normalised += dz * (z[a] - down_bias[a * padded + w]);
        }
      }
      if (norm) {
        const int half = w / 32;
        of_weight = lanes_sum(of_weight, padded > 16);
        of_normalised = lanes_sum(of_normalised, padded > 16);
        if (w % 32 == 0) {
          if (half == 0) {
            const int first = row_tile * num_blocks * p.key_splits;
#pragma unroll 1
            for (int s = first; s < first + num_blocks * p.key_splits; ++s) {
              of_weight += row_sums[s * kTileRows + t].x;
              of_normalised += row_sums[s * kTileRows + t].y;
            }
          }
          const float inverse = 1.0f / static_cast<float>(dim);
          row_means[row * 2 + half] = {of_weight * inverse, of_normalised * inverse};
        }
      }
    }
  }

  // d(up) and d(down) of this warp's items, and grad_x of their columns.
  __device__ __forceinline__ void outputs(int64_t first_row, int stage) {
    const Stage in = stage_at(stage);
    auto* down_out = at<Out>(layout.down_out);
    auto *weight = at<float>(layout.weight), *bias = at<float>(layout.bias);
    auto *mixed = at<Out>(layout.mixed), *grad_code = at<Out>(layout.grad_code);
    auto* row_means = at<float2>(layout.row_means);
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const int item = item0 + k * warps;
      if (item >= items || part >= p.parts) break;
      const int group = item % per_block, code_tile = item / per_block;
      const int local = group * kGroupColumns + c * 8;
      const bool inside = kFast || local < d.block_dim;
#pragma unroll 1
      for (int rb = part, row_tile = 0, block = part; rb < row_blocks; rb += p.parts, block += p.parts) {
        while (block >= num_blocks) block -= num_blocks, ++row_tile;
        const int row0 = row_tile * kTileRows + g, row1 = row0 + 8, column = block * d.block_dim + local;
        uint4 grad0{}, grad1{}, base0{}, base1{};
        Eight n0{}, n1{}, w{};
        RowNorm r0{0.0f, 1.0f}, r1{0.0f, 1.0f};
        if (inside) {
          grad0 = *reinterpret_cast<const uint4*>(in.grad + row0 * layout.grad_stride + column);
          grad1 = *reinterpret_cast<const uint4*>(in.grad + row1 * layout.grad_stride + column);
          if (norm) {
            r0 = {in.means[row0], in.rstds[row0]};
            r1 = {in.means[row1], in.rstds[row1]};
            n0 = normalised(shared8(in.x + row0 * layout.x_stride + column), r0);
            n1 = normalised(shared8(in.x + row1 * layout.x_stride + column), r1);
            w = shared8(weight + column);
            const Eight o = shared8(bias + column);
            base0 = pack8<Out>(affine(n0, w, o));
            base1 = pack8<Out>(affine(n1, w, o));
          } else if constexpr (!kWide) {
            base0 = *reinterpret_cast<const uint4*>(in.x + row0 * layout.x_stride + column);
            base1 = *reinterpret_cast<const uint4*>(in.x + row1 * layout.x_stride + column);
          }
        }
        float dbase[4][4] = {};
        if (add_base) {
          set_output_row(dbase, 0, unpack8<Out>(grad0));
          set_output_row(dbase, 1, unpack8<Out>(grad1));
        }
        if (drops && inside) {
          grad0 = dropped<Out>(grad0, p.dropout, (first_row + row0) * dim + column);
          grad1 = dropped<Out>(grad1, p.dropout, (first_row + row1) * dim + column);
        }
        const int codes = rb * kTileRows * code_stride + code_tile * kCodeTile;
        uint32_t a[4];
        load_a_transposed(a, mixed + codes, code_stride, lane);
        mma<Out>(up_sum[k][0], a, transpose8x8(grad0.x), transpose8x8(grad1.x));
        mma<Out>(up_sum[k][1], a, transpose8x8(grad0.y), transpose8x8(grad1.y));
        mma<Out>(up_sum[k][2], a, transpose8x8(grad0.z), transpose8x8(grad1.z));
        mma<Out>(up_sum[k][3], a, transpose8x8(grad0.w), transpose8x8(grad1.w));
        load_a_transposed(a, grad_code + codes, code_stride, lane);
        mma<Out>(down_sum[k][0], a, transpose8x8(base0.x), transpose8x8(base1.x));
        mma<Out>(down_sum[k][1], a, transpose8x8(base0.y), transpose8x8(base1.y));
        mma<Out>(down_sum[k][2], a, transpose8x8(base0.z), transpose8x8(base1.z));
        mma<Out>(down_sum[k][3], a, transpose8x8(base0.w), transpose8x8(base1.w));
        if ((!kFast && code_tile != 0) || p.grad_x == nullptr)
          continue;  // one of the warps on these columns writes them

#pragma unroll 1
        for (int t = 0; t < code_tiles; ++t) {
          load_a(a, grad_code + rb * kTileRows * code_stride + t * kCodeTile, code_stride, lane);
          accumulate_output<Out>(dbase, a, down_out, d.chunks, t, group * 4, g, c);
        }
        if (!inside) continue;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int row = r == 0 ? row0 : row1;
          if (first_row + row >= p.num_tokens) continue;
          Eight dx = output_row(dbase, r);
          if (norm) {
            const float2 m0 = row_means[row * 2];
            const float2 m1 = padded > 32 ? row_means[row * 2 + 1] : float2{0.0f, 0.0f};
            const float rstd = r == 0 ? r0.rstd : r1.rstd;
            const float mean_g = rstd * (m0.x + m1.x), mean_gn = rstd * (m0.y + m1.y);
            const Eight& n = r == 0 ? n0 : n1;
#pragma unroll
            for (int j = 0; j < 8; ++j) dx.v[j] = dx.v[j] * (w.v[j] * rstd) - (n.v[j] * mean_gn + mean_g);
          }
          const int64_t to = (first_row + row) * dim + column;
          if (!kFast && p.grad_sum != nullptr) {
            Raw8<In> more;
            more.load(p.grad_sum + to);
            const Eight e = more.floats();
#pragma unroll
            for (int j = 0; j < 8; ++j) dx.v[j] += e.v[j];
          }
          Raw8<In> result;
          result.set(dx);
          result.store(p.grad_x + to);
        }
      }
    }
  }

  // The block's sums, to p.partial in the factors' own layout. The codes' and stages' memory is free then.
  __device__ __forceinline__ void leave_sums() {
    const int scale_size = p.factors.num_experts * num_blocks * num_blocks,
              factor_size = d.width * d.block_dim;
    auto* sums = at<float>(layout.code);  // [down | up]
    float* out = p.partial + static_cast<int64_t>(blockIdx.x) * (scale_size + 2 * factor_size);
    leave_factor_sums(sums, out + scale_size, factor_size);
    this->leave_scale_sums(scale_sum, sums, out);
  }

 private:
  // Parts are added one after the other.
  __device__ __forceinline__ void leave_factor_sums(float* sums, float* out, int factor_size) const {
#pragma unroll 1
    for (int turn = 0; turn < p.parts; ++turn) {
      if (part == turn) {
#pragma unroll
        for (int k = 0; k < kItems; ++k) {
          const int item = item0 + k * warps;
          if (item >= items) break;
          const int group = item % per_block, code_tile = item / per_block;
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int w = code_tile * kCodeTile + g + half * 8, expert = w / p.factors.rank;
            float* down_at = sums + expert * d.block_dim * p.factors.rank + w - expert * p.factors.rank;
            float* up_at = sums + factor_size + w * d.block_dim;
#pragma unroll
            for (int e = 0; e < 8; ++e) {
              const int j = group * kGroupColumns + c * 8 + e;
              if (w >= d.width || j >= d.block_dim) continue;
              float* to_down = down_at + j * p.factors.rank;
              const float to_add = down_sum[k][e / 2][half * 2 + e % 2];
              *to_down = turn == 0 ? to_add : *to_down + to_add;
              up_at[j] = (turn == 0 ? 0.0f : up_at[j]) + up_sum[k][e / 2][half * 2 + e % 2];
            }
          }
        }
      }
      __syncthreads();
    }
#pragma unroll 4
    for (int i = threadIdx.x; i < 2 * factor_size; i += blockDim.x) out[i] = sums[i];
    __syncthreads();
  }
};

template <typename In, typename Out, int kBlocks, int kItems, Path kPath>
__global__ void __launch_bounds__(max_threads(kBlocks), 1)
    alore_backward_kernel(const __grid_constant__ TilesParams<In, Out> p) {
  extern __shared__ __align__(128) unsigned char shared[];
  TilesBackward<In, Out, kBlocks, kItems, kPath> work(p, shared);
  const int rows = p.row_tiles * kTileRows;
  for (int s = 0; s < p.stages - 1; ++s) work.load(blockIdx.x + s * int64_t{gridDim.x}, s);
  work.make_images();
  int stage = 0;
#pragma unroll 1
  for (int64_t tile = blockIdx.x; tile < work.tiles; tile += gridDim.x) {
    if (p.stages > 1) {
      // All but the youngest stages - 2 groups have landed: this tile's among them.
      if (p.stages == 4)
        copy_async_wait<2>();
      else if (p.stages == 3)
        copy_async_wait<1>();
      else
        copy_async_wait<0>();
    } else {
      __syncthreads();
      work.load(tile, 0);
      copy_async_wait<0>();
    }
    __syncthreads();
    if (p.stages > 1) {
      // Into the stage that the previous tile has left.
      work.load(tile + (p.stages - 1) * int64_t{gridDim.x}, stage == 0 ? p.stages - 1 : stage - 1);
    }
    work.codes(tile * rows, stage);
    __syncthreads();
    work.mix();
    __syncthreads();
    work.outputs(tile * rows, stage);
    stage = stage + 1 == p.stages ? 0 : stage + 1;
  }
  copy_async_wait<0>();
  __syncthreads();
  work.leave_sums();
}

template <typename In, typename Out, int kBlocks, int kItems, Path kPath>
void launch(const CudaContext& context, const AloreBackwardPlan& plan, const TilesParams<In, Out>& params) {
  const auto kernel = alore_backward_kernel<In, Out, kBlocks, kItems, kPath>;
  static SharedMemoryGrants grants;
  grants.allow(reinterpret_cast<const void*>(kernel), plan.shared_bytes, "alore_backward");
  kernel<<<plan.blocks, 32 * plan.warps, plan.shared_bytes, context.stream>>>(params);
  check_launch("alore_backward");
}

}  // namespace

void alore_backward_tiles(const CudaContext& context, const AloreShape& s, const AloreBackwardPlan& plan,
                          const AloreBackwardArgs& a) {
  const AdapterDims dims = dims_of(s);
  const BackwardLayout layout(dims, 32 * plan.warps, plan.row_tiles, plan.stages, plan.key_splits, s.norm,
                              s.input == DType::kFloat32);
  const int log_width = dims.padded_width == 16 ? 4 : dims.padded_width == 32 ? 5 : 6;
  const FactorSource factors = factors_of(s, a.adapter);
  const auto run = [&](auto in_tag, auto out_tag) {
    using In = typename decltype(in_tag)::type;
    using Out = typename decltype(out_tag)::type;
    const TilesParams<In, Out> params{s.num_tokens,
                                      dims,
                                      layout,
                                      log_width,
                                      factors,
                                      plan.row_tiles,
                                      plan.stages,
                                      plan.key_splits,
                                      plan.parts,
                                      s.norm,
                                      s.add_base,
                                      static_cast<const Out*>(a.grad_out),
                                      static_cast<const In*>(a.sum),
                                      static_cast<const In*>(a.grad_sum),
                                      a.norm.weight,
                                      a.norm.bias,
                                      s.affine,
                                      a.mean,
                                      a.rstd,
                                      DropoutMask(a.dropout.seed, a.dropout.p),
                                      static_cast<In*>(a.grad_x),
                                      static_cast<float*>(a.workspace)};
    const bool fast = s.num_blocks == 4 && plan.items_per_warp == 1 && dims.code_tiles == 1 &&
                      s.block_dim % kGroupColumns == 0 && a.dropout.p == 0.0 && a.grad_sum == nullptr;
    if (fast && s.norm) return launch<In, Out, 4, 1, Path::kNorm>(context, plan, params);
    if constexpr (std::is_same_v<In, Out>) {
      if (fast) return launch<In, Out, 4, 1, Path::kBare>(context, plan, params);
    }
    if (s.num_blocks > 4) return launch<In, Out, 8, 1, Path::kGeneral>(context, plan, params);
    if (plan.items_per_warp == 1) return launch<In, Out, 4, 1, Path::kGeneral>(context, plan, params);
    launch<In, Out, 4, 2, Path::kGeneral>(context, plan, params);
  };
  dispatch_rows(s.input, s.output, run);
}

}  // namespace alore::kernels
