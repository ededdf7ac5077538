// The vector loops of the CPU backend: plain loops that the compiler vectorizes.
//
// Thread-safe (pure functions). All arithmetic in f32; sums are vectorized, so their order is
// fixed for one build but not specified.
#pragma once

#include <cstdint>

#include "absl/types/span.h"
#include "worker/model/bf16.h"

namespace nosara::worker {

/// exp(x) with a relative error below 3e-7 for x <= 88; 0 below -87.3. For x <= 0 mostly (softmax).
inline float FastExp(float x) {
  // exp(x) = 2^n * exp(r), r = x - n ln 2 in [-0.35, 0.35]; n ln 2 in two parts to keep r exact.
  const float clamped = x < -87.3f ? -87.3f : (x > 88.0f ? 88.0f : x);
  const float shifted = clamped * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer
  const float n = shifted - 12582912.0f;
  const float r = (clamped - n * 0.693145752f) - n * 1.42860677e-6f;
  float p = 1.98756915e-4f;
  p = p * r + 1.39819995e-3f;
  p = p * r + 8.33345205e-3f;
  p = p * r + 4.16657963e-2f;
  p = p * r + 1.66666655e-1f;
  p = p * r + 5.00000012e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t exponent = (static_cast<int32_t>(n) + 127) << 23;
  const float result = p * std::bit_cast<float>(exponent);
  return x < -87.3f ? 0.0f : result;
}

/// log(1 + exp(x)), stable for large |x|.
float Softplus(float x);

/// out = x / sqrt(mean(x^2) + eps) * weight, elementwise. Equal sizes.
void RmsNorm(absl::Span<const float> x, absl::Span<const float> weight, float eps,
             absl::Span<float> out);

/// Rotates `x` [D] in place, NeoX style: the pairs are (i, i + D/2). `cosine`, `sine`: [D/2].
void Rope(absl::Span<float> x, absl::Span<const float> cosine, absl::Span<const float> sine);

/// gate = silu(gate) * up, elementwise. Equal sizes.
void SwiGlu(absl::Span<float> gate, absl::Span<const float> up);

/// x[i] += y[i].
void AddTo(absl::Span<float> x, absl::Span<const float> y);

/// The largest of x; -inf for none.
float Max(absl::Span<const float> x);

/// x[i] = exp(x[i] - shift); returns the sum of the results.
float ExpAndSum(absl::Span<float> x, float shift);

/// x[i] *= factor.
void Scale(absl::Span<float> x, float factor);

float Dot(absl::Span<const float> a, absl::Span<const float> b);

}  // namespace nosara::worker
