#include "kernels/common/device.cuh"
#include "kernels/common/launch.cuh"
#include "kernels/rms_norm/rms_norm.h"

namespace nosara::kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kCached = 8;  // float4 a thread that stay in registers: widths up to 8,192

__global__ void __launch_bounds__(kThreads) RmsNormKernel(RmsNormParams p) {
  StartKernel();
  __shared__ float scratch[kThreads / 32];
  const int64_t from = p.source == nullptr ? blockIdx.x : p.source[blockIdx.x];
  float4* hidden = reinterpret_cast<float4*>(p.hidden + from * p.width);
  const float4* addend =
      reinterpret_cast<const float4*>(p.addend == nullptr ? nullptr : p.addend + from * p.width);
  const int vectors = p.width / 4;

  float4 cached[kCached];
  float sum = 0;
#pragma unroll
  for (int k = 0; k < kCached; ++k) {
    const int i = threadIdx.x + k * kThreads;
    if (i >= vectors) break;
    float4 x = hidden[i];
    if (addend != nullptr) {
      const float4 y = addend[i];
      x = {x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w};
      hidden[i] = x;
    }
    cached[k] = x;
    sum += x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w;
  }
  for (int i = threadIdx.x + kCached * kThreads; i < vectors; i += kThreads) {
    float4 x = hidden[i];
    if (addend != nullptr) {
      const float4 y = addend[i];
      x = {x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w};
      hidden[i] = x;
    }
    sum += x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w;
  }
  const float scale = 1.0f / sqrtf(BlockSum(sum, scratch) / p.width + p.eps);

  const float4* weight = reinterpret_cast<const float4*>(p.weight);
  uint2* out = reinterpret_cast<uint2*>(p.out + static_cast<int64_t>(blockIdx.x) * p.width);
  const auto put = [&](int i, const float4& x) {
    const float4 w = weight[i];
    out[i] = make_uint2(PackBf16(x.x * scale * w.x, x.y * scale * w.y),
                        PackBf16(x.z * scale * w.z, x.w * scale * w.w));
  };
#pragma unroll
  for (int k = 0; k < kCached; ++k) {
    const int i = threadIdx.x + k * kThreads;
    if (i >= vectors) break;
    put(i, cached[k]);
  }
  for (int i = threadIdx.x + kCached * kThreads; i < vectors; i += kThreads) put(i, hidden[i]);
}

}  // namespace

cudaError_t LaunchRmsNorm(const RmsNormParams& params, cudaStream_t stream) {
  if (params.rows < 1 || params.width < 4 || params.width % 4 != 0) return cudaErrorInvalidValue;
  return LaunchKernel(RmsNormKernel, params.rows, kThreads, 0, stream, params);
}

}  // namespace nosara::kernels
