#include <cmath>

#include "kernels/common/device.cuh"
#include "kernels/common/launch.cuh"
#include "kernels/sample/sample.h"

namespace nosara::kernels {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;

/// The better of two candidates: the larger logit, then the smaller id.
__device__ inline void KeepBetter(float& best, int& id, float other, int other_id) {
  if (other > best || (other == best && other_id < id)) {
    best = other;
    id = other_id;
  }
}

__device__ inline uint64_t WarpSum(uint64_t x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
  return x;
}

/// Sum over this lane and those before it.
__device__ inline uint64_t WarpPrefix(uint64_t x) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const uint64_t before = __shfl_up_sync(kAllLanes, x, offset);
    if (lane >= offset) x += before;
  }
  return x;
}

/// One thread block draws one token. All members but `shared` are the same in every thread.
struct Drawer {
  struct Shared {
    uint64_t bins[kDrawBins];
    uint64_t sums[kWarps];
    float bests[kWarps];
    int ids[kWarps];
    uint64_t before;  // the chosen bin
    int bin;
  };

  Shared& shared;
  const float* logits;
  int vocab;
  float largest = 0;
  float temperature = 0;
  uint32_t limit = kNoGap - 1;  // of the gaps that are kept
  uint64_t least = 1;           // of the weights that are kept

  __device__ uint32_t Gap(int i) const { return DrawGap(largest, logits[i], temperature); }
  __device__ uint64_t Weight(int i) const {
    const uint32_t gap = Gap(i);
    const uint64_t weight = gap <= limit ? DrawWeight(gap) : 0;
    return weight >= least ? weight : 0;
  }

