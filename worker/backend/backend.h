// The seam between the engine and the device that computes: one loaded model with the working part
// of its sequences' KV caches.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "kvstore/api/layout.h"
#include "kvstore/api/store_client.h"
#include "worker/backend/sampler.h"
#include "worker/cache/page_pool.h"
#include "worker/model/config.h"

namespace nosara::worker {

/// A sequence of one backend, numbered by the engine; not reused while the backend lives.
struct SequenceId {
  uint64_t value = 0;
  friend bool operator==(SequenceId a, SequenceId b) { return a.value == b.value; }
  template <typename H>
  friend H AbslHashValue(H h, SequenceId id) {
    return H::combine(std::move(h), id.value);
  }
};

/// A stored page and its verified prefix (header, checksums, index part).
struct BoundPage {
  kvstore::PageRef ref;
  absl::Span<const std::byte> prefix;  // layout.prefix_bytes(); read during the call only
};

/// Ask for a token after the last one of a step item.
struct SampleRequest {
  SamplingParams params;
  /// Prompt and output up to and including the item's tokens; read where params.NeedsHistory().
  absl::Span<const int32_t> history;
  size_t prompt_tokens = 0;
};

/// New tokens of one sequence: a chunk of its prompt, or the last sampled token.
struct StepItem {
  SequenceId sequence;
  /// At least one; at most Backend::Headroom(sequence). They go to the positions behind those that
  /// the sequence has.
  absl::Span<const int32_t> tokens;
  std::optional<SampleRequest> sample;
};

/// Use of the cache, counted per (layer, KV head) and step. selected = resident + fetched.
struct CacheCounters {
  uint64_t records_selected = 0;
  uint64_t records_resident = 0;
  uint64_t records_fetched = 0;
  uint64_t bytes_fetched = 0;
  // Of records_fetched, by the way they came.
  uint64_t records_by_mapped = 0;
  uint64_t records_by_in_process = 0;
  uint64_t records_by_ucx = 0;

  void CountFetched(kvstore::Path path, uint64_t records, uint64_t record_bytes) {
    records_fetched += records;
    bytes_fetched += records * record_bytes;
    records_by_mapped += path == kvstore::Path::kMapped ? records : 0;
    records_by_in_process += path == kvstore::Path::kInProcess ? records : 0;
    records_by_ucx += path == kvstore::Path::kUcx ? records : 0;
  }

  CacheCounters& operator+=(const CacheCounters& other) {
    records_selected += other.records_selected;
    records_resident += other.records_resident;
    records_fetched += other.records_fetched;
    bytes_fetched += other.bytes_fetched;
    records_by_mapped += other.records_by_mapped;
    records_by_in_process += other.records_by_in_process;
    records_by_ucx += other.records_by_ucx;
    return *this;
  }
};

/// A block of 64 tokens that a step has completed: to be stored, then told to CommitBlock.
struct FinishedBlock {
  int block = 0;
  /// Index part and records in page layout; complete and constant but for the header, which the
  /// store client seals. The backend goes on reading its records until CommitBlock.
  PageBuffer page;
};

/// What became of one step item. On an error the sequence is unusable and must be removed; the
/// other items of the step are not affected.
struct StepItemResult {
  absl::Status status;
  std::optional<SampledToken> token;    // where asked for
  std::vector<FinishedBlock> finished;  // ascending
  CacheCounters counters;
};

/// One model on one device.
///
/// Owned by the engine thread: all calls from one thread, none concurrent. Knows page layout and
/// selection; knows nothing of requests, gRPC or routing. Reads missing records itself, through
/// the store client it was created with.
///
/// Errors of a step item: those of StoreClient::ReadRecords; INTERNAL for a broken device.
class Backend {
 public:
  virtual ~Backend() = default;

  virtual const ModelConfig& config() const = 0;
  virtual const kvstore::PageLayout& layout() const = 0;
  /// Of the checkpoint and of the attention policy; part of the page keys.
  virtual const std::string& model_fingerprint() const = 0;

  /// Makes room for a sequence of up to `max_tokens` tokens. RESOURCE_EXHAUSTED when the memory is
  /// in use (try again when a sequence has left), INVALID_ARGUMENT when it could never fit.
  virtual absl::Status AddSequence(SequenceId id, int64_t max_tokens) = 0;

  /// Forgets the sequence. Pages of finished blocks live on with their other owners.
  virtual void RemoveSequence(SequenceId id) = 0;

  /// Makes stored pages the first blocks of a sequence that has no tokens yet. Their records are
  /// fetched when a step selects them.
  virtual absl::Status BindPages(SequenceId id, absl::Span<const BoundPage> pages) = 0;

  /// Notes that a finished block is in the store, with the checksums of its records (one per
  /// record); from now on it may leave the device.
  virtual void CommitBlock(SequenceId id, int block, const kvstore::PageRef& ref,
                           absl::Span<const uint64_t> record_checksums) = 0;

  /// How many tokens the next step may add to the sequence: bounded by its max_tokens and by the
  /// finished blocks that are not committed yet (the back-pressure of the store).
  virtual int64_t Headroom(SequenceId id) const = 0;

  /// Processes prompt chunks, each of one or more tokens. Result i belongs to item i.
  virtual std::vector<StepItemResult> PrefillChunk(absl::Span<const StepItem> items) = 0;

  /// Processes one token of each of several sequences. Result i belongs to item i.
  virtual std::vector<StepItemResult> DecodeStep(absl::Span<const StepItem> items) = 0;

  /// What computes, and what it keeps where: for one line of a log.
  virtual std::string Describe() const = 0;

  /// Aborts when an invariant of the cache is broken; for tests and debug runs.
  virtual void CheckIntegrity() const = 0;
};

}  // namespace nosara::worker
