// Calls of those who operate a KV store node.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "nosara/kvstore/v1/kvstore.pb.h"

namespace nosara::client {

/// A connection to one nosara-kvstore. Thread-safe; calls block, each at most 10 s.
///
/// Errors: those of kvstore.proto; UNAVAILABLE names the address when no store answers there.
class StoreAdminClient final {
 public:
  /// `address`: "host:port". Connects lazily. INVALID_ARGUMENT for an empty address.
  static absl::StatusOr<std::unique_ptr<StoreAdminClient>> Connect(const std::string& address);
  StoreAdminClient(const StoreAdminClient&) = delete;
  StoreAdminClient& operator=(const StoreAdminClient&) = delete;
  ~StoreAdminClient();

  absl::StatusOr<kvstore::v1::GetStatsResponse> Stats();
  absl::StatusOr<kvstore::v1::DrainResponse> Drain();
  /// `max_pages`: 0 for all. `namespace_key`: 16 bytes, or empty for all namespaces.
  absl::StatusOr<kvstore::v1::EvictResponse> Evict(uint64_t max_pages,
                                                   const std::string& namespace_key);
  /// `bytes_per_second`: 0 for the store's default.
  absl::StatusOr<kvstore::v1::VerifyProgress> StartVerify(uint64_t bytes_per_second);
  absl::StatusOr<kvstore::v1::VerifyProgress> VerifyProgress();

 private:
  struct Impl;
  explicit StoreAdminClient(std::unique_ptr<Impl> impl);

  const std::unique_ptr<Impl> impl_;
};

}  // namespace nosara::client
