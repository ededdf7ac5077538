#include <cmath>

#include "kernels/append/append.h"
#include "kernels/common/device.cuh"
#include "kernels/common/launch.cuh"
#include "kernels/windows/windows.cuh"

namespace nosara::kernels {
namespace {

constexpr int kThreads = 256;

__device__ inline float Softplus(float x) { return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))); }

/// Thread blocks of a row: all but the last share the query heads; the last one has keys, values, c
/// and, where asked for, the windows.
__global__ void __launch_bounds__(kThreads) AppendKernel(AppendParams p) {
  StartKernel();
  const int64_t row = blockIdx.x;
  const StepRow info = p.rows_info[row];
  if (info.sequence < 0) return;
  const int dim = p.cache.head_dim;
  const int half = dim / 2;
  const int q_width = p.num_heads * dim;
  const int kv_width = p.num_kv_heads * dim;
  const float* x = p.qkv + row * (q_width + 2 * kv_width);
  const float* cosine = p.cosine + row * half;
  const float* sine = p.sine + row * half;
  const auto value = [&](int i) { return p.bias == nullptr ? x[i] : x[i] + p.bias[i]; };
  // Pairs (j, j + D/2) of a head rotate together.
  const auto rotate = [&](int head, int j, __nv_bfloat16* to) {
    const float a = value(head * dim + j);
    const float b = value(head * dim + j + half);
    const float c = cosine[j];
    const float s = sine[j];
    to[j] = __float2bfloat16_rn(a * c - b * s);
    to[j + half] = __float2bfloat16_rn(b * c + a * s);
  };
  if (blockIdx.y + 1 < gridDim.y) {
    const int stride = (gridDim.y - 1) * kThreads;
    for (int i = blockIdx.y * kThreads + threadIdx.x; i < p.num_heads * half; i += stride) {
      rotate(i / half, i % half, p.q + row * q_width + i / half * dim);
    }
    return;
  }

  const int block = info.position / kBlockTokens;
  const int in_block = info.position % kBlockTokens;
  const auto record = [&](int head) {
    return p.cache.Slot(p.cache.SlotOf(info.sequence, p.layer * p.num_kv_heads + head, block));
  };
  for (int i = threadIdx.x; i < p.num_kv_heads * half; i += kThreads) {
    const int head = i / half;
    rotate(p.num_heads + head, i % half,
           reinterpret_cast<__nv_bfloat16*>(record(head)) + in_block * dim);
  }
  const int v_begin = q_width + kv_width;
  for (int i = threadIdx.x; i < kv_width; i += kThreads) {
    __nv_bfloat16* v = reinterpret_cast<__nv_bfloat16*>(record(i / dim)) + kBlockTokens * dim;
    v[in_block * dim + i % dim] = __float2bfloat16_rn(value(v_begin + i));
  }
  // c: one warp a KV head.
  const int lane = threadIdx.x % 32;
  for (int head = threadIdx.x / 32; head < p.num_kv_heads; head += kThreads / 32) {
    float c = 0;
    if (p.A != nullptr) {
      float dot = 0;
      const float* delta = p.delta + static_cast<int64_t>(head) * kv_width;
#pragma unroll 8
      for (int i = lane; i < kv_width; i += 32) dot += delta[i] * value(v_begin + i);
      dot = WarpSum(dot);
      if (p.delta_bias != nullptr) dot += p.delta_bias[head];
      c = p.A[head] * Softplus(dot);
    }
    if (lane == 0) {
      float* bias = reinterpret_cast<float*>(record(head) + int64_t{4} * kBlockTokens * dim);
      bias[in_block] = c;
    }
  }
  if (p.windows == AppendWindows::kLeave || !CompletesWindow(info.position)) return;
  __syncthreads();  // the row is there
  for (int i = threadIdx.x; i < p.num_kv_heads * dim; i += kThreads) {
    UpdateWindow(p.cache, info.sequence, p.layer * p.num_kv_heads + i / dim, info.position,
                 i % dim);
  }
}

}  // namespace

cudaError_t LaunchAppend(const AppendParams& params, cudaStream_t stream) {
  const int dim = params.cache.head_dim;
  if (params.rows < 1 || (dim != 64 && dim != 128) || params.num_kv_heads < 1) {
    return cudaErrorInvalidValue;
  }
  // Decode has few rows: several thread blocks for each. A chunk has rows enough.
  const int pairs = params.num_heads * dim / 2;
  const int parts = params.rows >= 256 ? 1 : (pairs + kThreads - 1) / kThreads;
  return LaunchKernel(AppendKernel, dim3(params.rows, parts + 1), kThreads, 0, stream, params);
}

}  // namespace nosara::kernels
