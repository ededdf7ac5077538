// Launches that overlap the end of the kernel before them (programmatic dependent launch, Hopper).
#pragma once

#include <cuda_runtime.h>

namespace nosara::kernels {

/// First thing in every kernel that is launched by LaunchKernel(): waits until the kernels before
/// it in the stream are done and what they wrote is seen; the next kernel may be set up meanwhile.
/// Nothing to wait for before Hopper, where kernels start one after the other.
__device__ inline void StartKernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/// kernel<<<grid, block, shared, stream>>>(arguments), which may be set up while the kernel before
/// it still runs. The kernel must begin with StartKernel(). `cluster`: thread blocks, neighbours in
/// x, that run together (Hopper; 1 elsewhere). Capturable.
template <typename... Parameters, typename... Arguments>
cudaError_t LaunchClusters(int cluster, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                           size_t shared, cudaStream_t stream, const Arguments&... arguments) {
  int device = 0;
  int major = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (status != cudaSuccess) return status;
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = cluster;
  attributes[1].val.clusterDim.y = 1;
  attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = major < 9 ? 0 : cluster == 1 ? 1 : 2;
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

/// The same without clusters.
template <typename... Parameters, typename... Arguments>
cudaError_t LaunchKernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared,
                         cudaStream_t stream, const Arguments&... arguments) {
  return LaunchClusters(1, kernel, grid, block, shared, stream, arguments...);
}

}  // namespace nosara::kernels
