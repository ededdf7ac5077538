// Scores of the compressed keys: the logits of every query head over the visible windows.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "kernels/common/cache_view.h"

namespace nosara::kernels {

/// Heads are stored padded: G rounded up to a multiple of 8; padding heads score 0, in logits and
/// in partials.
constexpr int PaddedGroup(int group) { return (group + 7) / 8 * 8; }
/// Row length of `partials` for sequences of at most `windows` windows.
constexpr int ScoreTiles(int windows) { return (windows + kIndexWindows - 1) / kIndexWindows; }

/// For each row at position t with more than `dense_blocks` blocks (t / 64 + 1), KV head h of
/// `layer`, visible window w and query head g of the group (nosa.md section 4, 1 and 2):
///   logits[row,h,w,g] = q_g . kc[w,h] / sqrt(D)                                         (f32)
/// and for each tile of 128 windows, over its visible ones:
///   partials[row,h,tile,g] = (max logit, sum of exp(logit - max)).
/// Keys are read once. Rows with at most `dense_blocks` blocks, and windows that are not visible,
/// are left as they are. Rows of a tile share the reading of the keys.
///
/// Bytes: W * (2D + 4 Gp) for each (tile of rows, KV head), Gp = PaddedGroup(G).
struct ScoreParams {
  const __nv_bfloat16* q = nullptr;    // [rows, Hq, D]
  const StepRow* rows_info = nullptr;  // [rows]
  const RowTile* tiles = nullptr;      // [num_tiles]; null: one row a tile, num_tiles = rows
  CacheView cache;
  float* logits = nullptr;     // [rows, Hkv, max_windows, Gp]
  float2* partials = nullptr;  // [rows, Hkv, ScoreTiles(max_windows), Gp]
  int num_tiles = 0;
  int num_heads = 0;
  int num_kv_heads = 0;
  int layer = 0;
  int max_windows = 0;   // a multiple of 128; at least the visible windows of every row
  int dense_blocks = 0;  // topk_blocks
};

/// head_dim 64 or 128, G up to 64. Capturable.
cudaError_t LaunchScore(const ScoreParams& params, cudaStream_t stream);

}  // namespace nosara::kernels
