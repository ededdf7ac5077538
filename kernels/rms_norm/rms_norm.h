// RMSNorm of the residual stream, with the addition that comes before it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace nosara::kernels {

/// x = hidden[r] (+ addend[r]);  out[r] = bf16(x * rsqrt(mean(x^2) + eps) * weight).
///
/// The sum x is written back to hidden where there is an addend. All f32 but the output, rounded to
/// nearest even (docs/adr/0002-numerics.md, rules 1 and 2). Bytes: rows * width * (4 + 4 + 4 + 2).
struct RmsNormParams {
  float* hidden = nullptr;          // [rows of the step, width]; read and written
  const float* addend = nullptr;    // [rows of the step, width]; null: none
  const float* weight = nullptr;    // [width]
  __nv_bfloat16* out = nullptr;     // [rows, width]
  const int32_t* source = nullptr;  // [rows]: row of hidden (and addend) to take; null: the same
  int rows = 0;                     // 1 or more
  int width = 0;                    // a multiple of 4
  float eps = 0;
};

/// Errors: cudaErrorInvalidValue for sizes outside of what is stated. Capturable.
cudaError_t LaunchRmsNorm(const RmsNormParams& params, cudaStream_t stream);

}  // namespace nosara::kernels
