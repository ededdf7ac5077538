#include "kernels/common/device.cuh"
#include "kernels/common/launch.cuh"
#include "kernels/resolve/resolve.h"

namespace nosara::kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kChunkThreads = 1024;  // few thread blocks with much to read
constexpr uint64_t kNoVictim = ~uint64_t{0};

/// Slots of one (sequence, record).
struct SlotRow {
  int32_t* slot_of;
  int32_t* block_of;
  uint32_t* stamp;
  const uint64_t* pages;
  int slots;

  __device__ SlotRow(const CacheView& cache, int sequence, int record) {
    const int64_t row = cache.TableRow(sequence, record);
    slot_of = cache.slot_of + row * cache.max_blocks;
    block_of = cache.block_of + row * cache.max_frames;
    stamp = cache.stamp + row * cache.max_frames;
    pages = cache.pages + int64_t{sequence} * cache.max_blocks;
    slots = cache.num_frames[sequence];
  }
};

/// The slot that `block` takes, entered into the tables by thread 0; -1 when none can be given up.
/// Called by the whole thread block; ends with a barrier. `scratch`: one number a warp.
template <int threads>
__device__ int TakeSlot(const SlotRow& row, int block, uint32_t step, uint64_t* scratch) {
  // Free slots rank by number, occupied ones behind them by (last step, block).
  uint64_t best = kNoVictim;
  for (int i = threadIdx.x; i < row.slots; i += threads) {
    const int held = row.block_of[i];
    uint64_t rank;
    if (held < 0) {
      rank = static_cast<uint32_t>(i);
    } else {
      const uint32_t used = row.stamp[i];
      if (used >= step || row.pages[held] == 0) continue;
      rank = (static_cast<uint64_t>(used) + 1) << 32 | static_cast<uint32_t>(held);
    }
    best = min(best, rank);
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    best = min(best, __shfl_xor_sync(kAllLanes, best, offset));
  }
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = best;
  __syncthreads();
  for (int i = 0; i < threads / 32; ++i) best = min(best, scratch[i]);
  int slot = -1;
  if (best != kNoVictim) {
    const int low = static_cast<int>(best & 0xffffffffu);
    slot = best >> 32 == 0 ? low : row.slot_of[low];
  }
  __syncthreads();  // everybody has read the tables and the scratch
  if (threadIdx.x == 0 && slot >= 0) {
    if (row.block_of[slot] >= 0) row.slot_of[row.block_of[slot]] = -1;
    row.block_of[slot] = block;
    row.slot_of[block] = slot;
    row.stamp[slot] = step;
  }
  __syncthreads();
  return slot;
}

__device__ inline void CountTotals(const ResolveParams& p, int row, int selected, int loaded) {
  if (p.totals == nullptr) return;
  atomicAdd(&p.totals[row].x, selected);
  atomicAdd(&p.totals[row].y, loaded);
}

