#include "kvstore/client/page_writer.h"

#include <algorithm>
#include <random>
#include <utility>

#include "absl/strings/str_cat.h"

namespace nosara::kvstore {
namespace {

/// Reserve is tried again once on a new connection: the usual error is a connection to a store that
/// has restarted since.
constexpr int kAttempts = 2;
constexpr absl::Duration kFirstBusyDelay = absl::Milliseconds(2);
constexpr absl::Duration kMaxBusyDelay = absl::Milliseconds(100);

/// Not 0, and another one each time.
uint64_t NewRequestId() {
  std::random_device random;
  return (uint64_t{random()} << 32 | random()) | 1;
}

}  // namespace

absl::StatusOr<PageRef> ParsePage(const v1::Page& page, const PageKey& expected, size_t store) {
  const absl::StatusOr<PageKey> key = PageKey::FromBytes(page.key());
  if (!key.ok() || *key != expected) {
    return absl::InternalError(
        absl::StrCat("store answered with another page than ", expected.ToHex()));
  }
  return PageRef{*key, StoreId{static_cast<uint32_t>(store)}, page.slot(), page.generation()};
}

struct PageWriter::State {
  size_t store = 0;
  PageKey parent;
  PageKey name_space;
  std::vector<PageWrite> pages;
  Done done;
  int attempts_left = kAttempts;
  absl::Time give_up;  // real time
  absl::Duration busy_delay = kFirstBusyDelay;
  /// Generation under which we wrote page i; 0: we did not.
  std::vector<uint64_t> written;
  std::vector<LeaseId> old_leases;
  /// The same until an answer has come: a store that has seen it before says again what it said.
  uint64_t request_id = NewRequestId();

