#include "kvstore/client/transfer_thread.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/status_macros.h"
#include "kvstore/transport/in_process_transport.h"
#include "kvstore/transport/mapped_transport.h"
#include "kvstore/transport/ucx_transport.h"

namespace nosara::kvstore {
namespace {

/// Turns without any event before the thread sleeps; about what a wake-up costs.
constexpr int kIdleTurns = 200;
/// Plain copies complete inside Post(): a turn must end now and then to see new work.
constexpr int kPostsPerTurn = 32;

// Counters only count: nothing is ordered by them.
constexpr auto kRelaxed = std::memory_order_relaxed;

absl::Time Now() { return Clock::Real()->Now(); }

}  // namespace

struct TransferThread::Job {
  std::vector<PieceTransfer> pieces;
  size_t remaining = 0;
  OnError on_error = OnError::kGoOn;
  std::vector<Failure> failures;
  DoneEach done;
};

class TransferThread::PieceTransfer final : public Transfer {
 public:
  PieceTransfer(TransferThread* thread, Job* job, const Piece& piece)
      : thread_(thread), job_(job), piece_(piece) {
    local = piece_.local;
    direction = piece_.kind == Piece::Kind::kWritePage ? Direction::kWrite : Direction::kRead;
    const PageLayout& layout = thread->options_.layout;
    offset = piece_.slot * layout.page_bytes();
    if (piece_.kind == Piece::Kind::kReadRecord) offset += layout.record_offset(piece_.record);
  }
  virtual ~PieceTransfer() = default;
  void Done(absl::Status status) override { thread_->OnPieceDone(*this, std::move(status)); }

  TransferThread* const thread_;
  Job* const job_;
  const Piece piece_;
  bool posted_ = false;
  bool done_ = false;
};

TransferThread::TransferThread(Options options)
    : options_(std::move(options)), wake_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
  CHECK(wake_.valid());
  thread_ = std::thread([this] { Loop(); });
}

TransferThread::~TransferThread() {
  CloseEndpoints();
  Run([this] {
    absl::MutexLock lock(&mu_);
    stop_ = true;
  });
  thread_.join();
}

void TransferThread::Run(Closure closure) {
  absl::MutexLock lock(&mu_);
  inbox_.push_back(std::move(closure));
  if (!asleep_) return;
  asleep_ = false;
  const uint64_t one = 1;
  CHECK(write(wake_.get(), &one, sizeof(one)) == sizeof(one));
}

void TransferThread::RunAfter(absl::Duration delay, Closure closure) {
  Run([this, at = Now() + delay, closure = std::move(closure)]() mutable {
    timers_.emplace(closed_ ? absl::InfinitePast() : at, std::move(closure));
  });
}

void TransferThread::Connect(size_t store, ArenaAddress arena,
                             absl::AnyInvocable<void(absl::StatusOr<Path>) &&> done) {
  Run([this, store, arena = std::move(arena), done = std::move(done)]() mutable {
    std::move(done)(ConnectNow(store, arena));
  });
}

void TransferThread::Submit(std::vector<Piece> pieces, DoneStatus done) {
  Start(std::move(pieces), OnError::kGiveUp,
        [done = std::move(done)](std::vector<Failure> failures) mutable {
          std::move(done)(failures.empty() ? absl::OkStatus() : std::move(failures[0].status));
        });
}

void TransferThread::SubmitEach(std::vector<Piece> pieces, DoneEach done) {
  Start(std::move(pieces), OnError::kGoOn, std::move(done));
}

