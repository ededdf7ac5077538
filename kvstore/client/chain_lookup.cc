#include "kvstore/client/chain_lookup.h"

#include <algorithm>
#include <tuple>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "kvstore/client/page_writer.h"

namespace nosara::kvstore {
namespace {

/// A store is asked again once on a new connection: the usual error is a connection to one that has
/// restarted since.
constexpr int kAttempts = 2;

}  // namespace

struct ChainLookup::State {
  /// What one store is asked for, and what it said.
  struct Question {
    size_t store = 0;
    std::vector<size_t> keys;                       // as indices
    std::vector<size_t> rank;                       // of the store among the homes of key i
    std::vector<std::pair<size_t, PageRef>> found;  // (index into `keys`, page)
    LeaseId lease;
    bool answered = false;
  };

  std::vector<PageKey> keys;
  StoreClient::Done<LookupResult> done;
  std::vector<Question> questions;

  absl::Mutex mu;
  size_t waiting ABSL_GUARDED_BY(mu) = 0;
  size_t answers ABSL_GUARDED_BY(mu) = 0;
  absl::Status error ABSL_GUARDED_BY(mu);
};

void ChainLookup::Lookup(std::vector<PageKey> keys, StoreClient::Done<LookupResult> done) {
  auto lookup = std::make_shared<State>();
  lookup->keys = std::move(keys);
  lookup->done = std::move(done);
  absl::flat_hash_map<size_t, size_t> question_of;  // by store
  for (size_t first = 0; first < lookup->keys.size(); first += kGroupBlocks) {
    const size_t end = std::min(first + kGroupBlocks, lookup->keys.size());
    const std::vector<size_t> homes =
        options_.stores->Homes(lookup->keys[first], options_.replicas + 1);
    for (size_t rank = 0; rank < homes.size(); ++rank) {
      const auto [found, added] = question_of.try_emplace(homes[rank], lookup->questions.size());
      if (added) lookup->questions.emplace_back().store = homes[rank];
      State::Question& question = lookup->questions[found->second];
      for (size_t i = first; i < end; ++i) {
        question.keys.push_back(i);
        question.rank.push_back(rank);
      }
    }
  }
  {
    absl::MutexLock lock(&lookup->mu);
    lookup->waiting = lookup->questions.size();
  }
  for (size_t i = 0; i < lookup->questions.size(); ++i) Ask(lookup, i, kAttempts);
}

void ChainLookup::Ask(StatePtr lookup, size_t index, int attempts_left) {
  StoreConnection& store = options_.stores->at(lookup->questions[index].store);
  store.WhenReady([this, lookup = std::move(lookup), index, attempts_left,
                   &store](absl::StatusOr<StoreConnection::Session> session) {
    if (!session.ok()) {
      OnError(lookup, session.status());
      return;
    }
    v1::LookupRequest request;
    request.set_epoch(session->epoch);
    request.set_scope(v1::LookupRequest::SCOPE_ALL);
    for (const size_t i : lookup->questions[index].keys) {
      request.add_keys(lookup->keys[i].bytes.data(), lookup->keys[i].bytes.size());
    }
    const absl::Time sent = options_.clock->Now();
    const uint64_t epoch = session->epoch;
    store.control().Lookup(
        std::move(request), [this, lookup, index, attempts_left, epoch, sent,
                             &store](absl::StatusOr<v1::LookupResponse> response) {
          if (response.ok()) {
            OnAnswer(lookup, index, epoch, sent, *response);
            return;
          }
          if (IsConnectionError(response.status())) {
            store.Doubt(epoch);
            // One that hangs is worth a second wait only where there is no other.
            const bool again = absl::IsAborted(response.status()) || lookup->questions.size() == 1;
            if (again && attempts_left > 1 && !options_.closed()) {
              Ask(lookup, index, attempts_left - 1);
              return;
            }
          }
          OnError(lookup, response.status());
        });
  });
}

void ChainLookup::OnAnswer(const StatePtr& lookup, size_t index, uint64_t epoch, absl::Time sent,
                           const v1::LookupResponse& response) {
  State::Question& question = lookup->questions[index];
  if (response.lease_id() != 0) {
    question.lease = options_.leases->Add(question.store, epoch, response.lease_id(), sent,
                                          absl::Milliseconds(response.lease_ttl_ms()));
  }
  // Both are in the order of the keys.
  size_t next = 0;
  absl::Status status;
  for (const v1::Page& page : response.pages()) {
    const absl::StatusOr<PageKey> key = PageKey::FromBytes(page.key());
    while (key.ok() && next < question.keys.size() && lookup->keys[question.keys[next]] != *key) {
      ++next;
    }
    if (!key.ok() || next == question.keys.size()) {
      status = absl::InternalError("store answered with a page that was not asked for");
      break;
    }
    const absl::StatusOr<PageRef> ref = ParsePage(page, *key, question.store);
    question.found.emplace_back(next++, *ref);
  }
  if (!status.ok()) {
    question.found.clear();
    if (question.lease.value != 0) options_.leases->Release({question.lease});
    question.lease = LeaseId{};
    OnError(lookup, status);
    return;
  }
  question.answered = true;
  {
    absl::MutexLock lock(&lookup->mu);
    ++lookup->answers;
  }
  Count(lookup);
}

void ChainLookup::OnError(const StatePtr& lookup, const absl::Status& status) {
  {
    absl::MutexLock lock(&lookup->mu);
    if (lookup->error.ok()) lookup->error = status;
  }
  Count(lookup);
}

void ChainLookup::Count(const StatePtr& lookup) {
  absl::Status failed;
  {
    absl::MutexLock lock(&lookup->mu);
    if (--lookup->waiting > 0) return;
    if (lookup->answers == 0) failed = lookup->error;
  }
  if (!failed.ok()) {
    std::move(lookup->done)(failed);
    return;
  }
  Finish(*lookup);
}

void ChainLookup::Finish(State& lookup) {
  struct Candidate {
    PageRef page;
    LeaseId lease;
    int distance = 0;
    size_t rank = 0;
  };
  std::vector<std::vector<Candidate>> candidates(lookup.keys.size());
  // Homes that should have page i and could say whether they do.
  std::vector<size_t> expected(lookup.keys.size(), 0);
  for (const State::Question& question : lookup.questions) {
    const int distance = Distance(options_.stores->at(question.store).path());
    for (const auto& [i, page] : question.found) {
      candidates[question.keys[i]].push_back({page, question.lease, distance, question.rank[i]});
    }
    for (size_t i = 0; question.answered && i < question.keys.size(); ++i) {
      expected[question.keys[i]] += question.rank[i] < options_.replicas ? 1 : 0;
    }
  }
  LookupResult result;
  for (const std::vector<Candidate>& copies : candidates) {
    if (copies.empty()) break;
    const auto nearest =
        std::min_element(copies.begin(), copies.end(), [](const Candidate& a, const Candidate& b) {
          return std::tie(a.distance, a.rank) < std::tie(b.distance, b.rank);
        });
    const size_t i = result.pages.size();
    const PageOrigin origin{lookup.keys[i - i % kGroupBlocks],
                            i == 0 ? PageKey() : lookup.keys[i - 1]};
    result.pages.push_back(nearest->page);
    if (copies.size() < expected[i] && options_.on_short) options_.on_short(nearest->page, origin);
    if (options_.replicas == 1 && copies.size() == 1) continue;
    for (const Candidate& copy : copies) options_.copies->Add(copy.page, copy.lease, origin);
  }
  std::vector<LeaseId> useless;
  for (const State::Question& question : lookup.questions) {
    if (question.lease.value == 0) continue;
    // The first page found is the one nearest to the start of the chain.
    const bool used = question.keys[question.found[0].first] < result.pages.size();
    (used ? result.leases : useless).push_back(question.lease);
  }
  options_.leases->Release(useless);
  std::move(lookup.done)(std::move(result));
}

}  // namespace nosara::kvstore
