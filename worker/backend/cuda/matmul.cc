#include "worker/backend/cuda/matmul.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"

namespace nosara::worker {
namespace {

/// What cuBLAS recommends for Hopper.
constexpr size_t kWorkspaceBytes = size_t{32} << 20;
constexpr int kCandidates = 24;
constexpr int kTimedRuns = 9;
/// Weights that candidates are timed on: more than any L2 holds, as in a step.
constexpr size_t kTimedBytes = size_t{256} << 20;

absl::Status BlasStatus(cublasStatus_t status, absl::string_view what) {
  if (status == CUBLAS_STATUS_SUCCESS) return absl::OkStatus();
  return absl::InternalError(
      absl::StrCat("cuBLASLt, ", what, ": ", cublasLtGetStatusString(status)));
}

}  // namespace

struct CudaMatMul::Plan {
  ~Plan() {
    if (operation != nullptr) cublasLtMatmulDescDestroy(operation);
    for (cublasLtMatrixLayout_t layout : {w, x, y}) {
      if (layout != nullptr) cublasLtMatrixLayoutDestroy(layout);
    }
  }

  cublasLtMatmulDesc_t operation = nullptr;
  cublasLtMatrixLayout_t w = nullptr;
  cublasLtMatrixLayout_t x = nullptr;
  cublasLtMatrixLayout_t y = nullptr;
  cublasLtMatmulAlgo_t algorithm;
};

absl::StatusOr<std::unique_ptr<CudaMatMul>> CudaMatMul::Create() {
  std::unique_ptr<CudaMatMul> matmul(new CudaMatMul);
  RETURN_IF_ERROR(BlasStatus(cublasLtCreate(&matmul->handle_), "create"));
  ASSIGN_OR_RETURN(matmul->workspace_,
                   DeviceArray<std::byte>::Create(kWorkspaceBytes, "matrix products"));
  return matmul;
}

CudaMatMul::~CudaMatMul() {
  plans_.clear();
  if (handle_ != nullptr) cublasLtDestroy(handle_);
}

absl::Status CudaMatMul::Prepare(int rows, int in, int out, bool bias, Tuning tuning,
                                 cudaStream_t stream) {
  std::unique_ptr<Plan>& kept = plans_[Shape{rows, in, out, bias}];
  if (kept != nullptr) return absl::OkStatus();
  auto plan = std::make_unique<Plan>();
  // cuBLAS counts by columns: it sees y^T [out, rows] = w [in, out]^T * x^T [in, rows].
  RETURN_IF_ERROR(BlasStatus(
      cublasLtMatmulDescCreate(&plan->operation, CUBLAS_COMPUTE_32F, CUDA_R_32F), "operation"));
  const cublasOperation_t transposed = CUBLAS_OP_T;
  RETURN_IF_ERROR(
      BlasStatus(cublasLtMatmulDescSetAttribute(plan->operation, CUBLASLT_MATMUL_DESC_TRANSA,
                                                &transposed, sizeof(transposed)),
                 "transpose"));
  if (bias) {
    const cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_BIAS;
    RETURN_IF_ERROR(
        BlasStatus(cublasLtMatmulDescSetAttribute(plan->operation, CUBLASLT_MATMUL_DESC_EPILOGUE,
                                                  &epilogue, sizeof(epilogue)),
                   "bias"));
  }
  RETURN_IF_ERROR(
      BlasStatus(cublasLtMatrixLayoutCreate(&plan->w, CUDA_R_16BF, in, out, in), "layout"));
  RETURN_IF_ERROR(
      BlasStatus(cublasLtMatrixLayoutCreate(&plan->x, CUDA_R_16BF, in, rows, in), "layout"));
  RETURN_IF_ERROR(
      BlasStatus(cublasLtMatrixLayoutCreate(&plan->y, CUDA_R_32F, out, rows, out), "layout"));

  cublasLtMatmulPreference_t preference = nullptr;
  RETURN_IF_ERROR(BlasStatus(cublasLtMatmulPreferenceCreate(&preference), "preference"));
  const size_t workspace = kWorkspaceBytes;
  cublasStatus_t status = cublasLtMatmulPreferenceSetAttribute(
      preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace, sizeof(workspace));
  std::vector<cublasLtMatmulHeuristicResult_t> found(kCandidates);
  int count = 0;
  if (status == CUBLAS_STATUS_SUCCESS) {
    status = cublasLtMatmulAlgoGetHeuristic(handle_, plan->operation, plan->w, plan->x, plan->y,
                                            plan->y, preference, kCandidates, found.data(), &count);
  }
  cublasLtMatmulPreferenceDestroy(preference);
  RETURN_IF_ERROR(BlasStatus(
      status, absl::StrCat("algorithm for [", rows, ", ", in, "] x [", in, ", ", out, "]")));
  if (count == 0) {
    return absl::InternalError(absl::StrCat("cuBLASLt has no algorithm for [", rows, ", ", in,
                                            "] x [", in, ", ", out, "]"));
  }
  plan->algorithm = found[0].algo;

  if (tuning == Tuning::kTimed && count > 1) {
    // On memory of its own, with another copy of the weights for each run.
    const size_t x_size = size_t{static_cast<unsigned>(rows)} * in;
    const size_t w_size = size_t{static_cast<unsigned>(in)} * out;
    ASSIGN_OR_RETURN(const auto x, DeviceArray<__nv_bfloat16>::Create(x_size, "tuning"));
    const size_t copies = (kTimedBytes + w_size * 2 - 1) / (w_size * 2);
    ASSIGN_OR_RETURN(const auto w, DeviceArray<__nv_bfloat16>::Create(w_size * copies, "tuning"));
    size_t next = 0;
    ASSIGN_OR_RETURN(const auto b, DeviceArray<float>::Create(out, "tuning"));
    ASSIGN_OR_RETURN(const auto y, DeviceArray<float>::Create(
                                       size_t{static_cast<unsigned>(rows)} * out, "tuning"));
    cudaEvent_t begin, end;
    RETURN_IF_ERROR(CudaStatus(cudaEventCreate(&begin), "event"));
    RETURN_IF_ERROR(CudaStatus(cudaEventCreate(&end), "event"));
    float best_ms = std::numeric_limits<float>::infinity();
    for (int i = 0; i < count; ++i) {
      const auto run = [&] {
        const __nv_bfloat16* weights = w.data() + next++ % copies * w_size;
        return RunPlan(*plan, found[i].algo, x.data(), weights, bias ? b.data() : nullptr, y.data(),
                       stream);
      };
      if (!run().ok()) continue;
      std::vector<float> times;
      for (int k = 0; k < kTimedRuns; ++k) {
        RETURN_IF_ERROR(CudaStatus(cudaEventRecord(begin, stream), "event"));
        RETURN_IF_ERROR(run());
        RETURN_IF_ERROR(CudaStatus(cudaEventRecord(end, stream), "event"));
        RETURN_IF_ERROR(CudaStatus(cudaEventSynchronize(end), "matrix product"));
        float now = 0;
        RETURN_IF_ERROR(CudaStatus(cudaEventElapsedTime(&now, begin, end), "event"));
        times.push_back(now);
      }
      std::nth_element(times.begin(), times.begin() + kTimedRuns / 2, times.end());
      const float ms = times[kTimedRuns / 2];
      if (ms < best_ms) {
        best_ms = ms;
        plan->algorithm = found[i].algo;
      }
    }
    cudaEventDestroy(begin);
    cudaEventDestroy(end);
  }
  kept = std::move(plan);
  return absl::OkStatus();
}

absl::Status CudaMatMul::Run(const __nv_bfloat16* x, const __nv_bfloat16* w, const float* bias,
                             float* y, int rows, int in, int out, cudaStream_t stream) {
  const Shape shape{rows, in, out, bias != nullptr};
  auto plan = plans_.find(shape);
  if (plan == plans_.end() || plan->second == nullptr) {
    RETURN_IF_ERROR(Prepare(rows, in, out, bias != nullptr, Tuning::kHeuristic, stream));
    plan = plans_.find(shape);
  }
  return RunPlan(*plan->second, plan->second->algorithm, x, w, bias, y, stream);
}

absl::Status CudaMatMul::RunPlan(const Plan& plan, const cublasLtMatmulAlgo_t& algorithm,
                                 const __nv_bfloat16* x, const __nv_bfloat16* w, const float* bias,
                                 float* y, cudaStream_t stream) {
  if (bias != nullptr) {
    RETURN_IF_ERROR(
        BlasStatus(cublasLtMatmulDescSetAttribute(plan.operation, CUBLASLT_MATMUL_DESC_BIAS_POINTER,
                                                  &bias, sizeof(bias)),
                   "bias"));
  }
  const float one = 1;
  const float zero = 0;
  return BlasStatus(
      cublasLtMatmul(handle_, plan.operation, &one, w, plan.w, x, plan.x, &zero, y, plan.y, y,
                     plan.y, &algorithm, workspace_.data(), kWorkspaceBytes, stream),
      "product");
}

}  // namespace nosara::worker
