// Compressed keys of the windows that the step's tokens complete.
#pragma once

#include <cuda_runtime.h>

#include "kernels/common/cache_view.h"

namespace nosara::kernels {

/// A row at position t with t % 16 == 15 and t >= 31 completes window w = (t - 31) / 16. Then, for
/// each KV head of `layer`: kc[w] = bf16(mean of the 32 keys 16w .. 16w+31 as stored, in f32), e[w]
/// = f32 mean of their c (nosa.md section 4), written to the index slot of w.
///
/// Preconditions: LaunchAppend for all rows of the step came before in stream order; the blocks of
/// positions t and t - 31 have slots; the index frame of w exists.
struct WindowsParams {
  const StepRow* rows_info = nullptr;
  CacheView cache;
  int rows = 0;
  int num_kv_heads = 0;
  int layer = 0;
};

/// Capturable.
cudaError_t LaunchWindows(const WindowsParams& params, cudaStream_t stream);

}  // namespace nosara::kernels
