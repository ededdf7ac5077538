#include "kernels/common/launch.cuh"
#include "kernels/embed/embed.h"

namespace nosara::kernels {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) EmbedKernel(EmbedParams p) {
  StartKernel();
  const int64_t row = blockIdx.x;
  const StepRow info = p.rows_info[row];
  const bool used = info.sequence >= 0;
  const uint2* from = reinterpret_cast<const uint2*>(
      p.table + (used ? static_cast<int64_t>(p.tokens[row]) * p.width : 0));
  float4* to = reinterpret_cast<float4*>(p.hidden + row * p.width);
  for (int i = threadIdx.x; i < p.width / 4; i += kThreads) {
    float4 x = {0, 0, 0, 0};
    if (used) {
      // A bf16 is the upper half of the f32 of the same value.
      const uint2 pairs = from[i];
      x = {__uint_as_float(pairs.x << 16), __uint_as_float(pairs.x & 0xffff0000u),
           __uint_as_float(pairs.y << 16), __uint_as_float(pairs.y & 0xffff0000u)};
    }
    to[i] = x;
  }
  for (int i = threadIdx.x; i < p.half; i += kThreads) {
    double sine = 0, cosine = 0;
    if (used) sincos(info.position * p.inverse_frequencies[i], &sine, &cosine);
    p.cosine[row * p.half + i] = static_cast<float>(cosine);
    p.sine[row * p.half + i] = static_cast<float>(sine);
  }
}

}  // namespace

cudaError_t LaunchEmbed(const EmbedParams& params, cudaStream_t stream) {
  if (params.rows < 1 || params.width < 4 || params.width % 4 != 0 || params.half < 1) {
    return cudaErrorInvalidValue;
  }
  return LaunchKernel(EmbedKernel, params.rows, kThreads, 0, stream, params);
}

}  // namespace nosara::kernels
