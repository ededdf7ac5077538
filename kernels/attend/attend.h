// Sparse decode attention over slots, with what is missing on its way.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "kernels/common/cache_view.h"

namespace nosara::kernels {

/// Whether c is added to the logits.
enum class AttendBias { kNone, kCache };

/// Where the missing part of a (row, KV head)'s list is, the entries [resident, all) of its range.
enum class AttendMissing {
  kInSlots,   // it has been brought into its slots
  kInPages,   // in CacheView::pages: read from there, and brought into the slots by this kernel
  kArriving,  // as kInPages, but for what the host brings meanwhile: see Arrivals
};

/// Records that the host brings while the kernel runs: source i to landing + i * RecordBytes(D),
/// then the tag to arrived[i]. What it cannot bring it tags all the same. Landing and arrived are
/// mapped host memory, which the host leaves alone until the kernel has ended.
struct Arrivals {
  const int32_t* sources = nullptr;  // [rows, Hkv, max_selected]: as ResolveParams::sources
  const std::byte* landing = nullptr;
  const uint64_t* arrived = nullptr;
  const uint32_t* step = nullptr;  // device: the stamp of the step
};
/// Differs between all launches of layers of steps.
__host__ __device__ constexpr uint64_t ArrivalTag(uint32_t step, int layer) {
  return uint64_t{step} << 32 | static_cast<uint32_t>(layer + 1);
}

/// Attention of the query of each (row, KV head, query head g) over tokens j <= t of the blocks of
/// its list (nosa.md section 5): with l_j = q_g . k_j / sqrt(D) + c_j,
///   out = bf16(sum_j exp(l_j - m) v_j / sum_j exp(l_j - m)),  m = max l_j.
/// The list is cut into `num_splits` shares, each worked on by a thread block of its own, which the
/// last one to finish merges: exactly, by (m, z = sum exp(l_j - m), o = sum exp(l_j - m) v_j). With
/// kInPages and kArriving a warp of each thread block copies the missing records of its share to
/// their slots while the others attend to the resident ones.
///
/// Probabilities are rounded to bf16 for the product with V, z sums the unrounded ones
/// (docs/adr/0008-gpu-numerics.md). Rows with sequence -1 get zeros; a list must not be empty
/// otherwise. Bytes: RecordBytes(D) a block.
struct AttendParams {
  const __nv_bfloat16* q = nullptr;  // [rows, Hq, D]
  const StepRow* rows_info = nullptr;
  const int32_t* slots = nullptr;   // [rows, Hkv, max_selected]: slot numbers
  const int32_t* blocks = nullptr;  // [rows, Hkv, max_selected]
  const int2* ranges = nullptr;     // [rows, Hkv]: (resident, all)
  CacheView cache;
  float* partial_o = nullptr;    // [rows, Hkv, num_splits, G, D]; scratch
  float2* partial_mz = nullptr;  // [rows, Hkv, num_splits, G]; scratch
  int32_t* finished = nullptr;   // [rows, Hkv, ceil(G / 16)]; zeros, and zeros again after
  __nv_bfloat16* out = nullptr;  // [rows, Hq, D]
  int rows = 0;
  int num_heads = 0;
  int num_kv_heads = 0;
  int layer = 0;
  int max_selected = 0;
  int num_splits = 1;  // 1 to 32
  AttendMissing missing = AttendMissing::kInSlots;
  AttendBias bias = AttendBias::kCache;
  Arrivals arrivals;  // of kArriving
};

/// head_dim 64 or 128, G up to 64. Capturable.
cudaError_t LaunchAttend(const AttendParams& params, cudaStream_t stream);

}  // namespace nosara::kernels
