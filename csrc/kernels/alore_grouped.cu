// Forward of the fused ALoRE adapter with one adapter a sample.
//
// Blocks belong to a sample: each loads the factors of its sample's adapter once and takes tiles of 16 of its
// tokens. Unlike alore_fwd.cu, whose warps hold their part of the rows in registers, a tile's rows lie in
// shared memory and every step deals its work out to the block's warps anew: adapters of any shape run the
// same code.
#include <cstdio>

#include "kernels/alore_grouped.h"
#include "kernels/alore_grouped_layout.h"
#include "kernels/alore_tile.cuh"

namespace alore::kernels {
namespace {

constexpr int kGroupedThreads = kGroupedWarps * 32;
// Adapters of a launch. Samples of another launch's adapters cost this one a block each that only reads its
// index, so a table that takes all adapters of a large batch is worth its 15 KiB of parameters.
constexpr int kEntries = 128;
constexpr int kMaxRowChunks = 2048 / 8;  // of a row, in pieces of eight columns

struct GroupedEntry {
  FactorSource factors;
  AdapterDims dims;
  GroupedAdapterLayout layout;
};

// Room for entries whose types have no empty state; the first `count` are constructed.
struct EntryTable {
  alignas(GroupedEntry) unsigned char bytes[kEntries * sizeof(GroupedEntry)];

  __host__ __device__ GroupedEntry* data() { return reinterpret_cast<GroupedEntry*>(bytes); }
  __host__ __device__ const GroupedEntry& operator[](int i) const {
    return reinterpret_cast<const GroupedEntry*>(bytes)[i];
  }
};

template <typename In, typename Out>
struct GroupedParams {
  GroupedLayout layout;
  int64_t tokens, blocks_per_sample;  // of a sample
  int64_t num_adapters, first;        // of all launches; of the table's first entry
  int count, dim;
  bool norm, add_base;
  const In* x;
  const void *weight, *bias;
  DType affine;
  float eps;
  const int64_t* index;
  Out* out;
  EntryTable table;
};

// What a kernel's parameters may take since CUDA 12.1, on sm_70 and later.
static_assert(sizeof(GroupedParams<float, __half>) <= 32764);

// base[0..dim) = the norm of a row, rounded as a norm of its own would be. One warp a row, all of it in
// registers.
template <typename In, typename Out>
__device__ __forceinline__ void normalise_row(const GroupedParams<In, Out>& p, const In* row,
                                              const float* weight, const float* bias, Out* base, int lane) {
  constexpr int kChunks = kMaxRowChunks / 32;
  const int chunks = p.dim / 8;
  const float share = 1.0f / static_cast<float>(p.dim);
  Raw8<In> raw[kChunks];
  float sum = 0.0f, squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    const int k = lane + i * 32;
    raw[i].zero();
    if (k >= chunks) continue;
    raw[i].load(row + k * 8);
    const Eight e = raw[i].floats();
#pragma unroll
    for (int j = 0; j < 8; ++j) sum += e.v[j];
  }
  const float mean = warp_sum(sum) * share;
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    if (lane + i * 32 >= chunks) continue;
    const Eight e = raw[i].floats();
#pragma unroll
    for (int j = 0; j < 8; ++j) squares += (e.v[j] - mean) * (e.v[j] - mean);
  }
  const RowNorm statistics{mean, 1.0f / sqrtf(warp_sum(squares) * share + p.eps)};
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    const int k = lane + i * 32;
    if (k >= chunks) continue;
    const Eight y =
        affine(normalised(raw[i].floats(), statistics), shared8(weight + k * 8), shared8(bias + k * 8));
    *reinterpret_cast<uint4*>(base + k * 8) = pack8<Out>(y);
  }
}

// The tile's rows as the adapter sees them, in shared memory; zeros past the sample's last token.
template <typename In, typename Out>
__device__ __forceinline__ void load_base(const GroupedParams<In, Out>& p, const In* x, int rows,
                                          const float* weight, const float* bias, Out* base, int warp,
                                          int lane) {
#pragma unroll 1
  for (int r = warp; r < kTileRows; r += kGroupedWarps) {
    Out* to = base + r * p.layout.base_stride;
    const In* row = x + int64_t{r} * p.dim;
    if (r < rows && p.norm) {
      normalise_row(p, row, weight, bias, to, lane);
      continue;
    }
#pragma unroll 1
    for (int k = lane; k < p.dim / 8; k += 32) {
      uint4 q{};
      if constexpr (std::is_same_v<In, Out>) {
        if (r < rows) q = load_streamed(row + k * 8);
      }
      *reinterpret_cast<uint4*>(to + k * 8) = q;
    }
  }
}

