#include <cmath>

#include "kernels/common/device.cuh"
#include "kernels/common/launch.cuh"
#include "kernels/sample/sample.h"

namespace nosara::kernels {
namespace {

constexpr int kThreads = 1024;

/// The better of two candidates: the larger logit, then the smaller id.
__device__ inline void KeepBetter(float& best, int& id, float other, int other_id) {
  if (other > best || (other == best && other_id < id)) {
    best = other;
    id = other_id;
  }
}

__global__ void __launch_bounds__(kThreads) ArgMaxKernel(ArgMaxParams p) {
  StartKernel();
  __shared__ float bests[kThreads / 32];
  __shared__ int ids[kThreads / 32];
  const float* logits = p.logits + static_cast<int64_t>(blockIdx.x) * p.vocab;
  // -inf with id 0 is what a row without any number gives; NaN never compares as greater.
  float best = -INFINITY;
  int id = 0;
  for (int i = threadIdx.x; i < p.vocab; i += kThreads) {
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
    bests[threadIdx.x / 32] = best;
    ids[threadIdx.x / 32] = id;
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    best = bests[threadIdx.x];
    id = ids[threadIdx.x];
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      KeepBetter(best, id, __shfl_xor_sync(kAllLanes, best, offset),
                 __shfl_xor_sync(kAllLanes, id, offset));
    }
    if (threadIdx.x == 0) p.token[blockIdx.x] = id;
  }
}

}  // namespace

cudaError_t LaunchArgMax(const ArgMaxParams& params, cudaStream_t stream) {
  if (params.rows < 1 || params.vocab < 1) return cudaErrorInvalidValue;
  return LaunchKernel(ArgMaxKernel, params.rows, kThreads, 0, stream, params);
}

}  // namespace nosara::kernels
