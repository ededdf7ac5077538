#include "worker/backend/cpu/matmul.h"

#include <cblas.h>

#include <algorithm>

#include "base/check.h"

namespace nosara::worker {
namespace {

/// At least this many rows of X pay for widening W.
constexpr int kGemmRows = 8;
/// Rows of W widened at a time: 64 rows of 4096 floats stay in a core's L2 cache.
constexpr int kPanelRows = 64;
/// Rows of W handed to a thread at a time.
constexpr int kTaskRows = 128;

inline float Widen(float value) { return value; }
inline float Widen(Bf16 value) { return ToFloat(value); }

template <typename Element>
float DotWith(const Element* w, const float* x, int k) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < k; ++i) sum += Widen(w[i]) * x[i];
  return sum;
}

}  // namespace

MatMul::MatMul(ParallelFor* parallel) : parallel_(parallel), panels_(parallel->threads()) {
  // Our own loops are the only parallelism: OpenBLAS computes on the calling thread.
  openblas_set_num_threads(1);
}

void MatMul::Run(absl::Span<const float> x, const TensorView& w, absl::Span<float> y) {
  CHECK(w.shape.size() == 2);
  const int n = static_cast<int>(w.shape[0]);
  const int k = static_cast<int>(w.shape[1]);
  CHECK(k > 0 && x.size() % k == 0);
  const int m = static_cast<int>(x.size() / k);
  CHECK(y.size() == static_cast<size_t>(m) * n);
  if (w.dtype == TensorDType::kBf16) {
    RunTyped(x.data(), m, w.AsBf16().data(), n, k, y.data());
  } else {
    RunTyped(x.data(), m, w.AsF32().data(), n, k, y.data());
  }
}

template <typename Element>
void MatMul::RunTyped(const float* x, int m, const Element* w, int n, int k, float* y) {
  const int tasks = (n + kTaskRows - 1) / kTaskRows;
  parallel_->Run(tasks, [&](int task, int thread) {
    const int begin = task * kTaskRows;
    const int end = std::min(n, begin + kTaskRows);
    if (m < kGemmRows) {
      for (int row = begin; row < end; ++row) {
        for (int i = 0; i < m; ++i) {
          y[static_cast<size_t>(i) * n + row] =
              DotWith(w + static_cast<size_t>(row) * k, x + static_cast<size_t>(i) * k, k);
        }
      }
      return;
    }
    std::vector<float>& panel = panels_[thread];
    panel.resize(static_cast<size_t>(kPanelRows) * k);
    for (int first = begin; first < end; first += kPanelRows) {
      const int rows = std::min(kPanelRows, end - first);
      const Element* from = w + static_cast<size_t>(first) * k;
      float* to = panel.data();
      for (size_t i = 0; i < static_cast<size_t>(rows) * k; ++i) to[i] = Widen(from[i]);
      GemmNT(m, rows, k, 1.0f, x, k, to, k, y + first, n);
    }
  });
}

void GemmNT(int m, int n, int k, float alpha, const float* a, int lda, const float* b, int ldb,
            float* c, int ldc) {
  cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, m, n, k, alpha, a, lda, b, ldb, 0.0f, c,
              ldc);
}

void GemmNNAdd(int m, int n, int k, const float* a, int lda, const float* b, int ldb, float* c,
               int ldc) {
  cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, m, n, k, 1.0f, a, lda, b, ldb, 1.0f, c,
              ldc);
}

}  // namespace nosara::worker
