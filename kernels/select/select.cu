#include <cmath>

#include "kernels/common/device.cuh"
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
  float window_scores[kChunkWindows + 1];  // [0]: of the window before the chunk
  float most[kMaxGroup];                   // M_g
  float inverse_sum[kMaxGroup];            // 1 / Z_g; 0 for padding heads
  int counts[2][kWarps];
};

/// Sum of `count` over the thread block. `round` alternates between two buffers, so that one
/// barrier a call is enough.
__device__ inline int CountBlock(Shared& shared, int round, int count) {
  count = __reduce_add_sync(kAllLanes, count);
  if (threadIdx.x % 32 == 0) shared.counts[round & 1][threadIdx.x / 32] = count;
  __syncthreads();
  int total = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) total += shared.counts[round & 1][i];
  return total;
}

/// Adds the `count` blocks of the largest keys to the bit set `taken`, the smaller block first
/// among equals. Precondition: 1 <= count <= blocks with keys above kExcluded.
__device__ void TakeBest(Shared& shared, const uint32_t* keys, int blocks, int count,
                         uint32_t* taken) {
  // The largest threshold that at least `count` keys reach, bit by bit.
  uint32_t threshold = 0;
  for (int bit = 31; bit >= 0; --bit) {
    const uint32_t candidate = threshold | (1u << bit);
    int reached = 0;
    for (int n = threadIdx.x; n < blocks; n += kThreads) reached += keys[n] >= candidate ? 1 : 0;
    reached = CountBlock(shared, bit, reached);
    if (reached >= count) threshold = candidate;
    if (reached == count) break;  // the same in all threads
  }
  __syncthreads();
  int above = 0;
  for (int n = threadIdx.x; n < blocks; n += kThreads) above += keys[n] > threshold ? 1 : 0;
  int equals_left = count - CountBlock(shared, 0, above);

  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  for (int first = 0, round = 1; first < blocks; first += kThreads, ++round) {
    const int n = first + threadIdx.x;
    const uint32_t key = n < blocks ? keys[n] : kExcluded;
    const bool equal = n < blocks && key == threshold;
    const uint32_t equals = __ballot_sync(kAllLanes, equal);
    if (lane == 0) shared.counts[round & 1][warp] = __popc(equals);
    __syncthreads();
    int before = __popc(equals & ((1u << lane) - 1));
    int all = 0;
    for (int i = 0; i < kWarps; ++i) {
      const int own = shared.counts[round & 1][i];
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

template <bool all_blocks>
__global__ void __launch_bounds__(kThreads) SelectKernel(SelectParams p) {
  __shared__ Shared shared;
  extern __shared__ uint32_t keys[];      // [max_blocks]
  uint32_t* taken = keys + p.max_blocks;  // bit set of blocks
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

  // M_g and Z_g from the partial results of the tiles of windows: one warp a head.
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int group = p.num_heads / p.num_kv_heads;
  const int padded = PaddedGroup(group);
  const int visible = VisibleWindows(info.position);
  const float2* partials = p.partials + pair * ScoreTiles(p.max_windows) * padded;
  for (int g = warp; g < padded; g += kWarps) {
    float most = -INFINITY;
    for (int i = lane; i < ScoreTiles(visible); i += 32) {
      most = fmaxf(most, partials[i * padded + g].x);
    }
    most = WarpMax(most);
    float sum = 0;
    for (int i = lane; i < ScoreTiles(visible); i += 32) {
      const float2 part = partials[i * padded + g];
      sum += part.y * __expf(part.x - most);
    }
    sum = WarpSum(sum);
    if (lane == 0) {
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
    for (int i = threadIdx.x; i < kChunkWindows; i += kThreads) {
      const int window = first_window + i;
      float score = -INFINITY;
      if (window < visible) {
        score = 0;
        const float4* from = logits + static_cast<int64_t>(window) * (padded / 4);
        for (int g = 0; g < padded / 4; ++g) {
          const float4 l = from[g];
          score += __expf(l.x - shared.most[4 * g]) * shared.inverse_sum[4 * g];
          score += __expf(l.y - shared.most[4 * g + 1]) * shared.inverse_sum[4 * g + 1];
          score += __expf(l.z - shared.most[4 * g + 2]) * shared.inverse_sum[4 * g + 2];
          score += __expf(l.w - shared.most[4 * g + 3]) * shared.inverse_sum[4 * g + 3];
        }
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
  const int total = p.numbers.topk_blocks;  // fewer than the blocks there are
  const int by_query = min(p.numbers.query_blocks, total);
  TakeBest(shared, keys, blocks, by_query, taken);

  if (by_query < total) {
    const int record = p.layer * p.num_kv_heads + head;
    const auto importance = [&](int window) {
      if (window < 0 || window >= visible) return -INFINITY;
      const std::byte* slot = p.cache.IndexSlot(info.sequence, record, window);
      return reinterpret_cast<const float*>(slot + int64_t{2} * kIndexWindows *
                                                       p.cache.head_dim)[window % kIndexWindows];
    };
    for (int n = threadIdx.x; n < blocks; n += kThreads) {
      uint32_t key = kExcluded;
      if ((taken[n / 32] >> (n % 32) & 1u) == 0) {
        float best = -INFINITY;
        for (int w = 4 * n - 1; w <= 4 * n + 3; ++w) best = fmaxf(best, importance(w));
        key = OrderedKey(best);
      }
      keys[n] = key;
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

bool Valid(const SelectParams& p) {
  return p.rows >= 1 && p.num_kv_heads >= 1 && p.num_heads % p.num_kv_heads == 0 &&
         p.num_heads / p.num_kv_heads <= kMaxGroup && p.max_blocks >= 1 && p.max_blocks <= 48000;
}

}  // namespace

cudaError_t LaunchSelect(const SelectParams& params, cudaStream_t stream) {
  const SelectionNumbers& numbers = params.numbers;
  if (!Valid(params) || params.max_selected < numbers.topk_blocks || numbers.query_blocks < 1 ||
      numbers.topk_blocks > kMaxSelected || params.max_windows % kIndexWindows != 0) {
    return cudaErrorInvalidValue;
  }
  const size_t shared = sizeof(uint32_t) * (params.max_blocks + (params.max_blocks + 31) / 32);
  const cudaError_t status = cudaFuncSetAttribute(
      SelectKernel<false>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (status != cudaSuccess) return status;
  SelectKernel<false><<<dim3(params.rows, params.num_kv_heads), kThreads, shared, stream>>>(params);
  return cudaGetLastError();
}

cudaError_t LaunchReplay(const ReplayParams& params, cudaStream_t stream) {
  if (params.rows < 1 || params.rows > params.ring_rows || params.ring_blocks < 1 ||
      params.numbers.topk_blocks > params.max_selected) {
    return cudaErrorInvalidValue;
  }
  ReplayKernel<<<dim3(params.rows, params.num_kv_heads), 64, 0, stream>>>(params);
  return cudaGetLastError();
}

cudaError_t LaunchSelectAll(const SelectParams& params, cudaStream_t stream) {
  if (!Valid(params)) return cudaErrorInvalidValue;
  SelectKernel<true><<<dim3(params.rows, params.num_kv_heads), kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace nosara::kernels
