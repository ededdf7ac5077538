// How a token is drawn from its logits: one definition for every backend, in integers where an
// order of summation could show. Needs no CUDA.
//
// With the largest logit l_max, the gap of a token is (l_max - l) / temperature, in units of 2^-26,
// and its weight exp(-gap) in units of 2^-40. A token whose weight is 0 is never drawn. Of the
// rest,
//   top_k  keeps those whose gap is at most the k-th smallest,
//   top_p  of these, those whose gap is at most the smallest bound under which lies a part of at
//          least top_p of the weight,
//   min_p  of these, those that weigh at least min_p times the best,
// so that tokens of equal logits stay or go together; top_k 1 is greedy. The token is then the
// first, by id, at which the running sum of the weights kept exceeds `uniform` times all of it.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define NOSARA_HOST_DEVICE __host__ __device__
#else
#define NOSARA_HOST_DEVICE
#endif

namespace nosara::kernels {

/// How the token of one row is chosen.
struct DrawParams {
  double uniform = 0;     // in [0, 1)
  float temperature = 0;  // 0: greedy, the smallest id of the largest logit
  int32_t top_k = 0;      // 0: all
  float top_p = 1;        // in (0, 1]; 1: all
  float min_p = 0;        // in [0, 1]; 0: all

  NOSARA_HOST_DEVICE bool Greedy() const { return temperature == 0 || top_k == 1; }
};

/// A gap that no token with a weight has; also what a logit that is NaN or -inf gets.
inline constexpr uint32_t kNoGap = uint32_t{28} << 26;

/// `largest` must be finite, `temperature` positive.
NOSARA_HOST_DEVICE inline uint32_t DrawGap(float largest, float logit, float temperature) {
  const float gap = (largest - logit) / temperature;
  return gap < 28.0f ? static_cast<uint32_t>(gap * 0x1p26f) : kNoGap;
}

/// 2^40 exp(-gap), to a few units in the last place of f32: powers of two by shifts, the rest
/// 2^-1/2 exp(-ln 2 (f - 1/2)), f in [0, 1), by its series. Nothing here is rounded differently
/// where a compiler fuses a product with a sum, so equal logits give equal tokens everywhere.
NOSARA_HOST_DEVICE inline uint64_t DrawWeight(uint32_t gap) {
  if (gap >= kNoGap) return 0;
  const uint64_t halvings = gap * uint64_t{6196328019};  // gap / ln 2, 58 bits of it a fraction
  const auto fraction = static_cast<float>(halvings >> 34 & 0xffffff);
  const float x = (fraction * 0x1p-24f - 0.5f) * -0.693147181f;
  float series = 1.0f / 720;
  series = fmaf(series, x, 1.0f / 120);
  series = fmaf(series, x, 1.0f / 24);
  series = fmaf(series, x, 1.0f / 6);
  series = fmaf(series, x, 0.5f);
  series = fmaf(series, x, 1.0f);
  series = fmaf(series, x, 1.0f);
  const auto weight = static_cast<uint64_t>(series * (0.707106781f * 0x1p40f));
  return weight >> (halvings >> 58);
}

/// What top_p asks for of the weight `total`: 1 or more.
NOSARA_HOST_DEVICE inline uint64_t DrawNeeded(float top_p, uint64_t total) {
  const auto needed = static_cast<uint64_t>(ceil(static_cast<double>(top_p) * total));
  return needed < 1 ? 1 : needed > total ? total : needed;
}

/// The smallest weight that min_p keeps.
NOSARA_HOST_DEVICE inline uint64_t DrawLeast(float min_p) {
  const auto least =
      static_cast<uint64_t>(ceil(static_cast<double>(min_p) * static_cast<double>(DrawWeight(0))));
  return least < 1 ? 1 : least;
}

/// The running sum that the drawn token is the first to exceed.
NOSARA_HOST_DEVICE inline uint64_t DrawTarget(double uniform, uint64_t total) {
  const auto target = static_cast<uint64_t>(uniform * static_cast<double>(total));
  return target < total ? target : total - 1;
}

/// Gaps are searched digit by digit: bits of a digit, from the highest.
inline constexpr int kDrawDigits = 3;
NOSARA_HOST_DEVICE inline int DrawDigitBits(int digit) { return digit < 2 ? 10 : 11; }
NOSARA_HOST_DEVICE inline int DrawDigitShift(int digit) {
  return digit == 0 ? 21 : digit == 1 ? 11 : 0;
}
inline constexpr int kDrawBins = 1 << 11;

/// Draws on the host. `logits`: [vocab]; `vocab` at least 1. A NaN counts as -inf; a row without
/// any number gives 0; where the largest logit is +inf the choice is greedy.
int32_t DrawToken(const float* logits, int vocab, const DrawParams& params);

}  // namespace nosara::kernels
