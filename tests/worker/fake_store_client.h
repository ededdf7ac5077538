// A StoreClient in memory, with faults on demand.
#pragma once

#include <cstring>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/synchronization/mutex.h"
#include "base/bounded_queue.h"
#include "base/check.h"
#include "kvstore/api/store_client.h"

namespace nosara::worker {

/// What several FakeStoreClients share: the pages of one store. Thread-safe.
class FakeStore final {
 public:
  explicit FakeStore(const kvstore::PageLayout& layout) : layout_(layout) {}

  enum class Fault { kNone, kUnavailable, kFull };
  void SetWriteFault(Fault fault) { Set(write_fault_, fault); }
  void SetLookupFault(Fault fault) { Set(lookup_fault_, fault); }
  void SetReadFault(Fault fault) { Set(read_fault_, fault); }

  size_t pages() const {
    absl::MutexLock lock(&mu_);
    return pages_.size();
  }
  size_t leases() const {
    absl::MutexLock lock(&mu_);
    return leases_.size();
  }
  /// What clients say of how records come.
  void SetPath(kvstore::Path path) {
    absl::MutexLock lock(&mu_);
    path_ = path;
  }
  /// All leases expire.
  void LoseLeases() {
    absl::MutexLock lock(&mu_);
    leases_.clear();
  }
  /// What strikes the store as the reads of records go by.
  enum class Strike {
    kRestart,  // all pages and leases are gone, and the store is there
    kOutage,   // it is gone for some operations, then there without pages and leases
    kHiccup,   // one read fails
    kEvict,    // all pages are gone, leases and store are there
    kCorrupt,  // CorruptRecords()
  };
  /// The strike comes at each `reads`th call of ReadRecords from now, `times` times.
  void StrikeAt(Strike strike, int reads, int times = 1) {
    absl::MutexLock lock(&mu_);
    strike_ = strike;
    reads_to_strike_ = strike_period_ = reads;
    strikes_left_ = times;
  }
  /// Until the next strike.
  int reads_to_strike() const {
    absl::MutexLock lock(&mu_);
    return reads_to_strike_;
  }
  int strikes() const {
    absl::MutexLock lock(&mu_);
    return strikes_;
  }
  /// Flips a bit of every record; prefixes stay right.
  void CorruptRecords() {
    absl::MutexLock lock(&mu_);
    Corrupt();
  }

 private:
  friend class FakeStoreClient;
  static constexpr int kOutageOperations = 5;
  struct Page {
    uint64_t generation = 0;
    std::vector<std::byte> bytes;
  };

  void Corrupt() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    for (auto& [key, page] : pages_) {
      for (int r = 0; r < layout_.num_records(); ++r) {
        page.bytes[layout_.record_offset(r)] ^= std::byte{1};
      }
    }
  }
  /// Fails an operation during an outage.
  absl::Status Operate() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (outage_ == 0) return absl::OkStatus();
    --outage_;
    return absl::UnavailableError("fake store is out");
  }
  absl::Status OperateRead() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (absl::Status out = Operate(); !out.ok()) return out;
    if (strikes_left_ == 0 || --reads_to_strike_ > 0) return absl::OkStatus();
    reads_to_strike_ = strike_period_;
    --strikes_left_;
    ++strikes_;
    switch (strike_) {
      case Strike::kCorrupt:
        Corrupt();
        return absl::OkStatus();
      case Strike::kHiccup:
        return absl::UnavailableError("fake store has the hiccups");
      case Strike::kOutage:
        outage_ = kOutageOperations;
        [[fallthrough]];
      case Strike::kRestart:
        leases_.clear();
        [[fallthrough]];
      case Strike::kEvict:
        pages_.clear();
        return Operate();
    }
    return absl::OkStatus();
  }

  void Set(Fault& member, Fault fault) {
    absl::MutexLock lock(&mu_);
    member = fault;
  }
  static absl::Status ToStatus(Fault fault) {
    if (fault == Fault::kUnavailable) return absl::UnavailableError("fake store is down");
    if (fault == Fault::kFull) return absl::ResourceExhaustedError("fake store is full");
    return absl::OkStatus();
  }

  const kvstore::PageLayout layout_;
  mutable absl::Mutex mu_;
  absl::flat_hash_map<kvstore::PageKey, Page> pages_ ABSL_GUARDED_BY(mu_);
  absl::flat_hash_set<uint64_t> leases_ ABSL_GUARDED_BY(mu_);
  uint64_t next_ ABSL_GUARDED_BY(mu_) = 1;
  kvstore::Path path_ ABSL_GUARDED_BY(mu_) = kvstore::Path::kInProcess;
  Fault write_fault_ ABSL_GUARDED_BY(mu_) = Fault::kNone;
  Fault lookup_fault_ ABSL_GUARDED_BY(mu_) = Fault::kNone;
  Fault read_fault_ ABSL_GUARDED_BY(mu_) = Fault::kNone;
  Strike strike_ ABSL_GUARDED_BY(mu_) = Strike::kRestart;
  int reads_to_strike_ ABSL_GUARDED_BY(mu_) = 0;
  int strike_period_ ABSL_GUARDED_BY(mu_) = 0;
  int strikes_left_ ABSL_GUARDED_BY(mu_) = 0;
  int strikes_ ABSL_GUARDED_BY(mu_) = 0;
  int outage_ ABSL_GUARDED_BY(mu_) = 0;  // operations that fail yet
};

