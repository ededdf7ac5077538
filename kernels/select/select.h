// Pooling of window scores into blocks, and the selection of blocks.
#pragma once

#include <cuda_runtime.h>

#include "kernels/common/cache_view.h"

namespace nosara::kernels {

/// The numbers of nosa.md section 3.
struct SelectionNumbers {
  int init_blocks = 1;
  int window_blocks = 16;
  /// Blocks chosen by the query's scores, forced ones counted first: init + window + topk_q for
  /// NOSA, topk_blocks for InfLLM-V2.
  int query_blocks = 33;
  /// All selected blocks; what the query's part leaves is filled by importance.
  int topk_blocks = 64;
};

/// The selection Gamma of each (row, KV head) by nosa.md section 4, steps 2 to 8, ascending:
///   s[w] = sum_g exp(l_g[w] - M_g) / Z_g;  S[n] = max s[w], E[n] = max e[w] over 4n-1 <= w <=
///   4n+3.
/// Ties go to the smaller block. A row with t / 64 + 1 <= topk_blocks selects all its blocks and
/// reads no scores. NaN counts as -inf. f32 throughout.
struct SelectParams {
  const StepRow* rows_info = nullptr;
  CacheView cache;                // the scores e
  const float* logits = nullptr;  // as LaunchScore wrote them
  const float2* partials = nullptr;
  int32_t* selected = nullptr;  // [rows, Hkv, max_selected]
  int32_t* count = nullptr;     // [rows, Hkv]; 0 for padding rows
  SelectionNumbers numbers;
  int rows = 0;
  int num_heads = 0;
  int num_kv_heads = 0;
  int layer = 0;
  int max_windows = 0;   // as given to LaunchScore
  int max_selected = 0;  // at least topk_blocks
  /// Blocks of the longest row; bounds the shared memory (8 bytes a block, at most 24,000 blocks).
  int max_blocks = 0;
};

/// Capturable.
cudaError_t LaunchSelect(const SelectParams& params, cudaStream_t stream);

/// All blocks 0 .. t/64 of each row, for full attention. Reads and writes as LaunchSelect.
cudaError_t LaunchSelectAll(const SelectParams& params, cudaStream_t stream);

/// Replaces selections by synthetic ones of a given rate of change, for benchmarks with weights
/// that have no locality of their own. The forced blocks are always there; the other topk - forced
/// blocks are a window on a ring of all the rest, in an order of its own for each row and record,
/// that moves on by `change` blocks a step. A block that left comes back when the ring has gone
/// round, long after a cache of fewer slots than blocks has forgotten it. Rows with no more blocks
/// than topk keep their selection.
struct ReplayParams {
  const StepRow* rows_info = nullptr;
  const int32_t* rings = nullptr;  // [ring_rows, records, ring_blocks]: permutations of the blocks
                                   // that are not forced at block `ring_own_block`
  const uint32_t* step = nullptr;  // device; two a step
  int32_t* selected = nullptr;     // [rows, Hkv, max_selected]; not in order
  int32_t* count = nullptr;        // [rows, Hkv]
  SelectionNumbers numbers;
  float change = 0;
  int ring_rows = 0;  // at least rows
  int ring_blocks = 0;
  int records = 0;
  int rows = 0;
  int num_kv_heads = 0;
  int layer = 0;
  int max_selected = 0;
};
cudaError_t LaunchReplay(const ReplayParams& params, cudaStream_t stream);

}  // namespace nosara::kernels
