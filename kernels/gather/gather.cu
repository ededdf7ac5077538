#include "kernels/common/device.cuh"
#include "kernels/common/launch.cuh"
#include "kernels/gather/gather.h"

namespace nosara::kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kInFlight = 8;  // 16-byte reads of a thread under way together

template <int dim>
__global__ void __launch_bounds__(kThreads) GatherKernel(GatherParams p) {
  StartKernel();
  constexpr int kChunks = RecordBytes(dim) / 16;
  const int64_t total = int64_t{*p.num_loads} * kChunks;
  const auto source = [&](int64_t i) {
    const int record = static_cast<int>(i / kChunks);
    const std::byte* from;
    if (p.landing != nullptr) {
      from = p.landing + record * RecordBytes(dim);
    } else {
      const Load load = p.loads[record];
      from = reinterpret_cast<const std::byte*>(
                 p.cache.pages[int64_t{load.sequence} * p.cache.max_blocks + load.block]) +
             load.record * RecordBytes(dim);
    }
    return reinterpret_cast<const uint4*>(from) + i % kChunks;
  };
  const auto target = [&](int64_t i) {
    const Load load = p.loads[i / kChunks];
    return reinterpret_cast<uint4*>(
               p.cache.Slot(p.cache.SlotNumber(load.sequence, load.record, load.slot))) +
           i % kChunks;
  };
  constexpr int64_t kTile = int64_t{kThreads} * kInFlight;
  for (int64_t first = blockIdx.x * kTile; first < total; first += gridDim.x * kTile) {
    uint4 data[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const int64_t i = first + k * kThreads + threadIdx.x;
      if (i < total) data[k] = __ldcs(source(i));
    }
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const int64_t i = first + k * kThreads + threadIdx.x;
      if (i < total) *target(i) = data[k];
    }
  }
}

}  // namespace

cudaError_t LaunchGather(const GatherParams& params, cudaStream_t stream) {
  if (params.thread_blocks < 1) return cudaErrorInvalidValue;
  switch (params.cache.head_dim) {
    case 64:
      return LaunchKernel(GatherKernel<64>, params.thread_blocks, kThreads, 0, stream, params);
    case 128:
      return LaunchKernel(GatherKernel<128>, params.thread_blocks, kThreads, 0, stream, params);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace nosara::kernels
