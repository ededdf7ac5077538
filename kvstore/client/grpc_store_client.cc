#include "kvstore/client/grpc_store_client.h"

#include <algorithm>
#include <atomic>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "base/check.h"
#include "base/log.h"
#include "kvstore/client/control_client.h"
#include "kvstore/client/lease_table.h"
#include "kvstore/client/placement.h"
#include "kvstore/client/store_connection.h"

namespace nosara::kvstore {
namespace {

constexpr size_t kMaxLookupKeys = 65536;
constexpr size_t kMaxWritePages = 1024;
constexpr size_t kMaxRenewalsPerCall = 65536;
/// Lookup and Reserve try again once, on a new connection: the usual error is a connection to a
/// store that has restarted since.
constexpr int kAttempts = 2;
constexpr absl::Duration kReconnectPeriod = absl::Seconds(1);
constexpr absl::Duration kFirstBusyDelay = absl::Milliseconds(2);
constexpr absl::Duration kMaxBusyDelay = absl::Milliseconds(100);

bool IsConnectionError(const absl::Status& status) {
  return absl::IsUnavailable(status) || absl::IsAborted(status);
}

absl::StatusOr<PageRef> ParsePage(const v1::Page& page, const PageKey& expected, size_t store) {
  const absl::StatusOr<PageKey> key = PageKey::FromBytes(page.key());
  if (!key.ok() || *key != expected) {
    return absl::InternalError(
        absl::StrCat("store answered with another page than ", expected.ToHex()));
  }
  return PageRef{*key, StoreId{static_cast<uint32_t>(store)}, page.slot(), page.generation()};
}

}  // namespace

absl::Status GrpcStoreClientOptions::Validate() const {
  if (stores.empty()) return absl::InvalidArgumentError("stores: at least one is needed");
  for (size_t i = 0; i < stores.size(); ++i) {
    if (stores[i].address.empty()) {
      return absl::InvalidArgumentError(absl::StrCat("stores[", i, "].address is empty"));
    }
    for (size_t j = 0; j < i; ++j) {
      if (stores[i].address == stores[j].address) {
        return absl::InvalidArgumentError(
            absl::StrCat("stores[", i, "].address = ", stores[i].address, ": occurs twice"));
      }
    }
  }
  if (window < 1 || window > 4096) {
    return absl::InvalidArgumentError(absl::StrCat("window = ", window, ": must be 1 to 4096"));
  }
  if (stall_timeout < absl::Milliseconds(10)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "stall_timeout = ", absl::FormatDuration(stall_timeout), ": must be at least 10ms"));
  }
  if (busy_timeout < absl::ZeroDuration()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "busy_timeout = ", absl::FormatDuration(busy_timeout), ": must not be negative"));
  }
  return absl::OkStatus();
}

class GrpcStoreClient::Impl final {
 public:
  explicit Impl(GrpcStoreClientOptions options)
      : options_(std::move(options)), transfers_(TransferOptions()) {
    for (size_t i = 0; i < options_.stores.size(); ++i) {
      StoreConnection::Options connection;
      connection.store = i;
      connection.address = options_.stores[i].address;
      connection.channel = options_.stores[i].channel;
      connection.in_process_arena = options_.stores[i].in_process_arena;
      connection.transfer_thread = &transfers_;
      connection.on_session = [this, i](uint64_t epoch, absl::Duration lease_ttl) {
        OnSession(i, epoch, lease_ttl);
      };
      names_.push_back(options_.stores[i].address);
      stores_.push_back(std::make_unique<StoreConnection>(std::move(connection)));
    }
    epochs_.resize(stores_.size(), 0);
    transfers_.Run([this] { KeepConnected(); });
  }

  ~Impl() { Close(); }

