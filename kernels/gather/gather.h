// Records from mapped host memory into slots.
#pragma once

#include <cuda_runtime.h>

#include "kernels/common/cache_view.h"
#include "kernels/resolve/resolve.h"

namespace nosara::kernels {

/// Copies the record of each load, RecordBytes(D), from pages[sequence, block] + record *
/// RecordBytes(D) into its slot. `thread_blocks` bounds the SMs that it occupies: 16 to 24 saturate
/// PCIe 5.0 x16 and leave the others to the attention that runs beside it.
struct GatherParams {
  const Load* loads = nullptr;
  const int32_t* num_loads = nullptr;  // device
  CacheView cache;
  /// Where not null, record i comes from landing + i * RecordBytes(D) (device-readable) instead.
  const std::byte* landing = nullptr;
  int thread_blocks = 16;
};

/// Capturable.
cudaError_t LaunchGather(const GatherParams& params, cudaStream_t stream);

}  // namespace nosara::kernels
