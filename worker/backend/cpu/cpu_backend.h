// The backend that computes on host cores: the embedded default and the reference of every test.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "kvstore/api/store_client.h"
#include "worker/backend/backend.h"
#include "worker/backend/cpu/attention.h"
#include "worker/backend/cpu/matmul.h"
#include "worker/backend/cpu/parallel.h"
#include "worker/backend/cpu/sequence_cache.h"
#include "worker/backend/selection.h"
#include "worker/model/checkpoint.h"

namespace nosara::worker {

/// Called for every selection that a step makes (not where attention is dense because few blocks
/// exist): layer, KV head, query position, the selected blocks, and how clear the choice was. For
/// tests and for recording traces.
using SelectionObserver =
    std::function<void(SequenceId, int layer, int kv_head, int64_t position,
                       const std::vector<int32_t>& selected, const SelectionMargins& margins)>;

struct CpuBackendOptions {
  /// Compute threads, the engine's own included; 1 or more.
  int threads = 2;
  AttentionPolicy policy = AttentionPolicy::kNosa;
  BiasMode bias = BiasMode::kAuto;
  /// Slots per (sequence, layer, KV head); at least topk_blocks, or 0 for a slot for every block
  /// ("all resident").
  int slots_per_head = 0;
  /// Blocks per sequence that may be open or not yet stored; 2 or more. Also the longest chunk:
  /// (max_unstored_blocks - 1) * 64 tokens are always accepted when the store keeps up.
  int max_unstored_blocks = 16;
  /// Host memory for all sequences together.
  int64_t cache_bytes = int64_t{4} << 30;
  /// May be empty. Runs on the engine thread.
  SelectionObserver observer;

  absl::Status Validate(const ModelConfig& config) const;
};

/// Computes by nosa.md with the rounding points of docs/adr/0002-numerics.md.
class CpuBackend final : public Backend {
 public:
  /// `checkpoint` is shared; `store` must outlive the backend and have the checkpoint's layout; it
  /// may be null for sequences that are never bound nor committed (tests).
  static absl::StatusOr<std::unique_ptr<CpuBackend>> Create(
      std::shared_ptr<const Checkpoint> checkpoint, kvstore::StoreClient* store,
      CpuBackendOptions options);

  /// The page layout of a model.
  static absl::StatusOr<kvstore::PageLayout> LayoutFor(const ModelConfig& config);

  const ModelConfig& config() const override { return checkpoint_->config(); }
  const kvstore::PageLayout& layout() const override { return layout_; }
  const std::string& model_fingerprint() const override { return fingerprint_; }

  absl::Status AddSequence(SequenceId id, int64_t max_tokens) override;
  void RemoveSequence(SequenceId id) override;
  absl::Status BindPages(SequenceId id, absl::Span<const BoundPage> pages) override;
  void CommitBlock(SequenceId id, int block, const kvstore::PageRef& ref,
                   absl::Span<const uint64_t> record_checksums) override;
  int64_t Headroom(SequenceId id) const override;
  std::vector<StepItemResult> PrefillChunk(absl::Span<const StepItem> items) override {
    return Forward(items, nullptr);
  }
  std::vector<StepItemResult> DecodeStep(absl::Span<const StepItem> items) override {
    return Forward(items, nullptr);
  }
  std::string Describe() const override;
  void CheckIntegrity() const override;

  /// As PrefillChunk; `logits`, unless null, receives the logits [V] after the last token of each
  /// item, before sampling. For tests and evaluation.
  std::vector<StepItemResult> Forward(absl::Span<const StepItem> items,
                                      std::vector<std::vector<float>>* logits);

  /// The cache of a sequence, for tests.
  const SequenceCache& sequence(SequenceId id) const { return *sequences_.at(id); }

 private:
  /// Widened small tensors and views of the large ones.
  struct Layer {
    const LayerTensors* tensors = nullptr;
    std::vector<float> input_norm, post_norm;
    std::vector<float> A, delta, delta_bias;  // empty without eviction head
    std::vector<float> q_bias, k_bias, v_bias, o_bias;
  };
  /// One item of the running step.
  struct Active {
    SequenceId id;
    SequenceCache* cache = nullptr;
    int64_t start = 0;  // position of the first new token
    int first_row = 0;
    int tokens = 0;
    absl::Status status;
    CacheCounters counters;
    size_t fetched_early = 0;  // in this layer, before the selection
  };
  /// A record that a step needs and that is not here.
  struct Missing {
    int active = 0;
    int record = 0;
    int block = 0;
    std::byte* landing = nullptr;
  };

  CpuBackend(std::shared_ptr<const Checkpoint> checkpoint, kvstore::StoreClient* store,
             CpuBackendOptions options, const kvstore::PageLayout& layout);

  int SlotsFor(int64_t max_tokens) const;
  size_t BytesReserved() const;
  bool UsesBias() const {
    return checkpoint_->has_eviction_head() && options_.policy != AttentionPolicy::kInfLlmV2 &&
           options_.bias == BiasMode::kAuto;
  }

  // The step, in order.
  void PrepareRope();
  void RunLayer(int index);
  void AppendKeysAndValues(int index);
  void FetchWindowBlocks(int index);
  void UpdateWindows(int index);
  void SelectBlocks(int index);
  void ResolveRecords(int index);
  void FetchMissing(std::vector<Missing>& missing);
  void Attend(int index);
  void KeepFetched(int index);
  void Round(std::vector<float>& values) const;

  // Constant after construction.
  const std::shared_ptr<const Checkpoint> checkpoint_;
  kvstore::StoreClient* const store_;
  const CpuBackendOptions options_;
  const kvstore::PageLayout layout_;
  // Of checkpoint and policy: what deeper layers cache depends on which blocks were attended.
  const std::string fingerprint_;
  std::vector<Layer> layers_;
  std::vector<float> final_norm_;
  std::vector<double> inverse_frequencies_;  // [D/2]

  ParallelFor parallel_;
  MatMul matmul_;
  PagePool pages_;
  absl::flat_hash_map<SequenceId, std::unique_ptr<SequenceCache>> sequences_;
  uint64_t step_ = 0;

  // Buffers of the running step; rows are the tokens of all items in order.
  std::vector<Active> active_;
  std::vector<int64_t> position_;            // [R]
  std::vector<float> hidden_, normed_;       // [R, hidden]
  std::vector<float> q_, k_, v_;             // [R, heads * D]
  std::vector<float> attended_, projected_;  // [R, Hq*D], [R, hidden]
  std::vector<float> gate_, up_;             // [R, intermediate]
  std::vector<float> cosine_, sine_;         // [R, D/2]
  std::vector<AttentionTile> tiles_;
  std::vector<AttentionScratch> scratch_;  // one per thread
  AlignedBytes landing_;                   // records of this layer that have no slot
};

}  // namespace nosara::worker
