// How a token is drawn from its logits: one definition for every backend.
//
// With the largest logit l_max, the gap of a token is (l_max - l) / temperature, in units of 2^-26,
// and its weight exp(-gap) in units of 2^-40. A token whose weight is 0 is never drawn. Of the
// rest,
//   top_k  keeps those whose gap is at most the k-th smallest,
//   top_p  of these, those whose gap is at most the smallest bound under which lies a part of at
//          least top_p of the weight,
//   min_p  of these, those that weigh at least min_p times the best,
// so that tokens of equal logits stay or go together; top_k 1 is greedy. Each token that is kept
// has an exponential variate E of its own, from a generator keyed by (seed, position, token); the
// token of the smallest E / weight is drawn, which has probability weight / sum of the weights. A
// draw by cumulative weights would have the same distribution; this one moves least when the logits
// do: a stream that goes on with the sums of another machine or batch, in other last places, draws
// another token only about as often as the distributions differ (Gumbel-max coupling).
//
// Sums are of integers and functions are series of correctly rounded operations, none of which a
// compiler may fuse to another result: equal logits give equal tokens everywhere. Needs no CUDA.
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
  uint64_t seed = 0;
  uint64_t position = 0;  // of the token that is drawn, in its sequence
  float temperature = 0;  // 0: greedy, the smallest id of the largest logit
  int32_t top_k = 0;      // 0: all
  float top_p = 1;        // in (0, 1]; 1: all
  float min_p = 0;        // in [0, 1]; 0: all

  NOSARA_HOST_DEVICE bool Greedy() const { return temperature == 0 || top_k == 1; }
};

/// A gap that no token with a weight has; also what a logit that is NaN or -inf gets.
inline constexpr uint32_t kNoGap = uint32_t{28} << 26;

/// Gaps of a unit of logits; `temperature` must be positive.
NOSARA_HOST_DEVICE inline float DrawScale(float temperature) { return 0x1p26f / temperature; }

/// `largest` must be finite.
NOSARA_HOST_DEVICE inline uint32_t DrawGap(float largest, float logit, float scale) {
  const float gap = (largest - logit) * scale;
  return gap < static_cast<float>(kNoGap) ? static_cast<uint32_t>(gap) : kNoGap;
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

struct DrawRandom {
  uint32_t bits[4];
};

/// Philox4x32-10 (Salmon et al., SC'11): key `seed`, counter (`position`, `quad`, 0).
NOSARA_HOST_DEVICE inline DrawRandom DrawPhilox(uint64_t seed, uint64_t position, uint32_t quad) {
  uint32_t c0 = static_cast<uint32_t>(position);
  uint32_t c1 = static_cast<uint32_t>(position >> 32);
  uint32_t c2 = quad;
  uint32_t c3 = 0;
  uint32_t key0 = static_cast<uint32_t>(seed);
  uint32_t key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * c0;
    const uint64_t product1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ key0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key1;
    c3 = static_cast<uint32_t>(product0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

/// The bits of a float and back; the sign must be 0.
union DrawFloat {
  float value;
  uint32_t bits;
};

/// -ln(1 - x) for x in [0, 1/2], as 2 artanh(x / (2 - x)) by its series.
NOSARA_HOST_DEVICE inline float DrawMinusLog(float x) {
  const float z = x / (2 - x);
  const float square = z * z;
  float series = 2.0f / 13;
  series = fmaf(series, square, 2.0f / 11);
  series = fmaf(series, square, 2.0f / 9);
  series = fmaf(series, square, 2.0f / 7);
  series = fmaf(series, square, 2.0f / 5);
  series = fmaf(series, square, 2.0f / 3);
  series = fmaf(series, square, 2.0f);
  return series * z;
}

/// -ln x for normal x > 0.
NOSARA_HOST_DEVICE inline float DrawMinusLogOf(float x) {
  DrawFloat mantissa = {x};
  const int exponent = static_cast<int>(mantissa.bits >> 23) - 126;
  mantissa.bits = (mantissa.bits & 0x7fffffu) | 126u << 23;  // in [1/2, 1)
  return fmaf(static_cast<float>(exponent), -0.693147181f, DrawMinusLog(1 - mantissa.value));
}

/// In (0, 1): 1 - U for the uniform U that E = -ln U comes from.
NOSARA_HOST_DEVICE inline float DrawVariate(uint32_t bits) {
  return fminf(fmaf(static_cast<float>(bits), 0x1p-32f, 0x1p-33f), 1 - 0x1p-24f);
}

/// Below DrawKey() of the same arguments, for little: E is above 1 - U, whose logarithm is above
/// that of its power of two.
NOSARA_HOST_DEVICE inline float DrawKeyBound(uint32_t gap, float variate) {
  const DrawFloat x = {variate};
  const float exponent = static_cast<float>(static_cast<int>(x.bits >> 23) - 127);
  return fmaf(static_cast<float>(gap), 0x1p-26f, exponent * 0.6931472f) - 0.001f;
}

/// ln(E / weight) but for a constant: the token of the smallest is drawn, of equals the smaller id.
NOSARA_HOST_DEVICE inline float DrawKey(uint32_t gap, float variate) {
  const float exponential = variate < 0.5f ? DrawMinusLog(variate) : DrawMinusLogOf(1 - variate);
  return fmaf(static_cast<float>(gap), 0x1p-26f, -DrawMinusLogOf(exponential));
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
