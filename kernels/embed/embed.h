// Token embeddings, and the angles of the rotary position embedding.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "kernels/common/cache_view.h"

namespace nosara::kernels {

/// hidden[r] = f32(table[token[r]]);  cosine[r,i] = cos(t * f[i]), sine[r,i] = sin(t * f[i]) with
/// t = the row's position and f the inverse frequencies, all in f64, rounded to f32 at the end.
/// Rows with sequence -1 get zeros.
struct EmbedParams {
  const __nv_bfloat16* table = nullptr;         // [vocab, width]
  const int32_t* tokens = nullptr;              // [rows], in [0, vocab)
  const StepRow* rows_info = nullptr;           // [rows]
  const double* inverse_frequencies = nullptr;  // [half]
  float* hidden = nullptr;                      // [rows, width]
  float* cosine = nullptr;                      // [rows, half]
  float* sine = nullptr;                        // [rows, half]
  int rows = 0;
  int width = 0;  // a multiple of 4
  int half = 0;   // D / 2
};

/// Capturable.
cudaError_t LaunchEmbed(const EmbedParams& params, cudaStream_t stream);

}  // namespace nosara::kernels
