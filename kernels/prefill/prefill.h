// Attention of many queries of a sequence, each over its own selected blocks.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "kernels/attend/attend.h"
#include "kernels/common/cache_view.h"

namespace nosara::kernels {

/// Rows of a tile at most.
inline constexpr int kPrefillTileRows = 16;

/// out[row, head] = bf16 of nosa.md section 5 over the row's selected blocks, each row with its
/// own. Blocks that no row of a tile selected are skipped; tokens after the row's own are masked.
///
/// Preconditions: every selected block has a slot (slot_of >= 0); tiles cover all rows, each at
/// most kPrefillTileRows of one sequence.
struct PrefillParams {
  const __nv_bfloat16* q = nullptr;  // [rows, Hq, D]
  const StepRow* rows_info = nullptr;
  const RowTile* tiles = nullptr;     // [num_tiles]
  const int32_t* selected = nullptr;  // [rows, Hkv, max_selected], ascending
  const int32_t* count = nullptr;     // [rows, Hkv]
  CacheView cache;
  __nv_bfloat16* out = nullptr;  // [rows, Hq, D]
  int num_tiles = 0;
  int num_heads = 0;
  int num_kv_heads = 0;
  int layer = 0;
  int max_selected = 0;
  int max_blocks = 0;  // of the longest row; at most 16,384
  AttendBias bias = AttendBias::kCache;
};

/// head_dim 64 or 128, G up to 64. Capturable.
cudaError_t LaunchPrefill(const PrefillParams& params, cudaStream_t stream);

}  // namespace nosara::kernels
