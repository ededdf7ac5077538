#include "kernels/sample/draw.h"

#include <limits>
#include <vector>

namespace nosara::kernels {
namespace {

int32_t ArgMax(const float* logits, int vocab) {
  float best = -std::numeric_limits<float>::infinity();
  int32_t id = 0;
  for (int32_t i = 0; i < vocab; ++i) {
    if (logits[i] > best) {
      best = logits[i];
      id = i;
    }
  }
  return id;
}

/// The smallest gap such that tokens of at most it have `needed` of what is measured; `limit` where
/// all of them up to there have less.
template <typename Measure>
uint32_t Cut(const std::vector<uint32_t>& gaps, uint32_t limit, uint64_t needed,
             const Measure& measure) {
  uint32_t prefix = 0;  // the digits found so far
  std::vector<uint64_t> bins;
  for (int digit = 0; digit < kDrawDigits; ++digit) {
    const int shift = DrawDigitShift(digit);
    const int bits = DrawDigitBits(digit);
    bins.assign(size_t{1} << bits, 0);
    for (const uint32_t gap : gaps) {
      if (gap <= limit && (gap >> shift >> bits) == prefix) {
        bins[gap >> shift & (bins.size() - 1)] += measure(gap);
      }
    }
    size_t bin = 0;
    while (bin < bins.size() && bins[bin] < needed) needed -= bins[bin++];
    if (bin == bins.size()) return limit;
    prefix = prefix << bits | static_cast<uint32_t>(bin);
  }
  return prefix;
}

}  // namespace

int32_t DrawToken(const float* logits, int vocab, const DrawParams& params) {
  const int32_t best = ArgMax(logits, vocab);
  const float largest = logits[best];
  if (params.Greedy() || !std::isfinite(largest)) return best;

  std::vector<uint32_t> gaps(vocab);
  for (int i = 0; i < vocab; ++i) gaps[i] = DrawGap(largest, logits[i], params.temperature);
  uint32_t limit = kNoGap - 1;
  if (params.top_k > 0) {
    limit = Cut(gaps, limit, params.top_k,
                [](uint32_t gap) { return DrawWeight(gap) > 0 ? uint64_t{1} : 0; });
  }
  const auto total = [&](uint64_t least) {
    uint64_t sum = 0;
    for (const uint32_t gap : gaps) {
      const uint64_t weight = gap <= limit ? DrawWeight(gap) : 0;
      sum += weight >= least ? weight : 0;
    }
    return sum;
  };
  if (params.top_p < 1) limit = Cut(gaps, limit, DrawNeeded(params.top_p, total(0)), DrawWeight);

  const uint64_t least = DrawLeast(params.min_p);
  const uint64_t target = DrawTarget(params.uniform, total(least));
  uint64_t sum = 0;
  int32_t token = best;
  for (int i = 0; i < vocab; ++i) {
    const uint64_t weight = gaps[i] <= limit ? DrawWeight(gaps[i]) : 0;
    sum += weight >= least ? weight : 0;
    if (sum > target) {
      token = i;
      break;
    }
  }
  return token;
}

}  // namespace nosara::kernels
