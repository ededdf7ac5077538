// Scoring, selection and attention of a tile of queries on the CPU: nosa.md sections 4 and 5.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "kvstore/api/layout.h"
#include "worker/backend/cpu/sequence_cache.h"
#include "worker/backend/selection.h"
#include "worker/model/config.h"

namespace nosara::worker {

/// Queries per tile; a block's selection by the tile is a bit mask of this many bits.
inline constexpr int kTileTokens = 32;

/// A block that at least one query of a tile selects.
struct TileBlock {
  int32_t block = 0;
  uint32_t queries = 0;               // bit i: query i of the tile
  const std::byte* record = nullptr;  // set before AttendTile
};

/// Consecutive queries of one step item, for one KV head.
struct AttentionTile {
  int active = 0;  // the step item
  int kv_head = 0;
  int first_row = 0;                           // of the step's rows
  int tokens = 0;                              // 1 .. kTileTokens
  int64_t position = 0;                        // of the first query
  std::vector<TileBlock> blocks;               // ascending
  std::vector<int32_t> last_selected;          // the selection of the last query
  std::vector<SelectionMargins> margins;       // per query, where observed
  std::vector<std::vector<int32_t>> selected;  // per query, where observed
};

/// Reused buffers of one thread.
struct AttentionScratch {
  std::vector<float> queries;   // [tokens * G, D]
  std::vector<float> scores;    // [tokens * G, W] or [tokens * G, 64]
  std::vector<float> group;     // [W]
  std::vector<float> S, E;      // [blocks]
  std::vector<float> k, v;      // [64, D]
  std::vector<float> output;    // [tokens * G, D]
  std::vector<float> max, sum;  // [tokens * G]
  std::vector<int32_t> picked;
  SelectionScratch selection;
};

/// What all tiles of a layer share.
struct AttentionShape {
  int group_size = 0;    // G
  int head_dim = 0;      // D
  int query_stride = 0;  // floats from one row of q to the next: Hq * D
  DType dtype = DType::kF32;
  bool bias = false;  // add c to the logits
};

/// Fills in `tile.blocks` and `tile.last_selected`. `q`: the step's queries [R, Hq*D], after RoPE,
/// rounded. `windows`: of the tile's (layer, KV head), covering all its positions. `observe`: also
/// keep each query's selection and margins.
void SelectTile(const NosaConfig& config, AttentionPolicy policy, const AttentionShape& shape,
                absl::Span<const float> q, const WindowIndex& windows, bool observe,
                AttentionScratch& scratch, AttentionTile& tile);

/// Attends the tile's queries to the blocks each has selected, in ascending order of blocks, and
/// writes the unrounded outputs to their rows of `out` [R, Hq*D]. All records are set.
void AttendTile(const kvstore::PageLayout& layout, const AttentionShape& shape,
                absl::Span<const float> q, const AttentionTile& tile, AttentionScratch& scratch,
                absl::Span<float> out);

}  // namespace nosara::worker
