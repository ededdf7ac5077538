// The control plane of a store through gRPC, without a socket.
#include <gtest/gtest.h>

#include <map>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "tests/kvstore/server/service_fixture.h"

namespace nosara::kvstore {
namespace {

using ::nosara::testing::StatusIs;
using Response = v1::ReserveResponse;

TEST_F(ServiceTest, AFullStoreSaysWhatIsMissingAndLeavesRunningSequencesAlone) {
  Start(6);
  const uint64_t idle = Store({0, 1}, kRoot);
  Release(idle);
  const uint64_t running = Store({10, 11}, kRoot);
  const auto writing = Reserve({12}, 11);
  ASSERT_OK(writing);
  // 1 free, 2 evictable, 2 leased, 1 reserved.
  const auto refused = Reserve({20, 21, 22, 23}, kRoot);
  EXPECT_THAT(refused, StatusIs(absl::StatusCode::kResourceExhausted,
                                "store full: 4 pages asked for, 1 of 6 slots free and 2 evictable; "
                                "2 leased, 1 being written, 0 in quarantine"));
  EXPECT_TRUE(RetryDelay(refused.status()).has_value());
  EXPECT_EQ(Stats().pages_evicted(), 0u);
  EXPECT_EQ(Stats().reservations_refused(), 1u);

  // Who was there before goes on: leases, reads, and the page that was being written.
  EXPECT_TRUE(Renew(running));
  const auto found = Lookup({10, 11});
  ASSERT_OK(found);
  ASSERT_EQ(found->pages_size(), 2);
  for (const v1::Page& page : found->pages()) EXPECT_OK(VerifyPage(page));
  for (const v1::Page& page : Reserved(*writing)) WritePage(page);
  EXPECT_OK(Commit(writing->lease_id(), Reserved(*writing)));
  EXPECT_EQ(Found({0, 1}), 2);
  // What fits is taken.
  Store({20, 21, 22}, kRoot);
  EXPECT_EQ(Found({0}), 0);
  EXPECT_EQ(Found({10, 11, 12}), 3);
  EXPECT_OK(server_->CheckIntegrity());
}

TEST_F(ServiceTest, ALostAnswerOfReserveCanBeAskedForAgain) {
  Start(4);
  v1::ReserveRequest request = ReserveRequest({0, 1}, kRoot);
  request.set_request_id(42);
  const auto lost = Call(&v1::KvStoreService::Stub::Reserve, request);
  ASSERT_OK(lost);
  const auto again = Call(&v1::KvStoreService::Stub::Reserve, request);
  ASSERT_OK(again);
  EXPECT_EQ(again->lease_id(), lost->lease_id());
  ASSERT_EQ(Reserved(*again).size(), 2u);
  EXPECT_EQ(Stats().slots_reserved(), 2u);
  for (const v1::Page& page : Reserved(*again)) WritePage(page);
  EXPECT_OK(Commit(again->lease_id(), Reserved(*again)));
  EXPECT_EQ(Found({0, 1}), 2);
  // Another write of the same pages is another request: busy for it until they are committed.
  ASSERT_OK(Reserve({2}, 1));
  request = ReserveRequest({2}, 1);
  request.set_request_id(43);
  const auto other = Call(&v1::KvStoreService::Stub::Reserve, request);
  ASSERT_OK(other);
  EXPECT_EQ(other->slots(0).state(), Response::STATE_BUSY);
}

TEST_F(ServiceTest, RingsOfParentsDoNotStay) {
  Start(4);
  Release(Store({0}, 1));
  Release(Store({1}, 0));
  Release(Store({2, 3}, 1));
  Release(Store({10, 11, 12, 13}, kRoot));
  EXPECT_EQ(Stats().pages_evicted(), 4u);
}

TEST_F(ServiceTest, VerifyDiscardsPagesWhoseBytesHaveChanged) {
  Start(8);
  EXPECT_THAT(Call(&v1::KvStoreService::Stub::StartVerify, v1::StartVerifyRequest()),
              StatusIs(absl::StatusCode::kFailedPrecondition, "nothing was ever reserved"));
  const uint64_t reader = Store({0, 1, 2}, kRoot);
  Release(Store({10, 11}, kRoot));
  const auto found = Lookup({0, 1, 2});
  ASSERT_OK(found);
  v1::StartVerifyRequest request;
  request.set_bytes_per_second(1);
  EXPECT_THAT(Call(&v1::KvStoreService::Stub::StartVerify, request),
              StatusIs(absl::StatusCode::kInvalidArgument, "bytes_per_second = 1: must be"));
  const auto verify = [&] {
    EXPECT_OK(Call(&v1::KvStoreService::Stub::StartVerify, v1::StartVerifyRequest()));
    server_->WaitForVerify();
    const auto progress =
        Call(&v1::KvStoreService::Stub::GetVerifyProgress, v1::GetVerifyProgressRequest());
    EXPECT_OK(progress);
    EXPECT_EQ(progress->state(), v1::VerifyProgress::STATE_DONE);
    EXPECT_EQ(progress->slots_done(), 8u);
    return *progress;
  };
  EXPECT_EQ(verify().pages_verified(), 5u);
  EXPECT_EQ(verify().pages_mismatched(), 0u);

  // One bit in the last record of page 1: what Commit looks at is as it was.
  SlotBytes(found->pages(1).slot()).back() ^= std::byte{1};
  ASSERT_OK(VerifyPage(found->pages(1)));
  const v1::VerifyProgress progress = verify();
  EXPECT_EQ(progress.pages_verified(), 5u);
  EXPECT_EQ(progress.pages_mismatched(), 1u);
  EXPECT_EQ(Found({0, 1, 2}), 1);
  EXPECT_EQ(Stats().pages_discarded(), 1u);
  EXPECT_EQ(Stats().pages_verified(), 15u);
  EXPECT_EQ(Stats().slots_quarantined(), 1u);
  EXPECT_TRUE(Renew(reader));
  // Written again, it is found again.
  Store({1}, 0);
  EXPECT_EQ(verify().pages_mismatched(), 0u);
  EXPECT_EQ(Found({0, 1}), 2);
  EXPECT_OK(server_->CheckIntegrity());
}

TEST_F(ServiceTest, AVerifyThatIsStoppedEndsAtOnce) {
  Start(4000);
  for (int chain = 0; chain < 4; ++chain) {
    std::vector<int> pages(1000);
    std::iota(pages.begin(), pages.end(), 1000 * chain);
    Store(pages, kRoot);
  }
  v1::StartVerifyRequest request;
  request.set_bytes_per_second(uint64_t{1} << 20);  // would take half a minute
  ASSERT_OK(Call(&v1::KvStoreService::Stub::StartVerify, request));
  server_->Stop();
  EXPECT_LT(server_->Stats().pages_verified, 4000u);
}

TEST_F(ServiceTest, EvictTakesWhatNobodyLeases) {
  Start(8);
  Release(Store({0, 1, 2}, kRoot));
  const uint64_t lease = Store({10, 11}, kRoot);
  v1::EvictRequest request;
  request.set_max_pages(2);
  auto evicted = Call(&v1::KvStoreService::Stub::Evict, request);
  ASSERT_OK(evicted);
  EXPECT_EQ(evicted->pages_evicted(), 2u);
  EXPECT_EQ(Found({0, 1, 2}), 1);
  evicted = Call(&v1::KvStoreService::Stub::Evict, v1::EvictRequest());
  ASSERT_OK(evicted);
  EXPECT_EQ(evicted->pages_evicted(), 1u);
  EXPECT_EQ(Found({10, 11}), 2);
  const v1::GetStatsResponse stats = Stats();
  EXPECT_EQ(stats.pages_evicted_by_request(), 3u);
  EXPECT_EQ(stats.pages_evicted(), 0u);
  EXPECT_EQ(stats.slots_free(), 6u);
  EXPECT_TRUE(Renew(lease));
}

TEST_F(ServiceTest, EvictTakesOneNamespaceWhereAsked) {
  Start(8);
  v1::ReserveRequest request = ReserveRequest({0, 1}, kRoot);
  request.set_namespace_key(Key(700).ToBytes());
  const auto reserved = Call(&v1::KvStoreService::Stub::Reserve, request);
  ASSERT_OK(reserved);
  for (const v1::Page& page : Reserved(*reserved)) WritePage(page);
  ASSERT_OK(Commit(reserved->lease_id(), Reserved(*reserved)));
  Release(reserved->lease_id());
  Release(Store({10}, kRoot));
  const v1::GetStatsResponse stats = Stats();
  EXPECT_EQ(stats.namespaces_total(), 2u);
  ASSERT_EQ(stats.namespaces_size(), 2);
  EXPECT_EQ(stats.namespaces(0).namespace_key(), Key(700).ToBytes());
  EXPECT_EQ(stats.namespaces(0).pages(), 2u);
  v1::EvictRequest evict;
  evict.set_namespace_key(Key(700).ToBytes());
  const auto evicted = Call(&v1::KvStoreService::Stub::Evict, evict);
  ASSERT_OK(evicted);
  EXPECT_EQ(evicted->pages_evicted(), 2u);
  EXPECT_EQ(Found({0}), 0);
  EXPECT_EQ(Found({10}), 1);
  evict.set_namespace_key("short");
  EXPECT_THAT(Call(&v1::KvStoreService::Stub::Evict, evict),
              StatusIs(absl::StatusCode::kInvalidArgument, "namespace_key"));
}

TEST_F(ServiceTest, QuotasAreOfBytesByNamespace) {
  KvStoreServerOptions options;
  options.namespace_quota_bytes = 3 * layout_.page_bytes() - 1;  // two pages
  options.namespace_quotas_bytes = {{Key(700), 1}, {Key(701), 0}};
  Start(12, options);
  const auto reserve = [this](const std::vector<int>& pages, int name_space) {
    v1::ReserveRequest request = ReserveRequest(pages, kRoot);
    request.set_namespace_key(Key(name_space).ToBytes());
    return Call(&v1::KvStoreService::Stub::Reserve, request);
  };
  const auto refused = reserve({0, 1}, 700);
  EXPECT_THAT(refused, StatusIs(absl::StatusCode::kResourceExhausted, "of a quota of 1 there"));
  EXPECT_TRUE(RetryDelay(refused.status()).has_value());
  EXPECT_OK(reserve({0}, 700));
  EXPECT_OK(reserve({10, 11, 12, 13}, 701));
  EXPECT_OK(reserve({20, 21}, 702));
  EXPECT_THAT(reserve({22}, 702),
              StatusIs(absl::StatusCode::kResourceExhausted, "of a quota of 2 there"));
  const v1::GetStatsResponse stats = Stats();
  EXPECT_EQ(stats.reservations_refused_by_quota(), 2u);
  EXPECT_EQ(stats.reservations_refused(), 0u);
  ASSERT_EQ(stats.namespaces_size(), 3);
  EXPECT_EQ(stats.namespaces(0).quota_pages(), 0u);
  EXPECT_EQ(stats.namespaces(1).quota_pages(), 2u);
  EXPECT_EQ(stats.namespaces(2).quota_pages(), 1u);
}

TEST_F(ServiceTest, RequestsOutOfRangeAreRefusedByName) {
  Start(4);
  v1::ReserveRequest request = ReserveRequest({0}, kRoot);
  request.set_parent_key("short");
  EXPECT_THAT(Call(&v1::KvStoreService::Stub::Reserve, request),
              StatusIs(absl::StatusCode::kInvalidArgument, "parent_key"));
  request = ReserveRequest({}, kRoot);
  EXPECT_THAT(Call(&v1::KvStoreService::Stub::Reserve, request),
              StatusIs(absl::StatusCode::kInvalidArgument, "keys: has 0 elements"));
  request = ReserveRequest({0, 0}, kRoot);
  EXPECT_THAT(Call(&v1::KvStoreService::Stub::Reserve, request),
              StatusIs(absl::StatusCode::kInvalidArgument, "occurs twice"));
  v1::Page page;
  page.set_key(Key(0).ToBytes());
  page.set_slot(uint64_t{1} << 40);
  const auto lease = Reserve({1}, kRoot);
  ASSERT_OK(lease);
  EXPECT_THAT(Commit(lease->lease_id(), {page}),
              StatusIs(absl::StatusCode::kNotFound, "the store has 4 slots"));
  EXPECT_THAT(Commit(lease->lease_id() + 1, {page}),
              StatusIs(absl::StatusCode::kAborted, "has ended"));
}

// Random calls, bytes included, against a plain model of what each lease holds.
TEST_F(ServiceTest, RandomCallsKeepWhatIsLeased) {
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE(::testing::Message() << "seed " << seed);
  std::mt19937_64 random(seed);
  constexpr uint64_t kSlots = 24;
  Start(kSlots);
  struct Held {
    absl::Time expires;
    std::map<int, v1::Page> pages;  // stored ones
    std::map<int, v1::Page> reserved;
    v1::ReserveRequest request;  // that made it; empty for a lookup's
  };
  std::map<uint64_t, Held> held;
  const auto pick = [&] {
    return std::next(held.begin(), static_cast<long>(random() % held.size()));
  };
  const auto chain = [&](int number, int begin, int end) {
    std::vector<int> pages;
    for (int page = begin; page < end; ++page) pages.push_back(100 * number + page);
    return pages;
  };
  // Takes over what a Reserve answered.
  const auto note = [&](const v1::ReserveRequest& request, const Response& response) {
    Held& lease = held[response.lease_id()];
    lease.expires = clock_.Now() + absl::Seconds(10);
    lease.request = request;
    std::map<int, v1::Page> reserved;
    for (const auto& slot : response.slots()) {
      if (slot.state() == Response::STATE_BUSY) continue;
      const std::string& key = slot.page().key();
      const int page = static_cast<uint8_t>(key[0]) | static_cast<uint8_t>(key[1]) << 8;
      (slot.state() == Response::STATE_STORED ? lease.pages : reserved)[page] = slot.page();
    }
    lease.reserved = reserved;
  };
  int refused = 0, committed = 0, repeated = 0, corrupted = 0;
  for (int step = 0; step < 3000; ++step) {
    SCOPED_TRACE(::testing::Message() << "step " << step);
    clock_.Advance(absl::Milliseconds(random() % 300));
    std::erase_if(held, [&](const auto& entry) { return entry.second.expires <= clock_.Now(); });
    const int number = static_cast<int>(random() % 6);
    const auto operation = random() % 12;
    if (operation < 3) {
      const auto found = Lookup(chain(number, 0, 1 + static_cast<int>(random() % 10)));
      ASSERT_OK(found);
      if (found->lease_id() == 0) continue;
      Held& lease = held[found->lease_id()];
      lease.expires = clock_.Now() + absl::Seconds(10);
      for (int i = 0; i < found->pages_size(); ++i) lease.pages[100 * number + i] = found->pages(i);
    } else if (operation < 6) {
      const int begin = static_cast<int>(random() % 8);
      v1::ReserveRequest request =
          ReserveRequest(chain(number, begin, begin + 1 + static_cast<int>(random() % 4)),
                         begin == 0 ? kRoot : 100 * number + begin - 1);
      request.set_request_id(random() % 2 == 0 ? 0 : random());
      const auto response = Call(&v1::KvStoreService::Stub::Reserve, request);
      if (response.ok()) {
        note(request, *response);
      } else {
        ASSERT_THAT(response, StatusIs(absl::StatusCode::kResourceExhausted, "store full"));
        ++refused;
      }
    } else if (held.empty()) {
      continue;
    } else if (operation < 8) {
      const auto lease = pick();
      if (lease->second.reserved.empty()) continue;
      std::vector<v1::Page> pages;
      for (const auto& [page, place] : lease->second.reserved) pages.push_back(place);
      for (const v1::Page& page : pages) WritePage(page);
      if (random() % 8 == 0) {
        // One page is damaged on its way: that one is dropped, the others can still be committed.
        const size_t bad = random() % pages.size();
        SlotBytes(pages[bad].slot())[layout_.index_offset() + 3] ^= std::byte{1};
        ASSERT_THAT(Commit(lease->first, pages), StatusIs(absl::StatusCode::kDataLoss, ""));
        std::erase_if(lease->second.reserved,
                      [&](const auto& entry) { return entry.second.slot() == pages[bad].slot(); });
        ++corrupted;
      } else {
        ASSERT_OK(Commit(lease->first, pages));
        lease->second.pages.merge(lease->second.reserved);
        lease->second.reserved.clear();
        ++committed;
      }
    } else if (operation < 9) {
      const auto lease = pick();
      if (lease->second.request.request_id() == 0) continue;
      const v1::ReserveRequest request = lease->second.request;
      const uint64_t id = lease->first;
      const auto response = Call(&v1::KvStoreService::Stub::Reserve, request);
      ASSERT_OK(response);
      ASSERT_EQ(response->lease_id(), id);
      note(request, *response);
      ++repeated;
    } else if (operation < 10) {
      const auto lease = pick();
      ASSERT_TRUE(Renew(lease->first));
      lease->second.expires = clock_.Now() + absl::Seconds(10);
    } else {
      const auto lease = pick();
      Release(lease->first);
      held.erase(lease);
    }
    ASSERT_OK(server_->CheckIntegrity());
    const v1::GetStatsResponse stats = Stats();
    ASSERT_EQ(stats.leases(), held.size());
    std::map<uint64_t, std::string> by_slot;  // slot -> key, of all that is held
    uint64_t reserved = 0;
    for (const auto& [id, lease] : held) {
      for (const auto& [number, page] : lease.pages) {
        ASSERT_OK(VerifyPage(page)) << "page " << number;
        ASSERT_EQ(by_slot.emplace(page.slot(), page.key()).first->second, page.key());
      }
      for (const auto& [number, page] : lease.reserved) {
        ASSERT_TRUE(by_slot.emplace(page.slot(), page.key()).second) << "slot given twice";
        ++reserved;
      }
    }
    ASSERT_EQ(stats.slots_reserved(), reserved);
    ASSERT_EQ(stats.pages_leased() + reserved, by_slot.size());
  }
  EXPECT_GT(refused, 0);
  EXPECT_GT(committed, 0);
  EXPECT_GT(repeated, 0);
  EXPECT_GT(corrupted, 0);
  // Nothing has leaked.
  for (const auto& [id, lease] : held) Release(id);
  clock_.Advance(absl::Minutes(2));
  std::vector<int> all;
  for (int page = 0; page < static_cast<int>(kSlots); ++page) all.push_back(5000 + page);
  EXPECT_OK(Reserve(all, kRoot));
}

}  // namespace
}  // namespace nosara::kvstore
