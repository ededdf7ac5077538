#include <cmath>

#include "kernels/common/device.cuh"
#include "kernels/common/launch.cuh"
#include "kernels/score/score.h"
#include "kernels/select/select.h"

namespace nosara::kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kChunkBlocks = 512;  // blocks whose window scores lie in shared memory at a time
constexpr int kChunkWindows = 4 * kChunkBlocks;
constexpr uint32_t kForced = 0xffffffffu;
constexpr uint32_t kExcluded = 0;

/// An integer of the same order as the score; NaN as -inf, -0 as 0. Between kExcluded and kForced.
__device__ inline uint32_t OrderedKey(float score) {
  if (isnan(score)) score = -INFINITY;
  if (score == 0) score = 0;
  const uint32_t bits = __float_as_uint(score);
  return (bits & 0x80000000u) != 0 ? ~bits : (bits | 0x80000000u);
}

struct Shared {
  // Aligned, so that no vector load of them reaches into what others write.
  alignas(16) float most[kMaxGroup];         // M_g
  alignas(16) float inverse_sum[kMaxGroup];  // 1 / Z_g; 0 for padding heads
  uint2 counts[2][kWarps];
  float window_scores[kChunkWindows + 1];  // [0]: of the window before the chunk
};

/// Sums of three counts over the thread block, each below 65,536. `round` alternates between two
/// buffers, so that one barrier a call is enough.
struct Counts {
  int low, middle, high;
};
__device__ inline Counts CountBlock(Shared& shared, int round, Counts own) {
  const unsigned pair =
      __reduce_add_sync(kAllLanes, static_cast<unsigned>(own.low | own.middle << 16));
  const unsigned single = __reduce_add_sync(kAllLanes, static_cast<unsigned>(own.high));
  if (threadIdx.x % 32 == 0) shared.counts[round & 1][threadIdx.x / 32] = {pair, single};
  __syncthreads();
  unsigned pairs = 0;
  unsigned singles = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) {
    pairs += shared.counts[round & 1][i].x;
    singles += shared.counts[round & 1][i].y;
  }
  return {static_cast<int>(pairs & 0xffffu), static_cast<int>(pairs >> 16),
          static_cast<int>(singles)};
}

/// Adds the `count` blocks of the largest keys to the bit set `taken`, the smaller block first
/// among equals. Precondition: 1 <= count <= blocks with keys above kExcluded.
__device__ void TakeBest(Shared& shared, const uint32_t* keys, int blocks, int count,
                         uint32_t* taken) {
  // The largest threshold that at least `count` keys reach, two bits at a time.
  uint32_t threshold = 0;
  for (int bit = 30; bit >= 0; bit -= 2) {
    Counts reached = {0, 0, 0};
    for (int n = threadIdx.x; n < blocks; n += kThreads) {
      const uint32_t key = keys[n];
      reached.low += key >= (threshold | 1u << bit) ? 1 : 0;
      reached.middle += key >= (threshold | 2u << bit) ? 1 : 0;
      reached.high += key >= (threshold | 3u << bit) ? 1 : 0;
    }
    reached = CountBlock(shared, bit >> 1, reached);
    int now = -1;
    if (reached.high >= count) {
      threshold |= 3u << bit;
      now = reached.high;
    } else if (reached.middle >= count) {
      threshold |= 2u << bit;
      now = reached.middle;
    } else if (reached.low >= count) {
      threshold |= 1u << bit;
      now = reached.low;
    }
    if (now == count) break;  // the same in all threads
  }
  __syncthreads();
  int above = 0;
  for (int n = threadIdx.x; n < blocks; n += kThreads) above += keys[n] > threshold ? 1 : 0;
  int equals_left = count - CountBlock(shared, 0, {above, 0, 0}).low;

  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  for (int first = 0, round = 1; first < blocks; first += kThreads, ++round) {
    const int n = first + threadIdx.x;
    const uint32_t key = n < blocks ? keys[n] : kExcluded;
    const bool equal = n < blocks && key == threshold;
    const uint32_t equals = __ballot_sync(kAllLanes, equal);
    if (lane == 0) shared.counts[round & 1][warp].x = __popc(equals);
    __syncthreads();
    int before = __popc(equals & ((1u << lane) - 1));
    int all = 0;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) {
      const int own = shared.counts[round & 1][i].x;
      before += i < warp ? own : 0;
      all += own;
    }
    const bool take = n < blocks && (key > threshold || (equal && before < equals_left));
    const uint32_t bits = __ballot_sync(kAllLanes, take);
    if (lane == 0 && first + warp * 32 < blocks) taken[first / 32 + warp] |= bits;
    equals_left = max(0, equals_left - all);
  }
  __syncthreads();
}

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
    // Scores of windows from `window` on, within one index slot.
    const auto scores = [&](int window) {
      const std::byte* slot = p.cache.IndexSlot(info.sequence, record, window);
      return reinterpret_cast<const float*>(slot + int64_t{2} * kIndexWindows * p.cache.head_dim) +
             window % kIndexWindows;
    };
    for (int n = threadIdx.x; n < blocks; n += kThreads) {
      float best = -INFINITY;
      if (n > 0 && 4 * n - 1 < visible) best = *scores(4 * n - 1);
      if (4 * n < visible) {
        // Four windows lie in one slot; what is not visible yet is memory all the same.
        const float4 own = *reinterpret_cast<const float4*>(scores(4 * n));
        best = fmaxf(best, own.x);
        if (4 * n + 1 < visible) best = fmaxf(best, own.y);
        if (4 * n + 2 < visible) best = fmaxf(best, own.z);
        if (4 * n + 3 < visible) best = fmaxf(best, own.w);
      }
      importance[n] = OrderedKey(best);
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
  TakeBest(shared, keys, blocks, by_query, taken);
  if (by_query < total) {
    for (int n = threadIdx.x; n < blocks; n += kThreads) {
      keys[n] = (taken[n / 32] >> (n % 32) & 1u) != 0 ? kExcluded : importance[n];
    }
    __syncthreads();
    TakeBest(shared, keys, blocks, total - by_query, taken);
  }

  // Ascending: each block knows how many taken ones come before it.
  uint32_t* before = keys;  // [words], the keys are done with
  const int words = (blocks + 31) / 32;
  if (warp == 0) {
    int sum = 0;
    for (int first = 0; first < words; first += 32) {
      const int own = first + lane < words ? __popc(taken[first + lane]) : 0;
      int inclusive = own;
#pragma unroll
      for (int offset = 1; offset < 32; offset *= 2) {
        const int other = __shfl_up_sync(kAllLanes, inclusive, offset);
        inclusive += lane >= offset ? other : 0;
      }
      if (first + lane < words) before[first + lane] = sum + inclusive - own;
      sum += __shfl_sync(kAllLanes, inclusive, 31);
    }
    if (lane == 0) p.count[pair] = sum;
  }
  __syncthreads();
  for (int n = threadIdx.x; n < blocks; n += kThreads) {
    const uint32_t word = taken[n / 32];
    if ((word >> (n % 32) & 1u) != 0) {
      out[before[n / 32] + __popc(word & ((1u << (n % 32)) - 1))] = n;
    }
  }
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