  void Lookup(std::vector<PageKey> keys, Done<LookupResult> done) {
    done = Track(std::move(done));
    if (Refuse(done)) return;
    if (keys.empty()) {
      transfers_.Run([done = std::move(done)]() mutable { std::move(done)(LookupResult{}); });
      return;
    }
    if (keys.size() > kMaxLookupKeys) keys.resize(kMaxLookupKeys);
    const size_t store = HomeStore(names_, keys[0]);
    TryLookup(store, std::move(keys), std::move(done), 1);
  }

  void Write(ChainPosition position, std::vector<PageWrite> pages, Done<WriteResult> done);
  void ReadPrefixes(std::vector<PrefixRead> reads, DoneStatus done);
  void ReadRecords(std::vector<RecordRead> reads, DoneStatus done);

  void Release(std::vector<LeaseId> leases) {
    std::vector<LeaseTable::ServerLease> held;
    {
      absl::MutexLock lock(&mu_);
      for (const LeaseId lease : leases) {
        if (const auto removed = leases_.Remove(lease)) held.push_back(*removed);
      }
    }
    SendRelease(held);
  }

  absl::Status CheckLease(LeaseId lease) const {
    absl::MutexLock lock(&mu_);
    return leases_.Check(lease, options_.clock->Now());
  }

  ClientStats stats() const {
    ClientStats stats;
    transfers_.AddStats(stats);
    absl::MutexLock lock(&mu_);
    stats.leases_lost = leases_.lost();
    stats.pages_written = pages_written_;
    stats.pages_already_stored = pages_already_stored_;
    return stats;
  }

  void Connect(DoneStatus done);
  void Close();

  const PageLayout& layout() const { return options_.layout; }
  Path PathTo(StoreId store) const {
    CHECK(store.value < stores_.size());
    return stores_[store.value]->path();
  }

 private:
  struct WriteState;
  using WritePtr = std::shared_ptr<WriteState>;

  TransferThread::Options TransferOptions() {
    TransferThread::Options options{options_.layout};
    options.num_stores = options_.stores.size();
    options.window = options_.window;
    options.stall_timeout = options_.stall_timeout;
    options.path = options_.data_path;
    options.ucx_tls = options_.ucx_tls;
    options.wrap_transport = options_.wrap_transport;
    options.on_broken = [this](size_t store, const absl::Status& status) {
      LogWarning("data path to store {} is broken: {}", names_[store],
                 std::string(status.message()));
      stores_[store]->DataPathBroken();
    };
    return options;
  }

