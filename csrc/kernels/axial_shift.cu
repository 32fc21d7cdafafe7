#include <bit>

#include "kernels/axial_shift.h"
#include "kernels/cuda_common.cuh"

namespace alore::kernels {
namespace {

// Elements are copied as unsigned integers of their size, whatever they hold.
template <size_t kSize>
using Bits = std::conditional_t<kSize == 2, uint16_t, std::conditional_t<kSize == 4, uint32_t, uint64_t>>;

constexpr int kVectorBytes = 16;
// One vector a thread: with two or four in flight, or blocks of 256 and 512, every case was slower
// (NOTES.md).
constexpr int kBlock = 128;

template <typename T, int kLanes>
struct alignas(sizeof(T) * kLanes) Vec {
  T lane[kLanes];
};

template <typename T, int kLanes>
__device__ __forceinline__ Vec<T, kLanes> load(const T* p) {
  return *reinterpret_cast<const Vec<T, kLanes>*>(p);
}

template <typename T, int kLanes>
__device__ __forceinline__ void store(T* p, const Vec<T, kLanes>& v) {
  if constexpr (sizeof(v) == kVectorBytes) {
    store_16(p, std::bit_cast<uint4>(v));
  } else {
    *p = v.lane[0];
  }
}

// 16 bytes from element `skip` on of the two vectors that start at p, which is a multiple of 16. The same
// `skip` in all threads of a block, so that neither branch below diverges.
template <typename T, int kLanes>
__device__ __forceinline__ Vec<T, kLanes> load_across(const T* p, int skip) {
  static_assert(sizeof(T) * kLanes == kVectorBytes);
  if (skip == 0) return load<T, kLanes>(p);
  struct alignas(kVectorBytes) {
    uint32_t word[8];
  } both;
  *reinterpret_cast<uint4*>(both.word) = *reinterpret_cast<const uint4*>(p);
  *reinterpret_cast<uint4*>(both.word + 4) = *reinterpret_cast<const uint4*>(p + kLanes);
  const unsigned bytes = skip * sizeof(T);
#pragma unroll
  for (int i = 0; i < 6; ++i) both.word[i] = bytes & 8 ? both.word[i + 2] : both.word[i];
#pragma unroll
  for (int i = 0; i < 5; ++i) both.word[i] = bytes & 4 ? both.word[i + 1] : both.word[i];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    both.word[i] = __funnelshift_r(both.word[i], both.word[i + 1], (bytes & 2) * 8);
  }
  return load<T, kLanes>(reinterpret_cast<const T*>(both.word));
}

// Division by a number that is known at launch: of 32-bit dividends, which are below 2^31 and not negative,
// by a multiplication. A thread does three of them for one vector; real ones take tens of instructions each.
template <typename Index>
class Divider {
 public:
  explicit Divider(int64_t divisor) : divisor_(static_cast<Index>(divisor)) {
    while ((int64_t{1} << bits_) < divisor) ++bits_;
    // Rounded up: exact for such dividends, and for divisor > 1 below 2^32.
    if (sizeof(Index) == 4 && bits_ > 0) {
      multiplier_ = static_cast<uint32_t>(((int64_t{1} << (31 + bits_)) + divisor - 1) / divisor);
    }
  }
  __device__ __forceinline__ Index quotient(Index n) const {
    if constexpr (sizeof(Index) == 8) return n / divisor_;
    return bits_ == 0 ? n
                      : static_cast<Index>(__umulhi(static_cast<uint32_t>(n), multiplier_) >> (bits_ - 1));
  }
  __device__ __forceinline__ Index remainder(Index n) const { return n - quotient(n) * divisor_; }

 private:
  Index divisor_;
  uint32_t multiplier_ = 0;
  int bits_ = 0;  // the least with divisor <= 2^bits
};

// What both layouts need of the shape. Index is int32_t where an image's elements can be counted in it.
template <typename Index>
struct Image {
  Index channels, height, width, group_channels, first_distance;
  int sign;

  Image(const AxialShape& s)
      : channels(static_cast<Index>(s.channels)),
        height(static_cast<Index>(s.height)),
        width(static_cast<Index>(s.width)),
        group_channels(static_cast<Index>(s.group_channels())),
        first_distance(static_cast<Index>(s.first_distance())),
        sign(s.transposed ? -1 : 1) {}

