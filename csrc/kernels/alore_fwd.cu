// Forward of the fused ALoRE adapter for any shape of its domain; alore_fwd_pipelined.cu takes the common
// ones. Each row is read once into registers and written once.
//
// A team of `warps_per_tile` warps takes a tile of 16 tokens. Columns are dealt out in groups of 32
// (alore_tile.cuh), consecutive groups to a warp. Partial codes meet in shared memory: warp v's share of
// block a's code is slot v + a, which is distinct for every pair that occurs, since a block that two warps
// share is the last of the one and the first of the other.
#include "kernels/alore_fused.cuh"
#include "kernels/alore_rows.cuh"

namespace alore::kernels {
namespace {

constexpr int kFastBlocks = 4;  // num_blocks of the fast paths

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

// Out where the branch is dropped in part, or stands alone.
template <typename In, typename Out>
__device__ __forceinline__ void store_branch(const ForwardParams<In, Out>& p, Out* to, Eight y, uint4 base) {
  if (p.dropout.seed != nullptr) {
    const Eight mask = p.dropout.at(to - p.out);
#pragma unroll
    for (int j = 0; j < 8; ++j) y.v[j] = mask.v[j] > 0 ? y.v[j] * mask.v[j] : 0.0f;
  }
  if (p.add_base) {
    const Eight x = unpack8<Out>(base);
#pragma unroll
    for (int j = 0; j < 8; ++j) y.v[j] += x.v[j];
  }
  store_16(to, pack8<Out>(y));
}

// What a kernel is compiled for. The two fast paths fix at compile time what training a backbone asks for:
// blocks of whole groups, four of them, one code tile, no dropout and no residual input. kGeneral asks at run
// time.
enum class Path { kNorm, kBare, kGeneral };

template <typename In, typename Out, int kGroups, Path kPath>
__global__ void __launch_bounds__(32 * forward_warps(kGroups, sizeof(In) == 4, kPath != Path::kBare).of_block,
                                  forward_warps(kGroups, sizeof(In) == 4, kPath != Path::kBare).blocks)
    alore_forward_kernel(const __grid_constant__ ForwardParams<In, Out> p) {
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ float columns[8];  // of each warp of a tile
  constexpr bool kFast = kPath != Path::kGeneral;
  const AdapterDims& d = p.dims;
  const bool norm = kFast ? kPath == Path::kNorm : p.norm;
  const int num_blocks = kFast ? kFastBlocks : d.num_blocks, code_tiles = kFast ? 1 : d.code_tiles;
  const int padded = kFast ? kCodeTile : d.padded_width, code_stride = kFast ? kCodeTile + 8 : d.code_stride;
  const int warps = p.warps_per_tile, teams = blockDim.x / 32 / warps;
  const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  const int team = threadIdx.x / 32 / warps, v = threadIdx.x / 32 % warps;
  const int per_block = d.groups_per_block, image_stride = d.image_stride, dim = d.embed_dim,
            chunks = d.chunks;
  const GroupWalk<kFast> first(v * kGroups, per_block, c);
  GroupWalk<kFast> walk = first;

  const ForwardLayout& layout = p.layout;
  unsigned char* own = shared + layout.teams + team * layout.team_bytes;
  auto* statistics = reinterpret_cast<float2*>(own + layout.statistics);  // [warps, 16]
  auto* code = reinterpret_cast<float*>(own + layout.code);               // [slots, 16, padded]
  auto* mixed = reinterpret_cast<Out*>(own + layout.mixed);               // [num_blocks, 16, code_stride]

  // The next tile's rows come in while this one is worked on. A thread copies just what it will itself read,
  // so that waiting for its own copies is enough.
  constexpr int kPieces = sizeof(In) / 2;  // of 16 bytes
  unsigned char* stage = own + layout.stage + (v * 32 + lane) * stage_bytes_per_thread(kGroups, kPieces == 2);
  const int64_t step = int64_t{gridDim.x} * teams, last_row = p.num_tokens - 1;
  const int64_t tiles = (p.num_tokens + kTileRows - 1) / kTileRows;
  const auto prefetch = [&](int64_t tile) {
    if (tile < tiles) {  // rows past the end are read as the last one, and never written
      const In* from0 = p.x + min(tile * kTileRows + g, last_row) * dim;
      const In* from1 = p.x + min(tile * kTileRows + g + 8, last_row) * dim;
      walk.restart(first);
#pragma unroll
      for (int i = 0; i < kGroups; ++i, walk.next()) {
#pragma unroll
        for (int k = 0; k < kPieces; ++k) {
          constexpr int kElements = 16 / sizeof(In);
          copy_async_16(stage + (i * 2 * kPieces + k) * 16, walk.in_row(from0, d, c) + k * kElements, true);
          copy_async_16(stage + ((i * 2 + 1) * kPieces + k) * 16, walk.in_row(from1, d, c) + k * kElements,
                        true);
        }
      }
    }
    copy_async_commit();
  };
  int64_t tile = blockIdx.x * int64_t{teams} + team;
  prefetch(tile);

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
          [&](int i, float value) { down[code_image_at(d, down_place(i))] = convert<Out>(value); });
  scatter(p.factors.up, p.factors.type, factor_size,
          [&](int i, float value) { up[output_image_at(d, up_place(i))] = convert<Out>(value); });
  fill_mixing(mixing, d, p.factors);
  if (norm) {
    fill_affine(weight, p.weight, p.affine, dim, 1.0f);
    fill_affine(bias, p.bias, p.affine, dim, 0.0f);
  }
  if (threadIdx.x < warps) {
    int count = 0;
    GroupWalk<kFast> groups(threadIdx.x * kGroups, per_block, 0);
#pragma unroll 1
    for (int i = 0; i < kGroups && groups.live(d); ++i, groups.next()) {
      count += min(kGroupColumns, d.block_dim - groups.local * kGroupColumns);
    }
    columns[threadIdx.x] = static_cast<float>(count);
  }
  __syncthreads();

#pragma unroll 1
  for (; tile < tiles; tile += step) {
    const int64_t row0 = tile * kTileRows + g, row1 = row0 + 8, at0 = row0 * dim, at1 = row1 * dim;
    const bool live0 = row0 < p.num_tokens, live1 = row1 < p.num_tokens;

    Raw8<In> raw[kGroups][2];
    copy_async_wait<0>();
    walk.restart(first);
#pragma unroll
    for (int i = 0; i < kGroups; ++i, walk.next()) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        raw[i][r].read_pieces(stage + (i * 2 + r) * kPieces * 16);
        if (!walk.inside(d, c)) raw[i][r].zero();
      }
    }
    if (!kFast && p.residual != nullptr) {
      walk.restart(first);
#pragma unroll
      for (int i = 0; i < kGroups; ++i, walk.next()) {
        if (!walk.inside(d, c)) continue;
        if (live0)
          add_residual(raw[i][0], walk.in_row(p.residual + at0, d, c), walk.in_row(p.sum + at0, d, c));
        if (live1)
          add_residual(raw[i][1], walk.in_row(p.residual + at1, d, c), walk.in_row(p.sum + at1, d, c));
      }
    }

