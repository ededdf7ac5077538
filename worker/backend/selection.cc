#include "worker/backend/selection.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "base/check.h"

namespace nosara::worker {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kBlock = 64;
constexpr int64_t kWindowTokens = 32;
constexpr int64_t kWindowStride = 16;

/// The first and last window (exclusive) that overlap block n, cut to `windows`.
int64_t FirstWindow(int64_t n) { return std::max<int64_t>(0, 4 * n - 1); }
int64_t EndWindow(int64_t n, int64_t windows) { return std::min<int64_t>(4 * n + 4, windows); }

/// Maps (score, block) to an integer whose order is: better score first, then smaller block.
uint64_t RankKey(float score, int32_t block) {
  if (std::isnan(score)) score = -kInfinity;
  if (score == 0) score = 0;  // -0 and +0 tie
  uint32_t bits = std::bit_cast<uint32_t>(score);
  // Monotonic map of floats to unsigned integers, then inverted: smaller key = better.
  bits = (bits & 0x80000000u) ? ~bits : (bits | 0x80000000u);
  return (static_cast<uint64_t>(~bits) << 32) | static_cast<uint32_t>(block);
}

int32_t BlockOf(uint64_t key) { return static_cast<int32_t>(key & 0xffffffffu); }

/// Moves the `count` best keys to the front, and the next best to position `count`, if any.
void PutBestFirst(std::vector<uint64_t>& keys, size_t count) {
  if (count < keys.size()) std::nth_element(keys.begin(), keys.begin() + count, keys.end());
}

/// The score of the worst of the first `count` keys and that of key `count`, apart.
float Margin(const std::vector<uint64_t>& keys, size_t count, absl::Span<const float> scores) {
  if (count == 0 || count >= keys.size()) return kInfinity;
  const uint64_t worst = *std::max_element(keys.begin(), keys.begin() + count);
  const float taken = scores[BlockOf(worst)];
  const float left = scores[BlockOf(keys[count])];
  if (!std::isfinite(taken) || !std::isfinite(left)) return kInfinity;
  const float size = std::max(std::abs(taken), std::abs(left));
  return size > 0 ? (taken - left) / size : 0;
}

}  // namespace

int64_t VisibleWindows(int64_t t) {
  return t < kWindowTokens - 1 ? 0 : (t - (kWindowTokens - 1)) / kWindowStride + 1;
}

void PoolQueryScores(absl::Span<const float> s, int64_t t, absl::Span<float> block_scores) {
  const int64_t windows = VisibleWindows(t);
  CHECK(static_cast<int64_t>(s.size()) >= windows);
  CHECK(static_cast<int64_t>(block_scores.size()) == t / kBlock + 1);
  if (windows == 0) {
    std::fill(block_scores.begin(), block_scores.end(), 0.0f);
    return;
  }
  for (int64_t n = 0; n < static_cast<int64_t>(block_scores.size()); ++n) {
    float best = -kInfinity;
    for (int64_t w = FirstWindow(n); w < EndWindow(n, windows); ++w) best = std::max(best, s[w]);
    block_scores[n] = best;
  }
}

void PoolImportance(absl::Span<const float> e, absl::Span<float> importance) {
  const int64_t windows = e.size();
  for (int64_t n = 0; n < static_cast<int64_t>(importance.size()); ++n) {
    float best = -kInfinity;
    for (int64_t w = FirstWindow(n); w < EndWindow(n, windows); ++w) best = std::max(best, e[w]);
    importance[n] = best;
  }
}

void Select(const NosaConfig& config, AttentionPolicy policy, int64_t t, absl::Span<const float> S,
            absl::Span<const float> E, SelectionScratch& scratch, std::vector<int32_t>& selected,
            SelectionMargins* margins) {
  const int32_t b = static_cast<int32_t>(t / kBlock);
  const int32_t blocks = b + 1;
  if (margins != nullptr) *margins = {kInfinity, kInfinity};
  selected.clear();
  if (policy == AttentionPolicy::kFull || blocks <= config.topk_blocks) {
    for (int32_t n = 0; n < blocks; ++n) selected.push_back(n);
    return;
  }
  CHECK(static_cast<int32_t>(S.size()) == blocks);

  // The query-aware part.
  const size_t query_blocks =
      policy == AttentionPolicy::kNosa ? config.QueryAwareBlocks() : config.topk_blocks;
  std::vector<uint64_t>& keys = scratch.keys;
  keys.clear();
  for (int32_t n = 0; n < blocks; ++n) {
    const bool forced = n < config.init_blocks || n >= b - config.window_blocks;
    keys.push_back(RankKey(forced ? kInfinity : S[n], n));
  }
  PutBestFirst(keys, query_blocks);
  if (margins != nullptr) margins->query = Margin(keys, query_blocks, S);
  scratch.taken.assign(blocks, 0);
  for (size_t i = 0; i < std::min(query_blocks, keys.size()); ++i) {
    selected.push_back(BlockOf(keys[i]));
    scratch.taken[BlockOf(keys[i])] = 1;
  }

  // What it leaves is filled by the query-agnostic importance.
  if (policy == AttentionPolicy::kNosa &&
      selected.size() < static_cast<size_t>(config.topk_blocks)) {
    CHECK(static_cast<int32_t>(E.size()) == blocks);
    const size_t fill = config.topk_blocks - selected.size();
    keys.clear();
    for (int32_t n = 0; n < blocks; ++n) {
      if (!scratch.taken[n]) keys.push_back(RankKey(E[n], n));
    }
    PutBestFirst(keys, fill);
    if (margins != nullptr) margins->importance = Margin(keys, fill, E);
    for (size_t i = 0; i < std::min(fill, keys.size()); ++i) selected.push_back(BlockOf(keys[i]));
  }
  std::sort(selected.begin(), selected.end());
}

}  // namespace nosara::worker