  // Bounded by the extent, beyond which there are only zeros.
  __device__ __forceinline__ Index distance(Index group, Index extent) const {
    return max(-extent, min((first_distance - group) * sign, extent));
  }
  __device__ __forceinline__ Index extent(ShiftAxis axis) const {
    return axis == ShiftAxis::kWidth ? width : height;
  }
};

// [B, C, H, W]. The planes of one group in one image lie side by side and move alike: a run. Seen from a run,
// a row or a plane is a period, and element i comes from i + offset unless that is in another period.
template <typename T, int kLanes_, typename Index_>
struct Planes {
  static constexpr int kLanes = kLanes_;
  using Element = T;
  using Index = Index_;
  using Vector = Vec<T, kLanes>;

  Image<Index> image;
  Divider<Index> groups, row, plane;
  Index runs, group_count, vectors;  // vectors: that one run may touch
  int64_t elements;                  // of the tensor

  Planes(const AxialShape& s)
      : image(s),
        groups(s.groups()),
        row(s.width),
        plane(s.height * s.width),
        runs(static_cast<Index>(s.batch * s.groups())),
        group_count(static_cast<Index>(s.groups())),
        // A run need not start or end with a vector.
        vectors(static_cast<Index>(s.group_channels() * s.height * s.width / kLanes + 2)),
        elements(s.batch * s.channels * s.height * s.width) {}

  struct Place {
    int64_t vector;  // first element of the thread's vector, counted from the tensor's
    Index element;   // the same, counted from the run's first: negative where the vector starts before it
    Index length;    // of the run
    Index group;
  };

  __device__ __forceinline__ Place place(Index run, Index vector) const {
    const Index b = groups.quotient(run), group = run - b * group_count;
    const Index channel = group * image.group_channels, plane_size = image.height * image.width;
    const int64_t begin = (int64_t{b} * image.channels + channel) * plane_size;
    const int lead = static_cast<int>(begin % kLanes);
    const Index at = vector * kLanes;
    return {begin - lead + at, at - lead, min(image.group_channels, image.channels - channel) * plane_size,
            group};
  }

  __device__ __forceinline__ bool has_work(const Place& p) const { return p.element < p.length; }

  __device__ __forceinline__ Vector load_shifted(const T* x, ShiftAxis axis, const Place& p) const {
    const Index stride = axis == ShiftAxis::kWidth ? 1 : image.width, extent = image.extent(axis);
    const Index period = extent * stride, offset = image.distance(p.group, extent) * stride;
    // Within its period; of a lane before the run, which is not stored, what leads up to 0 at the run.
    Index position = p.element;
    if (position >= 0)
      position = axis == ShiftAxis::kWidth ? row.remainder(position) : plane.remainder(position);
    if constexpr (kLanes > 1) {
      // Whole vectors, where they are inside the tensor; what came from elsewhere is masked.
      const int skip = static_cast<int>(offset & (kLanes - 1));
      const int64_t from = p.vector + offset - skip;
      if (from >= 0 && from + 2 * kLanes <= elements) {
        Vector v = load_across<T, kLanes>(x + from, skip);
        const Index lowest = min(position, position + offset);
        const Index behind = max(position, position + offset) + kLanes;
        if (lowest >= 0 && behind <= period) return v;
#pragma unroll
        for (int k = 0; k < kLanes; ++k) {
          if (position + offset < 0 || position + offset >= period) v.lane[k] = 0;
          if (++position == period) position = 0;
        }
        return v;
      }
    }
    Vector v;
#pragma unroll
    for (int k = 0; k < kLanes; ++k) {
      const bool stored = p.element + k >= 0 && p.element + k < p.length;
      const bool inside = position + offset >= 0 && position + offset < period;
      v.lane[k] = stored && inside ? x[p.vector + k + offset] : T{0};
      if (++position == period) position = 0;
    }
    return v;
  }

  __device__ __forceinline__ void store_at(T* out, const Place& p, const Vector& v) const {
    if (p.element >= 0 && p.element + kLanes <= p.length) return store<T, kLanes>(out + p.vector, v);
#pragma unroll
    for (int k = 0; k < kLanes; ++k) {
      if (p.element + k >= 0 && p.element + k < p.length) out[p.vector + k] = v.lane[k];
    }
  }
};

// [B, H, W, C], C a multiple of the lanes. A run is a row of an image; a vector, channels of one pixel, comes
// from as many pixels as it has groups.
template <typename T, int kLanes_, typename Index_>
struct Pixels {
  static constexpr int kLanes = kLanes_;
  using Element = T;
  using Index = Index_;
  using Vector = Vec<T, kLanes>;

