// Sparse decode attention over slots, in parts that merge exactly.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "kernels/common/cache_view.h"

namespace nosara::kernels {

/// Which entries of a (row, KV head)'s list a launch attends to, by its range (resident, all).
enum class AttendPart {
  kResident,  // [0, resident)
  kLoaded,    // [resident, all)
};

/// Whether c is added to the logits.
enum class AttendBias { kNone, kCache };

/// Partial attention of the query of each (row, KV head, query head g) over tokens j <= t of its
/// blocks (nosa.md section 5): with l_j = q_g . k_j / sqrt(D) + c_j,
///   m = max l_j;  z = sum exp(l_j - m);  o = sum exp(l_j - m) v_j,
/// for each of `num_splits` shares of the list, written to splits first_split .. of the partials.
/// An empty share gives m = -inf, z = 0, o = 0. Probabilities are rounded to bf16 for the product
/// with V; z sums the unrounded ones.
///
/// Bytes: RecordBytes(D) a block.
struct AttendParams {
  const __nv_bfloat16* q = nullptr;  // [rows, Hq, D]
  const StepRow* rows_info = nullptr;
  const int32_t* slots = nullptr;   // [rows, Hkv, max_selected]: slot numbers
  const int32_t* blocks = nullptr;  // [rows, Hkv, max_selected]
  const int2* ranges = nullptr;     // [rows, Hkv]
  CacheView cache;
  float* partial_o = nullptr;    // [rows, Hkv, total_splits, G, D]
  float2* partial_mz = nullptr;  // [rows, Hkv, total_splits, G]
  int rows = 0;
  int num_heads = 0;
  int num_kv_heads = 0;
  int max_selected = 0;
  int first_split = 0;
  int num_splits = 0;
  int total_splits = 0;
  AttendPart part = AttendPart::kResident;
  AttendBias bias = AttendBias::kCache;
};

/// head_dim 64 or 128, G up to 64. Capturable.
cudaError_t LaunchAttend(const AttendParams& params, cudaStream_t stream);

/// out[row, head] = bf16(sum_s exp(m_s - M) o_s / sum_s exp(m_s - M) z_s), M = max m_s: the exact
/// merge of all parts. Rows with sequence -1 get zeros.
struct MergeParams {
  const float* partial_o = nullptr;
  const float2* partial_mz = nullptr;
  const StepRow* rows_info = nullptr;
  __nv_bfloat16* out = nullptr;  // [rows, Hq, D]
  int rows = 0;
  int num_heads = 0;
  int num_kv_heads = 0;
  int head_dim = 0;
  int total_splits = 0;
};
cudaError_t LaunchMerge(const MergeParams& params, cudaStream_t stream);

}  // namespace nosara::kernels
