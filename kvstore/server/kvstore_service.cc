#include "kvstore/server/kvstore_service.h"

#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/log.h"
#include "base/retry_delay.h"
#include "base/status_macros.h"
#include "kvstore/api/layout.h"

namespace nosara::kvstore {
namespace {

constexpr int kMaxLookupKeys = 65536;
constexpr int kMaxPagesPerCall = 1024;
constexpr int kMaxLeasesPerCall = 65536;
constexpr size_t kMaxNamespacesShown = 64;
/// Less than any layout has; bounds the memory that the index takes.
constexpr uint64_t kMinPageBytes = 4096;
constexpr uint64_t kMaxSlots = uint64_t{1} << 31;
/// A tenth or less of what one core checks in a second.
constexpr uint64_t kVerifyBytesPerSecond = uint64_t{256} << 20;
constexpr uint64_t kMinVerifyBytesPerSecond = uint64_t{1} << 20;
/// A full store empties as leases end; asking much more often than this only costs.
constexpr absl::Duration kRetryDelay = absl::Milliseconds(200);

grpc::Status ToGrpc(const absl::Status& status) {
  return grpc::Status(static_cast<grpc::StatusCode>(status.code()), std::string(status.message()));
}

grpc::ServerUnaryReactor* Finish(grpc::CallbackServerContext* context, const absl::Status& status) {
  grpc::ServerUnaryReactor* const reactor = context->DefaultReactor();
  reactor->Finish(status.ok() ? grpc::Status::OK : ToGrpc(status));
  return reactor;
}

absl::Status CheckCount(const char* field, int count, int min, int max) {
  if (count >= min && count <= max) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(field, ": has ", count, " elements: must have ", min, " to ", max));
}

absl::StatusOr<PageKey> ParseKey(const char* field, int index, const std::string& bytes) {
  absl::StatusOr<PageKey> key = PageKey::FromBytes(bytes);
  if (!key.ok()) return Annotate(key.status(), absl::StrCat(field, "[", index, "]"));
  return key;
}

/// All zeros when there is none.
absl::StatusOr<PageKey> ParseNamespace(const std::string& bytes) {
  if (bytes.empty()) return PageKey();
  absl::StatusOr<PageKey> key = PageKey::FromBytes(bytes);
  if (!key.ok()) return Annotate(key.status(), "namespace_key");
  return key;
}

absl::StatusOr<std::vector<PageKey>> ParseKeys(
    const google::protobuf::RepeatedPtrField<std::string>& bytes) {
  std::vector<PageKey> keys;
  keys.reserve(bytes.size());
  for (int i = 0; i < bytes.size(); ++i) {
    ASSIGN_OR_RETURN(PageKey key, ParseKey("keys", i, bytes[i]));
    keys.push_back(key);
  }
  return keys;
}

void FillPage(const PageIndex::Page& page, v1::Page* proto) {
  proto->set_key(page.key.bytes.data(), page.key.bytes.size());
  proto->set_slot(page.slot);
  proto->set_generation(page.generation);
}

void FillProgress(const Verifier::Progress& progress, v1::VerifyProgress* proto) {
  switch (progress.state) {
    case Verifier::Progress::State::kNone:
      proto->set_state(v1::VerifyProgress::STATE_NONE);
      break;
    case Verifier::Progress::State::kRunning:
      proto->set_state(v1::VerifyProgress::STATE_RUNNING);
      break;
    case Verifier::Progress::State::kDone:
      proto->set_state(v1::VerifyProgress::STATE_DONE);
      break;
  }
  proto->set_slots_total(progress.slots_total);
  proto->set_slots_done(progress.slots_done);
  proto->set_pages_verified(progress.pages_verified);
  proto->set_pages_mismatched(progress.pages_mismatched);
}

}  // namespace

KvStoreServiceImpl::KvStoreServiceImpl(Options options)
    : options_(std::move(options)), verifier_([this](uint64_t slot) { return VerifySlot(slot); }) {
  CHECK(options_.epoch != 0 && options_.clock != nullptr);
}

