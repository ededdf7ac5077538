// What lies where in a slot, for the references on the host.
#pragma once

#include <cuda_bf16.h>

#include <cstddef>

#include "kernels/common/cache_view.h"

namespace nosara::kernels {

/// The K row of token `token` (0 .. 63) in a record, [D].
inline __nv_bfloat16* RecordKey(std::byte* record, int head_dim, int token) {
  return reinterpret_cast<__nv_bfloat16*>(record) + int64_t{token} * head_dim;
}
/// The V row of token `token` in a record, [D].
inline __nv_bfloat16* RecordValue(std::byte* record, int head_dim, int token) {
  return reinterpret_cast<__nv_bfloat16*>(record) + int64_t{kBlockTokens + token} * head_dim;
}
/// The biases c of a record, [64].
inline float* RecordBias(std::byte* record, int head_dim) {
  return reinterpret_cast<float*>(record + int64_t{4} * kBlockTokens * head_dim);
}
/// The compressed key of window `window` in its index slot, [D].
inline __nv_bfloat16* IndexKey(std::byte* slot, int head_dim, int window) {
  return reinterpret_cast<__nv_bfloat16*>(slot) + int64_t{window % kIndexWindows} * head_dim;
}
/// The score e of window `window` in its index slot.
inline float* IndexScore(std::byte* slot, int head_dim, int window) {
  return reinterpret_cast<float*>(slot + int64_t{2} * kIndexWindows * head_dim) +
         window % kIndexWindows;
}

}  // namespace nosara::kernels
