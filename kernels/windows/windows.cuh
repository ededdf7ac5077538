// The compressed key of one window, on the device.
#pragma once

#include "kernels/common/cache_view.h"
#include "kernels/common/device.cuh"

namespace nosara::kernels {

/// Whether the token at position t completes a window.
__device__ inline bool CompletesWindow(int t) {
  return t % kWindowStride == kWindowStride - 1 && t >= kWindowTokens - 1;
}

/// The window that position t completes, of one record (kernels/windows/windows.h). By D threads,
/// d = 0 .. D - 1, whole warps.
__device__ inline void UpdateWindow(const CacheView& cache, int sequence, int record, int t,
                                    int d) {
  const int dim = cache.head_dim;
  const int window = (t - (kWindowTokens - 1)) / kWindowStride;
  const int first = window * kWindowStride;
  // A window lies in one block or in two neighbours.
  const std::byte* blocks[2];
  blocks[0] = cache.Slot(cache.SlotOf(sequence, record, first / kBlockTokens));
  blocks[1] = cache.Slot(cache.SlotOf(sequence, record, t / kBlockTokens));
  const auto block_of = [&](int token) {
    return blocks[token / kBlockTokens == first / kBlockTokens ? 0 : 1];
  };
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kWindowTokens; ++i) {
    const int token = first + i;
    sum += __bfloat162float(
        reinterpret_cast<const __nv_bfloat16*>(block_of(token))[(token % kBlockTokens) * dim + d]);
  }
  std::byte* index = cache.IndexSlot(sequence, record, window);
  const int place = window % kIndexWindows;
  reinterpret_cast<__nv_bfloat16*>(index)[place * dim + d] =
      __float2bfloat16_rn(sum * (1.0f / kWindowTokens));
  if (d < 32) {
    const int token = first + d;
    const float* c =
        reinterpret_cast<const float*>(block_of(token) + int64_t{4} * kBlockTokens * dim);
    const float e = WarpSum(c[token % kBlockTokens]) * (1.0f / kWindowTokens);
    if (d == 0) reinterpret_cast<float*>(index + int64_t{2} * kIndexWindows * dim)[place] = e;
  }
}

}  // namespace nosara::kernels