__global__ void __launch_bounds__(kThreads) ResolveKernel(ResolveParams p) {
  StartKernel();
  extern __shared__ int32_t missing[];  // [max_selected]
  __shared__ int hits_of_warp[2][kWarps];
  __shared__ uint64_t scratch[kWarps];
  const int64_t pair = static_cast<int64_t>(blockIdx.x) * p.num_kv_heads + blockIdx.y;
  const int sequence = p.rows_info[blockIdx.x].sequence;
  if (sequence < 0) return;
  const int record = p.layer * p.num_kv_heads + blockIdx.y;
  const SlotRow row(p.cache, sequence, record);
  const uint32_t step = *p.step;
  const int32_t* selected = p.selected + pair * p.max_selected;
  int32_t* slots = p.slots + pair * p.max_selected;
  int32_t* blocks = p.blocks + pair * p.max_selected;
  const int count = p.count[pair];
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;

  int hits = 0;
  int misses = 0;
  for (int first = 0, round = 0; first < count; first += kThreads, ++round) {
    const int i = first + threadIdx.x;
    const int block = i < count ? selected[i] : -1;
    const int local = block >= 0 ? row.slot_of[block] : -1;
    const uint32_t hit_bits = __ballot_sync(kAllLanes, local >= 0);
    if (lane == 0) hits_of_warp[round & 1][warp] = __popc(hit_bits);
    __syncthreads();
    int before = __popc(hit_bits & ((1u << lane) - 1));
    int here = 0;
    for (int w = 0; w < kWarps; ++w) {
      const int own = hits_of_warp[round & 1][w];
      before += w < warp ? own : 0;
      here += own;
    }
    if (local >= 0) {
      slots[hits + before] = static_cast<int32_t>(p.cache.SlotNumber(sequence, record, local));
      blocks[hits + before] = block;
      row.stamp[local] = step;
    } else if (block >= 0) {
      missing[misses + (threadIdx.x - before)] = block;
    }
    hits += here;
    misses += min(kThreads, count - first) - here;
  }
  __syncthreads();

  int loaded = 0;
  for (int i = 0; i < misses; ++i) {
    const int block = missing[i];
    const int local = TakeSlot<kThreads>(row, block, step, scratch);
    if (local < 0) {
      if (threadIdx.x == 0) atomicAdd(p.failures, 1);
      continue;
    }
    if (threadIdx.x == 0) {
      slots[hits + loaded] = static_cast<int32_t>(p.cache.SlotNumber(sequence, record, local));
      blocks[hits + loaded] = block;
      int source = -1;
      if (p.sources == nullptr || row.pages[block] == kStoredElsewhere) {
        source = atomicAdd(p.num_loads, 1);
        p.loads[source] = {sequence, record, block, local};
      }
      if (p.sources != nullptr) p.sources[pair * p.max_selected + hits + loaded] = source;
    }
    ++loaded;
  }
  if (threadIdx.x == 0) {
    p.ranges[pair] = {hits, hits + loaded};
    CountTotals(p, blockIdx.x, count, loaded);
  }
}

__global__ void __launch_bounds__(kThreads) PublishLoadsKernel(PublishLoadsParams p) {
  StartKernel();
  const int count = *p.num_loads;
  for (int i = threadIdx.x; i < count; i += kThreads) p.host_loads[i] = p.loads[i];
  __threadfence_system();
  __syncthreads();
  if (threadIdx.x == 0) *reinterpret_cast<volatile uint32_t*>(p.bell) = count + 1;
}

__global__ void __launch_bounds__(kChunkThreads) ResolveChunksKernel(ResolveParams p) {
  StartKernel();
  constexpr int kThreads = kChunkThreads;
  constexpr int kWarps = kThreads / 32;
  extern __shared__ uint32_t needed[];  // bit set of blocks
  __shared__ uint64_t scratch[kWarps];
  __shared__ int end;
  __shared__ int selected;
  const int first_row = blockIdx.x;
  const int sequence = p.rows_info[first_row].sequence;
  if (sequence < 0) return;
  if (first_row > 0 && p.rows_info[first_row - 1].sequence == sequence) return;
  const int record = p.layer * p.num_kv_heads + blockIdx.y;
  const SlotRow row(p.cache, sequence, record);
  const uint32_t step = *p.step;
  const int words = (p.max_blocks + 31) / 32;
  for (int i = threadIdx.x; i < words; i += kThreads) needed[i] = 0;
  if (threadIdx.x == 0) {
    end = p.rows;
    selected = 0;
  }
  __syncthreads();
  for (int i = first_row + threadIdx.x; i < p.rows; i += kThreads) {
    if (p.rows_info[i].sequence != sequence) {
      atomicMin(&end, i);
      break;
    }
  }
  __syncthreads();
  const int end_row = end;
  // A warp a row. Most rows select what others have: a look first, so that they do not queue.
  const int lane = threadIdx.x % 32;
#pragma unroll 4
  for (int r = first_row + static_cast<int>(threadIdx.x) / 32; r < end_row; r += kWarps) {
    const int64_t pair = static_cast<int64_t>(r) * p.num_kv_heads + blockIdx.y;
    const int count = p.count[pair];
    for (int i = lane; i < count; i += 32) {
      const int block = p.selected[pair * p.max_selected + i];
      const uint32_t bit = 1u << (block % 32);
      if ((needed[block / 32] & bit) == 0) atomicOr(needed + block / 32, bit);
    }
  }
  __syncthreads();
  // All that is here is marked before anything can be given up; what is left in the set is missing.
  for (int n = threadIdx.x; n < p.max_blocks; n += kThreads) {
    if ((needed[n / 32] >> (n % 32) & 1u) == 0) continue;
    atomicAdd(&selected, 1);
    const int local = row.slot_of[n];
    if (local < 0) continue;
    row.stamp[local] = step - 1;
    atomicAnd(needed + n / 32, ~(1u << (n % 32)));
  }
  __syncthreads();
  int loaded = 0;
  for (int word = 0; word < words; ++word) {
    for (uint32_t bits = needed[word]; bits != 0; bits &= bits - 1) {
      const int block = word * 32 + __ffs(static_cast<int>(bits)) - 1;
      const int local = TakeSlot<kThreads>(row, block, step - 1, scratch);
      if (threadIdx.x == 0) {
        if (local < 0) {
          atomicAdd(p.failures, 1);
        } else {
          p.loads[atomicAdd(p.num_loads, 1)] = {sequence, record, block, local};
        }
      }
      loaded += local < 0 ? 0 : 1;
    }
  }
  __syncthreads();
  const int64_t last = static_cast<int64_t>(end_row - 1) * p.num_kv_heads + blockIdx.y;
  for (int i = threadIdx.x; i < p.count[last]; i += kThreads) {
    const int local = row.slot_of[p.selected[last * p.max_selected + i]];
    if (local >= 0) row.stamp[local] = step;
  }
  if (threadIdx.x == 0) CountTotals(p, first_row, selected, loaded);
}