  // Of the current attempt.
  uint64_t epoch = 0;
  uint64_t server_lease = 0;
  std::vector<PageRef> refs;
  std::vector<v1::ReserveResponse::State> states;
  LeaseId lease;
};

void PageWriter::Write(size_t store, const PageKey& parent, const PageKey& name_space,
                       std::vector<PageWrite> pages, Done done) {
  auto write = std::make_shared<State>();
  write->store = store;
  write->parent = parent;
  write->name_space = name_space;
  write->written.resize(pages.size(), 0);
  write->pages = std::move(pages);
  write->done = std::move(done);
  write->give_up = Clock::Real()->Now() + options_.busy_timeout;
  Reserve(std::move(write));
}

void PageWriter::Close() { closed_.store(true, std::memory_order_release); }

StoreConnection& PageWriter::store(const State& write) const {
  return options_.stores->at(write.store);
}

void PageWriter::Reserve(StatePtr write) {
  store(*write).WhenReady([this, write](absl::StatusOr<StoreConnection::Session> session) {
    if (!session.ok()) {
      Fail(write, session.status());
      return;
    }
    write->epoch = session->epoch;
    v1::ReserveRequest request;
    request.set_epoch(session->epoch);
    for (const PageWrite& page : write->pages) {
      request.add_keys(page.key.bytes.data(), page.key.bytes.size());
    }
    request.set_parent_key(write->parent.ToBytes());
    request.set_namespace_key(write->name_space.ToBytes());
    request.set_page_bytes(options_.layout.page_bytes());
    request.set_layout_fingerprint(options_.layout.fingerprint());
    request.set_prefix_bytes(options_.layout.prefix_bytes());
    request.set_request_id(write->request_id);
    const absl::Time sent = options_.clock->Now();
    store(*write).control().Reserve(
        std::move(request), [this, write, sent](absl::StatusOr<v1::ReserveResponse> response) {
          OnReserved(write, sent, std::move(response));
        });
  });
}

void PageWriter::OnReserved(StatePtr write, absl::Time sent,
                            absl::StatusOr<v1::ReserveResponse> response) {
  if (!response.ok()) {
    if (IsConnectionError(response.status())) {
      store(*write).Doubt(write->epoch);
      if (--write->attempts_left > 0 && !closed()) {
        Reserve(std::move(write));
        return;
      }
    }
    Fail(std::move(write), response.status());
    return;
  }
  write->server_lease = response->lease_id();
  write->request_id = NewRequestId();
  write->lease = options_.leases->Add(write->store, write->epoch, response->lease_id(), sent,
                                      absl::Milliseconds(response->lease_ttl_ms()));
  if (const absl::Status parsed = ParseReserved(*write, *response); !parsed.ok()) {
    options_.leases->Release({write->lease});
    Fail(std::move(write), parsed);
    return;
  }
  WriteReserved(std::move(write));
}

absl::Status PageWriter::ParseReserved(State& write, const v1::ReserveResponse& response) {
  if (static_cast<size_t>(response.slots_size()) != write.pages.size()) {
    return absl::InternalError(absl::StrCat("store answered with ", response.slots_size(),
                                            " slots for ", write.pages.size(), " keys"));
  }
  write.refs.clear();
  write.states.clear();
  for (int i = 0; i < response.slots_size(); ++i) {
    write.states.push_back(response.slots(i).state());
    write.refs.emplace_back();
    switch (response.slots(i).state()) {
      case v1::ReserveResponse::STATE_RESERVED:
      case v1::ReserveResponse::STATE_STORED: {
        const absl::StatusOr<PageRef> ref =
            ParsePage(response.slots(i).page(), write.pages[i].key, write.store);
        if (!ref.ok()) return ref.status();
        write.refs.back() = *ref;
        break;
      }
      case v1::ReserveResponse::STATE_BUSY:
        break;
      default:
        return absl::InternalError(absl::StrCat("store answered with state ",
                                                static_cast<int>(response.slots(i).state())));
    }
  }
  return absl::OkStatus();
}

void PageWriter::WriteReserved(StatePtr write) {
  std::vector<TransferThread::Piece> pieces;
  for (size_t i = 0; i < write->pages.size(); ++i) {
    if (write->states[i] != v1::ReserveResponse::STATE_RESERVED) continue;
    const PageWrite& page = write->pages[i];
    const PageRef& ref = write->refs[i];
    SealPage(options_.layout, page.key, ref.generation, page.tokens, page.bytes);
    TransferThread::Piece piece;
    piece.kind = TransferThread::Piece::Kind::kWritePage;
    piece.store = write->store;
    piece.key = page.key;
    piece.slot = ref.slot;
    piece.generation = ref.generation;
    piece.local = page.bytes;
    pieces.push_back(piece);
  }
  if (pieces.empty()) {
    FinishAttempt(std::move(write));
    return;
  }
  options_.transfers->Submit(std::move(pieces), [this, write](absl::Status status) {
    if (status.ok()) {
      Commit(write);
      return;
    }
    // Bytes of a broken connection may still arrive at the store. So the lease is not released,
    // which would free the slots at once, but forgotten: it expires into quarantine.
    options_.leases->Forget(write->lease);
    Fail(write, std::move(status));
  });
}

void PageWriter::Commit(StatePtr write) {
  v1::CommitRequest request;
  request.set_epoch(write->epoch);
  request.set_lease_id(write->server_lease);
  for (size_t i = 0; i < write->pages.size(); ++i) {
    if (write->states[i] != v1::ReserveResponse::STATE_RESERVED) continue;
    v1::Page* const page = request.add_pages();
    page->set_key(write->refs[i].key.ToBytes());
    page->set_slot(write->refs[i].slot);
    page->set_generation(write->refs[i].generation);
  }
  store(*write).control().Commit(
      std::move(request), [this, write](absl::StatusOr<v1::CommitResponse> response) {
        if (!response.ok()) {
          if (IsConnectionError(response.status())) store(*write).Doubt(write->epoch);
          options_.leases->Release({write->lease});
          // A reservation that is gone is, for the caller, a lease lost on the way.
          Fail(write, absl::IsNotFound(response.status())
                          ? absl::AbortedError(response.status().message())
                          : response.status());
          return;
        }
        for (size_t i = 0; i < write->pages.size(); ++i) {
          if (write->states[i] == v1::ReserveResponse::STATE_RESERVED) {
            write->written[i] = write->refs[i].generation;
          }
        }
        FinishAttempt(write);
      });
}

void PageWriter::FinishAttempt(StatePtr write) {
  const bool busy = std::find(write->states.begin(), write->states.end(),
                              v1::ReserveResponse::STATE_BUSY) != write->states.end();
  if (busy) {
    WaitForOthers(std::move(write));
    return;
  }
  WriteResult result;
  result.pages = std::move(write->refs);
  result.leases.push_back(write->lease);
  uint64_t ours = 0;
  for (size_t i = 0; i < result.pages.size(); ++i) {
    const bool wrote = write->written[i] == result.pages[i].generation;
    result.already_stored.push_back(wrote ? 0 : 1);
    ours += wrote;
  }
  pages_written_.fetch_add(ours, std::memory_order_relaxed);
  pages_already_stored_.fetch_add(result.pages.size() - ours, std::memory_order_relaxed);
  options_.leases->Release(write->old_leases);
  std::move(write->done)(std::move(result));
}

void PageWriter::WaitForOthers(StatePtr write) {
  // Held until the next attempt has leased the same pages anew.
  write->old_leases.push_back(write->lease);
  if (closed()) {
    Fail(std::move(write), absl::CancelledError("store client is closed"));
    return;
  }
  if (Clock::Real()->Now() >= write->give_up) {
    Fail(std::move(write),
         absl::AbortedError("page is being written by another client; try again later"));
    return;
  }
  const absl::Duration delay = write->busy_delay;
  write->busy_delay = std::min(2 * delay, kMaxBusyDelay);
  options_.transfers->RunAfter(delay, [this, write] { Reserve(write); });
}

void PageWriter::Fail(StatePtr write, absl::Status status) {
  options_.leases->Release(write->old_leases);
  std::move(write->done)(std::move(status));
}

}  // namespace nosara::kvstore
