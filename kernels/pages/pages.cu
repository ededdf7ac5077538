#include "kernels/common/device.cuh"
#include "kernels/common/launch.cuh"
#include "kernels/pages/pages.h"

namespace nosara::kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kWindowsOfBlock = 4;  // windows that end in a block: 4n - 1 .. 4n + 2

__device__ inline int64_t EntryBytes(int dim) { return kWindowsOfBlock * (int64_t{2} * dim + 4); }

/// Keys and scores of the windows that end in a block, one way or the other.
template <bool to_page>
__device__ void CopyIndex(const CacheView& cache, const PageOfBlock& block, int record,
                          std::byte* entry) {
  const int dim = cache.head_dim;
  for (int place = 0; place < kWindowsOfBlock; ++place) {
    const int window = 4 * block.block - 1 + place;
    if (window < 0) continue;
    std::byte* slot = cache.IndexSlot(block.sequence, record, window);
    const int in_slot = window % kIndexWindows;
    uint32_t* cached = reinterpret_cast<uint32_t*>(slot + int64_t{2} * dim * in_slot);
    uint32_t* paged = reinterpret_cast<uint32_t*>(entry + int64_t{2} * dim * place);
    for (int i = threadIdx.x; i < dim / 2; i += kThreads) {
      if (to_page) {
        paged[i] = cached[i];
      } else {
        cached[i] = paged[i];
      }
    }
    if (threadIdx.x == 0) {
      float* score = reinterpret_cast<float*>(slot + int64_t{2} * dim * kIndexWindows) + in_slot;
      float* stored = reinterpret_cast<float*>(entry + int64_t{2} * dim * kWindowsOfBlock) + place;
      if (to_page) {
        *stored = *score;
      } else {
        *score = *stored;
      }
    }
  }
}

__device__ void CopyRecord(const CacheView& cache, const std::byte* from, std::byte* to) {
  const int chunks = static_cast<int>(RecordBytes(cache.head_dim) / 16);
  const uint4* source = reinterpret_cast<const uint4*>(from);
  uint4* target = reinterpret_cast<uint4*>(to);
  for (int i = threadIdx.x; i < chunks; i += kThreads) target[i] = source[i];
}

__global__ void __launch_bounds__(kThreads) ExportKernel(ExportParams p) {
  StartKernel();
  const PageOfBlock block = p.blocks[blockIdx.x];
  const int record = blockIdx.y;
  const int64_t slot = p.cache.SlotOf(block.sequence, record, block.block);
  CopyRecord(p.cache, p.cache.Slot(slot),
             block.page + p.offsets.records + record * RecordBytes(p.cache.head_dim));
  CopyIndex<true>(p.cache, block, record,
                  block.page + p.offsets.index + record * EntryBytes(p.cache.head_dim));
}

__global__ void __launch_bounds__(kThreads) ImportIndexKernel(ExportParams p) {
  StartKernel();
  const PageOfBlock block = p.blocks[blockIdx.x];
  const int record = blockIdx.y;
  CopyIndex<false>(p.cache, block, record,
                   block.page + p.offsets.index + record * EntryBytes(p.cache.head_dim));
}

/// The smallest of `rank` over the thread block.
__device__ uint64_t BlockMin(uint64_t rank, uint64_t* scratch) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    rank = min(rank, __shfl_xor_sync(kAllLanes, rank, offset));
  }
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = rank;
  __syncthreads();
  for (int i = 0; i < kWarps; ++i) rank = min(rank, scratch[i]);
  __syncthreads();
  return rank;
}

constexpr uint64_t kNothing = ~uint64_t{0};

/// One thread block a record.
__global__ void __launch_bounds__(kThreads) ShrinkKernel(ShrinkParams p) {
  StartKernel();
  __shared__ uint64_t scratch[kWarps];
  const CacheView& cache = p.cache;
  const int record = blockIdx.x;
  const int64_t row = cache.TableRow(p.sequence, record);
  int32_t* slot_of = cache.slot_of + row * cache.max_blocks;
  int32_t* block_of = cache.block_of + row * cache.max_frames;
  uint32_t* stamp = cache.stamp + row * cache.max_frames;
  const uint64_t* pages = cache.pages + int64_t{p.sequence} * cache.max_blocks;
  const int slots = cache.num_frames[p.sequence];
  const auto value = [&](int block, uint32_t used) {
    // Not stored before all others, then the most recently selected.
    return pages[block] == 0 ? uint64_t{1} << 32 : uint64_t{used};
  };

  while (true) {
    // The most valuable block above, the least valuable place below.
    uint64_t best = kNothing;
    for (int i = p.keep + threadIdx.x; i < slots; i += kThreads) {
      const int block = block_of[i];
      if (block < 0) continue;
      best = min(best, ((uint64_t{1} << 32) - value(block, stamp[i])) << 24 | i);
    }
    uint64_t worst = kNothing;
    for (int i = threadIdx.x; i < min(p.keep, slots); i += kThreads) {
      const int block = block_of[i];
      worst = min(worst, (block < 0 ? 0 : value(block, stamp[i]) + 1) << 24 | i);
    }
    best = BlockMin(best, scratch);
    worst = BlockMin(worst, scratch);
    if (best == kNothing || worst == kNothing) break;
    const uint64_t best_value = (uint64_t{1} << 32) - (best >> 24);
    if (best_value + 1 <= worst >> 24) break;
    const int from = static_cast<int>(best & 0xffffff);
    const int to = static_cast<int>(worst & 0xffffff);
    CopyRecord(cache, cache.Slot(cache.SlotNumber(p.sequence, record, from)),
               cache.Slot(cache.SlotNumber(p.sequence, record, to)));
    if (threadIdx.x == 0) {
      if (block_of[to] >= 0) slot_of[block_of[to]] = -1;
      block_of[to] = block_of[from];
      slot_of[block_of[to]] = to;
      stamp[to] = stamp[from];
      block_of[from] = -1;
    }
    __syncthreads();
  }
  for (int i = p.keep + threadIdx.x; i < slots; i += kThreads) {
    if (block_of[i] >= 0) slot_of[block_of[i]] = -1;
    block_of[i] = -1;
  }
}

bool Valid(const ExportParams& p) {
  return p.num_blocks >= 0 && p.num_blocks <= 65535 && p.cache.records >= 1;
}

}  // namespace

cudaError_t LaunchExport(const ExportParams& params, cudaStream_t stream) {
  if (!Valid(params)) return cudaErrorInvalidValue;
  if (params.num_blocks == 0) return cudaSuccess;
  return LaunchKernel(ExportKernel, dim3(params.num_blocks, params.cache.records), kThreads, 0,
                      stream, params);
}

cudaError_t LaunchImportIndex(const ExportParams& params, cudaStream_t stream) {
  if (!Valid(params)) return cudaErrorInvalidValue;
  if (params.num_blocks == 0) return cudaSuccess;
  return LaunchKernel(ImportIndexKernel, dim3(params.num_blocks, params.cache.records), kThreads, 0,
                      stream, params);
}

cudaError_t LaunchShrink(const ShrinkParams& params, cudaStream_t stream) {
  if (params.keep < 1 || params.sequence < 0 || params.cache.records < 1) {
    return cudaErrorInvalidValue;
  }
  return LaunchKernel(ShrinkKernel, params.cache.records, kThreads, 0, stream, params);
}

}  // namespace nosara::kernels