void TransferThread::Start(std::vector<Piece> pieces, OnError on_error, DoneEach done) {
  Run([this, pieces = std::move(pieces), on_error, done = std::move(done)]() mutable {
    auto job = std::make_unique<Job>();
    job->done = std::move(done);
    job->on_error = on_error;
    job->remaining = pieces.size();
    job->pieces.reserve(pieces.size());  // no reallocation: transports hold pointers
    for (const Piece& piece : pieces) job->pieces.emplace_back(this, job.get(), piece);
    if (job->pieces.empty()) {
      finished_.push_back(std::move(job));
      return;
    }
    Job* const raw = job.release();  // OnPieceDone of the last piece takes it back
    // The last call of the loop may end the job, but never before the last piece.
    const size_t count = raw->pieces.size();
    for (size_t i = 0; i < count; ++i) {
      PieceTransfer& piece = raw->pieces[i];
      const size_t store = piece.piece_.store;
      if (store >= stores_.size()) stores_.resize(store + 1);
      Store& target = stores_[store];
      absl::Status refused;
      if (closed_) {
        refused = absl::CancelledError("store client is closed");
      } else if (target.endpoint == nullptr) {
        refused = absl::UnavailableError(absl::StrCat("store ", store, ": not connected"));
      } else if ((piece.piece_.generation >> 32) != (target.epoch >> 32)) {
        refused = absl::AbortedError(absl::StrCat("page ", piece.piece_.key.ToHex(),
                                                  ": its store has restarted and lost it"));
      }
      if (!refused.ok()) {
        OnPieceDone(piece, std::move(refused));
      } else {
        if (target.queue.empty() && target.in_flight == 0) target.last_completion = Now();
        target.queue.push_back(&piece);
      }
    }
  });
}

void TransferThread::CloseEndpoints() {
  Run([this] {
    closed_ = true;
    for (Store& store : stores_) {
      DropEndpoint(store, absl::CancelledError("store client is closed"));
    }
    std::multimap<absl::Time, Closure> timers = std::exchange(timers_, {});
    for (auto& [at, closure] : timers) std::move(closure)();
  });
}

void TransferThread::Loop() {
  while (true) {
    bool active = TakeInbox();
    active |= RunTimers();
    active |= PostQueued();
    active |= ProgressTransports();
    active |= CheckStalls();
    active |= FinishJobs();
    if (active) {
      idle_turns_ = 0;
      continue;
    }
    {
      absl::MutexLock lock(&mu_);
      if (stop_ && inbox_.empty()) break;
    }
    Sleep();
  }
  // Endpoints are closed; transports end on the thread that made them.
  for (auto& transport : transports_) transport.reset();
}

bool TransferThread::TakeInbox() {
  std::vector<Closure> inbox;
  {
    absl::MutexLock lock(&mu_);
    inbox.swap(inbox_);
  }
  for (Closure& closure : inbox) std::move(closure)();
  return !inbox.empty();
}

bool TransferThread::RunTimers() {
  if (timers_.empty()) return false;
  const absl::Time now = Now();
  bool ran = false;
  while (!timers_.empty() && timers_.begin()->first <= now) {
    Closure closure = std::move(timers_.begin()->second);
    timers_.erase(timers_.begin());
    std::move(closure)();
    ran = true;
  }
  return ran;
}

bool TransferThread::PostQueued() {
  bool posted = false;
  for (Store& store : stores_) {
    for (int i = 0; i < kPostsPerTurn && store.in_flight < options_.window; ++i) {
      if (store.queue.empty()) break;
      PieceTransfer* const piece = store.queue.front();
      store.queue.pop_front();
      posted = true;
      if (piece->job_->on_error == OnError::kGiveUp && !piece->job_->failures.empty()) {
        // The caller gets an error anyhow.
        OnPieceDone(*piece, absl::OkStatus());
        continue;
      }
      piece->posted_ = true;
      ++store.in_flight;
      store.endpoint->Post(piece);
    }
  }
  return posted;
}

bool TransferThread::ProgressTransports() {
  bool active = false;
  for (auto& transport : transports_) {
    if (transport != nullptr) active |= transport->Progress();
  }
  for (size_t i = 0; i < stores_.size(); ++i) {
    Store& store = stores_[i];
    if (store.endpoint == nullptr) continue;
    const absl::Status status = store.endpoint->status();
    if (status.ok()) continue;
    DropEndpoint(store, status);
    if (options_.on_broken) options_.on_broken(i, status);
    active = true;
  }
  return active;
}

bool TransferThread::FinishJobs() {
  if (finished_.empty()) return false;
  std::vector<std::unique_ptr<Job>> finished = std::exchange(finished_, {});
  for (auto& job : finished) std::move(job->done)(std::move(job->failures));
  return true;
}

