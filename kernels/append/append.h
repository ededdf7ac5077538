// From the QKV product to queries and cache records: bias, RoPE, rounding, eviction score.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "kernels/common/cache_view.h"

namespace nosara::kernels {

enum class AppendWindows { kLeave, kUpdate };

/// For each row (a token at position t of a sequence), of layer `layer`:
///   x = qkv + bias; q, k: RoPE (NeoX halves) in f32, then rounded to bf16; v rounded to bf16;
///   c[h] = A[h] * softplus(sum_j delta[h,j] * v[j] + delta_bias[h]) from the unrounded v of all
///   KV heads, f32 (nosa.md section 2; docs/adr/0002-numerics.md rules 3 and 4).
/// q goes to `q`; k, v, c into the slot of block t / 64 at row t % 64.
///
/// Preconditions: that block has a slot (LaunchOpenBlocks); head_dim 64 or 128; no two rows have
/// the same (sequence, position). Tolerance: bf16 of sums in another order.
struct AppendParams {
  const float* qkv = nullptr;         // [rows, (Hq + 2 Hkv) * D]: q heads, k heads, v heads
  const float* bias = nullptr;        // [(Hq + 2 Hkv) * D], or null
  const float* A = nullptr;           // [Hkv]; null: no eviction head, c = 0
  const float* delta = nullptr;       // [Hkv, Hkv * D], with A
  const float* delta_bias = nullptr;  // [Hkv], or null
  const float* cosine = nullptr;      // [rows, D / 2]
  const float* sine = nullptr;        // [rows, D / 2]
  const StepRow* rows_info = nullptr;
  __nv_bfloat16* q = nullptr;  // [rows, Hq, D]
  CacheView cache;
  int rows = 0;
  int num_heads = 0;     // Hq
  int num_kv_heads = 0;  // Hkv
  int layer = 0;
  /// kUpdate: also what LaunchWindows does; only where no two rows are of one sequence.
  AppendWindows windows = AppendWindows::kLeave;
};

/// Capturable.
cudaError_t LaunchAppend(const AppendParams& params, cudaStream_t stream);

}  // namespace nosara::kernels
