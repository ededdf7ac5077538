// A store whose control plane is called without a socket and whose clock is moved by hand.
#pragma once

#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "base/clock.h"
#include "base/retry_delay.h"
#include "kvstore/api/layout.h"
#include "kvstore/server/kvstore_server.h"
#include "nosara/kvstore/v1/kvstore.grpc.pb.h"
#include "tests/status_matchers.h"

namespace nosara::kvstore {

class ServiceTest : public ::testing::Test {
 protected:
  static constexpr int kRoot = 9999;

  /// Starts a store of `slots` pages.
  void Start(uint64_t slots, KvStoreServerOptions options = {}) {
    options.listen = "";
    options.arena_bytes = slots * layout_.page_bytes();
    options.node_id = "s";
    options.lease_ttl = absl::Seconds(10);
    options.quarantine = absl::Seconds(60);
    options.ucx = KvStoreServerOptions::Ucx::kOff;
    options.clock = &clock_;
    Start(options);
  }
  void Start(const KvStoreServerOptions& options) {
    ASSERT_OK_AND_ASSIGN(server_, KvStoreServer::Create(options));
    stub_ = v1::KvStoreService::NewStub(server_->InProcessChannel());
  }

  static PageKey Key(int n) {
    PageKey key;
    key.bytes[0] = static_cast<uint8_t>(n);
    key.bytes[1] = static_cast<uint8_t>(n >> 8);
    key.bytes[15] = 0x5a;
    return key;
  }

  /// One call, with the retry delay of its answer, if there is one, in the status.
  template <typename Request, typename Response>
  absl::StatusOr<Response> Call(grpc::Status (v1::KvStoreService::Stub::*method)(
                                    grpc::ClientContext*, const Request&, Response*),
                                const Request& request) {
    grpc::ClientContext context;
    Response response;
    const grpc::Status status = (*stub_.*method)(&context, request, &response);
    if (status.ok()) return response;
    absl::Status result(static_cast<absl::StatusCode>(status.error_code()), status.error_message());
    const auto& trailers = context.GetServerTrailingMetadata();
    const auto delay = trailers.find(kRetryDelayMetadata);
    if (delay == trailers.end()) return result;
    return WithRetryDelay(std::move(result),
                          absl::string_view(delay->second.data(), delay->second.size()));
  }

  v1::ReserveRequest ReserveRequest(const std::vector<int>& pages, int parent) const {
    v1::ReserveRequest request;
    for (const int page : pages) request.add_keys(Key(page).ToBytes());
    request.set_parent_key(Key(parent).ToBytes());
    request.set_page_bytes(layout_.page_bytes());
    request.set_prefix_bytes(layout_.prefix_bytes());
    request.set_layout_fingerprint(layout_.fingerprint());
    return request;
  }
  absl::StatusOr<v1::ReserveResponse> Reserve(const std::vector<int>& pages, int parent) {
    return Call(&v1::KvStoreService::Stub::Reserve, ReserveRequest(pages, parent));
  }
  absl::StatusOr<v1::LookupResponse> Lookup(const std::vector<int>& pages) {
    v1::LookupRequest request;
    for (const int page : pages) request.add_keys(Key(page).ToBytes());
    return Call(&v1::KvStoreService::Stub::Lookup, request);
  }
  absl::StatusOr<v1::CommitResponse> Commit(uint64_t lease, const std::vector<v1::Page>& pages) {
    v1::CommitRequest request;
    request.set_lease_id(lease);
    for (const v1::Page& page : pages) *request.add_pages() = page;
    return Call(&v1::KvStoreService::Stub::Commit, request);
  }
  /// Whether the lease still lives.
  bool Renew(uint64_t lease) {
    v1::RenewRequest request;
    request.add_lease_ids(lease);
    const auto response = Call(&v1::KvStoreService::Stub::Renew, request);
    EXPECT_OK(response);
    return response.ok() && response->lost_lease_ids().empty();
  }
  void Release(uint64_t lease) {
    v1::ReleaseRequest request;
    request.add_lease_ids(lease);
    EXPECT_OK(Call(&v1::KvStoreService::Stub::Release, request));
  }
  v1::GetStatsResponse Stats() {
    const auto response = Call(&v1::KvStoreService::Stub::GetStats, v1::GetStatsRequest());
    EXPECT_OK(response);
    return response.ok() ? *response : v1::GetStatsResponse();
  }

  absl::Span<std::byte> SlotBytes(uint64_t slot) const {
    return server_->arena().subspan(slot * layout_.page_bytes(), layout_.page_bytes());
  }
  /// Writes a page as a client does: content that depends on key and generation, sealed.
  void WritePage(const v1::Page& page) const {
    const absl::Span<std::byte> bytes = SlotBytes(page.slot());
    std::memset(bytes.data(), static_cast<int>(page.slot() * 7 + page.generation()), bytes.size());
    SealPage(layout_, *PageKey::FromBytes(page.key()), page.generation(), kBlockTokens, bytes);
  }
  absl::Status VerifyPage(const v1::Page& page) const {
    return VerifyPrefix(layout_, *PageKey::FromBytes(page.key()), page.generation(),
                        SlotBytes(page.slot()));
  }
  static std::vector<v1::Page> Reserved(const v1::ReserveResponse& response) {
    std::vector<v1::Page> pages;
    for (const auto& slot : response.slots()) {
      if (slot.state() == v1::ReserveResponse::STATE_RESERVED) pages.push_back(slot.page());
    }
    return pages;
  }
  /// Stores pages behind `parent`; their lease.
  uint64_t Store(const std::vector<int>& pages, int parent) {
    const auto reserved = Reserve(pages, parent);
    EXPECT_OK(reserved);
    if (!reserved.ok()) return 0;
    for (const v1::Page& page : Reserved(*reserved)) WritePage(page);
    EXPECT_OK(Commit(reserved->lease_id(), Reserved(*reserved)));
    return reserved->lease_id();
  }
  int Found(const std::vector<int>& pages) {
    const auto found = Lookup(pages);
    EXPECT_OK(found);
    if (!found.ok() || found->lease_id() == 0) return 0;
    Release(found->lease_id());
    return found->pages_size();
  }

  const PageLayout layout_ = *PageLayout::Create(1, 2, 16, 2);
  FakeClock clock_;
  std::unique_ptr<KvStoreServer> server_;
  std::unique_ptr<v1::KvStoreService::Stub> stub_;
};

}  // namespace nosara::kvstore