bool TransferThread::CheckStalls() {
  bool dropped = false;
  for (size_t i = 0; i < stores_.size(); ++i) {
    Store& store = stores_[i];
    if (store.in_flight == 0 || Now() - store.last_completion < options_.stall_timeout) continue;
    const absl::Status status =
        absl::UnavailableError(absl::StrCat("store ", i, ": no transfer has completed for ",
                                            absl::FormatDuration(options_.stall_timeout)));
    DropEndpoint(store, status);
    if (options_.on_broken) options_.on_broken(i, status);
    dropped = true;
  }
  return dropped;
}

void TransferThread::Sleep() {
  bool in_flight = false;
  absl::Time until = timers_.empty() ? absl::InfiniteFuture() : timers_.begin()->first;
  for (const Store& store : stores_) {
    if (store.in_flight == 0) continue;
    in_flight = true;
    until = std::min(until, store.last_completion + options_.stall_timeout);
  }
  if (in_flight && ++idle_turns_ < kIdleTurns) return;
  pollfd fds[1 + kNumPaths] = {{wake_.get(), POLLIN, 0}};
  int num_fds = 1;
  for (const auto& transport : transports_) {
    if (transport == nullptr || transport->event_fd() < 0) continue;
    if (!transport->Arm()) return;
    fds[num_fds++] = {transport->event_fd(), POLLIN, 0};
  }
  {
    absl::MutexLock lock(&mu_);
    if (!inbox_.empty()) return;
    asleep_ = true;
  }
  int timeout_ms = -1;
  if (until != absl::InfiniteFuture()) {
    const int64_t ms = absl::ToInt64Milliseconds(until - Now()) + 1;
    timeout_ms = static_cast<int>(std::clamp<int64_t>(ms, 0, 60'000));
  }
  CHECK(poll(fds, num_fds, timeout_ms) >= 0 || errno == EINTR);
  if (fds[0].revents != 0) {
    uint64_t count;
    CHECK(read(wake_.get(), &count, sizeof(count)) == sizeof(count) || errno == EAGAIN);
  }
  absl::MutexLock lock(&mu_);
  asleep_ = false;
}

absl::StatusOr<Transport*> TransferThread::TransportFor(Path path) {
  std::unique_ptr<Transport>& transport = transports_[static_cast<int>(path)];
  if (transport != nullptr) return transport.get();
  std::unique_ptr<Transport> made;
  switch (path) {
    case Path::kMapped:
      made = std::make_unique<MappedTransport>();
      break;
    case Path::kInProcess:
      made = std::make_unique<InProcessTransport>();
      break;
    case Path::kUcx: {
      ASSIGN_OR_RETURN(made, CreateUcxTransport(options_.ucx_tls));
      break;
    }
  }
  if (options_.wrap_transport) made = options_.wrap_transport(std::move(made));
  transport = std::move(made);
  return transport.get();
}

absl::StatusOr<Path> TransferThread::ConnectNow(size_t index, const ArenaAddress& arena) {
  if (closed_) return absl::CancelledError("store client is closed");
  if (index >= stores_.size()) stores_.resize(index + 1);
  Store& store = stores_[index];
  DropEndpoint(store, absl::UnavailableError(absl::StrCat("store ", arena.name, ": reconnecting")));
  std::vector<Path> paths;
  switch (options_.path) {
    case DataPath::kAuto:
      if (arena.in_process != nullptr) paths.push_back(Path::kInProcess);
      paths.push_back(Path::kMapped);
      paths.push_back(Path::kUcx);
      break;
    case DataPath::kInProcess:
      paths.push_back(Path::kInProcess);
      break;
    case DataPath::kMapped:
      paths.push_back(Path::kMapped);
      break;
    case DataPath::kUcx:
      paths.push_back(Path::kUcx);
      break;
  }
  std::string reasons;
  for (const Path path : paths) {
    const absl::StatusOr<Transport*> transport = TransportFor(path);
    absl::Status failed = transport.status();
    if (transport.ok()) {
      absl::StatusOr<std::unique_ptr<Endpoint>> endpoint = (*transport)->Connect(arena);
      if (endpoint.ok()) {
        store.endpoint = *std::move(endpoint);
        store.path = path;
        store.epoch = arena.epoch;
        return path;
      }
      failed = endpoint.status();
    }
    absl::StrAppend(&reasons, reasons.empty() ? "" : "; ", PathName(path), ": ", failed.message());
  }
  return absl::UnavailableError(
      absl::StrCat("store ", arena.name, ": its arena cannot be reached (", reasons, ")"));
}

void TransferThread::DropEndpoint(Store& store, const absl::Status& status) {
  if (store.endpoint == nullptr) return;
  store.closing = status;
  std::deque<PieceTransfer*> queue = std::exchange(store.queue, {});
  for (PieceTransfer* piece : queue) OnPieceDone(*piece, status);
  const std::unique_ptr<Endpoint> endpoint = std::move(store.endpoint);
  endpoint->Close();
  CHECK(store.in_flight == 0);
  store.closing = absl::OkStatus();
}

void TransferThread::OnPieceDone(PieceTransfer& transfer, absl::Status status) {
  // A transport that says it twice, before the turn is over: once is enough.
  if (std::exchange(transfer.done_, true)) return;
  Job* const job = transfer.job_;
  const Piece& piece = transfer.piece_;
  Store& store = stores_[piece.store];
  if (transfer.posted_) {
    --store.in_flight;
    store.last_completion = Now();
    if (status.ok()) status = Verify(piece);
    if (absl::IsCancelled(status) && !store.closing.ok()) status = store.closing;
  }
  if (!status.ok()) {
    job->failures.push_back(
        {static_cast<size_t>(&transfer - job->pieces.data()), std::move(status)});
  }
  if (--job->remaining == 0) finished_.emplace_back(job);
}

absl::Status TransferThread::Verify(const Piece& piece) {
  absl::Status status;
  switch (piece.kind) {
    case Piece::Kind::kWritePage:
      counters_.page_bytes_written.fetch_add(piece.local.size(), kRelaxed);
      return absl::OkStatus();
    case Piece::Kind::kReadPrefix:
      counters_.prefixes.fetch_add(1, kRelaxed);
      counters_.prefix_bytes.fetch_add(piece.local.size(), kRelaxed);
      status = VerifyPrefix(options_.layout, piece.key, piece.generation, piece.local);
      break;
    case Piece::Kind::kReadRecord:
      counters_.records.fetch_add(1, kRelaxed);
      counters_.record_bytes.fetch_add(piece.local.size(), kRelaxed);
      counters_.records_by_path[static_cast<int>(stores_[piece.store].path)].fetch_add(1, kRelaxed);
      if (PageChecksum(piece.key, piece.generation, static_cast<uint32_t>(piece.record),
                       piece.local) != piece.checksum) {
        status = absl::DataLossError(absl::StrCat("page ", piece.key.ToHex(), " record ",
                                                  piece.record, ": checksum differs"));
      }
      break;
  }
  if (!status.ok()) counters_.verification_failures.fetch_add(1, kRelaxed);
  return status;
}

void TransferThread::AddStats(ClientStats& stats) const {
  stats.records_read += counters_.records.load(kRelaxed);
  stats.record_bytes_read += counters_.record_bytes.load(kRelaxed);
  stats.prefixes_read += counters_.prefixes.load(kRelaxed);
  stats.prefix_bytes_read += counters_.prefix_bytes.load(kRelaxed);
  stats.page_bytes_written += counters_.page_bytes_written.load(kRelaxed);
  stats.verification_failures += counters_.verification_failures.load(kRelaxed);
  const auto by_path = [this](Path path) {
    return counters_.records_by_path[static_cast<int>(path)].load(kRelaxed);
  };
  stats.records_by_mapped += by_path(Path::kMapped);
  stats.records_by_in_process += by_path(Path::kInProcess);
  stats.records_by_ucx += by_path(Path::kUcx);
}

}  // namespace nosara::kvstore
