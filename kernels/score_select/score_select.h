// Scores of the compressed keys, pooling and selection in one launch, for decode.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "kernels/common/cache_view.h"
#include "kernels/select/select.h"

namespace nosara::kernels {

/// The selection of each (row, KV head) as LaunchScore and LaunchSelect make it, from the queries.
/// Keys are read once and logits stay in shared memory: the windows of a (row, KV head) are shared
/// by a cluster of thread blocks, which exchange (max, sum of exp) of each head and collect their
/// block scores in the first one. Each row has a sequence of its own.
///
/// Bytes: W * (2D + 4) for each (row, KV head) of W visible windows.
struct ScoreSelectParams {
  const __nv_bfloat16* q = nullptr;  // [rows, Hq, D]
  const StepRow* rows_info = nullptr;
  CacheView cache;
  int32_t* selected = nullptr;  // [rows, Hkv, max_selected]
  int32_t* count = nullptr;     // [rows, Hkv]; 0 for padding rows
  SelectionNumbers numbers;
  int rows = 0;
  int num_heads = 0;
  int num_kv_heads = 0;
  int layer = 0;
  int max_selected = 0;  // at least topk_blocks
  int max_blocks = 0;    // at least those of the longest row
};

/// Whether the current device can: head_dim 64 or 128, G up to 16, and windows that fit the shared
/// memory of a cluster: some 250,000 tokens on Hopper.
bool CanScoreSelect(const ScoreSelectParams& params);

/// cudaErrorInvalidValue unless CanScoreSelect(). Capturable.
cudaError_t LaunchScoreSelect(const ScoreSelectParams& params, cudaStream_t stream);

}  // namespace nosara::kernels
