#include <cmath>

#include "kernels/append/append.h"
#include "kernels/common/device.cuh"
#include "kernels/common/launch.cuh"
#include "kernels/windows/windows.cuh"

namespace nosara::kernels {
namespace {

constexpr int kThreads = 512;
constexpr int kRowThreads = 256;  // for keys, values and c; the others have the windows

__device__ inline float Softplus(float x) { return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))); }

__device__ inline float4 operator+(const float4& a, const float4& b) {
  return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
}

__device__ inline uint2 Pack4(const float4& x) { return {PackBf16(x.x, x.y), PackBf16(x.z, x.w)}; }

/// A barrier that the warps of a thread block reach from different places.
__device__ inline void SyncRow() {
  asm volatile("barrier.sync.aligned 1, %0;" ::"n"(kThreads) : "memory");
}

/// Thread blocks of a row: the first has the query heads, the second keys, values, c and, where
/// asked for, the windows.
__global__ void __launch_bounds__(kThreads, 2) AppendKernel(AppendParams p) {
  StartKernel();
  const int64_t row = blockIdx.x;
  const StepRow info = p.rows_info[row];
  if (info.sequence < 0) return;
  const int dim = p.cache.head_dim;
  const int half = dim / 2;
  const int q_width = p.num_heads * dim;
  const int kv_width = p.num_kv_heads * dim;
  const float* x = p.qkv + row * (q_width + 2 * kv_width);
  const auto value = [&](int i) { return p.bias == nullptr ? x[i] : x[i] + p.bias[i]; };
  const auto values = [&](int i) {
    const float4 product = *reinterpret_cast<const float4*>(x + i);
    return p.bias == nullptr ? product : product + *reinterpret_cast<const float4*>(p.bias + i);
  };
  // Pairs (j, j + D/2) of a head rotate together: four of them, j .. j + 3.
  const auto rotate = [&](int head, int j, __nv_bfloat16* to) {
    const float4 a = values(head * dim + j);
    const float4 b = values(head * dim + j + half);
    const float4 c = *reinterpret_cast<const float4*>(p.cosine + row * half + j);
    const float4 s = *reinterpret_cast<const float4*>(p.sine + row * half + j);
    *reinterpret_cast<uint2*>(to + j) = Pack4(float4{a.x * c.x - b.x * s.x, a.y * c.y - b.y * s.y,
                                                     a.z * c.z - b.z * s.z, a.w * c.w - b.w * s.w});
    *reinterpret_cast<uint2*>(to + j + half) =
        Pack4(float4{b.x * c.x + a.x * s.x, b.y * c.y + a.y * s.y, b.z * c.z + a.z * s.z,
                     b.w * c.w + a.w * s.w});
  };
  if (blockIdx.y == 0) {
    for (int i = 4 * threadIdx.x; i < p.num_heads * half; i += 4 * kThreads) {
      rotate(i / half, i % half, p.q + row * q_width + i / half * dim);
    }
    return;
  }

  const bool completes = p.windows == AppendWindows::kUpdate && CompletesWindow(info.position);
  if (static_cast<int>(threadIdx.x) >= kRowThreads) {
    if (!completes) return;
    const auto begin = [&](int i) {
      WindowUpdate window;
      window.Begin(p.cache, info.sequence, p.layer * p.num_kv_heads + i / dim, info.position,
                   i % dim);
      return window;
    };
    const int thread = static_cast<int>(threadIdx.x) - kRowThreads;
    WindowUpdate first;
    if (thread < kv_width) first = begin(thread);
    SyncRow();  // the row is there
    if (thread < kv_width) first.Finish();
    for (int i = thread + kRowThreads; i < kv_width; i += kRowThreads) begin(i).Finish();
    return;
  }

  const int block = info.position / kBlockTokens;
  const int in_block = info.position % kBlockTokens;
  const auto record = [&](int head) {
    return p.cache.Slot(p.cache.SlotOf(info.sequence, p.layer * p.num_kv_heads + head, block));
  };
  for (int i = 4 * threadIdx.x; i < p.num_kv_heads * half; i += 4 * kRowThreads) {
    const int head = i / half;
    rotate(p.num_heads + head, i % half,
           reinterpret_cast<__nv_bfloat16*>(record(head)) + in_block * dim);
  }
  const int v_begin = q_width + kv_width;
  for (int i = threadIdx.x; i < kv_width; i += kRowThreads) {
    __nv_bfloat16* v = reinterpret_cast<__nv_bfloat16*>(record(i / dim)) + kBlockTokens * dim;
    v[in_block * dim + i % dim] = __float2bfloat16_rn(value(v_begin + i));
  }
  // c: one warp a KV head.
  const int lane = threadIdx.x % 32;
  for (int head = threadIdx.x / 32; head < p.num_kv_heads; head += kRowThreads / 32) {
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
  if (completes) SyncRow();  // the other threads wait for it
}

}  // namespace

cudaError_t LaunchAppend(const AppendParams& params, cudaStream_t stream) {
  const int dim = params.cache.head_dim;
  if (params.rows < 1 || (dim != 64 && dim != 128) || params.num_kv_heads < 1) {
    return cudaErrorInvalidValue;
  }
  return LaunchKernel(AppendKernel, dim3(params.rows, 2), kThreads, 0, stream, params);
}

}  // namespace nosara::kernels
