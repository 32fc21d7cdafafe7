// Forward of the fused ALoRE adapter: each row is read once into registers and written once.
//
// A team of `warps_per_tile` warps takes a tile of 16 tokens. Columns are dealt out in groups of 32 (alore_tile.cuh),
// consecutive groups to a warp. Partial codes meet in shared memory: warp v's share of block a's code is slot v + a,
// which is distinct for every pair that occurs, since a block that two warps share is the last of the one and the
// first of the other.
#include "kernels/alore.h"
#include "kernels/alore_tile.cuh"

namespace alore::kernels {
namespace {

template <typename In, typename Out>
struct ForwardParams {
  int64_t num_tokens;
  AdapterDims dims;
  ForwardLayout layout;
  FactorSource factors;
  int warps_per_tile;
  bool norm, add_base;
  const In *x, *residual;
  const void *weight, *bias;
  DType affine;
  float eps;
  Out* out;
  In* sum;
  float *mean, *rstd;
  DropoutMask dropout;
};

// Warps of one tile wait for each other, not for the block.
__device__ __forceinline__ void team_sync(int team, int warps) {
  if (warps == 1) {
    __syncwarp();
  } else {
    asm volatile("bar.sync %0, %1;" ::"r"(team + 1), "r"(warps * 32) : "memory");
  }
}

// Mean and reciprocal standard deviation of a row from every warp's own mean and squares around it (Chan's update:
// no second pass over the row, and no cancellation where the mean is large). The row's four lanes share the warps.
__device__ __forceinline__ RowNorm combine_statistics(const float2* partial, const float* columns, int warps, int row,
                                                     int c, float total, float eps) {
  float2 own[2]{};
  float weight[2]{}, mean = 0.0f;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int v = c + i * 4;
    if (v >= warps) continue;
    own[i] = partial[v * kTileRows + row];
    weight[i] = columns[v];
    mean += weight[i] * own[i].x;
  }
  mean = row_sum(mean) / total;
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < 2; ++i) squares += own[i].y + weight[i] * (own[i].x - mean) * (own[i].x - mean);
  return {mean, 1.0f / sqrtf(row_sum(squares) / total + eps)};
}

// Makes the compiler unpack the rows again at their next use: kept in fp32 between passes they would not fit the
// registers. Costs nothing at run time.
template <typename In, int kGroups>
__device__ __forceinline__ void forget_unpacked(Raw8<In> (&raw)[kGroups][2]) {
  if constexpr (!std::is_same_v<In, float>) {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        uint4& q = raw[i][r].q;
        asm volatile("" : "+r"(q.x), "+r"(q.y), "+r"(q.z), "+r"(q.w));
      }
    }
  }
}

// Walks a warp's groups: which block each lies in and which of the block's groups it is. kEven: blocks are whole
// groups and every warp has its full count, so that columns follow each other without a gap and all are real.
template <bool kEven>
struct GroupWalk {
  int block, local, per_block, column;
  __device__ GroupWalk(int first, int groups_per_block, int c)
      : block(first / groups_per_block),
        local(first % groups_per_block),
        per_block(groups_per_block),
        column(first * kGroupColumns + c * 8) {}
  // From the first group again. The compiler must not know that: it would keep every group's addresses in registers
  // from tile to tile, and spill the rows instead.
  __device__ void restart(const GroupWalk& first) {
    *this = first;
    asm volatile("" : "+r"(block), "+r"(local), "+r"(column));
  }
  __device__ void next() {
    if (++local == per_block) local = 0, ++block;
    column += kGroupColumns;
  }
  __device__ bool live(const AdapterDims& d) const { return kEven || block < d.num_blocks; }
  // Of this lane's eight columns: their place in the block and in the row, and whether they exist.
  __device__ int in_block(int c) const { return local * kGroupColumns + c * 8; }
  __device__ int in_row(const AdapterDims& d, int c) const { return kEven ? column : block * d.block_dim + in_block(c); }
  __device__ bool inside(const AdapterDims& d, int c) const {
    return kEven || (live(d) && in_block(c) < d.block_dim);
  }
};

