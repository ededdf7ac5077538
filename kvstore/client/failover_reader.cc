#include "kvstore/client/failover_reader.h"

#include <algorithm>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "base/log.h"

namespace nosara::kvstore {
namespace {

bool OtherCopyMayDo(const absl::Status& status) {
  return absl::IsUnavailable(status) || absl::IsAborted(status) || absl::IsDataLoss(status) ||
         absl::IsNotFound(status);
}

PageRef RefOf(const TransferThread::Piece& piece) {
  return {piece.key, StoreId{static_cast<uint32_t>(piece.store)}, piece.slot, piece.generation};
}

}  // namespace

struct FailoverReader::State {
  struct Item {
    Piece piece;
    std::vector<PageRef> tried;  // failed ones; few
    bool redirected = false;
    bool needs_checksum = false;
  };
  std::vector<Item> items;
  Done done;
  absl::Status error;            // that no other copy could mend
  std::vector<PageRef> damaged;  // to be discarded
};

void FailoverReader::Read(std::vector<Piece> pieces, Done done) {
  auto read = std::make_shared<State>();
  read->done = std::move(done);
  std::vector<size_t> straight, redirected;
  for (size_t i = 0; i < pieces.size(); ++i) {
    read->items.push_back({pieces[i], {}});
    const bool doubtful =
        pieces[i].store < options_.stores->size() && !options_.stores->at(pieces[i].store).live();
    if (doubtful && Redirect(*read, i, Among::kLive)) {
      redirected.push_back(i);
    } else {
      straight.push_back(i);
    }
  }
  if (redirected.empty()) {
    Submit(std::move(read), std::move(straight));
    return;
  }
  // All in one go, once the checksums are there.
  redirected.insert(redirected.end(), straight.begin(), straight.end());
  SubmitRedirected(std::move(read), std::move(redirected));
}

void FailoverReader::Submit(StatePtr read, std::vector<size_t> todo) {
  std::vector<Piece> pieces;
  pieces.reserve(todo.size());
  for (const size_t i : todo) pieces.push_back(read->items[i].piece);
  options_.transfers->SubmitEach(std::move(pieces),
                                 [this, read = std::move(read), todo = std::move(todo)](
                                     std::vector<TransferThread::Failure> failures) mutable {
                                   OnTransferred(read, todo, std::move(failures));
                                 });
}

void FailoverReader::OnTransferred(const StatePtr& read, const std::vector<size_t>& todo,
                                   std::vector<TransferThread::Failure> failures) {
  std::vector<size_t> again;
  for (TransferThread::Failure& failure : failures) {
    const size_t i = todo[failure.piece];
    State::Item& item = read->items[i];
    if (absl::IsDataLoss(failure.status)) read->damaged.push_back(RefOf(item.piece));
    item.tried.push_back(RefOf(item.piece));
    if (OtherCopyMayDo(failure.status) && Redirect(*read, i, Among::kAll)) {
      again.push_back(i);
    } else if (read->error.ok()) {
      read->error = std::move(failure.status);
    }
  }
  if (again.empty() || !read->error.ok()) {
    Finish(read);
    return;
  }
  SubmitRedirected(read, std::move(again));
}

bool FailoverReader::Redirect(State& read, size_t i, Among among) {
  State::Item& item = read.items[i];
  const std::vector<CopyTable::Copy> copies = options_.copies->CopiesOf(item.piece.key);
  const CopyTable::Copy* best = nullptr;
  const auto order = [this](const CopyTable::Copy& copy) {
    const StoreConnection& store = options_.stores->at(copy.page.store.value);
    return std::pair(!store.live(), Distance(store.path()));
  };
  const PageRef current = RefOf(item.piece);
  for (const CopyTable::Copy& copy : copies) {
    const auto same = [&copy](const PageRef& other) {
      return other.store == copy.page.store && other.generation == copy.page.generation &&
             other.slot == copy.page.slot;
    };
    if (same(current) || std::any_of(item.tried.begin(), item.tried.end(), same)) continue;
    if (among == Among::kLive && !options_.stores->at(copy.page.store.value).live()) continue;
    if (best == nullptr || order(copy) < order(*best)) best = &copy;
  }
  if (best == nullptr) return false;
  item.redirected = true;
  item.piece.store = best->page.store.value;
  item.piece.slot = best->page.slot;
  item.piece.generation = best->page.generation;
  if (item.piece.kind == Piece::Kind::kReadRecord) {
    item.needs_checksum = best->checksums == nullptr;
    if (!item.needs_checksum) item.piece.checksum = (*best->checksums)[item.piece.record];
  }
  return true;
}

void FailoverReader::SubmitRedirected(StatePtr read, std::vector<size_t> todo) {
  // One prefix per copy, however many of its records are asked for.
  struct Prefixes {
    std::vector<std::byte> bytes;
    absl::flat_hash_map<std::pair<size_t, uint64_t>, size_t> index;  // (store, slot)
    std::vector<std::vector<size_t>> items;
  };
  auto prefixes = std::make_shared<Prefixes>();
  std::vector<Piece> pieces;
  for (const size_t i : todo) {
    State::Item& item = read->items[i];
    if (!item.needs_checksum) continue;
    const auto [found, added] =
        prefixes->index.try_emplace({item.piece.store, item.piece.slot}, pieces.size());
    if (added) {
      Piece piece = item.piece;
      piece.kind = Piece::Kind::kReadPrefix;
      pieces.push_back(piece);
      prefixes->items.emplace_back();
    }
    prefixes->items[found->second].push_back(i);
  }
  if (pieces.empty()) {
    Submit(std::move(read), std::move(todo));
    return;
  }
  const size_t prefix_bytes = options_.layout.prefix_bytes();
  prefixes->bytes.resize(pieces.size() * prefix_bytes);
  for (size_t p = 0; p < pieces.size(); ++p) {
    pieces[p].local = absl::MakeSpan(prefixes->bytes).subspan(p * prefix_bytes, prefix_bytes);
  }
  std::vector<Piece> asked = pieces;
  options_.transfers->SubmitEach(
      std::move(pieces),
      [this, read = std::move(read), todo = std::move(todo), prefixes,
       asked = std::move(asked)](std::vector<TransferThread::Failure> failures) mutable {
        std::vector<absl::Status> statuses(asked.size());
        for (TransferThread::Failure& failure : failures) {
          statuses[failure.piece] = std::move(failure.status);
        }
        absl::flat_hash_map<size_t, absl::Status> failed;  // by item
        for (size_t p = 0; p < asked.size(); ++p) {
          if (absl::IsDataLoss(statuses[p])) read->damaged.push_back(RefOf(asked[p]));
          auto checksums = std::make_shared<std::vector<uint64_t>>();
          for (int record = 0; statuses[p].ok() && record < options_.layout.num_records();
               ++record) {
            checksums->push_back(RecordChecksum(options_.layout, asked[p].local, record));
          }
          if (statuses[p].ok()) options_.copies->SetChecksums(RefOf(asked[p]), checksums);
          for (const size_t i : prefixes->items[p]) {
            State::Item& item = read->items[i];
            if (statuses[p].ok()) {
              item.needs_checksum = false;
              item.piece.checksum = (*checksums)[item.piece.record];
            } else {
              failed.emplace(i, statuses[p]);
            }
          }
        }
        // Those go on to the copy after.
        bool prefixes_left = false;
        for (const auto& [i, status] : failed) {
          read->items[i].tried.push_back(RefOf(read->items[i].piece));
          if (OtherCopyMayDo(status) && Redirect(*read, i, Among::kAll)) {
            prefixes_left |= read->items[i].needs_checksum;
          } else if (read->error.ok()) {
            read->error = status;
          }
        }
        if (!read->error.ok()) {
          Finish(read);
        } else if (prefixes_left) {
          SubmitRedirected(std::move(read), std::move(todo));
        } else {
          Submit(std::move(read), std::move(todo));
        }
      });
}

void FailoverReader::Finish(const StatePtr& read) {
  std::vector<PageRef> damaged = std::exchange(read->damaged, {});
  if (!read->error.ok()) {
    // Not before the stores know: who looks the page up next must not find it.
    Discard(std::move(damaged), [read] { std::move(read->done)(read->error); });
    return;
  }
  Discard(std::move(damaged), [] {});
  std::vector<PageRef> copies;
  copies.reserve(read->items.size());
  uint64_t redirected = 0;
  for (const State::Item& item : read->items) {
    copies.push_back(RefOf(item.piece));
    redirected += item.redirected ? 1 : 0;
  }
  failed_over_.fetch_add(redirected, std::memory_order_relaxed);
  std::move(read->done)(std::move(copies));
}

void FailoverReader::Discard(std::vector<PageRef> pages, absl::AnyInvocable<void() &&> then) {
  if (pages.empty()) {
    std::move(then)();
    return;
  }
  struct Waiting {
    std::atomic<size_t> stores{0};
    absl::AnyInvocable<void() &&> then;
  };
  std::sort(pages.begin(), pages.end(), [](const PageRef& a, const PageRef& b) {
    return std::pair(a.store.value, a.slot) < std::pair(b.store.value, b.slot);
  });
  // Several records of a page may have been found damaged.
  pages.erase(std::unique(pages.begin(), pages.end(),
                          [](const PageRef& a, const PageRef& b) {
                            return a.store == b.store && a.slot == b.slot &&
                                   a.generation == b.generation;
                          }),
              pages.end());
  discarded_.fetch_add(pages.size(), std::memory_order_relaxed);
  std::vector<std::pair<size_t, v1::DiscardRequest>> requests;
  for (const PageRef& page : pages) {
    LogWarning("page {} in slot {} of store {} is damaged: discarded", page.key.ToHex(), page.slot,
               options_.stores->at(page.store.value).address());
    if (requests.empty() || requests.back().first != page.store.value) {
      requests.emplace_back(page.store.value, v1::DiscardRequest());
    }
    v1::Page* const proto = requests.back().second.add_pages();
    proto->set_key(page.key.ToBytes());
    proto->set_slot(page.slot);
    proto->set_generation(page.generation);
  }
  auto waiting = std::make_shared<Waiting>();
  waiting->stores = requests.size();
  waiting->then = std::move(then);
  for (auto& [store, request] : requests) {
    options_.stores->at(store).control().Discard(
        std::move(request), [waiting](absl::StatusOr<v1::DiscardResponse>) {
          // Acquire and release: the last one sees what all others have done.
          if (waiting->stores.fetch_sub(1, std::memory_order_acq_rel) == 1) {
            std::move(waiting->then)();
          }
        });
  }
}

}  // namespace nosara::kvstore
