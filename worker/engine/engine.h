// Continuous batching: requests come in, steps run, tokens and finished blocks go out.
#pragma once

#include <atomic>
#include <deque>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/functional/any_invocable.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "base/bounded_queue.h"
#include "base/clock.h"
#include "kvstore/api/page_key.h"
#include "kvstore/api/store_client.h"
#include "worker/backend/backend.h"
#include "worker/engine/engine_options.h"
#include "worker/engine/request.h"
#include "worker/engine/scheduler.h"

namespace nosara::worker {

/// A moment's load.
struct EngineLoad {
  int64_t running_requests = 0;
  int64_t queued_requests = 0;
  int64_t pending_prefill_tokens = 0;
  int64_t running_tokens = 0;
  CacheCounters cache;        // since the start
  int64_t pages_written = 0;  // since the start
  /// Since the start: how often a running sequence lost pages and went on, and how many tokens'
  /// keys and values were computed again for it.
  int64_t recoveries = 0;
  int64_t recomputed_tokens = 0;
  bool draining = false;
};

/// Identifies a submitted request; never reused.
struct RequestHandle {
  uint64_t value = 0;
};

/// Owns scheduler, sequences and page keys; one engine thread runs everything. Submit, Cancel,
/// load, Drain and Stop are thread-safe; completions of the store client come in through the same
/// inbox.
///
/// Life of a request: queued -> memory reserved, chain looked up in the stores -> index parts of
/// found pages pulled -> prefill in chunks -> decode -> told the sink -> finished blocks still
/// unstored are stored -> leases released.
///
/// A running sequence whose pages are lost (its store died or restarted, a lease ended, a checksum
/// differs) goes back to the head of the queue with the tokens it has: it is looked up again, and
/// what the stores do not have is computed again from prompt and output. Sampling depends on seed
/// and position alone, so the sink sees no gap, no repeat and the same tokens.
///
/// Invariants: (1) a request's sink gets one final call, or none after a cancel; (2) one write per
/// sequence is in flight at a time, so that blocks are stored in chain order; (3) page buffers
/// live until both backend and store client have let go.
///
/// Errors to sinks: UNAVAILABLE (the stores that the request needs are gone, or its pages were lost
/// more than max_recoveries times), RESOURCE_EXHAUSTED (the store has had no room for longer than
/// store_patience), DEADLINE_EXCEEDED, INTERNAL.
class Engine final {
 public:
  /// `store` and `clock` must outlive the engine; `store` must outlive the backend too.
  static absl::StatusOr<std::unique_ptr<Engine>> Create(std::unique_ptr<Backend> backend,
                                                        kvstore::StoreClient* store,
                                                        const Clock* clock, EngineOptions options);
  ~Engine();

  /// Queues a request. INVALID_ARGUMENT (names the field), RESOURCE_EXHAUSTED (queue full),
  /// FAILED_PRECONDITION (draining), UNAVAILABLE (stopped). On an error the sink is not called.
  absl::StatusOr<RequestHandle> Submit(Request request, std::shared_ptr<RequestSink> sink);

  /// Ends a request and frees what it holds; its sink gets nothing more once this has taken effect
  /// on the engine thread. Ignored when it has ended.
  void Cancel(RequestHandle handle);

  EngineLoad load() const;

  /// Refuses new requests; running ones go on.
  void Drain();

  /// Fails what runs with UNAVAILABLE, waits for the store operations in flight, joins. Idempotent.
  void Stop();

  const Backend& backend() const { return *backend_; }

 private:
  struct Sequence;
  using Event = absl::AnyInvocable<void() &&>;

  Engine(std::unique_ptr<Backend> backend, kvstore::StoreClient* store, const Clock* clock,
         EngineOptions options);

  absl::Status Validate(const Request& request) const;

  // The engine thread.
  void Run();
  absl::Duration Housekeep();
  void AdmitQueued();
  void LookUp(Sequence& sequence);
  void OnLookup(uint64_t handle, absl::StatusOr<kvstore::LookupResult> result);
  void OnPrefixes(uint64_t handle, absl::StatusOr<std::vector<kvstore::PageRef>> pages,
                  std::shared_ptr<std::vector<std::byte>> bytes);
  void StartPrefill(Sequence& sequence, int64_t cached_tokens);
  bool RunStep();
  void AfterStep(Sequence& sequence, int64_t tokens, StepItemResult result);
  void TakeToken(Sequence& sequence, SampledToken token);
  /// The sequence goes on from what its request and the stores have, or fails.
  void Recover(Sequence& sequence, const absl::Status& cause);
  void StoreBlocks(Sequence& sequence);
  void OnWritten(uint64_t handle, SequenceId id, std::vector<FinishedBlock> blocks,
                 absl::StatusOr<kvstore::WriteResult> result);
  void OnForeignPrefixes(uint64_t handle, SequenceId id, std::vector<FinishedBlock> blocks,
                         kvstore::WriteResult result,
                         std::shared_ptr<std::vector<std::byte>> prefixes, absl::Status status);
  /// A write is over whose sequence has been recovered since.
  void OnStaleWrite(Sequence& sequence, const absl::Status& status);
  void CommitBlocks(Sequence& sequence, const std::vector<FinishedBlock>& blocks,
                    const kvstore::WriteResult& result,
                    const std::vector<std::vector<uint64_t>>& checksums);
  void WriteFailed(Sequence& sequence, std::vector<FinishedBlock> blocks,
                   const absl::Status& status);
  void Complete(Sequence& sequence, FinishReason reason);
  void Fail(Sequence& sequence, const absl::Status& status);
  void Leave(Sequence& sequence);
  void LeaveBackend(Sequence& sequence);
  void EraseIfDone(uint64_t handle);
  void PublishLoad();
  void Post(Event event);
  Sequence* Find(uint64_t handle);

  // Constant after construction.
  const std::unique_ptr<Backend> backend_;
  kvstore::StoreClient* const store_;
  const Clock* const clock_;
  const EngineOptions options_;

  BoundedQueue<Event> inbox_;
  std::atomic<uint64_t> next_handle_{1};  // relaxed: only uniqueness matters
  std::atomic<int64_t> waiting_{0};       // relaxed: a bound, checked again by nobody
  std::atomic<bool> draining_{false};     // relaxed: a flag without data

  // Owned by the engine thread.
  absl::flat_hash_map<uint64_t, std::unique_ptr<Sequence>> sequences_;
  std::deque<uint64_t> queue_;     // not yet admitted, in order of arrival
  std::vector<uint64_t> running_;  // in the backend, in order of admission
  CacheCounters total_cache_;
  int64_t total_pages_written_ = 0;
  int64_t total_recoveries_ = 0;
  int64_t total_recomputed_tokens_ = 0;
  uint64_t next_sequence_ = 1;
  int64_t store_operations_ = 0;  // in flight
  bool stopping_ = false;

  mutable absl::Mutex load_mu_;
  EngineLoad load_ ABSL_GUARDED_BY(load_mu_);

  absl::Mutex stop_mu_;
  std::thread thread_ ABSL_GUARDED_BY(stop_mu_);
};

}  // namespace nosara::worker