  /// Counts the operation until its completion has run.
  template <typename Callback>
  Callback Track(Callback done) {
    absl::MutexLock lock(&mu_);
    ++operations_;
    return [this, done = std::move(done)](auto result) mutable {
      std::move(done)(std::move(result));
      absl::MutexLock lock(&mu_);
      --operations_;
    };
  }
  /// True after Close(): `done` is called with CANCELLED.
  template <typename Callback>
  bool Refuse(Callback& done) {
    if (!IsClosed()) return false;
    Fail(std::move(done), absl::CancelledError("store client is closed"));
    return true;
  }
  /// Completes on the client's thread: never inside the caller's call.
  template <typename Callback>
  void Fail(Callback done, absl::Status status) {
    transfers_.Run([done = std::move(done), status = std::move(status)]() mutable {
      std::move(done)(std::move(status));
    });
  }
  bool IsClosed() const {
    absl::MutexLock lock(&mu_);
    return closed_;
  }
  bool Idle() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return operations_ == 0; }

  LeaseId AddLease(size_t store, uint64_t epoch, uint64_t id, absl::Time sent, uint32_t ttl_ms) {
    absl::MutexLock lock(&mu_);
    return leases_.Add({StoreId{static_cast<uint32_t>(store)}, epoch, id}, sent,
                       absl::Milliseconds(ttl_ms));
  }

  void TryLookup(size_t store, std::vector<PageKey> keys, Done<LookupResult> done, int attempt);
  void OnLookup(size_t store, uint64_t epoch, absl::Time sent, const std::vector<PageKey>& keys,
                const v1::LookupResponse& response, Done<LookupResult> done);

  void Reserve(WritePtr write);
  void OnReserved(WritePtr write, absl::Time sent, absl::StatusOr<v1::ReserveResponse> response);
  absl::Status ParseReserved(WriteState& write, const v1::ReserveResponse& response);
  void WriteReserved(WritePtr write);
  void Commit(WritePtr write);
  void FinishAttempt(WritePtr write);
  void FailWrite(WritePtr write, absl::Status status);

  void SubmitReads(std::vector<TransferThread::Piece> pieces, absl::Status valid, DoneStatus done);
  void SendRelease(const std::vector<LeaseTable::ServerLease>& leases);
  /// Tries to reach stores that are not connected, from time to time.
  void KeepConnected();
  void OnSession(size_t store, uint64_t epoch, absl::Duration lease_ttl);
  /// Renews the leases of one incarnation of a store, until another one is there.
  void KeepLeases(size_t store, uint64_t epoch, absl::Duration lease_ttl);
  void RenewDue(size_t store);

  // Constant after construction.
  const GrpcStoreClientOptions options_;
  std::vector<std::string> names_;
  std::vector<std::unique_ptr<StoreConnection>> stores_;

  mutable absl::Mutex mu_;
  LeaseTable leases_ ABSL_GUARDED_BY(mu_);
  std::vector<uint64_t> epochs_ ABSL_GUARDED_BY(mu_);  // last known, by store
  size_t operations_ ABSL_GUARDED_BY(mu_) = 0;
  bool closed_ ABSL_GUARDED_BY(mu_) = false;
  uint64_t pages_written_ ABSL_GUARDED_BY(mu_) = 0;
  uint64_t pages_already_stored_ ABSL_GUARDED_BY(mu_) = 0;

  TransferThread transfers_;  // last: ends first, its callbacks use the rest
};

// --- Lookup -------------------------------------------------------------------------------------

void GrpcStoreClient::Impl::TryLookup(size_t store, std::vector<PageKey> keys,
                                      Done<LookupResult> done, int attempt) {
  stores_[store]->WhenReady([this, store, keys = std::move(keys), done = std::move(done),
                             attempt](absl::StatusOr<StoreConnection::Session> session) mutable {
    if (!session.ok()) {
      std::move(done)(session.status());
      return;
    }
    v1::LookupRequest request;
    request.set_epoch(session->epoch);
    for (const PageKey& key : keys) request.add_keys(key.bytes.data(), key.bytes.size());
    const absl::Time sent = options_.clock->Now();
    const uint64_t epoch = session->epoch;
    stores_[store]->control().Lookup(
        std::move(request),
        [this, store, epoch, sent, keys = std::move(keys), done = std::move(done),
         attempt](absl::StatusOr<v1::LookupResponse> response) mutable {
          if (response.ok()) {
            OnLookup(store, epoch, sent, keys, *response, std::move(done));
            return;
          }
          if (IsConnectionError(response.status())) {
            stores_[store]->Doubt(epoch);
            if (attempt < kAttempts && !IsClosed()) {
              TryLookup(store, std::move(keys), std::move(done), attempt + 1);
              return;
            }
          }
          std::move(done)(response.status());
        });
  });
}

void GrpcStoreClient::Impl::OnLookup(size_t store, uint64_t epoch, absl::Time sent,
                                     const std::vector<PageKey>& keys,
                                     const v1::LookupResponse& response, Done<LookupResult> done) {
  LookupResult result;
  if (response.lease_id() != 0) {
    result.leases.push_back(
        AddLease(store, epoch, response.lease_id(), sent, response.lease_ttl_ms()));
  }
  absl::Status status;
  if (static_cast<size_t>(response.pages_size()) > keys.size()) {
    status = absl::InternalError("store answered with more pages than keys");
  }
  for (int i = 0; status.ok() && i < response.pages_size(); ++i) {
    absl::StatusOr<PageRef> page = ParsePage(response.pages(i), keys[i], store);
    if (page.ok()) result.pages.push_back(*page);
    status = page.status();
  }
  if (!status.ok()) {
    Release(std::move(result.leases));
    std::move(done)(status);
    return;
  }
  std::move(done)(std::move(result));
}