/// Completes everything in order on a thread of its own, as the contract says.
class FakeStoreClient final : public kvstore::StoreClient {
 public:
  explicit FakeStoreClient(FakeStore* store) : store_(store), queue_(1 << 16) {
    thread_ = std::thread([this] {
      while (auto work = queue_.Pop()) std::move (*work)();
    });
  }
  ~FakeStoreClient() override { Close(); }

  const kvstore::PageLayout& layout() const override { return store_->layout_; }

  void Lookup(std::vector<kvstore::PageKey> keys, Done<kvstore::LookupResult> done) override {
    Post([this, keys = std::move(keys), done = std::move(done)]() mutable {
      absl::StatusOr<kvstore::LookupResult> result = DoLookup(keys);
      std::move(done)(std::move(result));
    });
  }
  void Write(kvstore::ChainPosition position, std::vector<kvstore::PageWrite> pages,
             Done<kvstore::WriteResult> done) override {
    Post([this, pages = std::move(pages), done = std::move(done)]() mutable {
      absl::StatusOr<kvstore::WriteResult> result = DoWrite(pages);
      std::move(done)(std::move(result));
    });
  }
  void ReadPrefixes(std::vector<kvstore::PrefixRead> reads,
                    Done<std::vector<kvstore::PageRef>> done) override {
    Post([this, reads = std::move(reads), done = std::move(done)]() mutable {
      if (const absl::Status read = DoReadPrefixes(reads); !read.ok()) {
        std::move(done)(read);
        return;
      }
      std::vector<kvstore::PageRef> pages;
      for (const kvstore::PrefixRead& one : reads) pages.push_back(one.page);
      std::move(done)(std::move(pages));
    });
  }
  void ReadRecords(std::vector<kvstore::RecordRead> reads, DoneStatus done) override {
    Post([this, reads = std::move(reads), done = std::move(done)]() mutable {
      std::move(done)(DoReadRecords(reads));
    });
  }
  void Release(std::vector<kvstore::LeaseId> leases) override {
    absl::MutexLock lock(&store_->mu_);
    for (kvstore::LeaseId lease : leases) store_->leases_.erase(lease.value);
  }
  absl::Status CheckLease(kvstore::LeaseId lease) const override {
    absl::MutexLock lock(&store_->mu_);
    return store_->leases_.contains(lease.value) ? absl::OkStatus()
                                                 : absl::AbortedError("fake lease is lost");
  }
  kvstore::Path PathTo(kvstore::StoreId store) const override {
    absl::MutexLock lock(&store_->mu_);
    return store_->path_;
  }
  std::vector<std::string> UnreachableStores() const override { return {}; }
  kvstore::ClientStats stats() const override { return {}; }
  void Close() override {
    queue_.Close();
    if (thread_.joinable()) thread_.join();
  }

