// What stands in for the CUDA backend where there was no CUDA toolkit to build it.
#include "worker/backend/cuda/cuda_backend_options.h"

namespace nosara::worker {

bool CudaUsable(int device) { return false; }

absl::StatusOr<std::unique_ptr<Backend>> MakeCudaBackend(
    std::shared_ptr<const Checkpoint> checkpoint, kvstore::StoreClient* store,
    const CudaBackendOptions& options) {
  return absl::UnimplementedError(
      "backend = cuda: this worker was built without a CUDA toolkit; it has the CPU backend");
}

}  // namespace nosara::worker
