#include <cmath>

#include "kernels/common/device.cuh"
#include "kernels/common/launch.cuh"
#include "kernels/score/score.h"
#include "kernels/select/select.h"
#include "kernels/select/take_best.cuh"

namespace nosara::kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kChunkBlocks = 512;  // blocks whose window scores lie in shared memory at a time
constexpr int kChunkWindows = 4 * kChunkBlocks;

struct Shared {
  // Aligned, so that no vector load of them reaches into what others write.
  alignas(16) float most[kMaxGroup];         // M_g
  alignas(16) float inverse_sum[kMaxGroup];  // 1 / Z_g; 0 for padding heads
  TakeBestScratch<kThreads> best;
  float window_scores[kChunkWindows + 1];  // [0]: of the window before the chunk
};

/// Sum over the heads of the softmax weights of one window. `quads` = padded heads / 4.
template <int quads>
__device__ inline float SumHeads(const Shared& shared, const float4* from, int all_quads) {
  float score = 0;
  const auto add = [&](int q, const float4& l) {
    score += __expf(l.x - shared.most[4 * q]) * shared.inverse_sum[4 * q];
    score += __expf(l.y - shared.most[4 * q + 1]) * shared.inverse_sum[4 * q + 1];
    score += __expf(l.z - shared.most[4 * q + 2]) * shared.inverse_sum[4 * q + 2];
    score += __expf(l.w - shared.most[4 * q + 3]) * shared.inverse_sum[4 * q + 3];
  };
  if constexpr (quads > 0) {
    float4 logits[quads];
#pragma unroll
    for (int q = 0; q < quads; ++q) logits[q] = from[q];
#pragma unroll
    for (int q = 0; q < quads; ++q) add(q, logits[q]);
  } else {
    for (int q = 0; q < all_quads; ++q) add(q, from[q]);
  }
  return score;
}

/// `quads`: padded heads of a group / 4 where it is known to the compiler, 0: any; -1: all blocks,
/// without scores.
template <int quads>
__global__ void __launch_bounds__(kThreads) SelectKernel(SelectParams p) {
  StartKernel();
  constexpr bool all_blocks = quads < 0;
  __shared__ Shared shared;
  extern __shared__ uint32_t keys[];  // [max_blocks]
  uint32_t* importance = keys + p.max_blocks;
  uint32_t* taken = importance + p.max_blocks;  // bit set of blocks
  const int row = blockIdx.x;
  const int head = blockIdx.y;
  const int64_t pair = static_cast<int64_t>(row) * p.num_kv_heads + head;
  const StepRow info = p.rows_info[row];
  if (info.sequence < 0) {
    if (threadIdx.x == 0) p.count[pair] = 0;
    return;
  }
  int32_t* out = p.selected + pair * p.max_selected;
  const int own_block = info.position / kBlockTokens;
  const int blocks = own_block + 1;
  if (all_blocks || blocks <= p.numbers.topk_blocks) {
    const int all = min(blocks, p.max_selected);
    for (int n = threadIdx.x; n < all; n += kThreads) out[n] = n;
    if (threadIdx.x == 0) p.count[pair] = all;
    return;
  }

  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int group = p.num_heads / p.num_kv_heads;
  const int padded = PaddedGroup(group);
  const int visible = VisibleWindows(info.position);

  // Importance first: it needs nothing but memory.
  const int total = p.numbers.topk_blocks;  // fewer than the blocks there are
  const int by_query = min(p.numbers.query_blocks, total);
  if (by_query < total) {
    const int record = p.layer * p.num_kv_heads + head;
    for (int n = threadIdx.x; n < blocks; n += kThreads) {
      importance[n] =
          ImportanceKey(LoadImportance(p.cache, info.sequence, record, n, visible), n, visible);
    }
  }

  // M_g and Z_g from the partial results of the tiles of windows.
  const float2* partials = p.partials + pair * ScoreTiles(p.max_windows) * padded;
  // Half a warp a head.
  for (int g = warp + lane / 16 * kWarps; g < padded; g += 2 * kWarps) {
    const unsigned half = 0xffffu << (lane / 16 * 16);
    float most = -INFINITY;
    for (int i = lane % 16; i < ScoreTiles(visible); i += 16) {
      most = fmaxf(most, partials[i * padded + g].x);
    }
#pragma unroll
    for (int offset = 8; offset > 0; offset /= 2) {
      most = fmaxf(most, __shfl_xor_sync(half, most, offset));
    }
    float sum = 0;
    for (int i = lane % 16; i < ScoreTiles(visible); i += 16) {
      const float2 part = partials[i * padded + g];
      sum += part.y * __expf(part.x - most);
    }
#pragma unroll
    for (int offset = 8; offset > 0; offset /= 2) sum += __shfl_xor_sync(half, sum, offset);
    if (lane % 16 == 0) {
      shared.most[g] = most;
      shared.inverse_sum[g] = g < group ? 1.0f / sum : 0.0f;
    }
  }
  for (int i = threadIdx.x; i < (blocks + 31) / 32; i += kThreads) taken[i] = 0;
  if (threadIdx.x == 0) shared.window_scores[kChunkWindows] = -INFINITY;
  __syncthreads();

  // S[n], a chunk of windows after the other.
  const float4* logits = reinterpret_cast<const float4*>(p.logits + pair * p.max_windows * padded);
  for (int first_block = 0; first_block < blocks; first_block += kChunkBlocks) {
    const int first_window = 4 * first_block;
    if (threadIdx.x == 0) shared.window_scores[0] = shared.window_scores[kChunkWindows];
    __syncthreads();
    const int here = min(kChunkWindows, 4 * (blocks - first_block));
#pragma unroll 2
    for (int i = threadIdx.x; i < here; i += kThreads) {
      const int window = first_window + i;
      float score = -INFINITY;
      if (window < visible) {
        score = SumHeads<quads>(shared, logits + static_cast<int64_t>(window) * (padded / 4),
                                padded / 4);
      }
      shared.window_scores[1 + i] = score;
    }
    __syncthreads();
    const int end = min(blocks, first_block + kChunkBlocks);
    for (int n = first_block + threadIdx.x; n < end; n += kThreads) {
      const float* s = shared.window_scores + 4 * (n - first_block);  // window 4n - 1
      float best = -INFINITY;
#pragma unroll
      for (int i = 0; i < 5; ++i) best = fmaxf(best, s[i]);
      const bool forced = n < p.numbers.init_blocks || n >= own_block - p.numbers.window_blocks;
      keys[n] = forced ? kForced : OrderedKey(best);
    }
    __syncthreads();
  }
  TakeBest(shared.best, keys, blocks, by_query, taken);
  if (by_query < total) {
    for (int n = threadIdx.x; n < blocks; n += kThreads) {
      keys[n] = (taken[n / 32] >> (n % 32) & 1u) != 0 ? kExcluded : importance[n];
    }
    __syncthreads();
    TakeBest(shared.best, keys, blocks, total - by_query, taken);
  }

  // The keys are done with.
  WriteTaken<kThreads>(taken, blocks, keys, out, p.count + pair);
}