// Asks for the rows of a later tile while this one is worked on: one tile of loads at a time would leave the
// memory idle during the products.
template <typename In>
__device__ __forceinline__ void prefetch_rows(const In* rows, int64_t elements) {
  constexpr int kLine = 128 / sizeof(In);
  for (int64_t i = int64_t{threadIdx.x} * kLine; i < elements; i += int64_t{kGroupedThreads} * kLine) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(rows + i));
  }
}

template <typename Out>
__device__ __forceinline__ void load_factors(const GroupedEntry& e, unsigned char* shared) {
  const AdapterDims& d = e.dims;
  auto* down = reinterpret_cast<Out*>(shared + e.layout.down);
  auto* up = reinterpret_cast<Out*>(shared + e.layout.up);
  fill_zero(shared + e.layout.down, e.layout.code - e.layout.down);
  __syncthreads();
  const int size = d.width * d.block_dim;
  const DownPlace down_place(d, e.factors.rank);
  const UpPlace up_place(d);
  scatter(e.factors.down, e.factors.type, size,
          [&](int i, float value) { down[code_image_at(d, down_place(i))] = convert<Out>(value); });
  scatter(e.factors.up, e.factors.type, size,
          [&](int i, float value) { up[output_image_at(d, up_place(i))] = convert<Out>(value); });
  fill_mixing(reinterpret_cast<float*>(shared + e.layout.mixing), d, e.factors);
}

// code[split, a, row, :] = this split's columns of block a @ down.
template <typename Out>
__device__ __forceinline__ void project_down(const GroupedEntry& e, const Out* base, int base_stride,
                                             unsigned char* shared, int warp, int lane) {
  const AdapterDims& d = e.dims;
  const auto* down = reinterpret_cast<const Out*>(shared + e.layout.down);
  auto* code = reinterpret_cast<float*>(shared + e.layout.code);
  const int g = lane / 4, c = lane % 4, splits = e.layout.splits;
#pragma unroll 1
  for (int item = warp; item < d.num_blocks * d.code_tiles * splits; item += kGroupedWarps) {
    const int split = item % splits, product = item / splits, t = product % d.code_tiles,
              a = product / d.code_tiles;
    const Out* row = base + g * base_stride + a * d.block_dim;
    float acc[2][4] = {};
#pragma unroll 2
    for (int local = split; local < d.groups_per_block; local += splits) {
      const int column = local * kGroupColumns + c * 8;
      uint4 row0{}, row1{};
      if (column < d.block_dim) {  // past it lies the next block
        row0 = load_shared_16(row + column);
        row1 = load_shared_16(row + 8 * base_stride + column);
      }
      accumulate_code<Out>(acc, row0, row1, down, d.image_stride, t, column, g);
    }
    float* slot =
        code + ((split * d.num_blocks + a) * kTileRows + g) * d.padded_width + t * kCodeTile + 2 * c;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      *reinterpret_cast<float2*>(slot + n * 8) = {acc[n][0], acc[n][1]};
      *reinterpret_cast<float2*>(slot + 8 * d.padded_width + n * 8) = {acc[n][2], acc[n][3]};
    }
  }
}