  Image<Index> image;
  Divider<Index> rows, pixel, group_of;
  Index runs, vectors, vectors_per_pixel;

  Pixels(const AxialShape& s)
      : image(s),
        rows(s.height),
        pixel(s.channels / kLanes),
        group_of(s.group_channels()),
        runs(static_cast<Index>(s.batch * s.height)),
        vectors(static_cast<Index>(s.width * (s.channels / kLanes))),
        vectors_per_pixel(static_cast<Index>(s.channels / kLanes)) {}

  struct Place {
    int64_t vector;  // first element of the thread's vector, counted from the tensor's
    Index h, w, channel;
  };

  __device__ __forceinline__ Place place(Index run, Index vector) const {
    const Index w = pixel.quotient(vector);
    return {(int64_t{run} * vectors + vector) * kLanes, rows.remainder(run), w,
            (vector - w * vectors_per_pixel) * kLanes};
  }

  __device__ __forceinline__ bool has_work(const Place&) const { return true; }

  __device__ __forceinline__ Vector load_shifted(const T* x, ShiftAxis axis, const Place& p) const {
    const bool along_width = axis == ShiftAxis::kWidth;
    const Index extent = image.extent(axis), position = along_width ? p.w : p.h;
    const Index stride = (along_width ? 1 : image.width) * image.channels;
    const auto from_group = [&](Index group) {
      const Index distance = image.distance(group, extent);
      if (position + distance < 0 || position + distance >= extent) return Vector{};
      return load<T, kLanes>(x + p.vector + int64_t{distance} * stride);
    };
    Index group = group_of.quotient(p.channel), next = (group + 1) * image.group_channels;
    Vector v = from_group(group);
    for (; next < p.channel + kLanes; next += image.group_channels) {
      const Vector other = from_group(++group);
#pragma unroll
      for (int k = 1; k < kLanes; ++k) {
        if (p.channel + k >= next) v.lane[k] = other.lane[k];
      }
    }
    return v;
  }

  __device__ __forceinline__ void store_at(T* out, const Place& p, const Vector& v) const {
    store<T, kLanes>(out + p.vector, v);
  }
};

// Stores load(place) at the thread's places: blockIdx.y counts runs, blockIdx.x parts of one. Two vectors of
// a thread are loaded before the first is stored.
template <typename Layout, typename Load, typename Store>
__device__ __forceinline__ void for_vectors(const Layout& layout, Load load, Store store) {
  using Index = typename Layout::Index;
  for (Index run = blockIdx.y; run < layout.runs; run += gridDim.y) {
    for (Index vector = Index(blockIdx.x) * kBlock + threadIdx.x; vector < layout.vectors;
         vector += Index(gridDim.x) * kBlock) {
      const auto place = layout.place(run, vector);
      if (layout.has_work(place)) store(place, load(place));
    }
  }
}

template <typename Layout, typename T = typename Layout::Element>
__global__ void __launch_bounds__(kBlock) shift_kernel(Layout layout, ShiftAxis axis, const T* x, T* out) {
  for_vectors(
      layout, [&](const auto& place) { return layout.load_shifted(x, axis, place); },
      [&](const auto& place, const auto& v) { layout.store_at(out, place, v); });
}

template <typename Layout, typename T = typename Layout::Element>
__global__ void __launch_bounds__(kBlock)
    shift_pair_kernel(Layout layout, const T* x, T* along_width, T* along_height) {
  struct Both {
    typename Layout::Vector w, h;
  };
  for_vectors(
      layout,
      [&](const auto& place) {
        return Both{layout.load_shifted(x, ShiftAxis::kWidth, place),
                    layout.load_shifted(x, ShiftAxis::kHeight, place)};
      },
      [&](const auto& place, const auto& both) {
        layout.store_at(along_width, place, both.w);
        layout.store_at(along_height, place, both.h);
      });
}

// Value: the type that the elements hold.
template <typename Value, typename Layout, typename T = typename Layout::Element>
__global__ void __launch_bounds__(kBlock) shift_sum_kernel(Layout layout, const T* a, const T* b, T* out) {
  using Acc = acc_t<Value>;
  const auto value = [](T bits) { return convert<Acc>(std::bit_cast<Value>(bits)); };
  for_vectors(
      layout,
      [&](const auto& place) {
        auto sum = layout.load_shifted(a, ShiftAxis::kWidth, place);
        const auto other = layout.load_shifted(b, ShiftAxis::kHeight, place);
#pragma unroll
        for (int k = 0; k < Layout::kLanes; ++k) {
          sum.lane[k] = std::bit_cast<T>(convert<Value>(value(sum.lane[k]) + value(other.lane[k])));
        }
        return sum;
      },
      [&](const auto& place, const auto& sum) { layout.store_at(out, place, sum); });
}

template <typename Layout>
dim3 grid_of(const Layout& layout) {
  const int64_t parts = (int64_t{layout.vectors} + kBlock - 1) / kBlock;
  return dim3(static_cast<unsigned>(std::min<int64_t>(parts, 1 << 30)),
              static_cast<unsigned>(std::min<int64_t>(layout.runs, 65535)));
}

template <typename... Pointers>
bool all_aligned(Pointers... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % kVectorBytes == 0) && ...);
}