absl::Status KvStoreServiceImpl::CheckEpoch(uint64_t epoch) const {
  if (epoch == 0 || epoch == options_.epoch) return absl::OkStatus();
  return absl::AbortedError(absl::StrCat("epoch ", epoch, ": node ", options_.node_id,
                                         " has restarted, its epoch is ", options_.epoch));
}

grpc::ServerUnaryReactor* KvStoreServiceImpl::GetInfo(grpc::CallbackServerContext* context,
                                                      const v1::GetInfoRequest* request,
                                                      v1::GetInfoResponse* response) {
  response->set_node_id(options_.node_id);
  response->set_epoch(options_.epoch);
  response->set_arena_bytes(options_.arena.size());
  response->set_host_id(options_.host_id);
  response->set_arena_path(options_.arena_path);
  response->set_ucx_address(options_.ucx_address);
  response->set_ucx_rkey(options_.ucx_rkey);
  response->set_remote_address(reinterpret_cast<uint64_t>(options_.arena.data()));
  response->set_lease_ttl_ms(lease_ttl_ms());
  {
    absl::MutexLock lock(&mu_);
    response->set_page_bytes(page_bytes_);
    if (index_ != nullptr) response->set_num_slots(index_->stats().slots_total);
  }
  return Finish(context, absl::OkStatus());
}

absl::Status KvStoreServiceImpl::DoLookup(const v1::LookupRequest& request,
                                          v1::LookupResponse& response) {
  RETURN_IF_ERROR(CheckEpoch(request.epoch()));
  RETURN_IF_ERROR(CheckCount("keys", request.keys_size(), 1, kMaxLookupKeys));
  ASSIGN_OR_RETURN(const std::vector<PageKey> keys, ParseKeys(request.keys()));
  const auto scope = request.scope() == v1::LookupRequest::SCOPE_ALL ? PageIndex::Scope::kAll
                                                                     : PageIndex::Scope::kPrefix;
  PageIndex::LookupResult found;
  {
    absl::MutexLock lock(&mu_);
    if (index_ != nullptr) found = index_->Lookup(keys, options_.clock->Now(), scope);
  }
  response.mutable_pages()->Reserve(static_cast<int>(found.pages.size()));
  for (const PageIndex::Page& page : found.pages) FillPage(page, response.add_pages());
  response.set_lease_id(found.lease_id);
  response.set_lease_ttl_ms(lease_ttl_ms());
  return absl::OkStatus();
}

grpc::ServerUnaryReactor* KvStoreServiceImpl::Lookup(grpc::CallbackServerContext* context,
                                                     const v1::LookupRequest* request,
                                                     v1::LookupResponse* response) {
  return Finish(context, DoLookup(*request, *response));
}

absl::Status KvStoreServiceImpl::FixPageSize(const v1::ReserveRequest& request) {
  if (page_bytes_ != 0) {
    if (request.page_bytes() == page_bytes_ && request.prefix_bytes() == prefix_bytes_ &&
        request.layout_fingerprint() == layout_fingerprint_) {
      return absl::OkStatus();
    }
    return absl::InvalidArgumentError(absl::StrCat(
        "page_bytes = ", request.page_bytes(), " (prefix_bytes ", request.prefix_bytes(),
        ", layout ", absl::Hex(request.layout_fingerprint()), "): node ", options_.node_id,
        " holds pages of ", page_bytes_, " bytes (prefix_bytes ", prefix_bytes_, ", layout ",
        absl::Hex(layout_fingerprint_), "); one store holds pages of one model layout"));
  }
  if (request.prefix_bytes() < sizeof(PageHeader) ||
      request.prefix_bytes() > request.page_bytes()) {
    return absl::InvalidArgumentError(absl::StrCat("prefix_bytes = ", request.prefix_bytes(),
                                                   ": must be ", sizeof(PageHeader),
                                                   " to page_bytes = ", request.page_bytes()));
  }
  if (request.page_bytes() % kPageAlignment != 0 || request.page_bytes() < kMinPageBytes) {
    return absl::InvalidArgumentError(absl::StrCat("page_bytes = ", request.page_bytes(),
                                                   ": must be a multiple of ", kPageAlignment,
                                                   ", at least ", kMinPageBytes));
  }
  if (request.page_bytes() > options_.arena.size()) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "arena too small: one page needs ", request.page_bytes(), " bytes, node ", options_.node_id,
        " has ", options_.arena.size(), " bytes available; start it with a larger --arena_bytes"));
  }
  page_bytes_ = request.page_bytes();
  prefix_bytes_ = request.prefix_bytes();
  layout_fingerprint_ = request.layout_fingerprint();
  PageIndex::Options index;
  index.num_slots = std::min<uint64_t>(options_.arena.size() / page_bytes_, kMaxSlots);
  index.base_generation = options_.epoch & ~uint64_t{0xffffffff};
  index.lease_ttl = options_.lease_ttl;
  index.quarantine = options_.quarantine;
  index.eviction = options_.eviction;
  // At least one page each: 0 would be no limit.
  const auto pages = [this](uint64_t bytes) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    return std::max<uint64_t>(1, bytes / page_bytes_);
  };
  if (options_.namespace_quota_bytes > 0) {
    index.namespace_quota = pages(options_.namespace_quota_bytes);
  }
  for (const auto& [name_space, bytes] : options_.namespace_quotas_bytes) {
    index.namespace_quotas[name_space] = bytes == 0 ? 0 : pages(bytes);
  }
  index_ = std::make_unique<PageIndex>(index);
  return absl::OkStatus();
}

