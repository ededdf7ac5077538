#include "kernels/common/device.cuh"
#include "kernels/common/launch.cuh"
#include "kernels/swiglu/swiglu.h"

namespace nosara::kernels {
namespace {

constexpr int kThreads = 256;

__device__ inline float Gated(float gate, float up) { return gate / (1.0f + __expf(-gate)) * up; }

__global__ void __launch_bounds__(kThreads) SwiGluKernel(SwiGluParams p) {
  StartKernel();
  const int vectors = p.width / 4;
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= vectors) return;
  const int64_t row = blockIdx.y;
  const float4* gates = reinterpret_cast<const float4*>(p.gate_up + row * 2 * p.width);
  const float4 gate = gates[i];
  const float4 up = gates[i + vectors];
  reinterpret_cast<uint2*>(p.out + row * p.width)[i] =
      make_uint2(PackBf16(Gated(gate.x, up.x), Gated(gate.y, up.y)),
                 PackBf16(Gated(gate.z, up.z), Gated(gate.w, up.w)));
}

}  // namespace

cudaError_t LaunchSwiGlu(const SwiGluParams& params, cudaStream_t stream) {
  if (params.rows < 1 || params.rows > 65535 || params.width < 4 || params.width % 4 != 0) {
    return cudaErrorInvalidValue;
  }
  const dim3 grid((params.width / 4 + kThreads - 1) / kThreads, params.rows);
  return LaunchKernel(SwiGluKernel, grid, kThreads, 0, stream, params);
}

}  // namespace nosara::kernels