// --- Write: reserve, write one-sidedly, commit; again while another client writes some of it
// ------

struct GrpcStoreClient::Impl::WriteState {
  size_t store = 0;
  ChainPosition position;
  std::vector<PageWrite> pages;
  Done<WriteResult> done;
  int attempts_left = kAttempts;
  absl::Time give_up;  // real time
  absl::Duration busy_delay = kFirstBusyDelay;
  /// Generation under which we wrote page i; 0: we did not.
  std::vector<uint64_t> written;
  std::vector<LeaseId> old_leases;

  // Of the current attempt.
  uint64_t epoch = 0;
  uint64_t server_lease = 0;
  std::vector<PageRef> refs;
  std::vector<v1::ReserveResponse::State> states;
  LeaseId lease;
};

void GrpcStoreClient::Impl::Write(ChainPosition position, std::vector<PageWrite> pages,
                                  Done<WriteResult> done) {
  done = Track(std::move(done));
  if (Refuse(done)) return;
  if (pages.empty() || pages.size() > kMaxWritePages) {
    Fail(std::move(done), absl::InvalidArgumentError(absl::StrCat(
                              "Write of ", pages.size(), " pages: must be 1 to ", kMaxWritePages)));
    return;
  }
  for (const PageWrite& page : pages) {
    if (page.bytes.size() != layout().page_bytes() || page.tokens < 1 ||
        page.tokens > static_cast<uint32_t>(kBlockTokens)) {
      Fail(std::move(done),
           absl::InvalidArgumentError(absl::StrCat(
               "Write of page ", page.key.ToHex(), ": has ", page.bytes.size(), " bytes and ",
               page.tokens, " tokens: must have ", layout().page_bytes(), " and 1 to 64")));
      return;
    }
  }
  auto write = std::make_shared<WriteState>();
  write->store = HomeStore(names_, position.head);
  write->position = position;
  write->written.resize(pages.size(), 0);
  write->pages = std::move(pages);
  write->done = std::move(done);
  write->give_up = Clock::Real()->Now() + options_.busy_timeout;
  Reserve(std::move(write));
}

void GrpcStoreClient::Impl::Reserve(WritePtr write) {
  StoreConnection& store = *stores_[write->store];
  store.WhenReady([this, write](absl::StatusOr<StoreConnection::Session> session) {
    if (!session.ok()) {
      FailWrite(write, session.status());
      return;
    }
    write->epoch = session->epoch;
    v1::ReserveRequest request;
    request.set_epoch(session->epoch);
    for (const PageWrite& page : write->pages) {
      request.add_keys(page.key.bytes.data(), page.key.bytes.size());
    }
    request.set_parent_key(write->position.parent.ToBytes());
    request.set_page_bytes(layout().page_bytes());
    request.set_layout_fingerprint(layout().fingerprint());
    request.set_prefix_bytes(layout().prefix_bytes());
    const absl::Time sent = options_.clock->Now();
    stores_[write->store]->control().Reserve(
        std::move(request), [this, write, sent](absl::StatusOr<v1::ReserveResponse> response) {
          OnReserved(write, sent, std::move(response));
        });
  });
}

void GrpcStoreClient::Impl::OnReserved(WritePtr write, absl::Time sent,
                                       absl::StatusOr<v1::ReserveResponse> response) {
  if (!response.ok()) {
    if (IsConnectionError(response.status())) {
      stores_[write->store]->Doubt(write->epoch);
      if (--write->attempts_left > 0 && !IsClosed()) {
        Reserve(std::move(write));
        return;
      }
    }
    FailWrite(std::move(write), response.status());
    return;
  }
  write->server_lease = response->lease_id();
  write->lease =
      AddLease(write->store, write->epoch, response->lease_id(), sent, response->lease_ttl_ms());
  if (const absl::Status parsed = ParseReserved(*write, *response); !parsed.ok()) {
    Release({write->lease});
    FailWrite(std::move(write), parsed);
    return;
  }
  WriteReserved(std::move(write));
}

