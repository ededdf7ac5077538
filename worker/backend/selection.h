// Which blocks a query attends to: nosa.md section 4, as pure functions of scores.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "worker/model/config.h"

namespace nosara::worker {

/// How blocks are selected. All three run on the same engine (nosa.md section 6).
enum class AttentionPolicy {
  kNosa,      // query-aware part, filled up by the query-agnostic importance; bias in the logits
  kInfLlmV2,  // the best blocks by the query-aware score alone; no bias
  kFull,      // every block; bias where the checkpoint has an eviction head
};

/// Whether the bias c is added to the attention logits.
enum class BiasMode {
  kAuto,  // kNosa and kFull: where the checkpoint has an eviction head; kInfLlmV2: never
  kOff,   // never
};

/// Compressed windows visible at query position t: those with 16w + 31 <= t.
/// Precondition: t >= -1.
int64_t VisibleWindows(int64_t t);

/// S[n] for n = 0 .. t/64: the maximum of `s[w]` over the visible windows 4n-1 <= w <= 4n+3;
/// -inf where there is none, 0 for all blocks while no window at all is visible.
/// `s`: at least VisibleWindows(t) scores; `block_scores`: exactly t/64 + 1.
void PoolQueryScores(absl::Span<const float> s, int64_t t, absl::Span<float> block_scores);

/// E[n], the maximum of `e[w]` over the windows 4n-1 <= w <= 4n+3 with w < e.size().
/// `importance`: one value a block; -inf where the block has no window.
void PoolImportance(absl::Span<const float> e, absl::Span<float> importance);

/// Scratch of Select, so that the hot path allocates nothing.
struct SelectionScratch {
  std::vector<uint64_t> keys;
  std::vector<uint8_t> taken;
};

/// How far apart the last block taken and the first one not taken were; for tests that must tell
/// a difference from a near-tie. Infinite where nothing was left out.
struct SelectionMargins {
  float query = 0;
  float importance = 0;
};

/// The set Gamma at query position t, ascending. Ties go to the smaller block, everywhere.
///
/// `S`, `E`: t/64 + 1 values each; E is read by kNosa only. The forced blocks (the first
/// init_blocks, and b - window_blocks .. b with b = t/64) count as +inf in S. While t/64 + 1 <=
/// topk_blocks, and always under kFull, all blocks are selected. NaN counts as -inf.
/// `margins` may be null.
void Select(const NosaConfig& config, AttentionPolicy policy, int64_t t, absl::Span<const float> S,
            absl::Span<const float> E, SelectionScratch& scratch, std::vector<int32_t>& selected,
            SelectionMargins* margins = nullptr);

}  // namespace nosara::worker
