#include <cstddef>
#include <cstring>

#include "kernels/axial_shift.h"

namespace alore::kernels {
namespace {

// Copies `count` slices of `size` bytes that lie side by side, each from `distance` slices on; zeros where
// that is outside [0, count).
void shift_slices(const char* in, int64_t count, int64_t distance, size_t size, char* out) {
  const int64_t first = std::clamp<int64_t>(-distance, 0, count),
                last = std::clamp<int64_t>(count - distance, first, count);
  std::memset(out, 0, first * size);
  if (last > first) std::memcpy(out + first * size, in + (first + distance) * size, (last - first) * size);
  std::memset(out + last * size, 0, (count - last) * size);
}

}  // namespace

void axial_shift_cpu(const AxialShape& s, ShiftAxis axis, const void* x, int64_t begin, int64_t end,
                     void* out) {
  const size_t element = size_of(s.type);
  const int64_t per_group = s.group_channels(), first = s.first_distance();
  const auto distance = [&](int64_t group) { return s.transposed ? group - first : first - group; };
  const char* in = static_cast<const char*>(x);
  char* result = static_cast<char*>(out);

  if (!s.channels_last) {
    const size_t row = s.width * element, plane = s.height * row;
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t d = distance(piece % s.channels / per_group);
      const char* source = in + piece * plane;
      char* target = result + piece * plane;
      if (axis == ShiftAxis::kHeight) {
        shift_slices(source, s.height, d, row, target);
      } else {
        for (int64_t h = 0; h < s.height; ++h) {
          shift_slices(source + h * row, s.width, d, element, target + h * row);
        }
      }
    }
    return;
  }

  const size_t pixel = s.channels * element, row = s.width * pixel;
  for (int64_t piece = begin; piece < end; ++piece) {
    const int64_t h = piece % s.height;
    const char* source = in + piece * row;
    char* target = result + piece * row;
    for (int64_t w = 0; w < s.width; ++w) {
      for (int64_t group = 0, channel = 0; channel < s.channels; ++group, channel += per_group) {
        const int64_t d = distance(group);
        const bool along_width = axis == ShiftAxis::kWidth;
        const int64_t from = (along_width ? w : h) + d;
        const bool inside = from >= 0 && from < (along_width ? s.width : s.height);
        const size_t at = w * pixel + channel * element,
                     size = std::min(per_group, s.channels - channel) * element;
        if (inside) {
          std::memcpy(target + at, source + at + d * static_cast<int64_t>(along_width ? pixel : row), size);
        } else {
          std::memset(target + at, 0, size);
        }
      }
    }
  }
}

}  // namespace alore::kernels
