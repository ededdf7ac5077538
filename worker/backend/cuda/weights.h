// A model's weights in device memory, in the shapes that the kernels read.
#pragma once

#include <cuda_bf16.h>

#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/backend/cuda/device_memory.h"
#include "worker/model/checkpoint.h"

namespace nosara::worker {

/// Immutable after creation. H = hidden_size, I = intermediate_size; q, k, v and gate, up lie
/// behind each other, so that each pair or triple is one product. Null pointers: the model has
/// none.
struct CudaWeights {
  struct Layer {
    DeviceArray<float> input_norm, post_norm;  // [H]
    DeviceArray<__nv_bfloat16> qkv;            // [(Hq + 2 Hkv) * D, H]
    DeviceArray<__nv_bfloat16> o;              // [H, Hq * D]
    DeviceArray<__nv_bfloat16> gate_up;        // [2 I, H]
    DeviceArray<__nv_bfloat16> down;           // [H, I]
    DeviceArray<float> qkv_bias, o_bias;       // or empty
    DeviceArray<float> A, delta, delta_bias;   // or empty
  };

  ModelConfig config;
  DeviceArray<__nv_bfloat16> embedding;  // [V, H]
  DeviceArray<__nv_bfloat16> lm_head;    // [V, H]; empty: the embedding
  DeviceArray<float> final_norm;         // [H]
  std::vector<Layer> layers;

  const __nv_bfloat16* output_matrix() const {
    return lm_head.size() > 0 ? lm_head.data() : embedding.data();
  }
  /// Bytes of the matrices that one step of decode reads.
  int64_t matrix_bytes() const;

  /// Copies a checkpoint to the device. INVALID_ARGUMENT where its dtype is not bf16.
  static absl::StatusOr<std::unique_ptr<CudaWeights>> Load(const Checkpoint& checkpoint);

  /// Random weights of a shape, for benchmarks: normal, scaled by 1 / sqrt(in). `seed` fixes them.
  static absl::StatusOr<std::unique_ptr<CudaWeights>> Random(const ModelConfig& config,
                                                             uint64_t seed);
};

}  // namespace nosara::worker