absl::Status KvStoreServiceImpl::DoReserve(const v1::ReserveRequest& request,
                                           v1::ReserveResponse& response) {
  RETURN_IF_ERROR(CheckEpoch(request.epoch()));
  RETURN_IF_ERROR(CheckCount("keys", request.keys_size(), 1, kMaxPagesPerCall));
  ASSIGN_OR_RETURN(const std::vector<PageKey> keys, ParseKeys(request.keys()));
  const absl::StatusOr<PageKey> parent = PageKey::FromBytes(request.parent_key());
  if (!parent.ok()) return Annotate(parent.status(), "parent_key");
  PageIndex::ReserveOptions options;
  options.request_id = request.request_id();
  ASSIGN_OR_RETURN(options.name_space, ParseNamespace(request.namespace_key()));
  PageIndex::ReserveResult reserved;
  {
    absl::MutexLock lock(&mu_);
    if (draining_) {
      return absl::FailedPreconditionError(
          absl::StrCat("node ", options_.node_id, " is draining: takes no new pages"));
    }
    RETURN_IF_ERROR(FixPageSize(request));
    ASSIGN_OR_RETURN(reserved, index_->Reserve(keys, *parent, options_.clock->Now(), options));
  }
  for (const PageIndex::ReservedPage& page : reserved.pages) {
    v1::ReserveResponse::Slot* const slot = response.add_slots();
    switch (page.state) {
      case PageIndex::ReserveState::kReserved:
        slot->set_state(v1::ReserveResponse::STATE_RESERVED);
        break;
      case PageIndex::ReserveState::kStored:
        slot->set_state(v1::ReserveResponse::STATE_STORED);
        break;
      case PageIndex::ReserveState::kBusy:
        slot->set_state(v1::ReserveResponse::STATE_BUSY);
        continue;
    }
    FillPage(page.page, slot->mutable_page());
  }
  response.set_lease_id(reserved.lease_id);
  response.set_lease_ttl_ms(lease_ttl_ms());
  return absl::OkStatus();
}

grpc::ServerUnaryReactor* KvStoreServiceImpl::Reserve(grpc::CallbackServerContext* context,
                                                      const v1::ReserveRequest* request,
                                                      v1::ReserveResponse* response) {
  const absl::Status status = DoReserve(*request, *response);
  bool can_ever_fit;
  {
    absl::MutexLock lock(&mu_);
    can_ever_fit = index_ != nullptr;
  }
  if (absl::IsResourceExhausted(status) && can_ever_fit) {
    context->AddTrailingMetadata(kRetryDelayMetadata, RetryDelayValue(kRetryDelay));
  }
  return Finish(context, status);
}

