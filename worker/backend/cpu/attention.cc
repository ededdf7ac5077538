#include "worker/backend/cpu/attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "base/check.h"
#include "worker/backend/cpu/math.h"
#include "worker/backend/cpu/matmul.h"

namespace nosara::worker {
namespace {

constexpr int kBlock = kvstore::kBlockTokens;
constexpr float kNegativeInfinity = -std::numeric_limits<float>::infinity();

/// Copies the tile's queries of its KV head to scratch.queries, [tokens * G, D].
void PackQueries(const AttentionShape& shape, absl::Span<const float> q, const AttentionTile& tile,
                 AttentionScratch& scratch) {
  const size_t row = static_cast<size_t>(shape.group_size) * shape.head_dim;
  scratch.queries.resize(row * tile.tokens);
  for (int i = 0; i < tile.tokens; ++i) {
    const float* from = q.data() + static_cast<size_t>(tile.first_row + i) * shape.query_stride +
                        tile.kv_head * row;
    std::memcpy(scratch.queries.data() + i * row, from, row * sizeof(float));
  }
}

/// Widens `count` elements of the model's dtype.
void WidenRow(DType dtype, const std::byte* from, size_t count, float* to) {
  if (dtype == DType::kBf16) {
    ToFloat(absl::MakeConstSpan(reinterpret_cast<const Bf16*>(from), count),
            absl::MakeSpan(to, count));
  } else {
    std::memcpy(to, from, count * sizeof(float));
  }
}

}  // namespace

void SelectTile(const NosaConfig& config, AttentionPolicy policy, const AttentionShape& shape,
                absl::Span<const float> q, const WindowIndex& windows, bool observe,
                AttentionScratch& scratch, AttentionTile& tile) {
  const int64_t last = tile.position + tile.tokens - 1;
  const int blocks = static_cast<int>(last / kBlock) + 1;
  const bool dense = policy == AttentionPolicy::kFull || blocks <= config.topk_blocks;
  tile.blocks.assign(blocks, {});
  for (int n = 0; n < blocks; ++n) tile.blocks[n].block = n;

  const int group = shape.group_size;
  const int64_t all_windows = VisibleWindows(last);
  if (!dense) {
    PackQueries(shape, q, tile, scratch);
    scratch.scores.resize(static_cast<size_t>(tile.tokens) * group * all_windows);
    GemmNT(tile.tokens * group, static_cast<int>(all_windows), shape.head_dim,
           1.0f / std::sqrt(static_cast<float>(shape.head_dim)), scratch.queries.data(),
           shape.head_dim, windows.keys.data(), shape.head_dim, scratch.scores.data(),
           static_cast<int>(all_windows));
    scratch.E.resize(blocks);
    PoolImportance(absl::MakeConstSpan(windows.scores), absl::MakeSpan(scratch.E));
  }
  for (int i = 0; i < tile.tokens; ++i) {
    const int64_t t = tile.position + i;
    SelectionMargins margins;
    if (dense) {
      Select(config, policy, t, {}, {}, scratch.selection, scratch.picked, &margins);
    } else {
      // s[w]: the softmax of each query head over the visible windows, summed over the group.
      const int64_t visible = VisibleWindows(t);
      scratch.group.assign(visible, 0.0f);
      for (int g = 0; g < group; ++g) {
        float* scores = scratch.scores.data() + (static_cast<size_t>(i) * group + g) * all_windows;
        const absl::Span<float> row(scores, visible);
        const float sum = ExpAndSum(row, Max(row));
        Scale(row, 1.0f / sum);
        AddTo(absl::MakeSpan(scratch.group), row);
      }
      const int own_blocks = static_cast<int>(t / kBlock) + 1;
      scratch.S.resize(own_blocks);
      PoolQueryScores(scratch.group, t, absl::MakeSpan(scratch.S));
      Select(config, policy, t, scratch.S, absl::MakeConstSpan(scratch.E).subspan(0, own_blocks),
             scratch.selection, scratch.picked, &margins);
    }
    for (int32_t block : scratch.picked) tile.blocks[block].queries |= 1u << i;
    if (observe && !dense) {
      tile.selected.push_back(scratch.picked);
      tile.margins.push_back(margins);
    }
  }
  tile.last_selected = scratch.picked;
  tile.blocks.erase(std::remove_if(tile.blocks.begin(), tile.blocks.end(),
                                   [](const TileBlock& b) { return b.queries == 0; }),
                    tile.blocks.end());
}

void AttendTile(const kvstore::PageLayout& layout, const AttentionShape& shape,
                absl::Span<const float> q, const AttentionTile& tile, AttentionScratch& scratch,
                absl::Span<float> out) {
  const int group = shape.group_size;
  const int dim = shape.head_dim;
  const int rows = tile.tokens * group;
  const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
  PackQueries(shape, q, tile, scratch);
  scratch.output.assign(static_cast<size_t>(rows) * dim, 0.0f);
  scratch.max.assign(rows, kNegativeInfinity);
  scratch.sum.assign(rows, 0.0f);
  scratch.scores.resize(static_cast<size_t>(rows) * kBlock);
  scratch.k.resize(static_cast<size_t>(kBlock) * dim);
  scratch.v.resize(static_cast<size_t>(kBlock) * dim);

  for (const TileBlock& tile_block : tile.blocks) {
    DCHECK(tile_block.record != nullptr);
    WidenRow(shape.dtype, tile_block.record + layout.k_offset(), scratch.k.size(),
             scratch.k.data());
    WidenRow(shape.dtype, tile_block.record + layout.v_offset(), scratch.v.size(),
             scratch.v.data());
    float bias[kBlock];
    std::memcpy(bias, tile_block.record + layout.c_offset(), sizeof(bias));
    const int64_t block_start = int64_t{tile_block.block} * kBlock;

    // Runs of neighbouring queries that selected this block share one product.
    for (int first = 0; first < tile.tokens;) {
      if ((tile_block.queries >> first & 1u) == 0) {
        ++first;
        continue;
      }
      int end = first + 1;
      while (end < tile.tokens && (tile_block.queries >> end & 1u) != 0) ++end;
      const int run_rows = (end - first) * group;
      const size_t first_row = static_cast<size_t>(first) * group;
      float* scores = scratch.scores.data();
      GemmNT(run_rows, kBlock, dim, scale, scratch.queries.data() + first_row * dim, dim,
             scratch.k.data(), dim, scores, kBlock);
      for (int r = 0; r < run_rows; ++r) {
        const size_t row = first_row + r;
        const int64_t t = tile.position + static_cast<int64_t>(row) / group;
        const int valid = static_cast<int>(std::min<int64_t>(kBlock, t - block_start + 1));
        const absl::Span<float> logits(scores + static_cast<size_t>(r) * kBlock, valid);
        if (shape.bias) AddTo(logits, absl::MakeConstSpan(bias, valid));
        const float new_max = std::max(scratch.max[row], Max(logits));
        if (new_max > scratch.max[row]) {
          // exp(-inf) is 0 for the first block, whose output is still all zero.
          const float rescale = FastExp(scratch.max[row] - new_max);
          Scale(absl::MakeSpan(scratch.output).subspan(row * dim, dim), rescale);
          scratch.sum[row] *= rescale;
          scratch.max[row] = new_max;
        }
        scratch.sum[row] += ExpAndSum(logits, new_max);
        std::fill(scores + static_cast<size_t>(r) * kBlock + valid,
                  scores + static_cast<size_t>(r + 1) * kBlock, 0.0f);
      }
      GemmNNAdd(run_rows, dim, kBlock, scores, kBlock, scratch.v.data(), dim,
                scratch.output.data() + first_row * dim, dim);
      first = end;
    }
  }

  const size_t token_floats = static_cast<size_t>(group) * dim;
  for (int row = 0; row < rows; ++row) {
    Scale(absl::MakeSpan(scratch.output).subspan(static_cast<size_t>(row) * dim, dim),
          1.0f / scratch.sum[row]);
  }
  for (int i = 0; i < tile.tokens; ++i) {
    float* to = out.data() + static_cast<size_t>(tile.first_row + i) * shape.query_stride +
                tile.kv_head * token_floats;
    std::memcpy(to, scratch.output.data() + i * token_floats, token_floats * sizeof(float));
  }
}

}  // namespace nosara::worker