absl::Status GrpcStoreClient::Impl::ParseReserved(WriteState& write,
                                                  const v1::ReserveResponse& response) {
  if (static_cast<size_t>(response.slots_size()) != write.pages.size()) {
    return absl::InternalError(absl::StrCat("store answered with ", response.slots_size(),
                                            " slots for ", write.pages.size(), " keys"));
  }
  write.refs.clear();
  write.states.clear();
  for (int i = 0; i < response.slots_size(); ++i) {
    write.states.push_back(response.slots(i).state());
    write.refs.emplace_back();
    switch (response.slots(i).state()) {
      case v1::ReserveResponse::STATE_RESERVED:
      case v1::ReserveResponse::STATE_STORED: {
        const absl::StatusOr<PageRef> ref =
            ParsePage(response.slots(i).page(), write.pages[i].key, write.store);
        if (!ref.ok()) return ref.status();
        write.refs.back() = *ref;
        break;
      }
      case v1::ReserveResponse::STATE_BUSY:
        break;
      default:
        return absl::InternalError(absl::StrCat("store answered with state ",
                                                static_cast<int>(response.slots(i).state())));
    }
  }
  return absl::OkStatus();
}

void GrpcStoreClient::Impl::WriteReserved(WritePtr write) {
  std::vector<TransferThread::Piece> pieces;
  for (size_t i = 0; i < write->pages.size(); ++i) {
    if (write->states[i] != v1::ReserveResponse::STATE_RESERVED) continue;
    const PageWrite& page = write->pages[i];
    const PageRef& ref = write->refs[i];
    SealPage(layout(), page.key, ref.generation, page.tokens, page.bytes);
    TransferThread::Piece piece;
    piece.kind = TransferThread::Piece::Kind::kWritePage;
    piece.store = write->store;
    piece.key = page.key;
    piece.slot = ref.slot;
    piece.generation = ref.generation;
    piece.local = page.bytes;
    pieces.push_back(piece);
  }
  if (pieces.empty()) {
    FinishAttempt(std::move(write));
    return;
  }
  transfers_.Submit(std::move(pieces), [this, write](absl::Status status) {
    if (status.ok()) {
      Commit(write);
      return;
    }
    // Bytes of a broken connection may still arrive at the store. So the lease is not released,
    // which would free the slots at once, but forgotten: it expires into quarantine.
    {
      absl::MutexLock lock(&mu_);
      leases_.Remove(write->lease);
    }
    FailWrite(write, std::move(status));
  });
}

void GrpcStoreClient::Impl::Commit(WritePtr write) {
  v1::CommitRequest request;
  request.set_epoch(write->epoch);
  request.set_lease_id(write->server_lease);
  for (size_t i = 0; i < write->pages.size(); ++i) {
    if (write->states[i] != v1::ReserveResponse::STATE_RESERVED) continue;
    v1::Page* const page = request.add_pages();
    page->set_key(write->refs[i].key.ToBytes());
    page->set_slot(write->refs[i].slot);
    page->set_generation(write->refs[i].generation);
  }
  stores_[write->store]->control().Commit(
      std::move(request), [this, write](absl::StatusOr<v1::CommitResponse> response) {
        if (!response.ok()) {
          if (IsConnectionError(response.status())) stores_[write->store]->Doubt(write->epoch);
          Release({write->lease});
          // A reservation that is gone is, for the caller, a lease lost on the way.
          FailWrite(write, absl::IsNotFound(response.status())
                               ? absl::AbortedError(response.status().message())
                               : response.status());
          return;
        }
        for (size_t i = 0; i < write->pages.size(); ++i) {
          if (write->states[i] == v1::ReserveResponse::STATE_RESERVED) {
            write->written[i] = write->refs[i].generation;
          }
        }
        FinishAttempt(write);
      });
}