  /// Sets `largest`; returns its smallest id. NaN never compares as greater; a row without any
  /// number gives -inf and 0.
  __device__ int ArgMax() {
    float best = -INFINITY;
    int id = 0;
    for (int i = threadIdx.x; i < vocab; i += kThreads) {
      const float x = logits[i];
      if (x > best) {
        best = x;
        id = i;
      }
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      KeepBetter(best, id, __shfl_xor_sync(kAllLanes, best, offset),
                 __shfl_xor_sync(kAllLanes, id, offset));
    }
    if (threadIdx.x % 32 == 0) {
      shared.bests[threadIdx.x / 32] = best;
      shared.ids[threadIdx.x / 32] = id;
    }
    __syncthreads();
    best = shared.bests[threadIdx.x % 32];
    id = shared.ids[threadIdx.x % 32];
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      KeepBetter(best, id, __shfl_xor_sync(kAllLanes, best, offset),
                 __shfl_xor_sync(kAllLanes, id, offset));
    }
    largest = best;
    return id;
  }

  /// Sum of `x` over the block.
  __device__ uint64_t Sum(uint64_t x) {
    x = WarpSum(x);
    __syncthreads();  // the sums before were read
    if (threadIdx.x % 32 == 0) shared.sums[threadIdx.x / 32] = x;
    __syncthreads();
    return WarpSum(shared.sums[threadIdx.x % 32]);
  }

  /// The bin at which the running sum of the bins reaches `needed`, which is left with what that
  /// bin has to give; -1 where all of them have less.
  __device__ int FindBin(uint64_t& needed) {
    constexpr int kBinsPerThread = kDrawBins / kThreads;
    const int first = threadIdx.x * kBinsPerThread;
    uint64_t own = 0;
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) own += shared.bins[first + i];
    const uint64_t prefix = WarpPrefix(own);
    __syncthreads();  // the sums before were read
    if (threadIdx.x % 32 == 31) shared.sums[threadIdx.x / 32] = prefix;
    if (threadIdx.x == 0) shared.bin = -1;
    __syncthreads();
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    uint64_t before = WarpSum(lane < warp ? shared.sums[lane] : uint64_t{0}) + prefix - own;
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) {
      const uint64_t here = shared.bins[first + i];
      if (before < needed && needed <= before + here) {
        shared.bin = first + i;
        shared.before = before;
      }
      before += here;
    }
    __syncthreads();
    if (shared.bin >= 0) needed -= shared.before;
    return shared.bin;
  }

  /// Lowers `limit` to the smallest gap up to which lies `needed` of the weight, or as many tokens.
  template <bool weights>
  __device__ void Cut(uint64_t needed) {
    uint32_t prefix = 0;  // the digits found so far
    for (int digit = 0; digit < kDrawDigits; ++digit) {
      const int shift = DrawDigitShift(digit);
      const int bits = DrawDigitBits(digit);
      __syncthreads();  // the bins before were read
      for (int i = threadIdx.x; i < kDrawBins; i += kThreads) shared.bins[i] = 0;
      __syncthreads();
      for (int i = threadIdx.x; i < vocab; i += kThreads) {
        const uint32_t gap = Gap(i);
        if (gap > limit || (gap >> shift >> bits) != prefix) continue;
        const uint64_t weight = DrawWeight(gap);
        if (weight == 0) continue;
        atomicAdd(
            reinterpret_cast<unsigned long long*>(&shared.bins[gap >> shift & ((1u << bits) - 1)]),
            static_cast<unsigned long long>(weights ? weight : 1));
      }
      __syncthreads();
      const int bin = FindBin(needed);
      if (bin < 0) return;
      prefix = prefix << bits | static_cast<uint32_t>(bin);
    }
    limit = prefix;
  }

  __device__ uint64_t Total() {
    uint64_t sum = 0;
    for (int i = threadIdx.x; i < vocab; i += kThreads) sum += Weight(i);
    return Sum(sum);
  }

  /// The first id at which the running sum of the weights exceeds `uniform` times all of it: each
  /// warp sums a part of the ids, then a part of the part that holds it.
  __device__ int Draw(double uniform) {
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    int begin = 0;
    int end = vocab;
    uint64_t target = 0;
    for (bool first = true; first || end - begin > 32; first = false) {
      const int part = ((end - begin + kWarps - 1) / kWarps + 31) / 32 * 32;
      const int part_begin = begin + warp * part;
      const int part_end = min(part_begin + part, end);
      uint64_t sum = 0;
      for (int i = part_begin + lane; i < part_end; i += 32) sum += Weight(i);
      sum = WarpSum(sum);
      __syncthreads();  // the sums before were read
      if (lane == 0) shared.sums[warp] = sum;
      __syncthreads();
      const uint64_t running = WarpPrefix(shared.sums[lane]);
      if (first) target = DrawTarget(uniform, __shfl_sync(kAllLanes, running, 31));
      const int chosen = __ffs(__ballot_sync(kAllLanes, running > target)) - 1;
      if (chosen > 0) target -= __shfl_sync(kAllLanes, running, chosen - 1);
      begin += chosen * part;
      end = min(begin + part, end);
    }
    const uint64_t running = WarpPrefix(begin + lane < end ? Weight(begin + lane) : uint64_t{0});
    return begin + __ffs(__ballot_sync(kAllLanes, running > target)) - 1;
  }
};

__global__ void __launch_bounds__(kThreads) SampleKernel(SampleParams p) {
  StartKernel();
  __shared__ Drawer::Shared shared;
  const DrawParams draw = p.draw[blockIdx.x];
  Drawer drawer{shared, p.logits + static_cast<int64_t>(blockIdx.x) * p.vocab, p.vocab};
  int token = drawer.ArgMax();
  if (!draw.Greedy() && isfinite(drawer.largest)) {
    drawer.temperature = draw.temperature;
    if (draw.top_k > 0) drawer.Cut<false>(draw.top_k);
    if (draw.top_p < 1) drawer.Cut<true>(DrawNeeded(draw.top_p, drawer.Total()));
    drawer.least = DrawLeast(draw.min_p);
    token = drawer.Draw(draw.uniform);
  }
  if (threadIdx.x == 0) p.token[blockIdx.x] = token;
}

}  // namespace

cudaError_t LaunchSample(const SampleParams& params, cudaStream_t stream) {
  if (params.rows < 1 || params.vocab < 1) return cudaErrorInvalidValue;
  return LaunchKernel(SampleKernel, params.rows, kThreads, 0, stream, params);
}

}  // namespace nosara::kernels
