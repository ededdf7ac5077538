// Greedy choice of the next token.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace nosara::kernels {

/// token[r] = the smallest id of the largest logit of row r; NaN counts as -inf, a row of nothing
/// else gives 0. Bytes: rows * vocab * 4.
struct ArgMaxParams {
  const float* logits = nullptr;  // [rows, vocab]
  int32_t* token = nullptr;       // [rows]
  int rows = 0;
  int vocab = 0;
};

/// Capturable.
cudaError_t LaunchArgMax(const ArgMaxParams& params, cudaStream_t stream);

}  // namespace nosara::kernels
