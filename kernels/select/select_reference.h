// The operation of kernels/select/select.h on the host: plain loops, for tests and benchmarks.
#pragma once

#include <limits>
#include <vector>

#include "kernels/select/select.h"

namespace nosara::kernels {

/// What the blocks 0 .. t/64 of a (row, KV head) are ranked by.
struct BlockScores {
  std::vector<float> S;  // by the query; no forced blocks yet
  std::vector<float> E;  // importance
};

/// S[n] for n = 0 .. t/64 from `s`, the scores of the visible windows; 0 everywhere while there is
/// no such window.
std::vector<float> PoolQuery(const std::vector<float>& s, int t);

/// S and E of row `row`, KV head `head`.
BlockScores BlockScoresReference(const SelectParams& params, int row, int head);

/// A selection, ascending.
struct Selection {
  std::vector<int32_t> blocks;
  /// How far apart its last block by the query and the first one left out were in S, relative to
  /// the larger; infinite where nothing was left out or one of them is infinite.
  float query_margin = std::numeric_limits<float>::infinity();
  /// How far, relatively, scores may err without another selection coming out: sums in another
  /// order may select otherwise where this is small. As query_margin, but where those two tie and
  /// are neighbours and the only ones with this score: they have it from the window they share, so
  /// that they tie however it is summed up, and only the next other score can come between.
  float rounding_margin = std::numeric_limits<float>::infinity();
};

/// nosa.md section 4, steps 5 to 8, at position t.
Selection SelectBlocks(const SelectionNumbers& numbers, int t, const BlockScores& scores);

/// As the launch functions of the same parameters, all pointers being host pointers.
void SelectReference(const SelectParams& params);
void SelectAllReference(const SelectParams& params);

}  // namespace nosara::kernels