 private:
  using Work = absl::AnyInvocable<void() &&>;
  void Post(Work work) { CHECK(queue_.TryPush(std::move(work))); }

  absl::StatusOr<kvstore::LookupResult> DoLookup(const std::vector<kvstore::PageKey>& keys) {
    absl::MutexLock lock(&store_->mu_);
    if (absl::Status fault = FakeStore::ToStatus(store_->lookup_fault_); !fault.ok()) return fault;
    if (absl::Status out = store_->Operate(); !out.ok()) return out;
    kvstore::LookupResult result;
    for (const kvstore::PageKey& key : keys) {
      const auto page = store_->pages_.find(key);
      if (page == store_->pages_.end()) break;
      result.pages.push_back({key, {}, 0, page->second.generation});
    }
    if (!result.pages.empty()) result.leases.push_back(NewLease());
    return result;
  }
  absl::StatusOr<kvstore::WriteResult> DoWrite(const std::vector<kvstore::PageWrite>& pages) {
    absl::MutexLock lock(&store_->mu_);
    if (absl::Status fault = FakeStore::ToStatus(store_->write_fault_); !fault.ok()) return fault;
    if (absl::Status out = store_->Operate(); !out.ok()) return out;
    kvstore::WriteResult result;
    for (const kvstore::PageWrite& write : pages) {
      auto [page, added] = store_->pages_.try_emplace(write.key);
      if (added) {
        page->second.generation = store_->next_++;
        kvstore::SealPage(store_->layout_, write.key, page->second.generation, write.tokens,
                          write.bytes);
        page->second.bytes.assign(write.bytes.begin(), write.bytes.end());
      }
      result.pages.push_back({write.key, {}, 0, page->second.generation});
      result.already_stored.push_back(added ? 0 : 1);
    }
    result.leases.push_back(NewLease());
    return result;
  }
  absl::Status DoReadPrefixes(const std::vector<kvstore::PrefixRead>& reads) {
    absl::MutexLock lock(&store_->mu_);
    if (absl::Status fault = FakeStore::ToStatus(store_->read_fault_); !fault.ok()) return fault;
    if (absl::Status out = store_->Operate(); !out.ok()) return out;
    for (const kvstore::PrefixRead& read : reads) {
      const auto page = store_->pages_.find(read.page.key);
      if (page == store_->pages_.end()) return absl::NotFoundError("page");
      if (page->second.generation != read.page.generation) return absl::AbortedError("page");
      std::memcpy(read.landing.data(), page->second.bytes.data(), read.landing.size());
    }
    return absl::OkStatus();
  }
  absl::Status DoReadRecords(const std::vector<kvstore::RecordRead>& reads) {
    absl::MutexLock lock(&store_->mu_);
    if (absl::Status fault = FakeStore::ToStatus(store_->read_fault_); !fault.ok()) return fault;
    if (absl::Status out = store_->OperateRead(); !out.ok()) return out;
    for (const kvstore::RecordRead& read : reads) {
      const auto page = store_->pages_.find(read.page.key);
      if (page == store_->pages_.end()) return absl::NotFoundError("page");
      if (page->second.generation != read.page.generation) return absl::AbortedError("page");
      std::memcpy(read.landing.data(),
                  page->second.bytes.data() + store_->layout_.record_offset(read.record),
                  read.landing.size());
      if (kvstore::PageChecksum(read.page.key, read.page.generation, read.record, read.landing) !=
          read.checksum) {
        store_->pages_.erase(page);  // as the contract of StoreClient says
        return absl::DataLossError("record checksum differs");
      }
    }
    return absl::OkStatus();
  }
  kvstore::LeaseId NewLease() ABSL_EXCLUSIVE_LOCKS_REQUIRED(store_->mu_) {
    const uint64_t lease = store_->next_++;
    store_->leases_.insert(lease);
    return {lease};
  }

  FakeStore* const store_;
  BoundedQueue<Work> queue_;
  std::thread thread_;
};

}  // namespace nosara::worker
