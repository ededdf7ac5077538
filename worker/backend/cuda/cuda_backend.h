// The backend that computes on an NVIDIA GPU.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "kernels/pages/pages.h"
#include "kvstore/api/store_client.h"
#include "worker/backend/backend.h"
#include "worker/backend/cuda/cuda_backend_options.h"
#include "worker/backend/cuda/cuda_step.h"
#include "worker/backend/cuda/device_cache.h"
#include "worker/backend/selection.h"
#include "worker/model/checkpoint.h"

namespace nosara::worker {

/// Computes by nosa.md with the rounding points of docs/adr/0002-numerics.md.
///
/// A sequence has frames for all its blocks while it prefills. Once it decodes, its blocks stay
/// while there is room; when another sequence needs frames, decoding ones give up theirs, down to
/// the fewest they can do with, and from then on fetch what they select and do not hold.
class CudaBackend final : public Backend {
 public:
  /// `store` must outlive the backend and have the checkpoint's layout; it may be null for
  /// sequences that are never bound nor committed (tests). UNAVAILABLE without a usable GPU.
  static absl::StatusOr<std::unique_ptr<CudaBackend>> Create(
      std::shared_ptr<const Checkpoint> checkpoint, kvstore::StoreClient* store,
      const CudaBackendOptions& options);
  ~CudaBackend() override;

  const ModelConfig& config() const override { return checkpoint_->config(); }
  const kvstore::PageLayout& layout() const override { return layout_; }
  const std::string& model_fingerprint() const override { return fingerprint_; }

  absl::Status AddSequence(SequenceId id, int64_t max_tokens) override;
  void RemoveSequence(SequenceId id) override;
  absl::Status BindPages(SequenceId id, absl::Span<const BoundPage> pages) override;
  void CommitBlock(SequenceId id, int block, const kvstore::PageRef& ref,
                   absl::Span<const uint64_t> record_checksums) override;
  int64_t Headroom(SequenceId id) const override;
  std::vector<StepItemResult> PrefillChunk(absl::Span<const StepItem> items) override;
  std::vector<StepItemResult> DecodeStep(absl::Span<const StepItem> items) override;
  void CheckIntegrity() const override;

  std::string Describe() const override;
  int free_frames() const { return cache_->free_frames(); }

 private:
  struct Block {
    std::optional<kvstore::PageRef> ref;     // once stored
    std::vector<uint64_t> record_checksums;  // once stored
  };
  struct Sequence {
    int row = 0;  // in the device cache
    int64_t tokens = 0;
    int64_t max_tokens = 0;
    int64_t unreported_from = 0;  // first block not reported as finished
    std::vector<Block> blocks;
    int unstored = 0;  // open or finished, without a ref
    bool decoding = false;
    /// Whether some block may be without a slot.
    bool partial = false;
    /// Stored blocks that the device cannot read by itself.
    int elsewhere = 0;
    /// A bound block that the next step needs whole; -1: none.
    int load_first = -1;
  };
  /// An arena that the device reads.
  struct Arena {
    std::shared_ptr<const kvstore::MappedArena> memory;
    std::byte* device_address = nullptr;  // null: the device cannot read it
  };
  /// Piece of a step item that goes into one launch.
  struct Piece {
    size_t item = 0;
    int64_t first = 0;
    int64_t tokens = 0;
  };

  CudaBackend(std::shared_ptr<const Checkpoint> checkpoint, kvstore::StoreClient* store,
              const CudaBackendOptions& options, const kvstore::PageLayout& layout);
  absl::Status Start();

  /// The arena of a store, made known to the device at first sight; null where there is none.
  const Arena* ArenaOf(kvstore::StoreId store);
  /// Where the records of a stored page lie for the device (kernels::CacheView::pages).
  uint64_t RecordsOf(const kvstore::PageRef& ref);
  int FloorFrames(const Sequence& sequence) const;
  absl::Status MakeRoom(int frames);
  absl::Status BecomeDecoding(Sequence& sequence);
  bool UsesBias() const;
  /// Makes the device current for the calling thread, which need not be the one that created this.
  void UseDevice() const;
  Sequence& At(SequenceId id) { return *sequences_.at(id); }

  std::vector<StepItemResult> Run(absl::Span<const StepItem> items, bool decode);
  absl::Status Prepare(const StepItem& item, bool decode);
  void RunPieces(absl::Span<const StepItem> items, absl::Span<const Piece> pieces, bool decode,
                 std::vector<StepItemResult>& results);
  /// Records of one item that are read together.
  struct RecordReads {
    size_t item = 0;
    std::vector<kvstore::RecordRead> reads;
    std::vector<int> indices;  // in the list of loads
    absl::Status status;       // set before the last of them has arrived

    absl::Status AnnotatedStatus() const;
  };
  /// The work of a FetchFunction. `started` gets the reads; it must outlive them.
  void StartReads(absl::Span<const kernels::Load> loads, std::byte* landing,
                  const std::function<void(int)>& arrived, absl::Span<const StepItem> items,
                  std::vector<StepItemResult>& results,
                  std::vector<std::unique_ptr<RecordReads>>& started);
  void SampleTokens(absl::Span<const StepItem> items, absl::Span<const size_t> sampled,
                    absl::Span<const int32_t> drawn, std::vector<StepItemResult>& results);
  absl::Status Export(absl::Span<const StepItem> items, std::vector<StepItemResult>& results);

  // Constant after construction.
  const std::shared_ptr<const Checkpoint> checkpoint_;
  kvstore::StoreClient* const store_;
  const CudaBackendOptions options_;
  const kvstore::PageLayout layout_;
  const std::string fingerprint_;
  std::string device_name_;

  cudaStream_t stream_ = nullptr;
  std::unique_ptr<CudaWeights> weights_;
  std::unique_ptr<DeviceCache> cache_;
  std::unique_ptr<CudaStep> step_;
  std::unique_ptr<PagePool> pages_;
  PinnedArray<kernels::PageOfBlock> page_list_;
  PinnedArray<std::byte> prefixes_;

  /// All incarnations: tables of the device may point into old ones.
  std::vector<std::unique_ptr<Arena>> arenas_;
  absl::flat_hash_map<SequenceId, std::unique_ptr<Sequence>> sequences_;
};

}  // namespace nosara::worker