void GrpcStoreClient::Impl::FinishAttempt(WritePtr write) {
  const bool busy = std::find(write->states.begin(), write->states.end(),
                              v1::ReserveResponse::STATE_BUSY) != write->states.end();
  if (busy) {
    // Held until the next attempt has leased the same pages anew.
    write->old_leases.push_back(write->lease);
    if (Clock::Real()->Now() >= write->give_up || IsClosed()) {
      FailWrite(std::move(write),
                absl::AbortedError("page is being written by another client; try again later"));
      return;
    }
    const absl::Duration delay = write->busy_delay;
    write->busy_delay = std::min(2 * delay, kMaxBusyDelay);
    transfers_.RunAfter(delay, [this, write] { Reserve(write); });
    return;
  }
  WriteResult result;
  result.pages = std::move(write->refs);
  result.leases.push_back(write->lease);
  uint64_t ours = 0;
  for (size_t i = 0; i < result.pages.size(); ++i) {
    const bool wrote = write->written[i] == result.pages[i].generation;
    result.already_stored.push_back(wrote ? 0 : 1);
    ours += wrote;
  }
  {
    absl::MutexLock lock(&mu_);
    pages_written_ += ours;
    pages_already_stored_ += result.pages.size() - ours;
  }
  Release(std::move(write->old_leases));
  std::move(write->done)(std::move(result));
}

void GrpcStoreClient::Impl::FailWrite(WritePtr write, absl::Status status) {
  Release(std::move(write->old_leases));
  std::move(write->done)(std::move(status));
}

// --- Reads --------------------------------------------------------------------------------------

void GrpcStoreClient::Impl::ReadPrefixes(std::vector<PrefixRead> reads, DoneStatus done) {
  absl::Status valid;
  std::vector<TransferThread::Piece> pieces;
  pieces.reserve(reads.size());
  for (const PrefixRead& read : reads) {
    if (read.page.store.value >= stores_.size() || read.landing.size() != layout().prefix_bytes()) {
      valid = absl::InvalidArgumentError(
          absl::StrCat("prefix read of page ", read.page.key.ToHex(), ": store ",
                       read.page.store.value, ", landing of ", read.landing.size(),
                       " bytes: must be below ", stores_.size(), " and ", layout().prefix_bytes()));
    }
    TransferThread::Piece piece;
    piece.kind = TransferThread::Piece::Kind::kReadPrefix;
    piece.store = read.page.store.value;
    piece.key = read.page.key;
    piece.slot = read.page.slot;
    piece.generation = read.page.generation;
    piece.local = read.landing;
    pieces.push_back(piece);
  }
  SubmitReads(std::move(pieces), std::move(valid), std::move(done));
}

void GrpcStoreClient::Impl::ReadRecords(std::vector<RecordRead> reads, DoneStatus done) {
  absl::Status valid;
  std::vector<TransferThread::Piece> pieces;
  pieces.reserve(reads.size());
  for (const RecordRead& read : reads) {
    if (read.page.store.value >= stores_.size() || read.record < 0 ||
        read.record >= layout().num_records() || read.landing.size() != layout().record_bytes()) {
      valid = absl::InvalidArgumentError(absl::StrCat(
          "record read of page ", read.page.key.ToHex(), ": store ", read.page.store.value,
          ", record ", read.record, ", landing of ", read.landing.size(), " bytes: must be below ",
          stores_.size(), ", below ", layout().num_records(), " and ", layout().record_bytes()));
    }
    TransferThread::Piece piece;
    piece.kind = TransferThread::Piece::Kind::kReadRecord;
    piece.store = read.page.store.value;
    piece.key = read.page.key;
    piece.slot = read.page.slot;
    piece.generation = read.page.generation;
    piece.record = read.record;
    piece.checksum = read.checksum;
    piece.local = read.landing;
    pieces.push_back(piece);
  }
  SubmitReads(std::move(pieces), std::move(valid), std::move(done));
}

