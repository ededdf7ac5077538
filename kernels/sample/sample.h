// The next token of each row, from its logits: greedy or drawn, see draw.h.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/sample/draw.h"

namespace nosara::kernels {

/// token[r] = DrawToken(logits[r], draw[r]), bit for bit. Bytes: rows * vocab * 4 a pass: 1 for
/// greedy rows, 2 at a temperature, 3 more for each of top_k and top_p; all but the first come from
/// the L2 cache.
struct SampleParams {
  const float* logits = nullptr;     // [rows, vocab]
  const DrawParams* draw = nullptr;  // [rows]
  int32_t* token = nullptr;          // [rows]
  int rows = 0;
  int vocab = 0;
};

/// Capturable.
cudaError_t LaunchSample(const SampleParams& params, cudaStream_t stream);

}  // namespace nosara::kernels
