// A running store and blocking calls of its clients, for the integration tests.
#pragma once

#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/synchronization/notification.h"
#include "absl/time/time.h"
#include "kvstore/api/layout.h"
#include "kvstore/client/grpc_store_client.h"
#include "kvstore/server/kvstore_server.h"
#include "tests/status_matchers.h"

namespace nosara::kvstore {

/// A small page: 2 layers, 2 heads, D = 16, f32.
inline PageLayout TestLayout() {
  absl::StatusOr<PageLayout> layout = PageLayout::Create(2, 2, 16, 4);
  EXPECT_TRUE(layout.ok()) << layout.status();
  return *layout;
}

/// Waits for the one completion of an asynchronous call. A minute is far beyond any time that a
/// call may take, so that a hang is a failure with a stack rather than a timeout of the program.
template <typename T>
class Waiter {
 public:
  auto Callback() {
    return [this](T result) {
      result_ = std::move(result);
      done_.Notify();
    };
  }
  T Wait() {
    if (!done_.WaitForNotificationWithTimeout(absl::Minutes(1))) {
      ADD_FAILURE() << "no completion within a minute";
      std::abort();
    }
    return std::move(result_);
  }
  bool done() const { return done_.HasBeenNotified(); }

 private:
  absl::Notification done_;
  T result_{};
};

inline absl::StatusOr<LookupResult> Lookup(StoreClient& client, std::vector<PageKey> keys) {
  Waiter<absl::StatusOr<LookupResult>> waiter;
  client.Lookup(std::move(keys), waiter.Callback());
  return waiter.Wait();
}

inline absl::StatusOr<WriteResult> Write(StoreClient& client, ChainPosition position,
                                         std::vector<PageWrite> pages) {
  Waiter<absl::StatusOr<WriteResult>> waiter;
  client.Write(position, std::move(pages), waiter.Callback());
  return waiter.Wait();
}

inline absl::StatusOr<std::vector<PageRef>> ReadPrefixes(StoreClient& client,
                                                         std::vector<PrefixRead> reads) {
  Waiter<absl::StatusOr<std::vector<PageRef>>> waiter;
  client.ReadPrefixes(std::move(reads), waiter.Callback());
  return waiter.Wait();
}

inline absl::Status ReadRecords(StoreClient& client, std::vector<RecordRead> reads) {
  Waiter<absl::Status> waiter;
  client.ReadRecords(std::move(reads), waiter.Callback());
  return waiter.Wait();
}

/// The keys of a chain of `blocks` blocks of random tokens, and random bytes for their pages.
struct TestChain {
  TestChain(const PageLayout& layout, int blocks, uint64_t seed) {
    std::mt19937_64 random(seed);
    namespace_key = NamespaceKey("model", layout.fingerprint(), "rope", "");
    std::vector<int32_t> tokens(static_cast<size_t>(blocks) * kBlockTokens);
    for (int32_t& token : tokens) token = static_cast<int32_t>(random() % 50000);
    keys = ChainKeys(namespace_key, tokens);
    for (int i = 0; i < blocks; ++i) {
      std::vector<std::byte> page(layout.page_bytes());
      for (std::byte& byte : page) byte = static_cast<std::byte>(random());
      pages.push_back(std::move(page));
    }
  }

  /// Blocks [begin, end) as arguments of Write; the pages are sealed in place.
  std::vector<PageWrite> Writes(size_t begin, size_t end) {
    std::vector<PageWrite> writes;
    for (size_t i = begin; i < end; ++i) {
      writes.push_back({keys[i], kBlockTokens, absl::MakeSpan(pages[i])});
    }
    return writes;
  }
  std::vector<PageWrite> Writes() { return Writes(0, keys.size()); }
  ChainPosition At(size_t block) const {
    return {block, keys[block - block % kGroupBlocks], block == 0 ? namespace_key : keys[block - 1],
            namespace_key};
  }

  PageKey namespace_key;
  std::vector<PageKey> keys;
  std::vector<std::vector<std::byte>> pages;
};

/// Reads all of `chain` through `client` at `refs`, prefixes then records, and compares.
inline absl::Status ReadAndCompare(StoreClient& client, const TestChain& chain,
                                   const std::vector<PageRef>& refs) {
  const PageLayout& layout = client.layout();
  std::vector<std::vector<std::byte>> prefixes(refs.size());
  std::vector<PrefixRead> prefix_reads;
  for (size_t i = 0; i < refs.size(); ++i) {
    prefixes[i].resize(layout.prefix_bytes());
    prefix_reads.push_back({refs[i], absl::MakeSpan(prefixes[i])});
  }
  const absl::StatusOr<std::vector<PageRef>> copies = ReadPrefixes(client, prefix_reads);
  if (!copies.ok()) return copies.status();
  std::vector<std::vector<std::byte>> records(refs.size() * layout.num_records());
  std::vector<RecordRead> record_reads;
  for (size_t i = 0; i < refs.size(); ++i) {
    for (int record = 0; record < layout.num_records(); ++record) {
      std::vector<std::byte>& landing = records[i * layout.num_records() + record];
      landing.resize(layout.record_bytes());
      record_reads.push_back({(*copies)[i], record, RecordChecksum(layout, prefixes[i], record),
                              absl::MakeSpan(landing)});
    }
  }
  if (absl::Status status = ReadRecords(client, record_reads); !status.ok()) return status;
  for (size_t i = 0; i < refs.size(); ++i) {
    const std::byte* const page = chain.pages[i].data();
    EXPECT_EQ(std::memcmp(prefixes[i].data() + layout.index_offset(), page + layout.index_offset(),
                          layout.index_bytes()),
              0)
        << "index part of page " << i;
    for (int record = 0; record < layout.num_records(); ++record) {
      EXPECT_EQ(std::memcmp(records[i * layout.num_records() + record].data(),
                            page + layout.record_offset(record), layout.record_bytes()),
                0)
          << "record " << record << " of page " << i;
    }
  }
  return absl::OkStatus();
}

inline std::unique_ptr<KvStoreServer> StartServer(const KvStoreServerOptions& options) {
  absl::StatusOr<std::unique_ptr<KvStoreServer>> server = KvStoreServer::Create(options);
  EXPECT_TRUE(server.ok()) << server.status();
  return server.ok() ? *std::move(server) : nullptr;
}

inline KvStoreServerOptions SmallServer() {
  KvStoreServerOptions options;
  options.arena_bytes = 32 * TestLayout().page_bytes();
  options.ucx = KvStoreServerOptions::Ucx::kOff;
  return options;
}

inline std::unique_ptr<GrpcStoreClient> MakeClient(const GrpcStoreClientOptions& options) {
  absl::StatusOr<std::unique_ptr<GrpcStoreClient>> client = GrpcStoreClient::Create(options);
  EXPECT_TRUE(client.ok()) << client.status();
  return client.ok() ? *std::move(client) : nullptr;
}

inline GrpcStoreClientOptions ClientOf(const std::string& address) {
  GrpcStoreClientOptions options(TestLayout());
  options.stores.push_back({address, nullptr, {}});
  return options;
}

}  // namespace nosara::kvstore