void GrpcStoreClient::Impl::SubmitReads(std::vector<TransferThread::Piece> pieces,
                                        absl::Status valid, DoneStatus done) {
  done = Track(std::move(done));
  if (Refuse(done)) return;
  if (!valid.ok()) {
    Fail(std::move(done), std::move(valid));
    return;
  }
  transfers_.Submit(std::move(pieces), std::move(done));
}

// --- Leases and connections ---------------------------------------------------------------------

void GrpcStoreClient::Impl::SendRelease(const std::vector<LeaseTable::ServerLease>& leases) {
  for (size_t store = 0; store < stores_.size(); ++store) {
    v1::ReleaseRequest request;
    for (const LeaseTable::ServerLease& lease : leases) {
      if (lease.store.value != store) continue;
      request.set_epoch(lease.epoch);
      request.add_lease_ids(lease.id);
    }
    // What cannot be released expires.
    if (request.lease_ids_size() > 0) {
      stores_[store]->control().Release(std::move(request),
                                        [](absl::StatusOr<v1::ReleaseResponse>) {});
    }
  }
}

void GrpcStoreClient::Impl::KeepConnected() {
  if (IsClosed()) return;
  for (auto& store : stores_) store->WhenReady([](absl::StatusOr<StoreConnection::Session>) {});
  transfers_.RunAfter(kReconnectPeriod, [this] { KeepConnected(); });
}

void GrpcStoreClient::Impl::OnSession(size_t store, uint64_t epoch, absl::Duration lease_ttl) {
  {
    absl::MutexLock lock(&mu_);
    if (epochs_[store] == epoch) return;  // the same incarnation: its renewals go on
    epochs_[store] = epoch;
    leases_.LoseOthers(StoreId{static_cast<uint32_t>(store)}, epoch);
  }
  transfers_.Run([this, store, epoch, lease_ttl] { KeepLeases(store, epoch, lease_ttl); });
}

void GrpcStoreClient::Impl::KeepLeases(size_t store, uint64_t epoch, absl::Duration lease_ttl) {
  {
    absl::MutexLock lock(&mu_);
    if (closed_ || epochs_[store] != epoch) return;
  }
  // On a doubtful connection too: the answer tells, and leases are precious.
  RenewDue(store);
  const absl::Duration period =
      std::clamp(lease_ttl / 12, absl::Milliseconds(5), absl::Seconds(1));
  transfers_.RunAfter(period, [=, this] { KeepLeases(store, epoch, lease_ttl); });
}

void GrpcStoreClient::Impl::RenewDue(size_t store) {
  const absl::Time sent = options_.clock->Now();
  std::vector<LeaseTable::Renewal> due;
  {
    absl::MutexLock lock(&mu_);
    due = leases_.TakeDue(StoreId{static_cast<uint32_t>(store)}, sent, kMaxRenewalsPerCall);
  }
  if (due.empty()) return;
  const uint64_t epoch = due.front().epoch;
  v1::RenewRequest request;
  request.set_epoch(epoch);
  std::vector<LeaseTable::Renewal> asked;
  for (const LeaseTable::Renewal& renewal : due) {
    // Leases of another incarnation than the first one's are lost as soon as GetInfo says so.
    if (renewal.epoch != epoch) continue;
    request.add_lease_ids(renewal.server_id);
    asked.push_back(renewal);
  }
  stores_[store]->control().Renew(
      std::move(request), [this, store, epoch, sent,
                           asked = std::move(asked)](absl::StatusOr<v1::RenewResponse> response) {
        if (!response.ok()) {
          if (IsConnectionError(response.status())) stores_[store]->Doubt(epoch);
          return;
        }
        const absl::flat_hash_set<uint64_t> lost(response->lost_lease_ids().begin(),
                                                 response->lost_lease_ids().end());
        const absl::Duration ttl = absl::Milliseconds(response->lease_ttl_ms());
        absl::MutexLock lock(&mu_);
        for (const LeaseTable::Renewal& renewal : asked) {
          if (lost.contains(renewal.server_id)) {
            leases_.Lost(renewal.lease);
          } else {
            leases_.Renewed(renewal.lease, sent, ttl);
          }
        }
      });
}

