#include "kernels/sample/draw.h"

#include <algorithm>
#include <limits>
#include <numeric>
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

/// The smallest gap such that tokens of at most it have `needed(all)` of what is measured, `all`
/// being what those up to `limit` have; `limit` where they have less.
template <typename Measure, typename Needed>
uint32_t Cut(const std::vector<uint32_t>& gaps, uint32_t limit, const Measure& measure,
             const Needed& needed) {
  uint32_t prefix = 0;  // the digits found so far
  uint64_t left = 0;    // to be found
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
    if (digit == 0) left = needed(std::accumulate(bins.begin(), bins.end(), uint64_t{0}));
    size_t bin = 0;
    while (bin < bins.size() && bins[bin] < left) left -= bins[bin++];
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

  const float scale = DrawScale(params.temperature);
  std::vector<uint32_t> gaps(vocab);
  for (int i = 0; i < vocab; ++i) gaps[i] = DrawGap(largest, logits[i], scale);
  uint32_t limit = kNoGap - 1;
  if (params.top_k > 0) {
    limit = Cut(
        gaps, limit, [](uint32_t gap) { return uint64_t{DrawWeight(gap) > 0}; },
        [&params](uint64_t) { return static_cast<uint64_t>(params.top_k); });
  }
  if (params.top_p < 1) {
    limit = Cut(gaps, limit, DrawWeight,
                [&params](uint64_t total) { return DrawNeeded(params.top_p, total); });
  }
  const uint64_t least = DrawLeast(params.min_p);
  const auto kept = [&](int i) { return gaps[i] <= limit && DrawWeight(gaps[i]) >= least; };

  // The best token first: most others are then out of the question.
  const auto variate = [&params](int i) {
    return DrawVariate(DrawPhilox(params.seed, params.position, i / 4).bits[i % 4]);
  };
  int32_t token = best;
  float smallest = DrawKey(gaps[best], variate(best));
  for (int first = 0; first < vocab; first += 4) {
    const DrawRandom random = DrawPhilox(params.seed, params.position, first / 4);
    for (int i = first; i < std::min(first + 4, vocab); ++i) {
      const float x = DrawVariate(random.bits[i % 4]);
      if (DrawKeyBound(gaps[i], x) > smallest || !kept(i)) continue;
      const float key = DrawKey(gaps[i], x);
      if (key < smallest || (key == smallest && i < token)) {
        smallest = key;
        token = i;
      }
    }
  }
  return token;
}

}  // namespace nosara::kernels
