#include "kvstore/client/grpc_store_client.h"

#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "base/check.h"
#include "base/log.h"
#include "kvstore/client/control_client.h"
#include "kvstore/client/lease_keeper.h"
#include "kvstore/client/page_writer.h"
#include "kvstore/client/placement.h"
#include "kvstore/client/store_connection.h"

namespace nosara::kvstore {
namespace {

constexpr size_t kMaxLookupKeys = 65536;
constexpr size_t kMaxWritePages = 1024;
/// Lookup is tried again once, on a new connection: the usual error is a connection to a store that
/// has restarted since.
constexpr int kAttempts = 2;
constexpr absl::Duration kReconnectPeriod = absl::Seconds(1);

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
      : options_(std::move(options)),
        leases_(options_.clock, &stores_, options_.stores.size(), &transfers_),
        writer_(WriterOptions()),
        transfers_(TransferOptions()) {
    for (size_t i = 0; i < options_.stores.size(); ++i) {
      StoreConnection::Options connection;
      connection.store = i;
      connection.address = options_.stores[i].address;
      connection.channel = options_.stores[i].channel;
      connection.in_process_arena = options_.stores[i].in_process_arena;
      connection.transfer_thread = &transfers_;
      connection.on_session = [this, i](uint64_t epoch, absl::Duration lease_ttl) {
        leases_.OnSession(i, epoch, lease_ttl);
      };
      names_.push_back(options_.stores[i].address);
      stores_.push_back(std::make_unique<StoreConnection>(std::move(connection)));
    }
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
  void ReadPrefixes(const std::vector<PrefixRead>& reads, DoneStatus done);
  void ReadRecords(const std::vector<RecordRead>& reads, DoneStatus done);

  void Release(const std::vector<LeaseId>& leases) { leases_.Release(leases); }
  absl::Status CheckLease(LeaseId lease) const { return leases_.Check(lease); }

  ClientStats stats() const {
    ClientStats stats;
    transfers_.AddStats(stats);
    stats.leases_lost = leases_.lost();
    stats.pages_written = writer_.pages_written();
    stats.pages_already_stored = writer_.pages_already_stored();
    return stats;
  }

  void Connect(DoneStatus done);
  void Close();

  const PageLayout& layout() const { return options_.layout; }
  Path PathTo(StoreId store) const {
    CHECK(store.value < stores_.size());
    return stores_[store.value]->path();
  }
  std::shared_ptr<const MappedArena> Map(StoreId store) const {
    return store.value < stores_.size() ? stores_[store.value]->arena() : nullptr;
  }
  std::vector<std::string> UnreachableStores() const {
    std::vector<std::string> addresses;
    for (const auto& store : stores_) {
      if (store->unreachable()) addresses.push_back(store->address());
    }
    return addresses;
  }

 private:
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

  void TryLookup(size_t store, std::vector<PageKey> keys, Done<LookupResult> done, int attempt);
  void OnLookup(size_t store, uint64_t epoch, absl::Time sent, const std::vector<PageKey>& keys,
                const v1::LookupResponse& response, Done<LookupResult> done);

  void SubmitReads(std::vector<TransferThread::Piece> pieces, absl::Status valid, DoneStatus done);
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

  // Constant after construction.
  const GrpcStoreClientOptions options_;
  std::vector<std::string> names_;
  std::vector<std::unique_ptr<StoreConnection>> stores_;

  mutable absl::Mutex mu_;
  size_t operations_ ABSL_GUARDED_BY(mu_) = 0;
  bool closed_ ABSL_GUARDED_BY(mu_) = false;

  // Have their own synchronisation.
  LeaseKeeper leases_;
  PageWriter writer_;
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
    result.leases.push_back(leases_.Add(store, epoch, response.lease_id(), sent,
                                        absl::Milliseconds(response.lease_ttl_ms())));
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
    leases_.Release(result.leases);
    std::move(done)(status);
    return;
  }
  std::move(done)(std::move(result));
}

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
  writer_.Write(HomeStore(names_, position.head), position, std::move(pages), std::move(done));
}

// --- Reads --------------------------------------------------------------------------------------

void GrpcStoreClient::Impl::ReadPrefixes(const std::vector<PrefixRead>& reads, DoneStatus done) {
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

// --- Connections ---------------------------------------------------------------------------------

void GrpcStoreClient::Impl::KeepConnected() {
  if (IsClosed()) return;
  for (auto& store : stores_) store->WhenReady([](absl::StatusOr<StoreConnection::Session>) {});
  transfers_.RunAfter(kReconnectPeriod, [this] { KeepConnected(); });
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
  {
    absl::MutexLock lock(&mu_);
    closed_ = true;
  }
  leases_.Close();
  writer_.Close();
  for (auto& store : stores_) store->control().Cancel();
  transfers_.CloseEndpoints();
  {
    absl::MutexLock lock(&mu_);
    mu_.Await(absl::Condition(this, &Impl::Idle));
  }
  leases_.ReleaseAll();
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
void GrpcStoreClient::Connect(DoneStatus done) { impl_->Connect(std::move(done)); }
void GrpcStoreClient::Close() { impl_->Close(); }

}  // namespace nosara::kvstore
