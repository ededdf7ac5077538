#include "kernels/score/score_reference.h"

#include <cmath>
#include <limits>

#include "kernels/common/record_reference.h"

namespace nosara::kernels {
namespace {

void ScoreRow(const ScoreParams& params, int row) {
  const CacheView& cache = params.cache;
  const StepRow info = params.rows_info[row];
  if (info.sequence < 0 || info.position / kBlockTokens + 1 <= params.dense_blocks) return;
  const int D = cache.head_dim;
  const int Hkv = params.num_kv_heads;
  const int G = params.num_heads / Hkv;
  const int Gp = PaddedGroup(G);
  const int windows = VisibleWindows(info.position);
  for (int h = 0; h < Hkv; ++h) {
    const int64_t pair = int64_t{row} * Hkv + h;
    float* logits = params.logits + pair * params.max_windows * Gp;
    for (int w = 0; w < windows; ++w) {
      std::byte* slot = cache.IndexSlot(info.sequence, params.layer * Hkv + h, w);
      const __nv_bfloat16* key = IndexKey(slot, D, w);
      for (int g = 0; g < Gp; ++g) {
        double dot = 0;
        if (g < G) {
          const __nv_bfloat16* q = params.q + (int64_t{row} * params.num_heads + h * G + g) * D;
          for (int i = 0; i < D; ++i)
            dot += double{__bfloat162float(q[i])} * __bfloat162float(key[i]);
        }
        logits[int64_t{w} * Gp + g] = static_cast<float>(dot / std::sqrt(double(D)));
      }
    }
    for (int tile = 0; tile < ScoreTiles(windows); ++tile) {
      const int end = std::min(windows, (tile + 1) * kIndexWindows);
      for (int g = 0; g < Gp; ++g) {
        float max = -std::numeric_limits<float>::infinity();
        for (int w = tile * kIndexWindows; w < end; ++w) {
          max = std::fmax(max, logits[int64_t{w} * Gp + g]);
        }
        double sum = 0;
        for (int w = tile * kIndexWindows; w < end; ++w) {
          sum += std::exp(double{logits[int64_t{w} * Gp + g]} - max);
        }
        params.partials[(pair * ScoreTiles(params.max_windows) + tile) * Gp + g] =
            make_float2(max, static_cast<float>(sum));
      }
    }
  }
}

}  // namespace

void ScoreReference(const ScoreParams& params) {
  for (int i = 0; i < params.num_tiles; ++i) {
    const RowTile tile = params.tiles != nullptr ? params.tiles[i] : RowTile{i, 1};
    for (int r = 0; r < tile.rows; ++r) ScoreRow(params, tile.first_row + r);
  }
}

}  // namespace nosara::kernels