// mixed[b, row, :] = sum_a mixing[a, b, :] * code[a, row, :], four code columns a thread.
template <typename Out>
__device__ __forceinline__ void mix_blocks(const GroupedEntry& e, unsigned char* shared) {
  const AdapterDims& d = e.dims;
  const auto* code = reinterpret_cast<const float*>(shared + e.layout.code);
  const auto* mixing = reinterpret_cast<const float*>(shared + e.layout.mixing);
  auto* mixed = reinterpret_cast<Out*>(shared + e.layout.mixed);
#pragma unroll 1
  for (int i = threadIdx.x; i < d.num_blocks * d.code_tiles * kTileRows * 4; i += kGroupedThreads) {
    const int row = i / 4 % kTileRows, rest = i / (4 * kTileRows), b = rest / d.code_tiles;
    const int w = (rest - b * d.code_tiles) * kCodeTile + i % 4 * 4;
    float4 h{};
#pragma unroll 1
    for (int a = 0; a < d.num_blocks; ++a) {
      float4 z{};
#pragma unroll 1
      for (int split = 0; split < e.layout.splits; ++split) {
        const float4 part = *reinterpret_cast<const float4*>(
            code + ((split * d.num_blocks + a) * kTileRows + row) * d.padded_width + w);
        z.x += part.x, z.y += part.y, z.z += part.z, z.w += part.w;
      }
      const float4 s = *reinterpret_cast<const float4*>(mixing + (a * d.num_blocks + b) * d.padded_width + w);
      h.x += s.x * z.x, h.y += s.y * z.y, h.z += s.z * z.z, h.w += s.w * z.w;
    }
    *reinterpret_cast<uint2*>(mixed + (b * kTileRows + row) * d.code_stride + w) = {pack2<Out>(h.x, h.y),
                                                                                    pack2<Out>(h.z, h.w)};
  }
}

// out = mixed @ up, onto the base where that is asked for. A warp takes 32 columns at a time.
template <typename Out>
__device__ __forceinline__ void project_up(const GroupedEntry& e, const Out* base, int base_stride,
                                           bool add_base, unsigned char* shared, Out* out, int rows, int warp,
                                           int lane) {
  const AdapterDims& d = e.dims;
  const auto* up = reinterpret_cast<const Out*>(shared + e.layout.up);
  const auto* mixed = reinterpret_cast<const Out*>(shared + e.layout.mixed);
  const int g = lane / 4, c = lane % 4;
#pragma unroll 1
  for (int group = warp; group < d.groups; group += kGroupedWarps) {
    const int block = group / d.groups_per_block, local = group - block * d.groups_per_block;
    const int in_block = local * kGroupColumns + c * 8, column = block * d.block_dim + in_block;
    const bool inside = in_block < d.block_dim;
    float acc[4][4] = {};
    if (add_base && inside) {
      set_output_row(acc, 0, shared8(base + g * base_stride + column));
      set_output_row(acc, 1, shared8(base + (g + 8) * base_stride + column));
    }
#pragma unroll 1
    for (int t = 0; t < d.code_tiles; ++t) {
      uint32_t h[4];
      load_a(h, mixed + block * kTileRows * d.code_stride + t * kCodeTile, d.code_stride, lane);
      accumulate_output<Out>(acc, h, up, d.chunks, t, local * 4, g, c);
    }
    if (!inside) continue;
    Out* to = out + int64_t{g} * d.embed_dim + column;
    if (g < rows) store_16(to, pack8<Out>(output_row(acc, 0)));
    if (g + 8 < rows) store_16(to + int64_t{8} * d.embed_dim, pack8<Out>(output_row(acc, 1)));
  }
}

// A sample without an adapter: the base, or zeros.
template <typename Out>
__device__ __forceinline__ void store_base(const Out* base, int base_stride, bool add_base, Out* out, int dim,
                                           int rows) {
  const int chunks = dim / 8;
#pragma unroll 1
  for (int i = threadIdx.x; i < rows * chunks; i += kGroupedThreads) {
    const int row = i / chunks, k = i - row * chunks;
    uint4 q{};
    if (add_base) q = load_shared_16(base + row * base_stride + k * 8);
    store_16(out + int64_t{row} * dim + k * 8, q);
  }
}