__global__ void ReplayKernel(ReplayParams p) {
  StartKernel();
  const int64_t pair = static_cast<int64_t>(blockIdx.x) * p.num_kv_heads + blockIdx.y;
  const StepRow info = p.rows_info[blockIdx.x];
  if (info.sequence < 0) return;
  const int own_block = info.position / kBlockTokens;
  if (own_block + 1 <= p.numbers.topk_blocks) return;
  const int record = p.layer * p.num_kv_heads + blockIdx.y;
  const int64_t ring_row = static_cast<int64_t>(blockIdx.x) * p.records + record;
  const int32_t* ring = p.rings + ring_row * p.ring_blocks;
  // Each ring begins at another fraction, so that the changes of a step are spread.
  const double moved = (*p.step / 2) * static_cast<double>(p.change) + (ring_row % 997) / 997.0;
  const int64_t offset = static_cast<int64_t>(moved);
  const int forced = p.numbers.init_blocks + p.numbers.window_blocks + 1;
  for (int i = threadIdx.x; i < p.numbers.topk_blocks; i += blockDim.x) {
    int block;
    if (i < p.numbers.init_blocks) {
      block = i;
    } else if (i < forced) {
      block = own_block - (i - p.numbers.init_blocks);
    } else {
      block = ring[(offset + i - forced) % p.ring_blocks];
    }
    p.selected[pair * p.max_selected + i] = block;
  }
  if (threadIdx.x == 0) p.count[pair] = p.numbers.topk_blocks;
}

template <int quads>
cudaError_t Launch(const SelectParams& params, cudaStream_t stream) {
  const size_t shared = sizeof(uint32_t) * (2 * params.max_blocks + (params.max_blocks + 31) / 32);
  const cudaError_t status = cudaFuncSetAttribute(
      SelectKernel<quads>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (status != cudaSuccess) return status;
  return LaunchKernel(SelectKernel<quads>, dim3(params.rows, params.num_kv_heads), kThreads, shared,
                      stream, params);
}

bool Valid(const SelectParams& p) {
  return p.rows >= 1 && p.num_kv_heads >= 1 && p.num_heads % p.num_kv_heads == 0 &&
         p.num_heads / p.num_kv_heads <= kMaxGroup && p.max_blocks >= 1 && p.max_blocks <= 24000;
}

}  // namespace

cudaError_t LaunchSelect(const SelectParams& params, cudaStream_t stream) {
  const SelectionNumbers& numbers = params.numbers;
  if (!Valid(params) || params.max_selected < numbers.topk_blocks || numbers.query_blocks < 1 ||
      numbers.topk_blocks > kMaxSelected || params.max_windows % kIndexWindows != 0) {
    return cudaErrorInvalidValue;
  }
  switch (PaddedGroup(params.num_heads / params.num_kv_heads)) {
    case 8:
      return Launch<2>(params, stream);
    case 16:
      return Launch<4>(params, stream);
    default:
      return Launch<0>(params, stream);
  }
}

cudaError_t LaunchReplay(const ReplayParams& params, cudaStream_t stream) {
  if (params.rows < 1 || params.rows > params.ring_rows || params.ring_blocks < 1 ||
      params.numbers.topk_blocks > params.max_selected) {
    return cudaErrorInvalidValue;
  }
  return LaunchKernel(ReplayKernel, dim3(params.rows, params.num_kv_heads), 64, 0, stream, params);
}

cudaError_t LaunchSelectAll(const SelectParams& params, cudaStream_t stream) {
  if (!Valid(params)) return cudaErrorInvalidValue;
  return LaunchKernel(SelectKernel<-1>, dim3(params.rows, params.num_kv_heads), kThreads, 0, stream,
                      params);
}

}  // namespace nosara::kernels