absl::Status KvStoreServiceImpl::DoCommit(const v1::CommitRequest& request) {
  RETURN_IF_ERROR(CheckEpoch(request.epoch()));
  RETURN_IF_ERROR(CheckCount("pages", request.pages_size(), 1, kMaxPagesPerCall));
  std::vector<PageIndex::Page> pages;
  for (int i = 0; i < request.pages_size(); ++i) {
    const v1::Page& page = request.pages(i);
    ASSIGN_OR_RETURN(const PageKey key, ParseKey("pages", i, page.key()));
    pages.push_back({key, page.slot(), page.generation()});
  }
  SealedSizes sizes;
  uint64_t page_bytes;
  {
    absl::MutexLock lock(&mu_);
    if (index_ == nullptr) return absl::NotFoundError("nothing was ever reserved here");
    RETURN_IF_ERROR(index_->CheckReservations(request.lease_id(), pages, options_.clock->Now()));
    sizes = {layout_fingerprint_, prefix_bytes_};
    page_bytes = page_bytes_;
  }
  // Outside the lock: hashing takes long. Should the lease end meanwhile, Commit below refuses.
  absl::Status verified;
  for (const PageIndex::Page& page : pages) {
    const absl::Status status =
        VerifySealed(sizes, page.key, page.generation,
                     options_.arena.subspan(page.slot * page_bytes, page_bytes));
    if (status.ok()) continue;
    // Whatever is wrong with bytes that are only now being committed, they were written wrongly.
    verified = absl::DataLossError(status.message());
    absl::MutexLock lock(&mu_);
    ++commit_checksum_failures_;
    index_->DropReservation(request.lease_id(), page, options_.clock->Now());
  }
  RETURN_IF_ERROR(verified);
  absl::MutexLock lock(&mu_);
  return index_->Commit(request.lease_id(), pages, options_.clock->Now());
}

grpc::ServerUnaryReactor* KvStoreServiceImpl::Commit(grpc::CallbackServerContext* context,
                                                     const v1::CommitRequest* request,
                                                     v1::CommitResponse* response) {
  return Finish(context, DoCommit(*request));
}

grpc::ServerUnaryReactor* KvStoreServiceImpl::Renew(grpc::CallbackServerContext* context,
                                                    const v1::RenewRequest* request,
                                                    v1::RenewResponse* response) {
  absl::Status status = CheckEpoch(request->epoch());
  if (status.ok()) {
    status = CheckCount("lease_ids", request->lease_ids_size(), 0, kMaxLeasesPerCall);
  }
  if (!status.ok()) return Finish(context, status);
  const std::vector<uint64_t> ids(request->lease_ids().begin(), request->lease_ids().end());
  std::vector<uint64_t> lost = ids;
  {
    absl::MutexLock lock(&mu_);
    if (index_ != nullptr) lost = index_->Renew(ids, options_.clock->Now());
  }
  for (const uint64_t id : lost) response->add_lost_lease_ids(id);
  response->set_lease_ttl_ms(lease_ttl_ms());
  return Finish(context, absl::OkStatus());
}

grpc::ServerUnaryReactor* KvStoreServiceImpl::Release(grpc::CallbackServerContext* context,
                                                      const v1::ReleaseRequest* request,
                                                      v1::ReleaseResponse* response) {
  absl::Status status = CheckEpoch(request->epoch());
  if (status.ok()) {
    status = CheckCount("lease_ids", request->lease_ids_size(), 0, kMaxLeasesPerCall);
  }
  if (!status.ok()) return Finish(context, status);
  const std::vector<uint64_t> ids(request->lease_ids().begin(), request->lease_ids().end());
  {
    absl::MutexLock lock(&mu_);
    if (index_ != nullptr) index_->Release(ids, options_.clock->Now());
  }
  return Finish(context, absl::OkStatus());
}

absl::Status KvStoreServiceImpl::DoDiscard(const v1::DiscardRequest& request) {
  RETURN_IF_ERROR(CheckEpoch(request.epoch()));
  RETURN_IF_ERROR(CheckCount("pages", request.pages_size(), 0, kMaxPagesPerCall));
  std::vector<PageIndex::Page> pages;
  for (int i = 0; i < request.pages_size(); ++i) {
    const v1::Page& page = request.pages(i);
    ASSIGN_OR_RETURN(const PageKey key, ParseKey("pages", i, page.key()));
    pages.push_back({key, page.slot(), page.generation()});
  }
  absl::MutexLock lock(&mu_);
  if (index_ != nullptr) index_->Discard(pages, options_.clock->Now());
  return absl::OkStatus();
}