template <typename In, typename Out>
__global__ void __launch_bounds__(kGroupedThreads, 2)
    alore_grouped_kernel(const __grid_constant__ GroupedParams<In, Out> p) {
  extern __shared__ __align__(128) unsigned char shared[];
  const int64_t sample = blockIdx.x / p.blocks_per_sample, part = blockIdx.x - sample * p.blocks_per_sample;
  const int64_t which = p.index[sample];
  if (which < -1 || which >= p.num_adapters) {
    if (threadIdx.x == 0) {
      printf("alore_ext: index[%lld] = %lld is not in [-1, %lld)\n", static_cast<long long>(sample),
             static_cast<long long>(which), static_cast<long long>(p.num_adapters));
    }
    __trap();
  }
  const bool adapted = which >= 0;
  const int64_t at = which - p.first;
  if (adapted ? at < 0 || at >= p.count : p.first > 0) return;  // another launch's
  const GroupedEntry& e = p.table[adapted ? static_cast<int>(at) : 0];

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  auto* base = reinterpret_cast<Out*>(shared + p.layout.base);
  auto* weight = reinterpret_cast<float*>(shared + p.layout.weight);
  auto* bias = reinterpret_cast<float*>(shared + p.layout.bias);
  if (adapted) load_factors<Out>(e, shared);
  if (p.norm) {
    fill_affine(weight, p.weight, p.affine, p.dim, 1.0f);
    fill_affine(bias, p.bias, p.affine, p.dim, 0.0f);
  }

  const int64_t tiles = (p.tokens + kTileRows - 1) / kTileRows;
#pragma unroll 1
  for (int64_t tile = part; tile < tiles; tile += p.blocks_per_sample) {
    const int64_t from = (sample * p.tokens + tile * kTileRows) * p.dim;
    const int rows = static_cast<int>(min(p.tokens - tile * kTileRows, int64_t{kTileRows}));
    if (const int64_t next = tile + p.blocks_per_sample; next < tiles) {
      const int64_t left = (p.tokens - next * kTileRows) * p.dim;
      prefetch_rows(p.x + (sample * p.tokens + next * kTileRows) * p.dim,
                    min(left, int64_t{kTileRows} * p.dim));
    }
    __syncthreads();  // factors and affine are there; the tile before is done with
    load_base(p, p.x + from, rows, weight, bias, base, warp, lane);
    __syncthreads();
    if (adapted) {
      project_down<Out>(e, base, p.layout.base_stride, shared, warp, lane);
      __syncthreads();
      mix_blocks<Out>(e, shared);
      __syncthreads();
      project_up<Out>(e, base, p.layout.base_stride, p.add_base, shared, p.out + from, rows, warp, lane);
    } else {
      store_base<Out>(base, p.layout.base_stride, p.add_base, p.out + from, p.dim, rows);
    }
  }
}

}  // namespace

void alore_grouped_forward(const CudaContext& context, int64_t num_samples,
                           std::span<const AloreShape> shapes, const AloreGroupedPlan& plan,
                           const AloreGroupedArgs& a) {
  if (!plan.fused) throw std::runtime_error("alore_grouped_forward: no fused kernel for this shape");
  const AloreShape& s = shapes.front();
  if (s.num_tokens == 0) return;
  const int dim = static_cast<int>(s.embed_dim());
  const GroupedLayout layout(dim, s.norm);
  const auto run = [&](auto in_tag, auto out_tag) {
    using In = typename decltype(in_tag)::type;
    using Out = typename decltype(out_tag)::type;
    const auto kernel = alore_grouped_kernel<In, Out>;
    static SharedMemoryGrants grants;
    grants.allow(reinterpret_cast<const void*>(kernel), static_cast<int>(plan.shared_bytes),
                 "alore_grouped_forward");
    GroupedParams<In, Out> p{layout,
                             s.num_tokens / num_samples,
                             plan.blocks_per_sample,
                             static_cast<int64_t>(shapes.size()),
                             0,
                             0,
                             dim,
                             s.norm,
                             s.add_base,
                             static_cast<const In*>(a.x),
                             a.norm.weight,
                             a.norm.bias,
                             s.affine,
                             a.norm.eps,
                             a.index,
                             static_cast<Out*>(a.out),
                             {}};
    for (size_t first = 0; first < shapes.size(); first += kEntries) {
      p.first = static_cast<int64_t>(first);
      p.count = static_cast<int>(std::min<size_t>(kEntries, shapes.size() - first));
      for (int i = 0; i < p.count; ++i) {
        const AloreShape& shape = shapes[first + i];
        const AloreAdapter& adapter = a.adapters[first + i];
        const AdapterDims dims(static_cast<int>(shape.num_blocks), static_cast<int>(shape.block_dim),
                               static_cast<int>(shape.width()));
        new (p.table.data() + i)
            GroupedEntry{{adapter.scale, adapter.down, adapter.up, shape.factor,
                          static_cast<int>(shape.num_experts), static_cast<int>(shape.rank)},
                         dims,
                         GroupedAdapterLayout(layout, dims)};
      }
      kernel<<<static_cast<unsigned>(num_samples * plan.blocks_per_sample), kGroupedThreads,
               plan.shared_bytes, context.stream>>>(p);
      check_launch("alore_grouped_forward");
    }
  };
  dispatch_rows(s.input, s.output, run);
}

}  // namespace alore::kernels