// Calls run(layout) with the layout that fits: vectors and 32-bit indices, or single elements and 64-bit
// ones.
template <typename T, typename Run>
void with_layout(const AxialShape& s, bool aligned, Run run) {
  constexpr int kLanes = kVectorBytes / sizeof(T);
  constexpr int64_t kMost = int64_t{1} << 29;  // sums of a few such indices still fit 32 bits
  const bool narrow =
      s.channels * s.height * s.width < kMost && s.batch * std::max(s.channels, s.height) < kMost;
  if (s.channels_last) {
    if (narrow && aligned && s.channels % kLanes == 0) return run(Pixels<T, kLanes, int32_t>(s));
    return run(Pixels<T, 1, int64_t>(s));
  }
  if (narrow && aligned) return run(Planes<T, kLanes, int32_t>(s));
  run(Planes<T, 1, int64_t>(s));
}

// Calls f(zero of the integer type that elements are copied as).
template <typename F>
void dispatch_bits(DType type, F&& f) {
  switch (size_of(type)) {
    case 2:
      return f(uint16_t{0});
    case 4:
      return f(uint32_t{0});
    default:
      return f(uint64_t{0});
  }
}

template <typename T>
const T* in(const void* p) {
  return static_cast<const T*>(p);
}

template <typename T>
T* to(void* p) {
  return static_cast<T*>(p);
}

}  // namespace

void axial_shift(const CudaContext& context, const AxialShape& shape, ShiftAxis axis, const void* x,
                 void* out) {
  if (shape.is_empty()) return;
  dispatch_bits(shape.type, [&](auto zero) {
    using T = decltype(zero);
    with_layout<T>(shape, all_aligned(x, out), [&](const auto& layout) {
      shift_kernel<<<grid_of(layout), kBlock, 0, context.stream>>>(layout, axis, in<T>(x), to<T>(out));
    });
  });
  check_launch("axial_shift");
}

void axial_shift_pair(const CudaContext& context, const AxialShape& shape, const void* x, void* along_width,
                      void* along_height) {
  if (shape.is_empty()) return;
  dispatch_bits(shape.type, [&](auto zero) {
    using T = decltype(zero);
    with_layout<T>(shape, all_aligned(x, along_width, along_height), [&](const auto& layout) {
      shift_pair_kernel<<<grid_of(layout), kBlock, 0, context.stream>>>(layout, in<T>(x), to<T>(along_width),
                                                                        to<T>(along_height));
    });
  });
  check_launch("axial_shift_pair");
}

void axial_shift_sum(const CudaContext& context, const AxialShape& shape, const void* a, const void* b,
                     void* out) {
  if (shape.is_empty()) return;
  dispatch(shape.type, [&](auto tag) {
    using Value = typename decltype(tag)::type;
    using T = Bits<sizeof(Value)>;
    with_layout<T>(shape, all_aligned(a, b, out), [&](const auto& layout) {
      shift_sum_kernel<Value>
          <<<grid_of(layout), kBlock, 0, context.stream>>>(layout, in<T>(a), in<T>(b), to<T>(out));
    });
  });
  check_launch("axial_shift_sum");
}

}  // namespace alore::kernels