__global__ void __launch_bounds__(kThreads) OpenBlocksKernel(OpenBlocksParams p) {
  StartKernel();
  __shared__ uint64_t scratch[kWarps];
  const int sequence = p.rows_info[blockIdx.x].sequence;
  if (sequence < 0) return;
  // The first row of a sequence opens the blocks of all its rows, one after the other.
  if (blockIdx.x > 0 && p.rows_info[blockIdx.x - 1].sequence == sequence) return;
  const SlotRow row(p.cache, sequence, blockIdx.y);
  const int position = p.rows_info[blockIdx.x].position;
  const int skipped = (kBlockTokens - position % kBlockTokens) % kBlockTokens;
  for (int i = blockIdx.x + skipped; i < p.rows; i += kBlockTokens) {
    const StepRow info = p.rows_info[i];
    if (info.sequence != sequence) break;
    const int block = info.position / kBlockTokens;
    if (row.slot_of[block] >= 0) continue;
    if (TakeSlot<kThreads>(row, block, *p.step, scratch) < 0 && threadIdx.x == 0) {
      atomicAdd(p.failures, 1);
    }
  }
}

}  // namespace

cudaError_t LaunchResolve(const ResolveParams& params, cudaStream_t stream) {
  if (params.rows < 1 || params.num_kv_heads < 1 || params.max_selected < 1) {
    return cudaErrorInvalidValue;
  }
  const size_t shared = sizeof(int32_t) * params.max_selected;
  const cudaError_t status = cudaFuncSetAttribute(
      ResolveKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (status != cudaSuccess) return status;
  return LaunchKernel(ResolveKernel, dim3(params.rows, params.num_kv_heads), kThreads, shared,
                      stream, params);
}

cudaError_t LaunchPublishLoads(const PublishLoadsParams& params, cudaStream_t stream) {
  return LaunchKernel(PublishLoadsKernel, 1, kThreads, 0, stream, params);
}

cudaError_t LaunchResolveChunks(const ResolveParams& params, cudaStream_t stream) {
  if (params.rows < 1 || params.num_kv_heads < 1 || params.max_blocks < 1) {
    return cudaErrorInvalidValue;
  }
  const size_t shared = sizeof(uint32_t) * ((params.max_blocks + 31) / 32);
  return LaunchKernel(ResolveChunksKernel, dim3(params.rows, params.num_kv_heads), kChunkThreads,
                      shared, stream, params);
}

cudaError_t LaunchOpenBlocks(const OpenBlocksParams& params, cudaStream_t stream) {
  if (params.rows < 1 || params.cache.records < 1) return cudaErrorInvalidValue;
  return LaunchKernel(OpenBlocksKernel, dim3(params.rows, params.cache.records), kThreads, 0,
                      stream, params);
}

}  // namespace nosara::kernels