// row += residual, rounded as a sum of its own would be, and kept.
template <typename In>
__device__ __forceinline__ void add_residual(Raw8<In>& row, const In* residual, In* sum) {
  Raw8<In> other;
  other.load(residual);
  Eight s = row.floats();
  const Eight o = other.floats();
#pragma unroll
  for (int j = 0; j < 8; ++j) s.v[j] += o.v[j];
  row.set(s);
  row.store(sum);
}

// Sums of rows g and g + 8 over this warp's columns, in all lanes of the row. 16-bit values are summed by the tensor
// cores, against ones: a fifth of the instructions of unpacking and adding.
template <typename In, int kGroups>
__device__ __forceinline__ float2 row_totals(const Raw8<In> (&raw)[kGroups][2]) {
  if constexpr (std::is_same_v<In, float>) {
    float2 sum{};
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        sum.x += raw[i][0].e.v[j];
        sum.y += raw[i][1].e.v[j];
      }
    }
    return {row_sum(sum.x), row_sum(sum.y)};
  } else {
    const uint32_t ones = pack2<In>(1.0f, 1.0f);
    float sum[4] = {};
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const uint4 &a = raw[i][0].q, &b = raw[i][1].q;
      mma<In>(sum, {a.x, b.x, a.y, b.y}, ones, ones);
      mma<In>(sum, {a.z, b.z, a.w, b.w}, ones, ones);
    }
    return {sum[0], sum[2]};
  }
}

// Out where the branch is dropped in part, or stands alone.
template <typename In, typename Out>
__device__ __forceinline__ void store_branch(const ForwardParams<In, Out>& p, int64_t at, Eight y, uint4 base) {
  if (p.dropout.seed != nullptr) {
    const Eight mask = p.dropout.at(at);
#pragma unroll
    for (int j = 0; j < 8; ++j) y.v[j] = mask.v[j] > 0 ? y.v[j] * mask.v[j] : 0.0f;
  }
  if (p.add_base) {
    const Eight x = unpack8<Out>(base);
#pragma unroll
    for (int j = 0; j < 8; ++j) y.v[j] += x.v[j];
  }
  *reinterpret_cast<uint4*>(p.out + at) = pack8<Out>(y);
}