grpc::ServerUnaryReactor* KvStoreServiceImpl::Discard(grpc::CallbackServerContext* context,
                                                      const v1::DiscardRequest* request,
                                                      v1::DiscardResponse* response) {
  return Finish(context, DoDiscard(*request));
}

grpc::ServerUnaryReactor* KvStoreServiceImpl::GetStats(grpc::CallbackServerContext* context,
                                                       const v1::GetStatsRequest* request,
                                                       v1::GetStatsResponse* response) {
  const KvStoreStats stats = Stats();
  response->set_node_id(options_.node_id);
  response->set_epoch(options_.epoch);
  response->set_draining(stats.draining);
  response->set_page_bytes(stats.page_bytes);
  response->set_arena_bytes(stats.arena_bytes);
  response->set_commit_checksum_failures(stats.commit_checksum_failures);
  response->set_pages_verified(stats.pages_verified);
  response->set_slots_total(stats.index.slots_total);
  response->set_slots_free(stats.index.slots_free);
  response->set_slots_stored(stats.index.slots_stored);
  response->set_slots_reserved(stats.index.slots_reserved);
  response->set_slots_quarantined(stats.index.slots_quarantined);
  response->set_pages_leased(stats.index.pages_leased);
  response->set_pages_evictable(stats.index.pages_evictable);
  response->set_leases(stats.index.leases);
  response->set_keys_looked_up(stats.index.keys_looked_up);
  response->set_keys_found(stats.index.keys_found);
  response->set_pages_committed(stats.index.pages_committed);
  response->set_pages_evicted(stats.index.pages_evicted);
  response->set_pages_evicted_by_quota(stats.index.pages_evicted_by_quota);
  response->set_reservations_refused_by_quota(stats.index.reservations_refused_by_quota);
  response->set_pages_evicted_by_request(stats.index.pages_evicted_by_request);
  response->set_pages_discarded(stats.index.pages_discarded);
  response->set_namespaces_total(stats.index.namespaces);
  for (const PageIndex::NamespacePages& pages : stats.largest_namespaces) {
    v1::NamespaceStats* const entry = response->add_namespaces();
    entry->set_namespace_key(pages.name_space.ToBytes());
    entry->set_pages(pages.pages);
    entry->set_quota_pages(pages.quota);
  }
  response->set_leases_expired(stats.index.leases_expired);
  response->set_reservations_refused(stats.index.reservations_refused);
  return Finish(context, absl::OkStatus());
}

KvStoreStats KvStoreServiceImpl::Stats() {
  KvStoreStats stats;
  stats.arena_bytes = options_.arena.size();
  stats.pages_verified = verifier_.pages_verified();
  absl::MutexLock lock(&mu_);
  stats.draining = draining_;
  stats.page_bytes = page_bytes_;
  stats.commit_checksum_failures = commit_checksum_failures_;
  if (index_ != nullptr) {
    index_->Expire(options_.clock->Now());
    stats.index = index_->stats();
    stats.largest_namespaces = index_->LargestNamespaces(kMaxNamespacesShown);
  }
  return stats;
}

grpc::ServerUnaryReactor* KvStoreServiceImpl::Drain(grpc::CallbackServerContext* context,
                                                    const v1::DrainRequest* request,
                                                    v1::DrainResponse* response) {
  {
    absl::MutexLock lock(&mu_);
    draining_ = true;
    if (index_ != nullptr) {
      index_->Expire(options_.clock->Now());
      response->set_leases(index_->stats().leases);
    }
  }
  return Finish(context, absl::OkStatus());
}

