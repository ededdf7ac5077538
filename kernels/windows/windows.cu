#include "kernels/common/device.cuh"
#include "kernels/windows/windows.h"

namespace nosara::kernels {
namespace {

/// One thread block of D threads a (row, KV head): thread d averages dimension d.
__global__ void WindowsKernel(WindowsParams p) {
  const StepRow info = p.rows_info[blockIdx.x];
  const int t = info.position;
  if (info.sequence < 0 || t % kWindowStride != kWindowStride - 1 || t < kWindowTokens - 1) return;
  const int dim = p.cache.head_dim;
  const int window = (t - (kWindowTokens - 1)) / kWindowStride;
  const int record = p.layer * p.num_kv_heads + blockIdx.y;
  const int first = window * kWindowStride;
  // A window lies in one block or in two neighbours.
  const std::byte* blocks[2];
  blocks[0] = p.cache.Slot(p.cache.SlotOf(info.sequence, record, first / kBlockTokens));
  blocks[1] = p.cache.Slot(p.cache.SlotOf(info.sequence, record, t / kBlockTokens));
  const int d = threadIdx.x;
  float sum = 0;
#pragma unroll 8
  for (int i = 0; i < kWindowTokens; ++i) {
    const int token = first + i;
    const std::byte* block = blocks[token / kBlockTokens == first / kBlockTokens ? 0 : 1];
    sum += __bfloat162float(
        reinterpret_cast<const __nv_bfloat16*>(block)[(token % kBlockTokens) * dim + d]);
  }
  std::byte* index = p.cache.IndexSlot(info.sequence, record, window);
  const int place = window % kIndexWindows;
  reinterpret_cast<__nv_bfloat16*>(index)[place * dim + d] =
      __float2bfloat16_rn(sum * (1.0f / kWindowTokens));

  if (d < 32) {
    const int token = first + d;
    const std::byte* block = blocks[token / kBlockTokens == first / kBlockTokens ? 0 : 1];
    const float* c = reinterpret_cast<const float*>(block + int64_t{4} * kBlockTokens * dim);
    const float e = WarpSum(c[token % kBlockTokens]) * (1.0f / kWindowTokens);
    if (d == 0) reinterpret_cast<float*>(index + int64_t{2} * kIndexWindows * dim)[place] = e;
  }
}

}  // namespace

cudaError_t LaunchWindows(const WindowsParams& params, cudaStream_t stream) {
  const int dim = params.cache.head_dim;
  if (params.rows < 1 || (dim != 64 && dim != 128) || params.num_kv_heads < 1) {
    return cudaErrorInvalidValue;
  }
  WindowsKernel<<<dim3(params.rows, params.num_kv_heads), dim, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace nosara::kernels
