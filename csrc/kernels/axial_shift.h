// The axial shift of AS-MLP: each group of channels moves along one spatial axis by its own distance.
//   along the width:   out[b,c,h,w] = x[b,c,h,w + d(c)]
//   along the height:  out[b,c,h,w] = x[b,c,h + d(c),w]
// and 0 where that is outside, d(c) = shift_size / 2 - c / ceil(channels / shift_size) in whole numbers.
// The map's transpose, which takes out's gradient to x's, is the same one with -d(c).
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/dtype.h"

namespace alore::kernels {

enum class ShiftAxis { kHeight, kWidth };

struct AxialShape {
  int64_t batch = 0;
  int64_t channels = 0;
  int64_t height = 0;
  int64_t width = 0;
  int64_t shift_size = 1;      // >= 1
  bool channels_last = false;  // in memory [B, H, W, C], else [B, C, H, W]
  DType type = DType::kFloat32;
  bool transposed = false;  // distances -d(c): the gradient

  bool is_empty() const { return batch == 0 || channels == 0 || height == 0 || width == 0; }

  // The rest is for shapes that are not empty. shift_size may be far beyond the image.
  int64_t group_channels() const { return (channels - 1) / shift_size + 1; }
  int64_t groups() const { return (channels - 1) / group_channels() + 1; }
  // d of the first group, bounded where no element of any group can come from inside the image.
  int64_t first_distance() const { return std::min(shift_size / 2, std::max(height, width) + channels); }
};

// ---- CPU: one thread
// ------------------------------------------------------------------------------------------------

// Pieces of work: the planes [b,c], or with channels_last the rows [b,h].
inline int64_t axial_shift_pieces_cpu(const AxialShape& s) {
  return s.batch * (s.channels_last ? s.height : s.channels);
}

// Overwrites pieces [begin, end) of out. x and out do not overlap.
void axial_shift_cpu(const AxialShape& shape, ShiftAxis axis, const void* x, int64_t begin, int64_t end,
                     void* out);

}  // namespace alore::kernels

#ifdef ALORE_WITH_CUDA
#include "kernels/context.h"

namespace alore::kernels {

// ---- CUDA
// ----------------------------------------------------------------------------------------------------------

// 16-byte accesses where all pointers are multiples of 16, an image has less than 2^29 elements and, with
// channels_last, a pixel is a whole number of 16 bytes; single elements otherwise. Outputs overlap nothing.

// Overwrites out.
void axial_shift(const CudaContext& context, const AxialShape& shape, ShiftAxis axis, const void* x,
                 void* out);

// Both shifts of x in one pass. Overwrites along_width and along_height.
void axial_shift_pair(const CudaContext& context, const AxialShape& shape, const void* x, void* along_width,
                      void* along_height);

// out = shift of a along the width + shift of b along the height, rounded once: with shape.transposed the
// gradient of axial_shift_pair. Overwrites out.
void axial_shift_sum(const CudaContext& context, const AxialShape& shape, const void* a, const void* b,
                     void* out);

}  // namespace alore::kernels
#endif
