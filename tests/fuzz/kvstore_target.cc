#include <grpcpp/grpcpp.h>
#include <grpcpp/test/default_reactor_test_peer.h>

#include <algorithm>
#include <cstddef>
#include <optional>
#include <string>
#include <vector>

#include "base/check.h"
#include "base/clock.h"
#include "kvstore/api/layout.h"
#include "kvstore/server/kvstore_service.h"
#include "tests/fuzz/fuzz_targets.h"

namespace nosara::fuzz {
namespace {

using kvstore::KvStoreServiceImpl;
using kvstore::PageKey;
namespace v1 = kvstore::v1;

constexpr uint64_t kSlots = 5;

/// One service over an arena of a few pages, called as gRPC calls it.
class Target final {
 public:
  explicit Target(absl::Span<const uint8_t> input)
      : left_(input), layout_(*kvstore::PageLayout::Create(1, 1, 16, 2)) {
    arena_.resize(kSlots * std::max<size_t>(layout_.page_bytes(), 4096));
    KvStoreServiceImpl::Options options;
    options.node_id = "fuzz";
    options.epoch = uint64_t{3} << 32;
    options.lease_ttl = absl::Seconds(10);
    options.quarantine = absl::Seconds(20);
    options.namespace_quota_bytes = 3 * layout_.page_bytes();
    options.arena = absl::MakeSpan(arena_);
    options.clock = &clock_;
    service_.emplace(options);
  }

  void Run() {
    while (!left_.empty()) {
      switch (Byte() % 13) {
        case 0:
          Call(&KvStoreServiceImpl::Lookup, Request<v1::LookupRequest>(&Target::FillLookup));
          break;
        case 1:
        case 2:
        case 3:
          Note(Call(&KvStoreServiceImpl::Reserve,
                    Request<v1::ReserveRequest>(&Target::FillReserve)));
          break;
        case 4:
        case 5:
          Call(&KvStoreServiceImpl::Commit, Request<v1::CommitRequest>(&Target::FillCommit));
          break;
        case 6:
          Call(&KvStoreServiceImpl::Renew, Request<v1::RenewRequest>(&Target::FillLeases));
          break;
        case 7:
          Call(&KvStoreServiceImpl::Release, Request<v1::ReleaseRequest>(&Target::FillLeases));
          break;
        case 8:
          CheckStats(Call(&KvStoreServiceImpl::GetStats, v1::GetStatsRequest()));
          break;
        case 9:
          clock_.Advance(absl::Seconds(Byte() < 230 ? Byte() % 3 : 25));
          service_->ExpireLeases();
          break;
        case 10:
          if (!reserved_.empty()) Write(Recent());
          break;
        case 12: {
          v1::EvictRequest request;
          request.set_max_pages(Number());
          if (Byte() % 2 == 0) request.set_namespace_key(Key());
          Call(&KvStoreServiceImpl::Evict, request);
          break;
        }
        case 11:
          // Rarely: nothing is reserved after it.
          if (Byte() == 0) Call(&KvStoreServiceImpl::Drain, v1::DrainRequest());
          break;
      }
      CHECK(service_->CheckIntegrity().ok());
    }
    CheckStats(Call(&KvStoreServiceImpl::GetStats, v1::GetStatsRequest()));
  }

 private:
  uint8_t Byte() {
    if (left_.empty()) return 0;
    const uint8_t byte = left_.front();
    left_.remove_prefix(1);
    return byte;
  }
  std::string Text(size_t size) {
    size = std::min(size, left_.size());
    const std::string text(reinterpret_cast<const char*>(left_.data()), size);
    left_.remove_prefix(size);
    return text;
  }
  /// Mostly one of few keys, so that requests meet.
  std::string Key() {
    const uint8_t byte = Byte();
    if (byte >= 250) return Text(byte - 240);
    PageKey key;
    key.bytes[3] = byte % 16;
    return key.ToBytes();
  }
  uint64_t Number() {
    const uint8_t byte = Byte();
    return byte < 200 ? byte % 16 : ~uint64_t{0} >> (byte % 64);
  }

