#include <cmath>

#include "kernels/common/device.cuh"
#include "kernels/common/launch.cuh"
#include "kernels/sample/sample.h"

namespace nosara::kernels {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kBinsPerThread = kDrawBins / kThreads;

/// The better of two candidates: the smaller key, then the smaller id.
__device__ inline void KeepBetter(float& best, int& id, float other, int other_id) {
  if (other < best || (other == best && other_id < id)) {
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
  float scale = 0;
  uint32_t limit = kNoGap - 1;  // of the gaps that are kept

  __device__ uint32_t Gap(int i) const { return DrawGap(largest, logits[i], scale); }

  /// The best candidate of all threads, to all threads.
  __device__ void Reduce(float& best, int& id) {
    const auto reduce_warp = [&] {
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) {
        const float other = __shfl_xor_sync(kAllLanes, best, offset);
        KeepBetter(best, id, other, __shfl_xor_sync(kAllLanes, id, offset));
      }
    };
    reduce_warp();
    __syncthreads();  // what was reduced before was read
    if (threadIdx.x % 32 == 0) {
      shared.bests[threadIdx.x / 32] = best;
      shared.ids[threadIdx.x / 32] = id;
    }
    __syncthreads();
    best = shared.bests[threadIdx.x % 32];
    id = shared.ids[threadIdx.x % 32];
    reduce_warp();
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
    best = -best;
    Reduce(best, id);
    largest = -best;
    return id;
  }

  /// Sum of the bins before the first of this thread; sets `total` to that of all.
  __device__ uint64_t BinsBefore(uint64_t& total) {
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    uint64_t own = 0;
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) own += shared.bins[threadIdx.x * kBinsPerThread + i];
    const uint64_t prefix = WarpPrefix(own);
    if (lane == 31) shared.sums[warp] = prefix;
    if (threadIdx.x == 0) shared.bin = -1;
    __syncthreads();
    const uint64_t sum = shared.sums[lane];
    total = WarpSum(sum);
    return WarpSum(lane < warp ? sum : uint64_t{0}) + prefix - own;
  }

  /// Lowers `limit` to the smallest gap up to which lie `top_k` tokens, or, where that is 0,
  /// `top_p` of the weight.
  __device__ void Cut(int top_k, float top_p) {
    uint32_t prefix = 0;  // the digits found so far
    uint64_t left = 0;    // to be found
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
            static_cast<unsigned long long>(top_k > 0 ? 1 : weight));
      }
      __syncthreads();
      uint64_t total = 0;
      uint64_t before = BinsBefore(total);
      if (digit == 0) left = top_k > 0 ? top_k : DrawNeeded(top_p, total);
#pragma unroll
      for (int i = 0; i < kBinsPerThread; ++i) {
        const int bin = threadIdx.x * kBinsPerThread + i;
        if (before < left && left <= before + shared.bins[bin]) {
          shared.bin = bin;
          shared.before = before;
        }
        before += shared.bins[bin];
      }
      __syncthreads();
      if (shared.bin < 0) return;
      left -= shared.before;
      prefix = prefix << bits | static_cast<uint32_t>(shared.bin);
    }
    limit = prefix;
  }

  /// The token of the smallest key; `best` has the largest logit.
  __device__ int Draw(const DrawParams& draw, int best) {
    const uint64_t least = DrawLeast(draw.min_p);
    int token = best;
    float smallest =
        DrawKey(0, DrawVariate(DrawPhilox(draw.seed, draw.position, best / 4).bits[best % 4]));
    for (int quad = threadIdx.x; 4 * quad < vocab; quad += kThreads) {
      const DrawRandom random = DrawPhilox(draw.seed, draw.position, quad);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int i = 4 * quad + k;
        if (i >= vocab) break;
        const float variate = DrawVariate(random.bits[k]);
        const uint32_t gap = Gap(i);
        if (gap > limit || DrawKeyBound(gap, variate) > smallest || DrawWeight(gap) < least) {
          continue;
        }
        KeepBetter(smallest, token, DrawKey(gap, variate), i);
      }
    }
    Reduce(smallest, token);
    return token;
  }
};

__global__ void __launch_bounds__(kThreads) SampleKernel(SampleParams p) {
  StartKernel();
  __shared__ Drawer::Shared shared;
  const DrawParams draw = p.draw[blockIdx.x];
  Drawer drawer{shared, p.logits + static_cast<int64_t>(blockIdx.x) * p.vocab, p.vocab};
  int token = drawer.ArgMax();
  if (!draw.Greedy() && isfinite(drawer.largest)) {
    drawer.scale = DrawScale(draw.temperature);
    if (draw.top_k > 0) drawer.Cut(draw.top_k, 1);
    if (draw.top_p < 1) drawer.Cut(0, draw.top_p);
    token = drawer.Draw(draw, token);
  }
  if (threadIdx.x == 0) p.token[blockIdx.x] = token;
}

}  // namespace

cudaError_t LaunchSample(const SampleParams& params, cudaStream_t stream) {
  if (params.rows < 1 || params.vocab < 1) return cudaErrorInvalidValue;
  return LaunchKernel(SampleKernel, params.rows, kThreads, 0, stream, params);
}

}  // namespace nosara::kernels
