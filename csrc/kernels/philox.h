// Counter-based random bits for dropout: Philox4x32-10 (Salmon et al., SC 2011). The mask of element i is a
// function of (seed, i) alone, so backward and activation checkpointing recompute it and CPU and CUDA draw
// the same one.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define ALORE_HOST_DEVICE __host__ __device__
#else
#define ALORE_HOST_DEVICE
#endif

namespace alore::kernels {

struct Philox4 {
  uint32_t v[4];
};

// `stream`: independent sequences of one seed, as torch's kernels number their threads.
ALORE_HOST_DEVICE inline Philox4 philox(uint64_t seed, uint64_t counter, uint64_t stream = 0) {
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32);
  uint32_t c2 = static_cast<uint32_t>(stream), c3 = static_cast<uint32_t>(stream >> 32);
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#ifdef __CUDA_ARCH__
// Rolled up: a copy stands at every place that drops, and together they would crowd the instruction cache.
#pragma unroll 1
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0, p1 = uint64_t{0xCD9E8D57u} * c2;
    const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0,
                   n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// An element is dropped when its 32 random bits, as a fraction of 2^32, fall below p.
ALORE_HOST_DEVICE inline uint32_t drop_threshold(double p) { return static_cast<uint32_t>(p * 4294967296.0); }

}  // namespace alore::kernels