    uint4 base[kGroups][2];  // the normalised rows, rounded to the output's type as a norm of its own would
    if (norm) {
      const RowMoments moments = row_moments(raw, columns[v], first, d, c);
      prefetch(tile + step);
      if (c == 0) {
        statistics[v * kTileRows + g] = {moments.mean0, moments.squares0};
        statistics[v * kTileRows + g + 8] = {moments.mean1, moments.squares1};
      }
      team_sync(team, warps);
      const RowNorm s0 = combine_statistics(statistics, columns, warps, g, c, static_cast<float>(dim), p.eps);
      const RowNorm s1 =
          combine_statistics(statistics, columns, warps, g + 8, c, static_cast<float>(dim), p.eps);
      if (v == 0 && c == 0) {
        if (live0) p.mean[row0] = s0.mean, p.rstd[row0] = s0.rstd;
        if (live1) p.mean[row1] = s1.mean, p.rstd[row1] = s1.rstd;
      }
      walk.restart(first);
#pragma unroll
      for (int i = 0; i < kGroups; ++i, walk.next()) {
        const Eight w = shared8(walk.in_row(weight, d, c)), b = shared8(walk.in_row(bias, d, c));
        base[i][0] = pack8<Out>(affine(normalised(raw[i][0].floats(), s0), w, b));
        base[i][1] = pack8<Out>(affine(normalised(raw[i][1].floats(), s1), w, b));
        if (!walk.inside(d, c)) base[i][0] = base[i][1] = {0, 0, 0, 0};
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
    for (int t = 0; t < code_tiles; ++t) {
      float acc[2][4] = {};
      walk.restart(first);
#pragma unroll
      for (int i = 0; i < kGroups; ++i, walk.next()) {
        if (!walk.live(d)) break;
        accumulate_code<Out>(acc, base[i][0], base[i][1], down, image_stride, t, walk.in_block(c), g);
        if (i == kGroups - 1 || walk.local == per_block - 1) {
          float* slot = code + ((v + walk.block) * kTileRows + g) * padded + t * kCodeTile + 2 * c;
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            *reinterpret_cast<float2*>(slot + n * 8) = {acc[n][0], acc[n][1]};
            *reinterpret_cast<float2*>(slot + 8 * padded + n * 8) = {acc[n][2], acc[n][3]};
            acc[n][0] = acc[n][1] = acc[n][2] = acc[n][3] = 0.0f;
          }
        }
      }
    }
    if (!norm) prefetch(tile + step);
    team_sync(team, warps);

    // H: mixing over blocks, four code columns a thread.
#pragma unroll 1
    for (int i = v * 32 + lane; i < num_blocks * code_tiles * kTileRows * 4; i += warps * 32) {
      const int row = i / 4 % kTileRows, rest = i / (4 * kTileRows);  // = block * code_tiles + code tile
      const int b = code_tiles == 1 ? rest : rest / code_tiles;
      const int w = (rest - b * code_tiles) * kCodeTile + i % 4 * 4;
      float4 h{};
#pragma unroll(kFast ? kFastBlocks : 1)
      for (int a = 0; a < num_blocks; ++a) {
        const int from = a * per_block / kGroups, to = ((a + 1) * per_block - 1) / kGroups;
        float4 z = *reinterpret_cast<const float4*>(code + ((from + a) * kTileRows + row) * padded + w);
#pragma unroll 1
        for (int u = from + 1; u <= to; ++u) {
          const float4 more =
              *reinterpret_cast<const float4*>(code + ((u + a) * kTileRows + row) * padded + w);
          z.x += more.x, z.y += more.y, z.z += more.z, z.w += more.w;
        }
        const float4 s = *reinterpret_cast<const float4*>(mixing + (a * num_blocks + b) * padded + w);
        h.x += s.x * z.x, h.y += s.y * z.y, h.z += s.z * z.z, h.w += s.w * z.w;
      }
      *reinterpret_cast<uint2*>(mixed + (b * kTileRows + row) * code_stride + w) = {pack2<Out>(h.x, h.y),
                                                                                    pack2<Out>(h.z, h.w)};
    }
    team_sync(team, warps);

    // Y, onto the base.
    const bool plain = kPath == Path::kNorm || (p.add_base && p.dropout.seed == nullptr);
    Out *to0 = p.out + at0, *to1 = p.out + at1;
    walk.restart(first);
#pragma unroll
    for (int i = 0; i < kGroups; ++i, walk.next()) {
      if (!walk.live(d)) break;
      float acc[4][4] = {};
      if (plain) {
        set_output_row(acc, 0, unpack8<Out>(base[i][0]));
        set_output_row(acc, 1, unpack8<Out>(base[i][1]));
      }
#pragma unroll 1
      for (int t = 0; t < code_tiles; ++t) {
        uint32_t h[4];
        load_a(h, mixed + walk.block * kTileRows * code_stride + t * kCodeTile, code_stride, lane);
        accumulate_output<Out>(acc, h, up, chunks, t, walk.local * 4, g, c);
      }
      if (!walk.inside(d, c)) continue;
      Out *here0 = walk.in_row(to0, d, c), *here1 = walk.in_row(to1, d, c);
      if (!kFast && !plain) {
        if (live0) store_branch(p, here0, output_row(acc, 0), base[i][0]);
        if (live1) store_branch(p, here1, output_row(acc, 1), base[i][1]);
      } else {
        if (live0) store_16(here0, pack8<Out>(output_row(acc, 0)));
        if (live1) store_16(here1, pack8<Out>(output_row(acc, 1)));
      }
    }
  }
  copy_async_wait<0>();
}