grpc::ServerUnaryReactor* KvStoreServiceImpl::Evict(grpc::CallbackServerContext* context,
                                                    const v1::EvictRequest* request,
                                                    v1::EvictResponse* response) {
  uint64_t left =
      request->max_pages() == 0 ? std::numeric_limits<uint64_t>::max() : request->max_pages();
  uint64_t evicted = 0;
  if (!request->namespace_key().empty()) {
    const absl::StatusOr<PageKey> name_space = ParseNamespace(request->namespace_key());
    if (!name_space.ok()) return Finish(context, name_space.status());
    absl::MutexLock lock(&mu_);
    if (index_ != nullptr) {
      evicted = index_->EvictNamespace(*name_space, left, options_.clock->Now());
    }
    left = 0;
  }
  // In parts: others wait for the lock.
  while (left > 0) {
    absl::MutexLock lock(&mu_);
    const uint64_t part = std::min<uint64_t>(left, kMaxPagesPerCall);
    const uint64_t done = index_ == nullptr ? 0 : index_->Evict(part, options_.clock->Now());
    evicted += done;
    if (done < part) break;
    left -= part;
  }
  response->set_pages_evicted(evicted);
  return Finish(context, absl::OkStatus());
}

Verifier::SlotState KvStoreServiceImpl::VerifySlot(uint64_t slot) {
  std::optional<PageIndex::Page> page;
  SealedSizes sizes;
  uint64_t page_bytes;
  {
    absl::MutexLock lock(&mu_);
    page = index_->Hold(slot);
    if (!page.has_value()) return Verifier::SlotState::kEmpty;
    sizes = {layout_fingerprint_, prefix_bytes_};
    page_bytes = page_bytes_;
  }
  const absl::Status verified = VerifyPage(sizes, page->key, page->generation,
                                           options_.arena.subspan(slot * page_bytes, page_bytes));
  {
    absl::MutexLock lock(&mu_);
    index_->EndHold();
    if (verified.ok()) return Verifier::SlotState::kIntact;
    // A reader may have found it damaged at the same time, and the slot may be another page's.
    const std::optional<PageIndex::Page> now = index_->StoredIn(slot);
    if (!now.has_value() || now->generation != page->generation) return Verifier::SlotState::kEmpty;
    index_->Discard({*page}, options_.clock->Now());
  }
  LogWarning("slot {}: {}; the page is discarded", slot, std::string(verified.message()));
  return Verifier::SlotState::kMismatched;
}

grpc::ServerUnaryReactor* KvStoreServiceImpl::StartVerify(grpc::CallbackServerContext* context,
                                                          const v1::StartVerifyRequest* request,
                                                          v1::VerifyProgress* response) {
  uint64_t rate = request->bytes_per_second();
  if (rate == 0) rate = kVerifyBytesPerSecond;
  if (rate < kMinVerifyBytesPerSecond) {
    return Finish(context, absl::InvalidArgumentError(
                               absl::StrCat("bytes_per_second = ", rate, ": must be at least ",
                                            kMinVerifyBytesPerSecond, ", or 0")));
  }
  uint64_t slots = 0, page_bytes = 0;
  {
    absl::MutexLock lock(&mu_);
    if (index_ != nullptr) slots = index_->stats().slots_total;
    page_bytes = page_bytes_;
  }
  if (slots == 0) {
    return Finish(context, absl::FailedPreconditionError("nothing was ever reserved here"));
  }
  FillProgress(verifier_.Start(slots, page_bytes, rate), response);
  return Finish(context, absl::OkStatus());
}

grpc::ServerUnaryReactor* KvStoreServiceImpl::GetVerifyProgress(
    grpc::CallbackServerContext* context, const v1::GetVerifyProgressRequest* request,
    v1::VerifyProgress* response) {
  FillProgress(verifier_.progress(), response);
  return Finish(context, absl::OkStatus());
}

void KvStoreServiceImpl::ExpireLeases() {
  absl::MutexLock lock(&mu_);
  if (index_ != nullptr) index_->Expire(options_.clock->Now());
}

absl::Status KvStoreServiceImpl::CheckIntegrity() const {
  absl::MutexLock lock(&mu_);
  if (index_ == nullptr) return absl::OkStatus();
  return index_->CheckIntegrity();
}

}  // namespace nosara::kvstore
