// Matrix products of the model's projections, by cuBLASLt.
#pragma once

#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <memory>
#include <tuple>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "worker/backend/cuda/device_memory.h"

namespace nosara::worker {

/// y [rows, out] = x [rows, in] * w^T, w [out, in] (+ bias [out]); x, w bf16, y and bias f32, sums
/// in f32 (docs/adr/0002-numerics.md rule 2).
///
/// The first call for a shape picks an algorithm, by timing the ones that cuBLASLt proposes where
/// `tune` is given, and must not be captured; later ones may be. Owned by one thread.
class CudaMatMul final {
 public:
  static absl::StatusOr<std::unique_ptr<CudaMatMul>> Create();
  ~CudaMatMul();
  CudaMatMul(const CudaMatMul&) = delete;
  CudaMatMul& operator=(const CudaMatMul&) = delete;

  enum class Tuning { kHeuristic, kTimed };

  /// Chooses the algorithm for a shape, unless it has one.
  absl::Status Prepare(int rows, int in, int out, bool bias, Tuning tuning, cudaStream_t stream);

  absl::Status Run(const __nv_bfloat16* x, const __nv_bfloat16* w, const float* bias, float* y,
                   int rows, int in, int out, cudaStream_t stream);

 private:
  struct Plan;
  using Shape = std::tuple<int, int, int, bool>;

  CudaMatMul() = default;
  absl::Status RunPlan(const Plan& plan, const cublasLtMatmulAlgo_t& algorithm,
                       const __nv_bfloat16* x, const __nv_bfloat16* w, const float* bias, float* y,
                       cudaStream_t stream);

  cublasLtHandle_t handle_ = nullptr;
  DeviceArray<std::byte> workspace_;
  absl::flat_hash_map<Shape, std::unique_ptr<Plan>> plans_;
};

}  // namespace nosara::worker