template <typename In, typename Out, int kGroups, Path kPath>
void launch(const CudaContext& context, const AloreForwardPlan& plan, const ForwardParams<In, Out>& params) {
  const auto kernel = alore_forward_kernel<In, Out, kGroups, kPath>;
  static SharedMemoryGrants grants;
  grants.allow(reinterpret_cast<const void*>(kernel), plan.shared_bytes, "alore_forward");
  kernel<<<plan.blocks, 32 * plan.warps_per_tile * plan.tiles_per_block, plan.shared_bytes, context.stream>>>(
      params);
  check_launch("alore_forward");
}

template <typename In, typename Out, int kGroups>
void choose_path(const CudaContext& context, const AloreForwardPlan& plan, const ForwardParams<In, Out>& p) {
  const bool fast = plan.even && p.dims.num_blocks == kFastBlocks && p.dims.code_tiles == 1 &&
                    p.dropout.seed == nullptr && p.residual == nullptr;
  if (fast && p.norm) return launch<In, Out, kGroups, Path::kNorm>(context, plan, p);
  if constexpr (std::is_same_v<In, Out>) {
    if (fast) return launch<In, Out, kGroups, Path::kBare>(context, plan, p);
  }
  launch<In, Out, kGroups, Path::kGeneral>(context, plan, p);
}

}  // namespace

void alore_forward(const CudaContext& context, const AloreShape& s, const AloreForwardPlan& plan,
                   const AloreForwardArgs& a) {
  if (!plan.fused) throw std::runtime_error("alore_forward: no fused kernel for this shape");
  if (s.num_tokens == 0) return;
  if (plan.pipelined) return alore_forward_pipelined(context, s, plan, a);
  const AdapterDims dims = dims_of(s);
  const ForwardLayout layout(dims, plan.groups_per_warp, plan.warps_per_tile, plan.tiles_per_block, s.norm,
                             s.input == DType::kFloat32);
  const FactorSource factors = factors_of(s, a.adapter);
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
        return choose_path<In, Out, 4>(context, plan, params);
      case 6:
        return choose_path<In, Out, 6>(context, plan, params);
      default:
        if constexpr (!std::is_same_v<In, float>) return choose_path<In, Out, 8>(context, plan, params);
    }
  };
  dispatch_rows(s.input, s.output, run);
}

}  // namespace alore::kernels