template <typename In, typename Out, int kGroups, bool kEven>
__global__ void __launch_bounds__(kGroups == 8 ? 192 : 256, std::is_same_v<In, float> ? 1 : 2)
    alore_forward_kernel(const __grid_constant__ ForwardParams<In, Out> p) {
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ float columns[8];  // of each warp of a tile
  const AdapterDims& d = p.dims;
  const int warps = p.warps_per_tile, teams = blockDim.x / 32 / warps;
  const ForwardLayout& layout = p.layout;
  auto* down = reinterpret_cast<Out*>(shared + layout.down);
  auto* up = reinterpret_cast<Out*>(shared + layout.up);
  auto* mixing = reinterpret_cast<float*>(shared + layout.mixing);
  auto* weight = reinterpret_cast<float*>(shared + layout.weight);
  auto* bias = reinterpret_cast<float*>(shared + layout.bias);
  fill_zero(shared, layout.weight);
  __syncthreads();
  const int factor_size = d.width * d.block_dim;
  const DownPlace down_place(d, p.factors.rank);
  const UpPlace up_place(d);
  scatter(p.factors.down, p.factors.type, factor_size,
          [&](int i, float v) { down[code_image_at(d, down_place(i))] = convert<Out>(v); });
  scatter(p.factors.up, p.factors.type, factor_size,
          [&](int i, float v) { up[output_image_at(d, up_place(i))] = convert<Out>(v); });
  fill_mixing(mixing, d, p.factors);
  if (p.norm) {
    fill_affine(weight, p.weight, p.affine, d.embed_dim, 1.0f);
    fill_affine(bias, p.bias, p.affine, d.embed_dim, 0.0f);
  }
  if (threadIdx.x < warps) {
    int count = 0;
    GroupWalk<kEven> walk(threadIdx.x * kGroups, d.groups_per_block, 0);
#pragma unroll 1
    for (int i = 0; i < kGroups && walk.live(d); ++i, walk.next()) {
      count += min(kGroupColumns, d.block_dim - walk.local * kGroupColumns);
    }
    columns[threadIdx.x] = static_cast<float>(count);
  }
  __syncthreads();

  const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  const int team = threadIdx.x / 32 / warps, v = threadIdx.x / 32 % warps;
  unsigned char* own = shared + layout.teams + team * layout.team_bytes;
  auto* statistics = reinterpret_cast<float2*>(own + layout.statistics);  // [warps, 16]
  auto* code = reinterpret_cast<float*>(own + layout.code);               // [slots, 16, padded]
  auto* mixed = reinterpret_cast<Out*>(own + layout.mixed);               // [num_blocks, 16, code_stride]

  const int per_block = d.groups_per_block, padded = d.padded_width;
  const int code_stride = d.code_stride, image_stride = d.image_stride;
  const int dim = d.embed_dim, chunks = d.chunks;
  const GroupWalk<kEven> first(v * kGroups, per_block, c);
  const int64_t tiles = (p.num_tokens + kTileRows - 1) / kTileRows;

#pragma unroll 1
  for (int64_t tile = blockIdx.x * int64_t{teams} + team; tile < tiles; tile += int64_t{gridDim.x} * teams) {
    const int64_t row0 = tile * kTileRows + g, row1 = row0 + 8, at0 = row0 * dim, at1 = row1 * dim;
    const bool live0 = row0 < p.num_tokens, live1 = row1 < p.num_tokens;

    Raw8<In> raw[kGroups][2];
    GroupWalk<kEven> walk = first;
    walk.restart(first);
#pragma unroll
    for (int i = 0; i < kGroups; ++i, walk.next()) {
      const bool inside = walk.inside(d, c);
      const int column = walk.in_row(d, c);
      if (inside && live0) raw[i][0].load(p.x + at0 + column);
      else raw[i][0].zero();
      if (inside && live1) raw[i][1].load(p.x + at1 + column);
      else raw[i][1].zero();
    }
    if (p.residual != nullptr) {
      walk.restart(first);
#pragma unroll
      for (int i = 0; i < kGroups; ++i, walk.next()) {
        const int column = walk.in_row(d, c);
        if (walk.inside(d, c) && live0) add_residual(raw[i][0], p.residual + at0 + column, p.sum + at0 + column);
        if (walk.inside(d, c) && live1) add_residual(raw[i][1], p.residual + at1 + column, p.sum + at1 + column);
      }
    }

    uint4 base[kGroups][2];  // the normalised rows, rounded to the output's type as a norm of its own would
    if (p.norm) {
      const float2 totals = row_totals(raw);
      const float share = 1.0f / columns[v], mean0 = totals.x * share, mean1 = totals.y * share;
      float squares0 = 0.0f, squares1 = 0.0f;
      walk.restart(first);
#pragma unroll
      for (int i = 0; i < kGroups; ++i, walk.next()) {
        if (!walk.inside(d, c)) continue;
        const Eight a = raw[i][0].floats(), b = raw[i][1].floats();
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          squares0 += (a.v[j] - mean0) * (a.v[j] - mean0);
          squares1 += (b.v[j] - mean1) * (b.v[j] - mean1);
        }
      }
      forget_unpacked(raw);
      squares0 = row_sum(squares0);
      squares1 = row_sum(squares1);
      if (c == 0) {
        statistics[v * kTileRows + g] = {mean0, squares0};
        statistics[v * kTileRows + g + 8] = {mean1, squares1};
      }
      team_sync(team, warps);
      const RowNorm s0 = combine_statistics(statistics, columns, warps, g, c, static_cast<float>(dim), p.eps);
      const RowNorm s1 = combine_statistics(statistics, columns, warps, g + 8, c, static_cast<float>(dim), p.eps);
      if (v == 0 && c == 0) {
        if (live0) p.mean[row0] = s0.mean, p.rstd[row0] = s0.rstd;
        if (live1) p.mean[row1] = s1.mean, p.rstd[row1] = s1.rstd;
      }
      walk.restart(first);
#pragma unroll
      for (int i = 0; i < kGroups; ++i, walk.next()) {
        if (!walk.inside(d, c)) {
          base[i][0] = base[i][1] = {0, 0, 0, 0};
          continue;
        }
        const int column = walk.in_row(d, c);
        const Eight w = shared8(weight + column), b = shared8(bias + column);
        base[i][0] = pack8<Out>(affine(normalised(raw[i][0].floats(), s0), w, b));
        base[i][1] = pack8<Out>(affine(normalised(raw[i][1].floats(), s1), w, b));
      }
    } else if constexpr (std::is_same_v<In, Out>) {
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
        base[i][0] = raw[i][0].q;
        base[i][1] = raw[i][1].q;
      }
    }

    // Z: each warp's share of its blocks' codes.
