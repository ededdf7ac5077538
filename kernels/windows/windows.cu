#include "kernels/common/launch.cuh"
#include "kernels/windows/windows.h"

#include "kernels/windows/windows.cuh"

namespace nosara::kernels {
namespace {

/// One thread block of D threads a (row, KV head).
__global__ void WindowsKernel(WindowsParams p) {
  StartKernel();
  const StepRow info = p.rows_info[blockIdx.x];
  if (info.sequence < 0 || !CompletesWindow(info.position)) return;
  const int record = p.layer * p.num_kv_heads + static_cast<int>(blockIdx.y);
  WindowUpdate window;
  window.Begin(p.cache, info.sequence, record, info.position, threadIdx.x);
  window.Finish();
}

}  // namespace

cudaError_t LaunchWindows(const WindowsParams& params, cudaStream_t stream) {
  const int dim = params.cache.head_dim;
  if (params.rows < 1 || (dim != 64 && dim != 128) || params.num_kv_heads < 1) {
    return cudaErrorInvalidValue;
  }
  return LaunchKernel(WindowsKernel, dim3(params.rows, params.num_kv_heads), dim, 0, stream,
                      params);
}

}  // namespace nosara::kernels