  /// A message that the input spells out, or one that is nearly right.
  template <typename Message>
  Message Request(void (Target::*fill)(Message*)) {
    Message message;
    const uint8_t how = Byte();
    if (how < 64) {
      // What does not parse never comes to the service.
      if (!message.ParseFromString(Text(how))) message.Clear();
    } else {
      (this->*fill)(&message);
    }
    return message;
  }
  void FillLookup(v1::LookupRequest* request) {
    for (int count = Byte() % 6; count > 0; --count) request->add_keys(Key());
  }
  void FillReserve(v1::ReserveRequest* request) {
    for (int count = Byte() % 6; count > 0; --count) request->add_keys(Key());
    request->set_parent_key(Key());
    request->set_page_bytes(layout_.page_bytes());
    request->set_prefix_bytes(layout_.prefix_bytes());
    request->set_layout_fingerprint(layout_.fingerprint());
    request->set_request_id(Byte() % 4);
    if (Byte() % 2 == 0) request->set_namespace_key(Key());
    if (Byte() == 0) request->set_page_bytes(Number());
    if (Byte() == 0) request->set_prefix_bytes(Number());
    if (Byte() == 0) request->set_epoch(Number());
  }
  void FillCommit(v1::CommitRequest* request) {
    request->set_lease_id(Number());
    for (int count = Byte() % 4; count > 0; --count) {
      if (!reserved_.empty() && Byte() % 8 != 0) {
        const v1::Page& page = Recent();
        if (Byte() % 8 != 0) Write(page);
        *request->add_pages() = page;
        if (Byte() % 8 != 0) request->set_lease_id(lease_);
      } else {
        v1::Page* const page = request->add_pages();
        page->set_key(Key());
        page->set_slot(Number());
        page->set_generation(Number());
      }
    }
  }
  template <typename Message>
  void FillLeases(Message* request) {
    for (int count = Byte() % 4; count > 0; --count)
      request->add_lease_ids(Byte() % 2 == 0 ? lease_ : Number());
  }

  const v1::Page& Recent() {
    return *(reserved_.end() - 1 - Byte() % std::min<size_t>(8, reserved_.size()));
  }

  /// Seals a page that was reserved once; its lease may be gone, as a late writer's is.
  void Write(const v1::Page& page) {
    if ((page.slot() + 1) * layout_.page_bytes() > arena_.size()) return;
    kvstore::SealPage(
        layout_, *PageKey::FromBytes(page.key()), page.generation(), 64,
        absl::MakeSpan(arena_).subspan(page.slot() * layout_.page_bytes(), layout_.page_bytes()));
  }
  void Note(const v1::ReserveResponse& response) {
    if (response.lease_id() != 0) lease_ = response.lease_id();
    for (const auto& slot : response.slots()) {
      CHECK(slot.state() != v1::ReserveResponse::STATE_UNSPECIFIED);
      if (slot.state() == v1::ReserveResponse::STATE_RESERVED) reserved_.push_back(slot.page());
    }
  }
  static void CheckStats(const v1::GetStatsResponse& stats) {
    CHECK(stats.slots_stored() + stats.slots_reserved() + stats.slots_quarantined() <=
          stats.slots_total());
    CHECK(stats.pages_leased() <= stats.slots_stored());
    CHECK(stats.keys_found() <= stats.keys_looked_up());
    CHECK(stats.pages_evicted() + stats.pages_evicted_by_request() +
              stats.pages_evicted_by_quota() <=
          stats.pages_committed());
  }

  template <typename Request, typename Response>
  Response Call(grpc::ServerUnaryReactor* (KvStoreServiceImpl::*method)(
                    grpc::CallbackServerContext*, const Request*, Response*),
                const Request& request) {
    grpc::CallbackServerContext context;
    grpc::testing::DefaultReactorTestPeer peer(&context);
    Response response;
    ((*service_).*method)(&context, &request, &response);
    CHECK(peer.test_status_set());
    switch (peer.test_status().error_code()) {
      case grpc::StatusCode::OK:
        break;
      case grpc::StatusCode::INVALID_ARGUMENT:
      case grpc::StatusCode::NOT_FOUND:
      case grpc::StatusCode::ABORTED:
      case grpc::StatusCode::DATA_LOSS:
      case grpc::StatusCode::FAILED_PRECONDITION:
      case grpc::StatusCode::RESOURCE_EXHAUSTED:
        CHECK(!peer.test_status().error_message().empty());
        response.Clear();
        break;
      default:
        CHECK(!"a code that the control plane does not answer with");
    }
    return response;
  }

  absl::Span<const uint8_t> left_;
  const kvstore::PageLayout layout_;
  std::vector<std::byte> arena_;
  FakeClock clock_;
  std::optional<KvStoreServiceImpl> service_;
  std::vector<v1::Page> reserved_;  // all that ever were
  uint64_t lease_ = 0;              // the last one
};

}  // namespace

void KvStoreControlTarget(absl::Span<const uint8_t> input) { Target(input).Run(); }

}  // namespace nosara::fuzz
