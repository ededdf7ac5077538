#include <cmath>

#include "kernels/append/append.h"
#include "kernels/common/device.cuh"

namespace nosara::kernels {
namespace {

constexpr int kThreads = 256;

__device__ inline float Softplus(float x) { return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))); }

/// Thread blocks of a row: by blockIdx.y, each takes an equal part of the pairs and of the values;
/// the last one c.
__global__ void __launch_bounds__(kThreads) AppendKernel(AppendParams p) {
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

  const int block = info.position / kBlockTokens;
  const int in_block = info.position % kBlockTokens;
  const auto record = [&](int head) {
    const int64_t slot = p.cache.SlotOf(info.sequence, p.layer * p.num_kv_heads + head, block);
    return p.cache.Slot(slot);
  };

  // Pairs (i, i + D/2) of query and key heads rotate together.
  const int first = blockIdx.y * kThreads + threadIdx.x;
  const int stride = gridDim.y * kThreads;
  const int pairs = (p.num_heads + p.num_kv_heads) * half;
  for (int i = first; i < pairs; i += stride) {
    const int head = i / half;
    const int j = i % half;
    const float a = value(head * dim + j);
    const float b = value(head * dim + j + half);
    const float c = cosine[j];
    const float s = sine[j];
    const __nv_bfloat16 low = __float2bfloat16_rn(a * c - b * s);
    const __nv_bfloat16 high = __float2bfloat16_rn(b * c + a * s);
    __nv_bfloat16* to;
    if (head < p.num_heads) {
      to = p.q + row * q_width + head * dim;
    } else {
      to = reinterpret_cast<__nv_bfloat16*>(record(head - p.num_heads)) + in_block * dim;
    }
    to[j] = low;
    to[j + half] = high;
  }
  const int v_begin = q_width + kv_width;
  for (int i = first; i < kv_width; i += stride) {
    __nv_bfloat16* v = reinterpret_cast<__nv_bfloat16*>(record(i / dim)) + kBlockTokens * dim;
    v[in_block * dim + i % dim] = __float2bfloat16_rn(value(v_begin + i));
  }

  // c: one warp a KV head.
  if (blockIdx.y + 1 < gridDim.y) return;
  const int lane = threadIdx.x % 32;
  for (int head = threadIdx.x / 32; head < p.num_kv_heads; head += kThreads / 32) {
    float c = 0;
    if (p.A != nullptr) {
      float dot = 0;
      const float* delta = p.delta + static_cast<int64_t>(head) * kv_width;
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
}

}  // namespace

cudaError_t LaunchAppend(const AppendParams& params, cudaStream_t stream) {
  const int dim = params.cache.head_dim;
  if (params.rows < 1 || (dim != 64 && dim != 128) || params.num_kv_heads < 1) {
    return cudaErrorInvalidValue;
  }
  // Decode has few rows: several thread blocks for each. A chunk has rows enough.
  const int pairs = (params.num_heads + params.num_kv_heads) * dim / 2;
  const int parts = params.rows >= 256 ? 2 : (pairs + kThreads - 1) / kThreads;
  AppendKernel<<<dim3(params.rows, parts), kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace nosara::kernels
