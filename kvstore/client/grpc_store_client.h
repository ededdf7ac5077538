// The StoreClient of production: gRPC for control, one-sided transports for bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "base/clock.h"
#include "kvstore/api/store_client.h"
#include "kvstore/client/transfer_thread.h"

namespace grpc {
class Channel;
}  // namespace grpc

namespace nosara::kvstore {

/// One store node, as a client finds it.
struct StoreEndpoint {
  /// "host:port" of the control plane. Also decides which pages live there: all clients must use
  /// the same names for the same stores.
  std::string address;
  /// Channel to use instead of a connection to `address`; for a store in this process. May be null.
  std::shared_ptr<grpc::Channel> channel;
  /// The arena of a store in this process; must outlive the client. Empty: none.
  absl::Span<std::byte> in_process_arena;
};

struct GrpcStoreClientOptions {
  explicit GrpcStoreClientOptions(const PageLayout& page_layout) : layout(page_layout) {}

  PageLayout layout;
  /// At least one; or none, where SetStores() is to tell.
  std::vector<StoreEndpoint> stores;
  /// Whether `stores` is all there will ever be.
  enum class Membership { kStatic, kDynamic } membership = Membership::kStatic;
  /// Copies of each page, where there are so many stores: 1 to 8.
  size_t replicas = 1;
  /// How fast lost copies are restored, bytes of pages per second; 0: not at all.
  uint64_t repair_bytes_per_second = uint64_t{64} << 20;
  /// A store that has been gone for so long is taken to have lost its pages.
  absl::Duration repair_delay = absl::Seconds(10);
  /// How bytes may travel.
  DataPath data_path = DataPath::kAuto;
  /// UCX transports, in UCX's notation ("tcp", "sm,self,tcp"); empty: UCX chooses.
  std::string ucx_tls;
  /// Transfers in flight per store, 1 to 4096.
  size_t window = 64;
  /// A store whose transfers make no progress for this long counts as gone: UNAVAILABLE.
  absl::Duration stall_timeout = absl::Seconds(5);
  /// How long Write waits for a page that another client is writing: ABORTED after.
  absl::Duration busy_timeout = absl::Seconds(2);
  /// For leases. Outlives the client.
  const Clock* clock = Clock::Real();
  /// For tests: may wrap the transports.
  TransferThread::TransportWrapper wrap_transport;

  /// INVALID_ARGUMENT names the field, its value and what is allowed.
  absl::Status Validate() const;
};

/// See StoreClient. Connects lazily: stores may start later than the client, may die and come back;
/// an operation fails when no store that it needs can be reached at that time. Groups of 16 blocks
/// are placed on stores by rendezvous hashing (docs/adr/0012-placement-and-copies.md); Lookup takes
/// keys from the start of a chain.
///
/// Beyond StoreClient's contract: Write takes at most 1,024 pages per call, Lookup looks at no more
/// than 65,536 keys; Write waits for pages that another client is writing, then fails with ABORTED,
/// having stored the others.
class GrpcStoreClient final : public StoreClient {
 public:
  /// Errors: those of Validate(). Does not wait for the stores.
  static absl::StatusOr<std::unique_ptr<GrpcStoreClient>> Create(GrpcStoreClientOptions options);
  ~GrpcStoreClient() override;

  const PageLayout& layout() const override;
  void Lookup(std::vector<PageKey> keys, Done<LookupResult> done) override;
  void Write(ChainPosition position, std::vector<PageWrite> pages, Done<WriteResult> done) override;
  void ReadPrefixes(std::vector<PrefixRead> reads, Done<std::vector<PageRef>> done) override;
  void ReadRecords(std::vector<RecordRead> reads, DoneStatus done) override;
  void Release(std::vector<LeaseId> leases) override;
  absl::Status CheckLease(LeaseId lease) const override;
  /// Before the first connection to the store: kMapped.
  Path PathTo(StoreId store) const override;
  /// Stores that are not connected are tried every second.
  std::vector<std::string> UnreachableStores() const override;
  std::shared_ptr<const MappedArena> Map(StoreId store) const override;
  ClientStats stats() const override;
  void Close() override;

  /// From now on groups of pages are placed on `stores`. Those that are left out are not written to
  /// any more; what is leased there can be read on. For kDynamic. INVALID_ARGUMENT: see
  /// Options::Validate(). RESOURCE_EXHAUSTED: more than 1,024 different stores in the client's
  /// life.
  absl::Status SetStores(std::vector<StoreEndpoint> stores);

  /// Connects to all stores; OK when all are connected. Optional: for programs that want to tell at
  /// start what is wrong.
  void Connect(DoneStatus done);

 private:
  class Impl;
  explicit GrpcStoreClient(GrpcStoreClientOptions options);

  const std::unique_ptr<Impl> impl_;
};

}  // namespace nosara::kvstore
