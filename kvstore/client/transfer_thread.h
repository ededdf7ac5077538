// The one thread of a store client that moves bytes and runs its timers.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/functional/any_invocable.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "kvstore/api/layout.h"
#include "kvstore/api/store_client.h"
#include "kvstore/transport/arena_file.h"
#include "kvstore/transport/transport.h"

namespace nosara::kvstore {

/// How a client may reach an arena.
enum class DataPath {
  kAuto,       // in-process when the arena is in this process, else mapped where possible, else UCX
  kInProcess,  // only by pointer
  kMapped,     // only by mapping the arena file
  kUcx,        // only by UCX
};

/// Owns the transports, the endpoints to all arenas, and every transfer in flight. Posts at most
/// `window` transfers per store at a time, verifies what was read, runs completions.
///
/// Threads: public methods may be called from any thread; callbacks and completions run on this
/// thread, outside all locks, and must not block. Transports are touched by this thread alone.
///
/// A store whose transfers make no progress for `stall_timeout` loses its endpoint: closing it
/// completes all transfers, so a landing buffer is never given back while it can still be written.
class TransferThread final {
 public:
  using Closure = absl::AnyInvocable<void() &&>;
  using DoneStatus = absl::AnyInvocable<void(absl::Status) &&>;
  /// For tests: may replace a transport by one that wraps it.
  using TransportWrapper = std::function<std::unique_ptr<Transport>(std::unique_ptr<Transport>)>;

  struct Options {
    PageLayout layout;
    /// Transfers in flight per store.
    size_t window = 64;
    absl::Duration stall_timeout = absl::Seconds(5);
    DataPath path = DataPath::kAuto;
    /// UCX transports; empty: UCX chooses.
    std::string ucx_tls;
    TransportWrapper wrap_transport;
    /// The endpoint of `store` failed and is gone.
    std::function<void(size_t store, const absl::Status& status)> on_broken;
  };

  /// One transfer of a job.
  struct Piece {
    enum class Kind { kReadRecord, kReadPrefix, kWritePage };
    Kind kind = Kind::kReadRecord;
    size_t store = 0;
    PageKey key;
    uint64_t slot = 0;
    uint64_t generation = 0;
    int record = 0;         // kReadRecord
    uint64_t checksum = 0;  // kReadRecord
    absl::Span<std::byte> local;
  };

  explicit TransferThread(Options options);
  TransferThread(const TransferThread&) = delete;
  TransferThread& operator=(const TransferThread&) = delete;
  /// Runs all closures left, closes the endpoints (their jobs complete with CANCELLED), joins.
  ~TransferThread();

  /// Runs `closure` on the thread.
  void Run(Closure closure);
  /// The same after `delay`; at once after CloseEndpoints().
  void RunAfter(absl::Duration delay, Closure closure);

  /// (Re)connects `store` to `arena`, by the best path that works. Jobs in flight on the old
  /// endpoint complete with UNAVAILABLE.
  void Connect(size_t store, ArenaAddress arena,
               absl::AnyInvocable<void(absl::StatusOr<Path>) &&> done);

  struct Failure {
    size_t piece = 0;
    absl::Status status;
  };
  using DoneEach = absl::AnyInvocable<void(std::vector<Failure>) &&>;
  /// Transfers and verifies all pieces, whatever becomes of the others; `done` gets those that
  /// failed. Errors: those of Submit().
  void SubmitEach(std::vector<Piece> pieces, DoneEach done);

  /// Transfers and verifies all pieces; gives up with the first error. Errors: UNAVAILABLE,
  /// DATA_LOSS, ABORTED (a piece of an earlier incarnation of its store), INVALID_ARGUMENT.
  void Submit(std::vector<Piece> pieces, DoneStatus done);

  /// Ends everything in flight with CANCELLED, runs all timers; later jobs fail likewise.
  void CloseEndpoints();

  /// Fills in the counters of reads, writes and verification.
  void AddStats(ClientStats& stats) const;

 private:
  static constexpr int kNumPaths = 3;
  struct Job;
  class PieceTransfer;
  struct Store {
    std::unique_ptr<Endpoint> endpoint;
    Path path = Path::kMapped;
    uint64_t epoch = 0;
    std::deque<PieceTransfer*> queue;
    size_t in_flight = 0;
    absl::Time last_completion;
    /// While the endpoint is being closed: why. Transfers cut off fail with this.
    absl::Status closing;
  };
  struct Counters {
    std::atomic<uint64_t> records{0}, record_bytes{0}, prefixes{0}, prefix_bytes{0},
        page_bytes_written{0}, verification_failures{0};
    std::atomic<uint64_t> records_by_path[kNumPaths] = {};
  };

  enum class OnError { kGoOn, kGiveUp };
  void Start(std::vector<Piece> pieces, OnError on_error, DoneEach done);
  void Loop();
  bool TakeInbox();
  bool RunTimers();
  bool PostQueued();
  bool ProgressTransports();
  bool FinishJobs();
  /// True when it dropped an endpoint: the jobs that this ends wait for FinishJobs().
  bool CheckStalls();
  void Sleep();
  absl::StatusOr<Path> ConnectNow(size_t store, const ArenaAddress& arena);
  absl::StatusOr<Transport*> TransportFor(Path path);
  /// Closes the endpoint of `store`; what was in flight or queued there fails with `status`.
  void DropEndpoint(Store& store, const absl::Status& status);
  void OnPieceDone(PieceTransfer& piece, absl::Status status);
  absl::Status Verify(const Piece& piece);

  // Constant after construction.
  const Options options_;
  const FileDescriptor wake_;

  absl::Mutex mu_;
  std::vector<Closure> inbox_ ABSL_GUARDED_BY(mu_);
  bool asleep_ ABSL_GUARDED_BY(mu_) = false;
  bool stop_ ABSL_GUARDED_BY(mu_) = false;

  // Owned by the thread.
  std::unique_ptr<Transport> transports_[kNumPaths];  // by Path
  std::vector<Store> stores_;
  std::multimap<absl::Time, Closure> timers_;
  std::vector<std::unique_ptr<Job>> finished_;
  bool closed_ = false;
  int idle_turns_ = 0;

  Counters counters_;
  std::thread thread_;  // last: starts when all else is there
};

}  // namespace nosara::kvstore
