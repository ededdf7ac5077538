// How a worker's CUDA backend is set up; needs no CUDA to be read.
#pragma once

#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"
#include "kvstore/api/store_client.h"
#include "worker/backend/backend.h"
#include "worker/backend/selection.h"
#include "worker/model/checkpoint.h"

namespace nosara::worker {

struct CudaBackendOptions {
  /// CUDA device, as the driver numbers it.
  int device = 0;
  AttentionPolicy policy = AttentionPolicy::kNosa;
  BiasMode bias = BiasMode::kAuto;
  /// Slots per (sequence, layer, KV head) once a sequence decodes; at least topk_blocks, or 0: all
  /// its blocks while they fit, and under pressure as few as the model allows.
  int slots_per_head = 0;
  /// Blocks of a sequence that may be open or not yet stored; 2 or more.
  int max_unstored_blocks = 16;
  /// Sequences at a time, 1 or more.
  int max_sequences = 64;
  /// Tokens of one prefill launch, 1 or more.
  int max_prefill_rows = 1024;
  /// Device memory for the KV cache, bytes; 0: nine tenths of what is free when the weights are
  /// there.
  int64_t cache_bytes = 0;
  /// Stores whose arenas are mapped into the device at start, where they lie in this machine's
  /// memory: the first so many of the store client. Others are mapped when they are first met.
  int num_stores = 0;
  /// Threads that sample where more is asked for than the device draws: penalties,
  /// log-probabilities.
  int threads = 2;

  absl::Status Validate(const ModelConfig& config) const;
};

/// Whether this build has the CUDA backend, and the machine a device that it can use.
bool CudaUsable(int device);

/// CudaBackend::Create, for programs that are also built without CUDA: then UNIMPLEMENTED.
absl::StatusOr<std::unique_ptr<Backend>> MakeCudaBackend(
    std::shared_ptr<const Checkpoint> checkpoint, kvstore::StoreClient* store,
    const CudaBackendOptions& options);

}  // namespace nosara::worker