void GrpcStoreClient::Impl::Connect(DoneStatus done) {
  done = Track(std::move(done));
  if (Refuse(done)) return;
  struct State {
    absl::Mutex mu;
    size_t remaining = 0;
    absl::Status status;
    DoneStatus done;
  };
  auto state = std::make_shared<State>();
  state->remaining = stores_.size();
  state->done = std::move(done);
  transfers_.Run([this, state] {
    for (auto& store : stores_) {
      store->WhenReady([state](absl::StatusOr<StoreConnection::Session> session) {
        DoneStatus last;
        {
          absl::MutexLock lock(&state->mu);
          if (state->status.ok()) state->status = session.status();
          if (--state->remaining == 0) last = std::move(state->done);
        }
        if (last) std::move(last)(state->status);
      });
    }
  });
}

void GrpcStoreClient::Impl::Close() {
  std::vector<LeaseTable::ServerLease> held;
  {
    absl::MutexLock lock(&mu_);
    if (!closed_) {
      closed_ = true;
      held = leases_.RemoveAll();
    }
  }
  for (auto& store : stores_) store->control().Cancel();
  transfers_.CloseEndpoints();
  {
    absl::MutexLock lock(&mu_);
    mu_.Await(absl::Condition(this, &Impl::Idle));
    // Operations that were under way may have got leases since.
    for (const LeaseTable::ServerLease& lease : leases_.RemoveAll()) held.push_back(lease);
  }
  SendRelease(held);
  for (auto& store : stores_) store->control().WaitIdle();
}

// --- The public face ----------------------------------------------------------------------------

absl::StatusOr<std::unique_ptr<GrpcStoreClient>> GrpcStoreClient::Create(
    GrpcStoreClientOptions options) {
  if (const absl::Status valid = options.Validate(); !valid.ok()) return valid;
  return std::unique_ptr<GrpcStoreClient>(new GrpcStoreClient(std::move(options)));
}

GrpcStoreClient::GrpcStoreClient(GrpcStoreClientOptions options)
    : impl_(std::make_unique<Impl>(std::move(options))) {}
GrpcStoreClient::~GrpcStoreClient() = default;

const PageLayout& GrpcStoreClient::layout() const { return impl_->layout(); }
void GrpcStoreClient::Lookup(std::vector<PageKey> keys, Done<LookupResult> done) {
  impl_->Lookup(std::move(keys), std::move(done));
}
void GrpcStoreClient::Write(ChainPosition position, std::vector<PageWrite> pages,
                            Done<WriteResult> done) {
  impl_->Write(position, std::move(pages), std::move(done));
}
void GrpcStoreClient::ReadPrefixes(std::vector<PrefixRead> reads, DoneStatus done) {
  impl_->ReadPrefixes(std::move(reads), std::move(done));
}
void GrpcStoreClient::ReadRecords(std::vector<RecordRead> reads, DoneStatus done) {
  impl_->ReadRecords(std::move(reads), std::move(done));
}
void GrpcStoreClient::Release(std::vector<LeaseId> leases) { impl_->Release(std::move(leases)); }
absl::Status GrpcStoreClient::CheckLease(LeaseId lease) const { return impl_->CheckLease(lease); }
Path GrpcStoreClient::PathTo(StoreId store) const { return impl_->PathTo(store); }
ClientStats GrpcStoreClient::stats() const { return impl_->stats(); }
void GrpcStoreClient::Connect(DoneStatus done) { impl_->Connect(std::move(done)); }
void GrpcStoreClient::Close() { impl_->Close(); }

}  // namespace nosara::kvstore
