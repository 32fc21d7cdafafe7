#include "kernels/merge_tile.cuh"

namespace alore::kernels {
namespace {

template <typename T>
void launch(const CudaContext& context, const MergeTable& table, int64_t tiles, size_t shared_bytes) {
  // Asked for only where needed: a kernel may have 48 KiB without asking.
  if (shared_bytes > 48 * 1024) {
    check(cudaFuncSetAttribute(merge_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes)),
          "merge_grouped");
  }
  merge_kernel<T><<<static_cast<unsigned>(tiles), kMergeThreads, shared_bytes, context.stream>>>(table);
  check_launch("merge_grouped");
}

}  // namespace

void merge_grouped(const CudaContext& context, DType target, const PlannedMerge* merges, int64_t count) {
  MergeTable table;
  int64_t tiles = 0;
  size_t shared_bytes = 0;
  const auto flush = [&] {
    if (table.count > 0) {
      dispatch(target,
               [&](auto tag) { launch<typename decltype(tag)::type>(context, table, tiles, shared_bytes); });
    }
    table.count = 0;
    tiles = 0;
    shared_bytes = 0;
  };
  constexpr int64_t kMaxTiles = int64_t{1} << 31;
  for (const PlannedMerge* merge = merges; merge != merges + count; ++merge) {
    if (merge->plan.num_tiles == 0) continue;
    if (table.count == kMergeEntries || tiles + merge->plan.num_tiles >= kMaxTiles) flush();
    MergeEntry& entry = table.entries[table.count++];
    entry = merge->entry;
    entry.first_tile = static_cast<int32_t>(tiles);
    tiles += merge->plan.num_tiles;
    shared_bytes = std::max(shared_bytes, merge->plan.shared_bytes);
  }
  flush();
}

}  // namespace alore::kernels
