// Matrix products of activations with a model's weights.
#pragma once

#include <vector>

#include "absl/types/span.h"
#include "worker/backend/cpu/parallel.h"
#include "worker/model/safetensors.h"

namespace nosara::worker {

/// Y = X W^T with W [N, K] in the checkpoint's dtype, read in place (no widened copy of the
/// weights is kept).
///
/// Few rows of X (decode): vectorized dot products, bound by the reading of W. Many rows (prefill):
/// panels of W are widened to f32 and multiplied by OpenBLAS. Work is split over N. Used by one
/// thread at a time. Accumulation in f32.
class MatMul final {
 public:
  /// `parallel` must outlive this.
  explicit MatMul(ParallelFor* parallel);

  /// x: [M, K]; y: [M, N], both row-major and contiguous; M = x.size() / K.
  void Run(absl::Span<const float> x, const TensorView& w, absl::Span<float> y);

 private:
  template <typename Element>
  void RunTyped(const float* x, int m, const Element* w, int n, int k, float* y);

  ParallelFor* const parallel_;
  std::vector<std::vector<float>> panels_;  // one per thread
};

/// c [M, N] = alpha * a [M, K] b^T, b [N, K] (leading dimensions lda, ldb, ldc); one thread.
void GemmNT(int m, int n, int k, float alpha, const float* a, int lda, const float* b, int ldb,
            float* c, int ldc);

/// c [M, N] += a [M, K] b [K, N]; one thread.
void GemmNNAdd(int m, int n, int k, const float* a, int lda, const float* b, int ldb, float* c,
               int ldc);

}  // namespace nosara::worker
