// The blocks of the largest scores, found by one thread block.
#pragma once

#include <climits>

#include "kernels/common/device.cuh"

namespace nosara::kernels {

inline constexpr uint32_t kForced = 0xffffffffu;
inline constexpr uint32_t kExcluded = 0;

/// An integer of the same order as the score; NaN as -inf, -0 as 0. Between kExcluded and kForced.
__device__ inline uint32_t OrderedKey(float score) {
  if (isnan(score)) score = -INFINITY;
  if (score == 0) score = 0;
  const uint32_t bits = __float_as_uint(score);
  return (bits & 0x80000000u) != 0 ? ~bits : (bits | 0x80000000u);
}

template <int threads>
struct TakeBestScratch {
  static constexpr int kWarps = threads / 32;
  alignas(16) uint32_t bins[4][256];
  int equals[2][kWarps];
  uint32_t threshold;
  int equals_left;
};

/// Adds the `count` blocks of the largest keys to the bit set `taken`, the smaller block first
/// among equals. Precondition: 1 <= count <= blocks with keys above kExcluded; what it reads was
/// written before a barrier. Ends with one.
template <int threads>
__device__ void TakeBest(TakeBestScratch<threads>& scratch, const uint32_t* keys, int blocks,
                         int count, uint32_t* taken) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  for (int i = threadIdx.x; i < 4 * 256; i += threads) scratch.bins[i / 256][i % 256] = 0;
  __syncthreads();
  // The count-th largest key, eight bits at a time, by the first warp.
  uint32_t threshold = 0;
  int equals_left = count;  // to take, of those that share the bits found so far
  for (int digit = 0; digit < 4; ++digit) {
    const int shift = 24 - 8 * digit;
#pragma unroll 1
    for (int n = threadIdx.x; n < blocks; n += threads) {
      const uint32_t key = keys[n];
      if (digit == 0 || (key >> shift >> 8) == threshold) {
        atomicAdd(&scratch.bins[digit][key >> shift & 255], 1u);
      }
    }
    __syncthreads();
    if (warp == 0) {
      // Eight bins a lane, the largest in lane 0.
      uint32_t bins[8];
      *reinterpret_cast<uint4*>(bins) =
          *reinterpret_cast<const uint4*>(&scratch.bins[digit][248 - 8 * lane]);
      *reinterpret_cast<uint4*>(bins + 4) =
          *reinterpret_cast<const uint4*>(&scratch.bins[digit][252 - 8 * lane]);
      int own = 0;
#pragma unroll
      for (int k = 0; k < 8; ++k) own += static_cast<int>(bins[k]);
      int up_to = own;
#pragma unroll
      for (int offset = 1; offset < 32; offset *= 2) {
        const int other = __shfl_up_sync(kAllLanes, up_to, offset);
        up_to += lane >= offset ? other : 0;
      }
      int left = equals_left - (up_to - own);
      if (left > 0 && left <= own) {
#pragma unroll
        for (int k = 7; k >= 0; --k) {
          const int in_bin = static_cast<int>(bins[k]);
          if (left > 0 && left <= in_bin) {
            // All that share these bits are taken: the rest of them does not matter.
            const bool all = left == in_bin;
            const uint32_t found = threshold << 8 | static_cast<uint32_t>(248 - 8 * lane + k);
            scratch.threshold = all ? found << shift : found;
            scratch.equals_left = all ? INT_MAX : left;
          }
          left -= in_bin;
        }
      }
    }
    __syncthreads();
    threshold = scratch.threshold;
    equals_left = scratch.equals_left;
    if (equals_left == INT_MAX) break;
  }

  for (int first = 0, round = 0; first < blocks; first += threads, ++round) {
    const int n = first + threadIdx.x;
    const uint32_t key = n < blocks ? keys[n] : kExcluded;
    bool take = n < blocks && key >= threshold;
    if (equals_left != INT_MAX) {
      const bool equal = n < blocks && key == threshold;
      const uint32_t equals = __ballot_sync(kAllLanes, equal);
      if (lane == 0) scratch.equals[round & 1][warp] = __popc(equals);
      __syncthreads();
      int before = __popc(equals & ((1u << lane) - 1));
      int all = 0;
#pragma unroll
      for (int i = 0; i < threads / 32; ++i) {
        const int others = scratch.equals[round & 1][i];
        before += i < warp ? others : 0;
        all += others;
      }
      if (equal) take = before < equals_left;
      equals_left = max(0, equals_left - all);
    }
    const uint32_t bits = __ballot_sync(kAllLanes, take);
    if (lane == 0 && first + warp * 32 < blocks) taken[first / 32 + warp] |= bits;
  }
  __syncthreads();
}

/// Writes the blocks of the bit set `taken` in ascending order, and how many there are. `before`:
/// scratch, a word for each of its words. What it reads was written before a barrier.
template <int threads>
__device__ void WriteTaken(const uint32_t* taken, int blocks, uint32_t* before, int32_t* out,
                           int32_t* count) {
  const int lane = threadIdx.x % 32;
  const int words = (blocks + 31) / 32;
  if (threadIdx.x < 32) {
    int sum = 0;
    for (int first = 0; first < words; first += 32) {
      const int own = first + lane < words ? __popc(taken[first + lane]) : 0;
      int up_to = own;
#pragma unroll
      for (int offset = 1; offset < 32; offset *= 2) {
        const int other = __shfl_up_sync(kAllLanes, up_to, offset);
        up_to += lane >= offset ? other : 0;
      }
      if (first + lane < words) before[first + lane] = sum + up_to - own;
      sum += __shfl_sync(kAllLanes, up_to, 31);
    }
    if (lane == 0) *count = sum;
  }
  __syncthreads();
  for (int n = threadIdx.x; n < blocks; n += threads) {
    const uint32_t word = taken[n / 32];
    if ((word >> (n % 32) & 1u) != 0) {
      out[before[n / 32] + __popc(word & ((1u << (n % 32)) - 1))] = n;
    }
  }
}

/// The scores e of the windows that overlap a block, on their way from memory.
struct Importance {
  float before;  // of window 4n - 1
  float4 own;    // of windows 4n to 4n + 3
};
__device__ inline Importance LoadImportance(const CacheView& cache, int sequence, int record, int n,
                                            int visible) {
  const auto scores = [&](int window) {
    const std::byte* slot = cache.IndexSlot(sequence, record, window);
    return reinterpret_cast<const float*>(slot + int64_t{2} * kIndexWindows * cache.head_dim) +
           window % kIndexWindows;
  };
  Importance scores_of = {-INFINITY, {-INFINITY, -INFINITY, -INFINITY, -INFINITY}};
  if (n > 0 && 4 * n - 1 < visible) scores_of.before = *scores(4 * n - 1);
  // Four windows lie in one slot; what is not visible yet is memory all the same.
  if (4 * n < visible) scores_of.own = *reinterpret_cast<const float4*>(scores(4 * n));
  return scores_of;
}
/// The largest of those that are visible, as a key.
__device__ inline uint32_t ImportanceKey(const Importance& e, int n, int visible) {
  float best = fmaxf(e.before, e.own.x);
  if (4 * n + 1 < visible) best = fmaxf(best, e.own.y);
  if (4 * n + 2 < visible) best = fmaxf(best, e.own.z);
  if (4 * n + 3 < visible) best = fmaxf(best, e.own.w);
  return OrderedKey(best);
}

}  // namespace nosara::kernels
