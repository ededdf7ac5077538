// The compressed key of one window, on the device.
#pragma once

#include "kernels/common/cache_view.h"
#include "kernels/common/device.cuh"

namespace nosara::kernels {

/// Whether the token at position t completes a window.
__device__ inline bool CompletesWindow(int t) {
  return t % kWindowStride == kWindowStride - 1 && t >= kWindowTokens - 1;
}

/// The window that position t completes, of one record (kernels/windows/windows.h). By D threads, d
/// = 0 .. D - 1, whole warps. In two parts, so that what is older than the token t is added up
/// while others still compute that token.
class WindowUpdate {
 public:
  /// Adds up the tokens before t.
  __device__ void Begin(const CacheView& cache, int sequence, int record, int t, int d) {
    d_ = d;
    dim_ = cache.head_dim;
    const int window = (t - (kWindowTokens - 1)) / kWindowStride;
    const int first = window * kWindowStride;
    // A window lies in one block or in two neighbours.
    const std::byte* older = cache.Slot(cache.SlotOf(sequence, record, first / kBlockTokens));
    last_block_ = cache.Slot(cache.SlotOf(sequence, record, t / kBlockTokens));
    const auto block_of = [&](int token) {
      return token / kBlockTokens == first / kBlockTokens ? older : last_block_;
    };
    sum_ = 0;
    // Each half of a window lies in one block.
#pragma unroll
    for (int begin = 0; begin < kWindowTokens; begin += kWindowStride) {
      const __nv_bfloat16* key = Keys(block_of(first + begin)) +
                                 static_cast<int64_t>((first + begin) % kBlockTokens) * dim_ + d;
#pragma unroll
      for (int i = 0; i < kWindowStride; ++i) {
        if (begin + i < kWindowTokens - 1) sum_ += __bfloat162float(key[i * dim_]);
      }
    }
    if (d < kWindowTokens - 1) c_ = Biases(block_of(first + d))[(first + d) % kBlockTokens];
    last_row_ = t % kBlockTokens;
    index_ = cache.IndexSlot(sequence, record, window);
    place_ = window % kIndexWindows;
  }

  /// The key and the bias of token t are there: writes the window.
  __device__ void Finish() {
    const float sum = sum_ + __bfloat162float(Keys(last_block_)[last_row_ * dim_ + d_]);
    reinterpret_cast<__nv_bfloat16*>(index_)[place_ * dim_ + d_] =
        __float2bfloat16_rn(sum * (1.0f / kWindowTokens));
    if (d_ >= kWindowTokens) return;
    if (d_ == kWindowTokens - 1) c_ = Biases(last_block_)[last_row_];
    const float e = WarpSum(c_) * (1.0f / kWindowTokens);
    float* scores = reinterpret_cast<float*>(index_ + int64_t{2} * kIndexWindows * dim_);
    if (d_ == 0) scores[place_] = e;
  }

 private:
  __device__ const __nv_bfloat16* Keys(const std::byte* block) const {
    return reinterpret_cast<const __nv_bfloat16*>(block);
  }
  __device__ const float* Biases(const std::byte* block) const {
    return reinterpret_cast<const float*>(block + int64_t{4} * kBlockTokens * dim_);
  }

  int d_;
  int dim_;
  float sum_;
  float c_ = 0;
  const std::byte* last_block_;
  int last_row_;
  std::byte* index_;
  int place_;
};
static_assert(kWindowTokens == 32, "a warp has the biases of a window");

}  // namespace nosara::kernels
