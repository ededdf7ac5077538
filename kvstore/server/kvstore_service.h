// The control plane of a KV store node: nosara.kvstore.v1.KvStoreService over one arena.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "base/clock.h"
#include "kvstore/server/kvstore_stats.h"
#include "kvstore/server/page_index.h"
#include "kvstore/server/verifier.h"
#include "nosara/kvstore/v1/kvstore.grpc.pb.h"

namespace nosara::kvstore {

/// Thread-safe. One mutex guards the index; nothing blocks under it, and checksums are computed
/// outside it. Owns the index; the arena and the clock must outlive it.
class KvStoreServiceImpl final : public v1::KvStoreService::CallbackService {
 public:
  struct Options {
    std::string node_id;
    /// Not 0.
    uint64_t epoch = 0;
    absl::Duration lease_ttl;
    absl::Duration quarantine;
    EvictionKind eviction = EvictionKind::kS3Fifo;
    /// As in KvStoreServerOptions.
    uint64_t namespace_quota_bytes = 0;
    absl::flat_hash_map<PageKey, uint64_t> namespace_quotas_bytes;
    absl::Span<std::byte> arena;
    std::string arena_path;
    std::string host_id;
    /// Empty without UCX.
    std::string ucx_address;
    std::string ucx_rkey;
    const Clock* clock = nullptr;
  };

  explicit KvStoreServiceImpl(Options options);

  grpc::ServerUnaryReactor* GetInfo(grpc::CallbackServerContext* context,
                                    const v1::GetInfoRequest* request,
                                    v1::GetInfoResponse* response) override;
  grpc::ServerUnaryReactor* Lookup(grpc::CallbackServerContext* context,
                                   const v1::LookupRequest* request,
                                   v1::LookupResponse* response) override;
  grpc::ServerUnaryReactor* Reserve(grpc::CallbackServerContext* context,
                                    const v1::ReserveRequest* request,
                                    v1::ReserveResponse* response) override;
  grpc::ServerUnaryReactor* Commit(grpc::CallbackServerContext* context,
                                   const v1::CommitRequest* request,
                                   v1::CommitResponse* response) override;
  grpc::ServerUnaryReactor* Renew(grpc::CallbackServerContext* context,
                                  const v1::RenewRequest* request,
                                  v1::RenewResponse* response) override;
  grpc::ServerUnaryReactor* Release(grpc::CallbackServerContext* context,
                                    const v1::ReleaseRequest* request,
                                    v1::ReleaseResponse* response) override;
  grpc::ServerUnaryReactor* Discard(grpc::CallbackServerContext* context,
                                    const v1::DiscardRequest* request,
                                    v1::DiscardResponse* response) override;
  grpc::ServerUnaryReactor* GetStats(grpc::CallbackServerContext* context,
                                     const v1::GetStatsRequest* request,
                                     v1::GetStatsResponse* response) override;
  grpc::ServerUnaryReactor* Drain(grpc::CallbackServerContext* context,
                                  const v1::DrainRequest* request,
                                  v1::DrainResponse* response) override;

  grpc::ServerUnaryReactor* Evict(grpc::CallbackServerContext* context,
                                  const v1::EvictRequest* request,
                                  v1::EvictResponse* response) override;
  grpc::ServerUnaryReactor* StartVerify(grpc::CallbackServerContext* context,
                                        const v1::StartVerifyRequest* request,
                                        v1::VerifyProgress* response) override;
  grpc::ServerUnaryReactor* GetVerifyProgress(grpc::CallbackServerContext* context,
                                              const v1::GetVerifyProgressRequest* request,
                                              v1::VerifyProgress* response) override;

  KvStoreStats Stats();

  /// Ends what runs in the background, before the arena goes. Idempotent.
  void Stop() { verifier_.Stop(); }
  /// Blocks until no pass of StartVerify runs. For tests.
  void WaitForVerify() { verifier_.WaitIdle(); }

  /// Ends what has expired; called from time to time, so that slots are not kept by the leases of
  /// dead clients when no request comes.
  void ExpireLeases();

  /// PageIndex::CheckIntegrity(); OK before the first Reserve. For tests.
  absl::Status CheckIntegrity() const;

 private:
  absl::Status CheckEpoch(uint64_t epoch) const;
  absl::Status DoLookup(const v1::LookupRequest& request, v1::LookupResponse& response);
  absl::Status DoReserve(const v1::ReserveRequest& request, v1::ReserveResponse& response);
  absl::Status DoCommit(const v1::CommitRequest& request);
  absl::Status DoDiscard(const v1::DiscardRequest& request);
  /// Makes the index at the first Reserve and holds the sizes of later ones to it.
  absl::Status FixPageSize(const v1::ReserveRequest& request) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  Verifier::SlotState VerifySlot(uint64_t slot);
  uint32_t lease_ttl_ms() const {
    return static_cast<uint32_t>(absl::ToInt64Milliseconds(options_.lease_ttl));
  }

  const Options options_;

  mutable absl::Mutex mu_;
  std::unique_ptr<PageIndex> index_ ABSL_GUARDED_BY(mu_);  // null until page_bytes_ is fixed
  uint64_t page_bytes_ ABSL_GUARDED_BY(mu_) = 0;
  uint64_t prefix_bytes_ ABSL_GUARDED_BY(mu_) = 0;
  uint64_t layout_fingerprint_ ABSL_GUARDED_BY(mu_) = 0;
  uint64_t commit_checksum_failures_ ABSL_GUARDED_BY(mu_) = 0;
  bool draining_ ABSL_GUARDED_BY(mu_) = false;

  Verifier verifier_;  // its thread uses all of the above
};

}  // namespace nosara::kvstore