#pragma unroll 1
    for (int t = 0; t < d.code_tiles; ++t) {
      float acc[2][4] = {};
      const auto flush = [&](int a) {
        float* slot = code + (v + a) * kTileRows * padded + t * kCodeTile + 2 * c;
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          *reinterpret_cast<float2*>(slot + g * padded + n * 8) = {acc[n][0], acc[n][1]};
          *reinterpret_cast<float2*>(slot + (g + 8) * padded + n * 8) = {acc[n][2], acc[n][3]};
          acc[n][0] = acc[n][1] = acc[n][2] = acc[n][3] = 0.0f;
        }
      };
      walk.restart(first);
#pragma unroll
      for (int i = 0; i < kGroups; ++i, walk.next()) {
        if (!walk.live(d)) break;
        accumulate_code<Out>(acc, base[i][0], base[i][1], down, image_stride, t, walk.in_block(c), g);
        if (i == kGroups - 1 || walk.local == per_block - 1) flush(walk.block);
      }
    }
    team_sync(team, warps);

    // H: mixing over blocks, four code columns a thread.
#pragma unroll 1
    for (int i = v * 32 + lane; i < d.num_blocks * d.code_tiles * kTileRows * 4; i += warps * 32) {
      const int row = i / 4 % kTileRows, rest = i / (4 * kTileRows);  // = block * code_tiles + code tile
      const int b = d.code_tiles == 1 ? rest : rest / d.code_tiles;
      const int w = (rest - b * d.code_tiles) * kCodeTile + i % 4 * 4;
      float4 h{};
#pragma unroll 2
      for (int a = 0; a < d.num_blocks; ++a) {
        const int from = a * per_block / kGroups, to = ((a + 1) * per_block - 1) / kGroups;
        float4 z = *reinterpret_cast<const float4*>(code + ((from + a) * kTileRows + row) * padded + w);
#pragma unroll 1
        for (int u = from + 1; u <= to; ++u) {
          const float4 more = *reinterpret_cast<const float4*>(code + ((u + a) * kTileRows + row) * padded + w);
          z.x += more.x, z.y += more.y, z.z += more.z, z.w += more.w;
        }
        const float4 s = *reinterpret_cast<const float4*>(mixing + (a * d.num_blocks + b) * padded + w);
        h.x += s.x * z.x, h.y += s.y * z.y, h.z += s.z * z.z, h.w += s.w * z.w;
      }
      *reinterpret_cast<uint2*>(mixed + (b * kTileRows + row) * code_stride + w) = {pack2<Out>(h.x, h.y),
                                                                                     pack2<Out>(h.z, h.w)};
    }
    team_sync(team, warps);

    // Y, onto the base.
    walk.restart(first);
