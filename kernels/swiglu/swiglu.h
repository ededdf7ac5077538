// The gated activation of the feed-forward network.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

namespace nosara::kernels {

/// out[r,i] = bf16(silu(gate[r,i]) * up[r,i]), silu(x) = x / (1 + exp(-x)), in f32.
/// Bytes: rows * width * (4 + 4 + 2).
struct SwiGluParams {
  const float* gate_up = nullptr;  // [rows, 2 * width]: gate, then up
  __nv_bfloat16* out = nullptr;    // [rows, width]
  int rows = 0;
  int width = 0;  // a multiple of 4
};

/// Capturable.
cudaError_t LaunchSwiGlu(const SwiGluParams& params, cudaStream_t stream);

}  // namespace nosara::kernels
