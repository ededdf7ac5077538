#include "worker/backend/cpu/math.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/check.h"

namespace nosara::worker {

float Softplus(float x) { return std::max(x, 0.0f) + std::log1p(std::exp(-std::abs(x))); }

void RmsNorm(absl::Span<const float> x, absl::Span<const float> weight, float eps,
             absl::Span<float> out) {
  DCHECK(x.size() == weight.size() && x.size() == out.size());
  const float scale = 1.0f / std::sqrt(Dot(x, x) / x.size() + eps);
  const float* in = x.data();
  const float* w = weight.data();
  float* to = out.data();
#pragma omp simd
  for (size_t i = 0; i < x.size(); ++i) to[i] = in[i] * scale * w[i];
}

void Rope(absl::Span<float> x, absl::Span<const float> cosine, absl::Span<const float> sine) {
  const size_t half = x.size() / 2;
  DCHECK(cosine.size() == half && sine.size() == half);
  float* low = x.data();
  float* high = x.data() + half;
  const float* c = cosine.data();
  const float* s = sine.data();
#pragma omp simd
  for (size_t i = 0; i < half; ++i) {
    const float a = low[i];
    const float b = high[i];
    low[i] = a * c[i] - b * s[i];
    high[i] = b * c[i] + a * s[i];
  }
}

void SwiGlu(absl::Span<float> gate, absl::Span<const float> up) {
  DCHECK(gate.size() == up.size());
  float* g = gate.data();
  const float* u = up.data();
#pragma omp simd
  for (size_t i = 0; i < gate.size(); ++i) g[i] = g[i] / (1.0f + FastExp(-g[i])) * u[i];
}

void AddTo(absl::Span<float> x, absl::Span<const float> y) {
  DCHECK(x.size() == y.size());
  float* to = x.data();
  const float* from = y.data();
#pragma omp simd
  for (size_t i = 0; i < x.size(); ++i) to[i] += from[i];
}

float Max(absl::Span<const float> x) {
  float best = -std::numeric_limits<float>::infinity();
  const float* in = x.data();
#pragma omp simd reduction(max : best)
  for (size_t i = 0; i < x.size(); ++i) best = in[i] > best ? in[i] : best;
  return best;
}

float ExpAndSum(absl::Span<float> x, float shift) {
  float sum = 0;
  float* in = x.data();
#pragma omp simd reduction(+ : sum)
  for (size_t i = 0; i < x.size(); ++i) {
    in[i] = FastExp(in[i] - shift);
    sum += in[i];
  }
  return sum;
}

void Scale(absl::Span<float> x, float factor) {
  float* in = x.data();
#pragma omp simd
  for (size_t i = 0; i < x.size(); ++i) in[i] *= factor;
}

float Dot(absl::Span<const float> a, absl::Span<const float> b) {
  DCHECK(a.size() == b.size());
  float sum = 0;
  const float* x = a.data();
  const float* y = b.data();
#pragma omp simd reduction(+ : sum)
  for (size_t i = 0; i < a.size(); ++i) sum += x[i] * y[i];
  return sum;
}

}  // namespace nosara::worker
