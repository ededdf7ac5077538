#include "kvstore/client/grpc_store_client.h"

#include <algorithm>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "base/check.h"
#include "base/log.h"
#include "kvstore/client/chain_lookup.h"
#include "kvstore/client/copy_repairer.h"
#include "kvstore/client/copy_table.h"
#include "kvstore/client/failover_reader.h"
#include "kvstore/client/lease_keeper.h"
#include "kvstore/client/page_writer.h"
#include "kvstore/client/replica_writer.h"
#include "kvstore/client/store_set.h"

namespace nosara::kvstore {
namespace {

constexpr size_t kMaxLookupKeys = 65536;
constexpr size_t kMaxWritePages = 1024;
constexpr absl::Duration kReconnectPeriod = absl::Seconds(1);

absl::Status ValidateStores(const std::vector<StoreEndpoint>& stores) {
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
  return absl::OkStatus();
}

}  // namespace

absl::Status GrpcStoreClientOptions::Validate() const {
  if (stores.empty() && membership == Membership::kStatic) {
    return absl::InvalidArgumentError("stores: at least one is needed");
  }
  if (const absl::Status valid = ValidateStores(stores); !valid.ok()) return valid;
  if (replicas < 1 || replicas > 8) {
    return absl::InvalidArgumentError(absl::StrCat("replicas = ", replicas, ": must be 1 to 8"));
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
      : options_(std::move(options)),
        leases_(options_.clock, &stores_, &transfers_),
        writer_(WriterOptions()),
        replicas_(ReplicaOptions()),
        lookup_(LookupOptions()),
        reader_({options_.layout, &stores_, &transfers_, &copies_}),
        repairer_(RepairOptions()),
        transfers_(TransferOptions()) {
    CHECK(SetStores(options_.stores).ok());
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
    if (stores_.members().empty()) {
      Fail(std::move(done), absl::UnavailableError("no KV store is known"));
      return;
    }
    lookup_.Lookup(std::move(keys), std::move(done));
  }

  void Write(ChainPosition position, std::vector<PageWrite> pages, Done<WriteResult> done);
  void ReadPrefixes(const std::vector<PrefixRead>& reads, Done<std::vector<PageRef>> done);
  void ReadRecords(const std::vector<RecordRead>& reads, DoneStatus done);

  void Release(const std::vector<LeaseId>& leases) {
    copies_.Remove(leases);
    leases_.Release(leases);
  }
  absl::Status CheckLease(LeaseId lease) const { return leases_.Check(lease); }

  ClientStats stats() const {
    ClientStats stats;
    transfers_.AddStats(stats);
    stats.leases_lost = leases_.lost();
    stats.pages_written = writer_.pages_written();
    stats.pages_already_stored = writer_.pages_already_stored();
    stats.reads_failed_over = reader_.reads_failed_over();
    stats.copies_missing = replicas_.copies_missing();
    stats.pages_discarded = reader_.pages_discarded();
    stats.copies_repaired = repairer_.copies_repaired();
    return stats;
  }

  absl::Status SetStores(const std::vector<StoreEndpoint>& stores);
  void Connect(DoneStatus done);
  void Close();

  const PageLayout& layout() const { return options_.layout; }
  Path PathTo(StoreId store) const {
    CHECK(store.value < stores_.size());
    return stores_.at(store.value).path();
  }
  std::shared_ptr<const MappedArena> Map(StoreId store) const {
    return store.value < stores_.size() ? stores_.at(store.value).arena() : nullptr;
  }
  std::vector<std::string> UnreachableStores() const {
    std::vector<std::string> addresses;
    for (const size_t store : stores_.members()) {
      if (stores_.at(store).unreachable()) addresses.push_back(stores_.at(store).address());
    }
    return addresses;
  }

 private:
  TransferThread::Options TransferOptions() {
    TransferThread::Options options{options_.layout};
    options.window = options_.window;
    options.stall_timeout = options_.stall_timeout;
    options.path = options_.data_path;
    options.ucx_tls = options_.ucx_tls;
    options.wrap_transport = options_.wrap_transport;
    options.on_broken = [this](size_t store, const absl::Status& status) {
      LogWarning("data path to store {} is broken: {}", stores_.at(store).address(),
                 std::string(status.message()));
      stores_.at(store).DataPathBroken();
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

  void Read(std::vector<TransferThread::Piece> pieces, absl::Status valid,
            Done<std::vector<PageRef>> done);
  /// Tries to reach stores that are not connected, from time to time.
  void KeepConnected();
  PageWriter::Options WriterOptions() {
    PageWriter::Options options{options_.layout};
    options.busy_timeout = options_.busy_timeout;
    options.clock = options_.clock;
    options.stores = &stores_;
    options.leases = &leases_;
    options.transfers = &transfers_;
    return options;
  }

  ReplicaWriter::Options ReplicaOptions() {
    ReplicaWriter::Options options;
    options.replicas = options_.replicas;
    options.stores = &stores_;
    options.leases = &leases_;
    options.copies = &copies_;
    options.writer = &writer_;
    return options;
  }
  ChainLookup::Options LookupOptions() {
    ChainLookup::Options options;
    options.replicas = options_.replicas;
    options.clock = options_.clock;
    options.stores = &stores_;
    options.leases = &leases_;
    options.copies = &copies_;
    options.closed = [this] { return IsClosed(); };
    options.on_short = [this](const PageRef& copy, const PageOrigin& origin) {
      repairer_.Add(copy, origin);
    };
    return options;
  }
  CopyRepairer::Options RepairOptions() {
    CopyRepairer::Options options{options_.layout};
    options.replicas = options_.replicas;
    options.bytes_per_second = options_.repair_bytes_per_second;
    options.stores = &stores_;
    options.transfers = &transfers_;
    options.reader = &reader_;
    options.writer = &writer_;
    options.leases = &leases_;
    return options;
  }
  /// `store` has no page any more that it had: the pages that this client holds get new copies.
  void RepairPagesOf(size_t store) {
    if (options_.replicas == 1) return;
    const StoreId id{static_cast<uint32_t>(store)};
    for (const auto& [copy, origin] : copies_.OtherCopies(id)) repairer_.Add(copy, origin);
  }
  void WatchForLosses();

  // Constant after construction.
  const GrpcStoreClientOptions options_;

  /// Of a store, as WatchForLosses() saw it.
  struct Outage {
    uint64_t epoch = 0;
    absl::Time since = absl::InfiniteFuture();
    bool repaired = false;
  };
  std::vector<Outage> outages_;  // the transfer thread's

  absl::Mutex membership_mu_;  // one SetStores() at a time

  mutable absl::Mutex mu_;
  size_t operations_ ABSL_GUARDED_BY(mu_) = 0;
  bool closed_ ABSL_GUARDED_BY(mu_) = false;

  // Have their own synchronisation.
  StoreSet stores_;
  CopyTable copies_;
  LeaseKeeper leases_;
  PageWriter writer_;
  ReplicaWriter replicas_;
  ChainLookup lookup_;
  FailoverReader reader_;
  CopyRepairer repairer_;
  TransferThread transfers_;  // last: ends first, its callbacks use the rest
};

// --- Write ---------------------------------------------------------------------------------------

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
  if (stores_.members().empty()) {
    Fail(std::move(done), absl::UnavailableError("no KV store is known"));
    return;
  }
  replicas_.Write(position, std::move(pages), std::move(done));
}

// --- Reads --------------------------------------------------------------------------------------

void GrpcStoreClient::Impl::ReadPrefixes(const std::vector<PrefixRead>& reads,
                                         Done<std::vector<PageRef>> done) {
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
  Read(std::move(pieces), std::move(valid), std::move(done));
}

void GrpcStoreClient::Impl::ReadRecords(const std::vector<RecordRead>& reads, DoneStatus done) {
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
  Read(std::move(pieces), std::move(valid),
       [done = std::move(done)](absl::StatusOr<std::vector<PageRef>> copies) mutable {
         std::move(done)(copies.status());
       });
}

void GrpcStoreClient::Impl::Read(std::vector<TransferThread::Piece> pieces, absl::Status valid,
                                 Done<std::vector<PageRef>> done) {
  done = Track(std::move(done));
  if (Refuse(done)) return;
  if (!valid.ok()) {
    Fail(std::move(done), std::move(valid));
    return;
  }
  reader_.Read(std::move(pieces), std::move(done));
}

// --- Connections ---------------------------------------------------------------------------------

void GrpcStoreClient::Impl::WatchForLosses() {
  const absl::Time now = Clock::Real()->Now();
  outages_.resize(stores_.size());
  for (size_t store = 0; store < stores_.size(); ++store) {
    Outage& outage = outages_[store];
    const uint64_t epoch = stores_.at(store).epoch();
    const bool restarted = outage.epoch != 0 && epoch != outage.epoch;
    outage.epoch = epoch;
    if (stores_.at(store).live()) {
      outage.since = absl::InfiniteFuture();
      outage.repaired = false;
      if (restarted) RepairPagesOf(store);
      continue;
    }
    outage.since = std::min(outage.since, now);
    if (now - outage.since >= options_.repair_delay && !std::exchange(outage.repaired, true)) {
      RepairPagesOf(store);
    }
  }
}

void GrpcStoreClient::Impl::KeepConnected() {
  if (IsClosed()) return;
  WatchForLosses();
  for (size_t store = 0; store < stores_.size(); ++store) {
    stores_.at(store).WhenReady([](absl::StatusOr<StoreConnection::Session>) {});
  }
  transfers_.RunAfter(kReconnectPeriod, [this] { KeepConnected(); });
}

absl::Status GrpcStoreClient::Impl::SetStores(const std::vector<StoreEndpoint>& stores) {
  if (const absl::Status valid = ValidateStores(stores); !valid.ok()) return valid;
  absl::MutexLock lock(&membership_mu_);
  std::vector<std::string> addresses;
  for (const StoreEndpoint& store : stores) addresses.push_back(store.address);
  const bool room = stores_.SetMembers(addresses, [&](size_t store, const std::string& address) {
    const auto endpoint = std::find_if(stores.begin(), stores.end(), [&](const StoreEndpoint& one) {
      return one.address == address;
    });
    StoreConnection::Options connection;
    connection.store = store;
    connection.address = address;
    connection.channel = endpoint->channel;
    connection.in_process_arena = endpoint->in_process_arena;
    connection.transfer_thread = &transfers_;
    connection.on_session = [this, store](uint64_t epoch, absl::Duration lease_ttl) {
      leases_.OnSession(store, epoch, lease_ttl);
    };
    return std::make_unique<StoreConnection>(std::move(connection));
  });
  if (room) return absl::OkStatus();
  return absl::ResourceExhaustedError(
      absl::StrCat("more than ", StoreSet::kMaxStores, " different stores were met"));
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
  const std::vector<size_t> members = stores_.members();
  if (members.empty()) {
    Fail(std::move(done), absl::UnavailableError("no KV store is known"));
    return;
  }
  state->remaining = members.size();
  state->done = std::move(done);
  transfers_.Run([this, state, members] {
    for (const size_t store : members) {
      stores_.at(store).WhenReady([state](absl::StatusOr<StoreConnection::Session> session) {
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
  {
    absl::MutexLock lock(&mu_);
    closed_ = true;
  }
  leases_.Close();
  repairer_.Close();
  writer_.Close();
  for (size_t store = 0; store < stores_.size(); ++store) stores_.at(store).control().Cancel();
  transfers_.CloseEndpoints();
  {
    absl::MutexLock lock(&mu_);
    mu_.Await(absl::Condition(this, &Impl::Idle));
  }
  repairer_.WaitIdle();
  leases_.ReleaseAll();
  for (size_t store = 0; store < stores_.size(); ++store) stores_.at(store).control().WaitIdle();
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
void GrpcStoreClient::ReadPrefixes(std::vector<PrefixRead> reads, Done<std::vector<PageRef>> done) {
  impl_->ReadPrefixes(reads, std::move(done));
}
void GrpcStoreClient::ReadRecords(std::vector<RecordRead> reads, DoneStatus done) {
  impl_->ReadRecords(reads, std::move(done));
}
void GrpcStoreClient::Release(std::vector<LeaseId> leases) { impl_->Release(leases); }
std::shared_ptr<const MappedArena> GrpcStoreClient::Map(StoreId store) const {
  return impl_->Map(store);
}
absl::Status GrpcStoreClient::CheckLease(LeaseId lease) const { return impl_->CheckLease(lease); }
Path GrpcStoreClient::PathTo(StoreId store) const { return impl_->PathTo(store); }
std::vector<std::string> GrpcStoreClient::UnreachableStores() const {
  return impl_->UnreachableStores();
}
ClientStats GrpcStoreClient::stats() const { return impl_->stats(); }
absl::Status GrpcStoreClient::SetStores(std::vector<StoreEndpoint> stores) {
  return impl_->SetStores(stores);
}
void GrpcStoreClient::Connect(DoneStatus done) { impl_->Connect(std::move(done)); }
void GrpcStoreClient::Close() { impl_->Close(); }

}  // namespace nosara::kvstore