#pragma unroll
    for (int i = 0; i < kGroups; ++i, walk.next()) {
      if (!walk.live(d)) break;
      float acc[4][4] = {};
      const bool plain = p.add_base && p.dropout.seed == nullptr;
      if (plain) {
        set_output_row(acc, 0, unpack8<Out>(base[i][0]));
        set_output_row(acc, 1, unpack8<Out>(base[i][1]));
      }
#pragma unroll 1
      for (int t = 0; t < d.code_tiles; ++t) {
        uint32_t h[4];
        load_a(h, mixed + walk.block * kTileRows * code_stride + t * kCodeTile, code_stride, lane);
        accumulate_output<Out>(acc, h, up, chunks, t, walk.local * 4, g, c);
      }
      if (!walk.inside(d, c)) continue;
      const int column = walk.in_row(d, c);
      if (plain) {
        if (live0) *reinterpret_cast<uint4*>(p.out + at0 + column) = pack8<Out>(output_row(acc, 0));
        if (live1) *reinterpret_cast<uint4*>(p.out + at1 + column) = pack8<Out>(output_row(acc, 1));
      } else {
        if (live0) store_branch(p, at0 + column, output_row(acc, 0), base[i][0]);
        if (live1) store_branch(p, at1 + column, output_row(acc, 1), base[i][1]);
      }
    }
  }
}

template <typename In, typename Out, int kGroups>
void launch(const CudaContext& context, const AloreForwardPlan& plan, const ForwardParams<In, Out>& params) {
  const auto kernel =
      plan.even ? alore_forward_kernel<In, Out, kGroups, true> : alore_forward_kernel<In, Out, kGroups, false>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes),
        "alore_forward");
  kernel<<<plan.blocks, 32 * plan.warps_per_tile * plan.tiles_per_block, plan.shared_bytes, context.stream>>>(params);
  check_launch("alore_forward");
}

}  // namespace

void alore_forward(const CudaContext& context, const AloreShape& s, const AloreForwardPlan& plan,
                   const AloreForwardArgs& a) {
  if (!plan.fused) throw std::runtime_error("alore_forward: no fused kernel for this shape");
  if (s.num_tokens == 0) return;
  const AdapterDims dims{static_cast<int>(s.num_blocks), static_cast<int>(s.block_dim), static_cast<int>(s.width())};
  const ForwardLayout layout(dims, plan.warps_per_tile, plan.tiles_per_block, s.norm);
  const FactorSource factors{a.adapter.scale, a.adapter.down, a.adapter.up, s.factor,
                             static_cast<int>(s.num_experts), static_cast<int>(s.rank)};
  const auto run = [&](auto in_tag, auto out_tag) {
    using In = typename decltype(in_tag)::type;
    using Out = typename decltype(out_tag)::type;
    const ForwardParams<In, Out> params{s.num_tokens,
                                        dims,
                                        layout,
                                        factors,
                                        plan.warps_per_tile,
                                        s.norm,
                                        s.add_base,
                                        static_cast<const In*>(a.x),
                                        static_cast<const In*>(a.residual),
                                        a.norm.weight,
                                        a.norm.bias,
                                        s.affine,
                                        a.norm.eps,
                                        static_cast<Out*>(a.out),
                                        static_cast<In*>(a.sum),
                                        a.mean,
                                        a.rstd,
                                        DropoutMask(a.dropout.seed, a.dropout.p)};
    switch (plan.groups_per_warp) {
      case 4:
        return launch<In, Out, 4>(context, plan, params);
      case 6:
        return launch<In, Out, 6>(context, plan, params);
      default:
        if constexpr (!std::is_same_v<In, float>) return launch<In, Out, 8>(context, plan, params);
    }
  };
  const bool wide = s.input == DType::kFloat32;
  if (s.output == DType::kBFloat16) {
    wide ? run(Tag<float>{}, Tag<__nv_bfloat16>{}) : run(Tag<__nv_bfloat16>{}, Tag<__nv_bfloat16>{});
  } else {
    wide ? run(Tag<float>{}, Tag<__half>{}) : run(Tag<__half>{}, Tag<__half>{});
  }
}

}  // namespace alore::kernels
