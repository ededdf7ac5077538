#include "kernels/select/select_reference.h"

#include <algorithm>
#include <cmath>

#include "kernels/common/record_reference.h"
#include "kernels/score/score.h"

namespace nosara::kernels {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

/// The maximum over the windows that overlap each block. NaN counts as -inf.
std::vector<float> PoolMax(const std::vector<float>& windows, int blocks) {
  std::vector<float> pooled(blocks, -kInfinity);
  for (int n = 0; n < blocks; ++n) {
    const int end = std::min<int>(4 * n + 4, windows.size());
    for (int w = std::max(0, 4 * n - 1); w < end; ++w) {
      if (windows[w] > pooled[n]) pooled[n] = windows[w];
    }
  }
  return pooled;
}

/// `candidates` by falling score, the smaller block first among equals.
void Rank(const std::vector<float>& scores, std::vector<int32_t>& candidates) {
  const auto score = [&](int32_t n) { return std::isnan(scores[n]) ? -kInfinity : scores[n]; };
  std::sort(candidates.begin(), candidates.end(), [&](int32_t a, int32_t b) {
    return score(a) != score(b) ? score(a) > score(b) : a < b;
  });
}

/// |a - b| relative to the larger; infinite where one of them is.
float Margin(float a, float b) {
  if (!std::isfinite(a) || !std::isfinite(b)) return kInfinity;
  const float size = std::max(std::abs(a), std::abs(b));
  return size > 0 ? std::abs(a - b) / size : 0;
}

/// Selection::rounding_margin of the `taken` first ones of `ranked`.
float RoundingMargin(const std::vector<float>& S, const std::vector<int32_t>& ranked, int taken) {
  const float cut = S[ranked[taken - 1]];
  const float margin = Margin(cut, S[ranked[taken]]);
  if (margin > 0) return margin;
  const auto begin =
      std::find_if(ranked.begin(), ranked.end(), [&](int32_t n) { return S[n] == cut; });
  const auto end = std::find_if(begin, ranked.end(), [&](int32_t n) { return S[n] != cut; });
  if (end - begin != 2 || begin[1] != begin[0] + 1) return 0;
  const float above = begin == ranked.begin() ? kInfinity : Margin(S[begin[-1]], cut);
  const float below = end == ranked.end() ? kInfinity : Margin(cut, S[*end]);
  return std::min(above, below);
}

}  // namespace

std::vector<float> PoolQuery(const std::vector<float>& s, int t) {
  const int blocks = t / kBlockTokens + 1;
  if (VisibleWindows(t) == 0) return std::vector<float>(blocks, 0.0f);
  return PoolMax(s, blocks);
}

BlockScores BlockScoresReference(const SelectParams& params, int row, int head) {
  const StepRow info = params.rows_info[row];
  const int G = params.num_heads / params.num_kv_heads;
  const int Gp = PaddedGroup(G);
  const int windows = VisibleWindows(info.position);
  const int64_t pair = int64_t{row} * params.num_kv_heads + head;
  const float* logits = params.logits + pair * params.max_windows * Gp;
  const float2* partials = params.partials + pair * ScoreTiles(params.max_windows) * Gp;

  std::vector<float> s(windows, 0.0f);
  for (int g = 0; g < G; ++g) {
    float max = -kInfinity;
    for (int i = 0; i < ScoreTiles(windows); ++i) max = std::fmax(max, partials[i * Gp + g].x);
    float sum = 0;
    for (int i = 0; i < ScoreTiles(windows); ++i) {
      sum += partials[i * Gp + g].y * std::exp(partials[i * Gp + g].x - max);
    }
    for (int w = 0; w < windows; ++w) s[w] += std::exp(logits[int64_t{w} * Gp + g] - max) / sum;
  }

  const CacheView& cache = params.cache;
  std::vector<float> e(windows);
  for (int w = 0; w < windows; ++w) {
    const int record = params.layer * params.num_kv_heads + head;
    e[w] = *IndexScore(cache.IndexSlot(info.sequence, record, w), cache.head_dim, w);
  }
  return {PoolQuery(s, info.position), PoolMax(e, info.position / kBlockTokens + 1)};
}

Selection SelectBlocks(const SelectionNumbers& numbers, int t, const BlockScores& scores) {
  const int b = t / kBlockTokens;
  Selection result;
  std::vector<int32_t> candidates(b + 1);
  for (int n = 0; n <= b; ++n) candidates[n] = n;
  if (b + 1 <= numbers.topk_blocks) {
    result.blocks = candidates;
    return result;
  }

  std::vector<float> S = scores.S;
  for (int n = 0; n <= b; ++n) {
    if (n < numbers.init_blocks || n >= b - numbers.window_blocks) S[n] = kInfinity;
  }
  Rank(S, candidates);
  const int by_query = std::min(numbers.query_blocks, numbers.topk_blocks);
  result.blocks.assign(candidates.begin(), candidates.begin() + by_query);
  if (by_query > 0) {
    result.query_margin = Margin(S[candidates[by_query - 1]], S[candidates[by_query]]);
    result.rounding_margin = RoundingMargin(S, candidates, by_query);
  }

  candidates.erase(candidates.begin(), candidates.begin() + by_query);
  Rank(scores.E, candidates);
  candidates.resize(numbers.topk_blocks - by_query);
  result.blocks.insert(result.blocks.end(), candidates.begin(), candidates.end());
  std::sort(result.blocks.begin(), result.blocks.end());
  return result;
}

void SelectReference(const SelectParams& params) {
  for (int r = 0; r < params.rows; ++r) {
    for (int h = 0; h < params.num_kv_heads; ++h) {
      const int64_t pair = int64_t{r} * params.num_kv_heads + h;
      params.count[pair] = 0;
      const StepRow info = params.rows_info[r];
      if (info.sequence < 0) continue;
      BlockScores scores;
      if (info.position / kBlockTokens + 1 > params.numbers.topk_blocks) {
        scores = BlockScoresReference(params, r, h);
      }
      const Selection selection = SelectBlocks(params.numbers, info.position, scores);
      std::copy(selection.blocks.begin(), selection.blocks.end(),
                params.selected + pair * params.max_selected);
      params.count[pair] = static_cast<int32_t>(selection.blocks.size());
    }
  }
}

void SelectAllReference(const SelectParams& params) {
  for (int r = 0; r < params.rows; ++r) {
    for (int h = 0; h < params.num_kv_heads; ++h) {
      const int64_t pair = int64_t{r} * params.num_kv_heads + h;
      const StepRow info = params.rows_info[r];
      const int blocks = info.sequence < 0 ? 0 : info.position / kBlockTokens + 1;
      for (int n = 0; n < blocks; ++n) params.selected[pair * params.max_selected + n] = n;
      params.count[pair] = blocks;
    }
  }
}

}  // namespace nosara::kernels
