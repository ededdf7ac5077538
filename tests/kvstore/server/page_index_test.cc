#include "kvstore/server/page_index.h"

#include <gtest/gtest.h>

#include <map>
#include <optional>
#include <random>
#include <set>

#include "tests/status_matchers.h"

namespace nosara::kvstore {
namespace {

using ::nosara::testing::StatusIs;
using State = PageIndex::ReserveState;

PageKey Key(int n) {
  PageKey key;
  key.bytes[0] = static_cast<uint8_t>(n);
  key.bytes[1] = static_cast<uint8_t>(n >> 8);
  key.bytes[15] = 0x5a;
  return key;
}

std::vector<PageKey> Keys(int begin, int end) {
  std::vector<PageKey> keys;
  for (int n = begin; n < end; ++n) keys.push_back(Key(n));
  return keys;
}

class PageIndexTest : public ::testing::Test {
 protected:
  static constexpr int kRoot = 999;
  static PageIndex::Options Options(uint64_t slots) {
    PageIndex::Options options;
    options.num_slots = slots;
    options.base_generation = uint64_t{7} << 32;
    options.lease_ttl = absl::Seconds(10);
    options.quarantine = absl::Seconds(100);
    return options;
  }

  static std::vector<PageIndex::Page> Reserved(const PageIndex::ReserveResult& result) {
    std::vector<PageIndex::Page> pages;
    for (const auto& page : result.pages) {
      if (page.state == State::kReserved) pages.push_back(page.page);
    }
    return pages;
  }

  /// Stores blocks [begin, end) behind block begin - 1 (behind `parent` when given); the lease.
  uint64_t Store(PageIndex& index, int begin, int end, int parent = -1) {
    const auto result =
        index.Reserve(Keys(begin, end), Key(parent >= 0 ? parent : begin - 1), now_);
    EXPECT_OK(result);
    if (!result.ok()) return 0;
    EXPECT_OK(index.Commit(result->lease_id, Reserved(*result), now_));
    EXPECT_OK(index.CheckIntegrity());
    return result->lease_id;
  }
  static void Release(PageIndex& index, uint64_t lease, absl::Time now) {
    index.Release({&lease, 1}, now);
    EXPECT_OK(index.CheckIntegrity());
  }
  size_t Found(PageIndex& index, int begin, int end) {
    const auto found = index.Lookup(Keys(begin, end), now_);
    if (found.lease_id != 0) Release(index, found.lease_id, now_);
    return found.pages.size();
  }

  absl::Time now_ = absl::UnixEpoch() + absl::Hours(1);
};

TEST_F(PageIndexTest, VisibleOnlyAfterCommit) {
  PageIndex index(Options(4));
  const auto reserved = index.Reserve(Keys(0, 2), Key(kRoot), now_);
  ASSERT_OK(reserved);
  EXPECT_EQ(reserved->pages[0].state, State::kReserved);
  EXPECT_EQ(reserved->pages[0].page.generation, (uint64_t{7} << 32) + 1);
  EXPECT_EQ(Found(index, 0, 2), 0u);
  ASSERT_OK(index.Commit(reserved->lease_id, {Reserved(*reserved)[0]}, now_));
  EXPECT_EQ(Found(index, 0, 2), 1u);
  ASSERT_OK(index.Commit(reserved->lease_id, Reserved(*reserved), now_)) << "idempotent";
  EXPECT_EQ(Found(index, 0, 3), 2u);
  EXPECT_EQ(index.stats().pages_committed, 2u);
  EXPECT_OK(index.CheckIntegrity());
}

TEST_F(PageIndexTest, ASecondWriterIsToldToWaitAndThenFindsThePage) {
  PageIndex index(Options(4));
  const auto first = index.Reserve(Keys(0, 1), Key(kRoot), now_);
  ASSERT_OK(first);
  auto second = index.Reserve(Keys(0, 1), Key(kRoot), now_);
  ASSERT_OK(second);
  EXPECT_EQ(second->pages[0].state, State::kBusy);
  EXPECT_THAT(index.Commit(second->lease_id, {first->pages[0].page}, now_),
              StatusIs(absl::StatusCode::kNotFound, "not reserved under lease"));
  ASSERT_OK(index.Commit(first->lease_id, Reserved(*first), now_));
  second = index.Reserve(Keys(0, 1), Key(kRoot), now_);
  ASSERT_OK(second);
  EXPECT_EQ(second->pages[0].state, State::kStored);
  EXPECT_EQ(second->pages[0].page.slot, first->pages[0].page.slot);
}

TEST_F(PageIndexTest, LeasedPagesAreNeverEvicted) {
  PageIndex index(Options(4));
  const uint64_t lease = Store(index, 0, 4, kRoot);
  EXPECT_THAT(index.Reserve(Keys(10, 11), Key(kRoot), now_),
              StatusIs(absl::StatusCode::kResourceExhausted, "4 leased"));
  EXPECT_EQ(Found(index, 0, 4), 4u);
  Release(index, lease, now_);
  Store(index, 10, 11, kRoot);
  EXPECT_EQ(index.stats().pages_evicted, 1u);
}

TEST_F(PageIndexTest, AChainGoesFromItsTail) {
  PageIndex::Options options = Options(4);
  options.eviction = EvictionKind::kLru;
  PageIndex index(options);
  Release(index, Store(index, 0, 4, kRoot), now_);
  Release(index, Store(index, 10, 11, kRoot), now_);
  EXPECT_EQ(Found(index, 0, 4), 3u);
  Release(index, Store(index, 20, 22, kRoot), now_);
  // 10 was used less recently than the lookup of 0..2, which leased them anew.
  EXPECT_EQ(Found(index, 10, 11), 0u);
  EXPECT_EQ(Found(index, 0, 4), 2u);
}

TEST_F(PageIndexTest, AParentStaysWhileAChildIsLeasedOrBeingWritten) {
  PageIndex index(Options(3));
  Release(index, Store(index, 0, 1, kRoot), now_);
  const auto child = index.Reserve(Keys(1, 2), Key(0), now_);
  ASSERT_OK(child);
  // One slot is free; 0 has a child on its way, so a second one cannot be found.
  EXPECT_THAT(index.Reserve(Keys(10, 12), Key(kRoot), now_),
              StatusIs(absl::StatusCode::kResourceExhausted, "store full"));
  EXPECT_EQ(Found(index, 0, 1), 1u);
  Release(index, child->lease_id, now_);  // drops the reservation: 0 is a tail again
  Store(index, 10, 13, kRoot);
  EXPECT_EQ(Found(index, 0, 1), 0u);
}

TEST_F(PageIndexTest, ReservingDoesNotEvictThePageItHangsOn) {
  PageIndex index(Options(2));
  Release(index, Store(index, 0, 2, kRoot), now_);
  // Needs one slot: of 0 and 1 only 1 may go, though the new page hangs on 0.
  Store(index, 5, 6, /*parent=*/0);
  EXPECT_EQ(Found(index, 0, 1), 1u);
  EXPECT_EQ(Found(index, 1, 2), 0u);
}

TEST_F(PageIndexTest, AFailedReserveReservesNothing) {
  PageIndex index(Options(3));
  const uint64_t lease = Store(index, 0, 2, kRoot);
  EXPECT_FALSE(index.Reserve(Keys(10, 12), Key(kRoot), now_).ok());
  EXPECT_OK(index.CheckIntegrity());
  EXPECT_EQ(index.stats().slots_reserved, 0u);
  EXPECT_EQ(index.stats().leases, 1u);
  EXPECT_EQ(index.stats().reservations_refused, 1u);
  Release(index, lease, now_);
}

TEST_F(PageIndexTest, AFailedReserveEvictsNothing) {
  PageIndex index(Options(4));
  // 0 cannot go: 1, which is leased, hangs on it. Only 2 and 3 can.
  Release(index, Store(index, 0, 1, kRoot), now_);
  const uint64_t lease = Store(index, 1, 2);
  Release(index, Store(index, 2, 4), now_);
  EXPECT_EQ(index.stats().pages_evictable, 2u);
  EXPECT_THAT(index.Reserve(Keys(10, 13), Key(kRoot), now_),
              StatusIs(absl::StatusCode::kResourceExhausted,
                       "3 pages asked for, 0 of 4 slots free and 2 evictable; 1 leased"));
  EXPECT_EQ(index.stats().pages_evicted, 0u);
  EXPECT_OK(index.CheckIntegrity());
  Store(index, 10, 12, kRoot);
  EXPECT_EQ(Found(index, 0, 4), 2u);
  Release(index, lease, now_);
}

TEST_F(PageIndexTest, PagesThatNameEachOtherAsParentsAreEvictedLikeOthers) {
  for (const EvictionKind kind : {EvictionKind::kLru, EvictionKind::kS3Fifo}) {
    PageIndex::Options options = Options(3);
    options.eviction = kind;
    PageIndex index(options);
    // 0 behind 1, 1 behind 2, 2 behind 0.
    Release(index, Store(index, 0, 1, 1), now_);
    Release(index, Store(index, 1, 2, 2), now_);
    Release(index, Store(index, 2, 3, 0), now_);
    EXPECT_EQ(index.stats().pages_evictable, 3u);
    Store(index, 10, 13, kRoot);
    EXPECT_EQ(index.stats().pages_evicted, 3u);
  }
}

TEST_F(PageIndexTest, APageBehindAReservationThatIsDroppedIsEvictedLikeOthers) {
  PageIndex index(Options(3));
  const auto parent = index.Reserve(Keys(0, 1), Key(kRoot), now_);
  ASSERT_OK(parent);
  Release(index, Store(index, 1, 2), now_);
  EXPECT_EQ(index.stats().pages_evictable, 1u);
  Release(index, parent->lease_id, now_);
  // 0 again, in another slot or the same one: 1 does not hang on it.
  Release(index, Store(index, 0, 1, kRoot), now_);
  EXPECT_EQ(index.stats().pages_evictable, 2u);
  Store(index, 10, 13, kRoot);
  EXPECT_EQ(index.stats().pages_evicted, 2u);
}

TEST_F(PageIndexTest, LeasesExpireAndCanBeRenewed) {
  PageIndex index(Options(2));
  const uint64_t renewed = Store(index, 0, 1, kRoot);
  const uint64_t expired = Store(index, 10, 11, kRoot);
  now_ += absl::Seconds(9);
  EXPECT_TRUE(index.Renew({&renewed, 1}, now_).empty());
  now_ += absl::Seconds(1);
  const uint64_t both[] = {renewed, expired};
  EXPECT_EQ(index.Renew(both, now_), std::vector<uint64_t>{expired});
  EXPECT_EQ(index.stats().leases_expired, 1u);
  Store(index, 20, 21, kRoot);
  EXPECT_EQ(Found(index, 0, 1), 1u);
  EXPECT_EQ(Found(index, 10, 11), 0u);
}

TEST_F(PageIndexTest, AnAbandonedReservationIsQuarantined) {
  PageIndex index(Options(1));
  const auto reserved = index.Reserve(Keys(0, 1), Key(kRoot), now_);
  ASSERT_OK(reserved);
  now_ += absl::Seconds(10);
  EXPECT_THAT(index.Commit(reserved->lease_id, Reserved(*reserved), now_),
              StatusIs(absl::StatusCode::kAborted, "has ended"));
  EXPECT_THAT(index.Reserve(Keys(1, 2), Key(kRoot), now_),
              StatusIs(absl::StatusCode::kResourceExhausted, "1 in quarantine"));
  EXPECT_OK(index.CheckIntegrity());
  now_ += absl::Seconds(99);
  EXPECT_FALSE(index.Reserve(Keys(1, 2), Key(kRoot), now_).ok());
  now_ += absl::Seconds(1);
  const auto again = index.Reserve(Keys(1, 2), Key(kRoot), now_);
  ASSERT_OK(again);
  EXPECT_EQ(again->pages[0].page.generation, reserved->pages[0].page.generation + 1);
}

TEST_F(PageIndexTest, AReleasedReservationIsFreeAtOnce) {
  PageIndex index(Options(1));
  const auto reserved = index.Reserve(Keys(0, 1), Key(kRoot), now_);
  ASSERT_OK(reserved);
  Release(index, reserved->lease_id, now_);
  Store(index, 1, 2, kRoot);
}

TEST_F(PageIndexTest, ADroppedReservationIsQuarantinedAndItsKeyIsFree) {
  PageIndex index(Options(2));
  const auto reserved = index.Reserve(Keys(0, 1), Key(kRoot), now_);
  ASSERT_OK(reserved);
  index.DropReservation(reserved->lease_id, reserved->pages[0].page, now_);
  index.DropReservation(reserved->lease_id, reserved->pages[0].page, now_);
  EXPECT_OK(index.CheckIntegrity());
  EXPECT_EQ(index.stats().slots_quarantined, 1u);
  const auto again = index.Reserve(Keys(0, 1), Key(kRoot), now_);
  ASSERT_OK(again);
  EXPECT_EQ(again->pages[0].state, State::kReserved);
}

TEST_F(PageIndexTest, ADiscardedPageIsGoneAtOnceAndItsSlotWaitsForItsReadersAndLonger) {
  PageIndex index(Options(3));
  const uint64_t reader = Store(index, 0, 3, kRoot);
  const PageIndex::LookupResult found = index.Lookup({Key(1)}, now_);
  PageIndex::Page other = found.pages[0];
  ++other.generation;
  index.Discard({other}, now_);
  EXPECT_EQ(index.stats().pages_discarded, 0u) << "another generation";
  index.Discard({found.pages[0]}, now_);
  index.Discard({found.pages[0]}, now_);
  ASSERT_OK(index.CheckIntegrity());
  EXPECT_EQ(index.stats().pages_discarded, 1u);
  EXPECT_EQ(index.stats().slots_quarantined, 1u);
  EXPECT_EQ(Found(index, 0, 3), 1u);
  // It can be written anew, elsewhere: here no slot is left.
  EXPECT_THAT(index.Reserve(Keys(1, 2), Key(0), now_),
              StatusIs(absl::StatusCode::kResourceExhausted, "2 leased, 0 being written, 1 in"));
  Release(index, reader, now_);
  // 2 goes: nobody could find it. 0 stays: the new page hangs on it.
  Store(index, 1, 2, 0);
  EXPECT_EQ(Found(index, 0, 2), 2u);
  now_ += absl::Seconds(200);
  index.Expire(now_);
  EXPECT_EQ(index.stats().slots_free, 0u) << "its lease ended only now";
  now_ += absl::Seconds(100);
  index.Expire(now_);
  EXPECT_EQ(index.stats().slots_free, 1u);
  // Without a lease: into quarantine at once.
  const auto tail = index.Lookup(Keys(1, 2), now_);
  Release(index, tail.lease_id, now_);
  index.Discard(tail.pages, now_);
  EXPECT_EQ(index.stats().slots_quarantined, 1u);
  ASSERT_OK(index.CheckIntegrity());
}

TEST_F(PageIndexTest, AllThatIsStoredOfSomeKeysIsFoundWhereAsked) {
  PageIndex index(Options(8));
  Store(index, 0, 2, kRoot);
  Store(index, 4, 6);
  EXPECT_EQ(index.Lookup(Keys(0, 8), now_).pages.size(), 2u);
  const auto all = index.Lookup(Keys(0, 8), now_, PageIndex::Scope::kAll);
  ASSERT_EQ(all.pages.size(), 4u);
  EXPECT_EQ(all.pages[2].key, Key(4));
  EXPECT_EQ(index.Lookup(Keys(2, 5), now_, PageIndex::Scope::kAll).pages.size(), 1u);
  ASSERT_OK(index.CheckIntegrity());
}

TEST_F(PageIndexTest, RefusesRepeatedAndSelfParentedKeys) {
  PageIndex index(Options(4));
  EXPECT_THAT(index.Reserve({Key(1), Key(1)}, Key(0), now_),
              StatusIs(absl::StatusCode::kInvalidArgument, "occurs twice"));
  EXPECT_THAT(index.Reserve({Key(1)}, Key(1), now_),
              StatusIs(absl::StatusCode::kInvalidArgument, "own parent"));
  EXPECT_OK(index.CheckIntegrity());
}

TEST_F(PageIndexTest, AHeldPageAndThoseBeforeItStayWithoutBeingUsed) {
  for (const EvictionKind kind : {EvictionKind::kLru, EvictionKind::kS3Fifo}) {
    PageIndex::Options options = Options(4);
    options.eviction = kind;
    PageIndex index(options);
    Release(index, Store(index, 0, 2, kRoot), now_);
    Release(index, Store(index, 10, 12, kRoot), now_);
    const auto slot = index.Lookup({Key(1)}, now_);
    Release(index, slot.lease_id, now_);
    Release(index, index.Lookup(Keys(10, 12), now_).lease_id, now_);
    const auto held = index.Hold(slot.pages[0].slot);
    ASSERT_TRUE(held.has_value());
    EXPECT_EQ(held->key, Key(1));
    EXPECT_OK(index.CheckIntegrity());
    EXPECT_EQ(index.stats().pages_evictable, 2u);
    EXPECT_EQ(index.stats().pages_leased, 0u);
    EXPECT_EQ(index.Evict(9, now_), 2u);
    EXPECT_EQ(Found(index, 0, 2), 2u);
    index.EndHold();
    EXPECT_OK(index.CheckIntegrity());
    EXPECT_EQ(index.Evict(9, now_), 2u);
    EXPECT_EQ(index.stats().slots_free, 4u);
    EXPECT_EQ(index.stats().pages_evicted_by_request, 4u);
    EXPECT_FALSE(index.Hold(slot.pages[0].slot).has_value());
    EXPECT_FALSE(index.Hold(4).has_value());
  }
}

TEST_F(PageIndexTest, HoldingAPageIsNoUseOfIt) {
  PageIndex::Options options = Options(3);
  options.eviction = EvictionKind::kLru;
  PageIndex index(options);
  for (int page = 0; page < 3; ++page) Release(index, Store(index, page, page + 1, kRoot), now_);
  for (uint64_t slot = 0; slot < 3; ++slot) {
    ASSERT_TRUE(index.Hold(2 - slot).has_value());
    index.EndHold();
  }
  Store(index, 10, 11, kRoot);
  EXPECT_EQ(Found(index, 0, 1), 0u) << "is still the one that goes first";
  EXPECT_EQ(Found(index, 2, 3), 1u);
}

TEST_F(PageIndexTest, NamespacesAreCountedAndEvictedApart) {
  PageIndex index(Options(12));
  const auto store = [&](int begin, int end, int name_space) {
    PageIndex::ReserveOptions options;
    options.name_space = Key(name_space);
    const auto result =
        index.Reserve(Keys(begin, end), Key(begin == 0 ? kRoot : begin - 1), now_, options);
    ASSERT_OK(result);
    ASSERT_OK(index.Commit(result->lease_id, Reserved(*result), now_));
    Release(index, result->lease_id, now_);
  };
  const auto sizes = [&index](size_t count) {
    std::vector<std::pair<PageKey, uint64_t>> sizes;
    for (const auto& one : index.LargestNamespaces(count)) {
      sizes.emplace_back(one.name_space, one.pages);
    }
    return sizes;
  };
  using Sizes = std::vector<std::pair<PageKey, uint64_t>>;
  store(0, 4, 701);
  store(10, 12, 702);
  store(20, 25, 703);
  EXPECT_EQ(sizes(9), (Sizes{{Key(703), 5}, {Key(701), 4}, {Key(702), 2}}));
  EXPECT_EQ(sizes(1), (Sizes{{Key(703), 5}}));
  const auto reader = index.Lookup(Keys(20, 22), now_);
  EXPECT_EQ(index.EvictNamespace(Key(703), 99, now_), 3u);
  EXPECT_EQ(index.EvictNamespace(Key(704), 99, now_), 0u);
  EXPECT_OK(index.CheckIntegrity());
  EXPECT_EQ(index.EvictNamespace(Key(701), 3, now_), 3u);
  EXPECT_EQ(Found(index, 0, 4), 1u);
  EXPECT_EQ(sizes(9), (Sizes{{Key(702), 2}, {Key(703), 2}, {Key(701), 1}}));
  EXPECT_EQ(index.EvictNamespace(Key(701), 3, now_), 1u);
  EXPECT_EQ(index.stats().namespaces, 2u);
  EXPECT_EQ(index.stats().pages_evicted_by_request, 7u);
  // Where the client does not know: that of the page before, which is here.
  ASSERT_OK(index.Reserve(Keys(22, 23), Key(21), now_));
  ASSERT_OK(index.Reserve(Keys(30, 31), Key(29), now_));
  EXPECT_EQ(sizes(9), (Sizes{{Key(703), 3}, {Key(702), 2}, {PageKey(), 1}}));
  EXPECT_OK(index.CheckIntegrity());
}

TEST_F(PageIndexTest, ANamespaceAtItsQuotaGivesUpItsOwnPagesOrIsRefused) {
  PageIndex::Options options = Options(10);
  options.namespace_quota = 4;
  options.namespace_quotas = {{Key(702), 2}, {Key(703), 0}};
  PageIndex index(options);
  const auto reserve = [&](int begin, int end, int name_space) {
    return index.Reserve(Keys(begin, end), Key(begin % 10 == 0 ? kRoot : begin - 1), now_,
                         {.name_space = Key(name_space)});
  };
  const auto store = [&](int begin, int end, int name_space) {
    const auto result = reserve(begin, end, name_space);
    EXPECT_OK(result);
    if (!result.ok()) return uint64_t{0};
    EXPECT_OK(index.Commit(result->lease_id, Reserved(*result), now_));
    EXPECT_OK(index.CheckIntegrity());
    return result->lease_id;
  };
  Release(index, store(10, 13, 703), now_);
  Release(index, store(0, 3, 701), now_);
  Release(index, store(20, 21, 701), now_);
  // Its own tail goes, though three slots are free and the pages of 703 are older.
  Release(index, store(30, 31, 701), now_);
  EXPECT_EQ(Found(index, 0, 3), 2u);
  EXPECT_EQ(Found(index, 10, 13), 3u);
  EXPECT_EQ(index.stats().pages_evicted_by_quota, 1u);
  EXPECT_EQ(index.stats().pages_evicted, 0u);

  // What is leased does not go, nor what it hangs on.
  const auto reader = index.Lookup(Keys(0, 2), now_);
  const auto other = index.Lookup(Keys(20, 21), now_);
  EXPECT_THAT(reserve(40, 42, 701),
              StatusIs(absl::StatusCode::kResourceExhausted,
                       "full: 2 pages asked for, 4 of a quota of 4 there, 1 of them evictable"));
  EXPECT_EQ(index.stats().reservations_refused_by_quota, 1u);
  EXPECT_EQ(index.stats().reservations_refused, 0u);
  EXPECT_EQ(Found(index, 30, 31), 1u) << "evicted for nothing";
  EXPECT_OK(index.CheckIntegrity());
  Release(index, store(40, 41, 701), now_);
  EXPECT_EQ(Found(index, 30, 31), 0u);
  Release(index, reader.lease_id, now_);
  Release(index, other.lease_id, now_);

  // Another one's quota, and none.
  EXPECT_THAT(reserve(50, 53, 702), StatusIs(absl::StatusCode::kResourceExhausted, "quota of 2"));
  Release(index, store(50, 52, 702), now_);
  Release(index, store(60, 66, 703), now_);
  EXPECT_GT(index.stats().pages_evicted, 0u) << "the store is full";
  EXPECT_OK(index.CheckIntegrity());
  // All pages of a namespace can be exchanged.
  Release(index, store(70, 74, 701), now_);
  EXPECT_EQ(Found(index, 70, 74), 4u);
  EXPECT_EQ(Found(index, 0, 1), 0u);
}

TEST_F(PageIndexTest, ARepeatedReserveAnswersWhatTheFirstOneDid) {
  PageIndex index(Options(8));
  const uint64_t stored = Store(index, 0, 1, kRoot);
  const auto other = index.Reserve(Keys(3, 4), Key(2), now_);
  ASSERT_OK(other);
  const auto first = index.Reserve(Keys(0, 4), Key(kRoot), now_, {.request_id = 77});
  ASSERT_OK(first);
  Release(index, stored, now_);
  now_ += absl::Seconds(9);
  const auto again = index.Reserve(Keys(0, 4), Key(kRoot), now_, {.request_id = 77});
  ASSERT_OK(again);
  EXPECT_EQ(again->lease_id, first->lease_id);
  const State states[] = {State::kStored, State::kReserved, State::kReserved, State::kBusy};
  for (int i = 0; i < 4; ++i) {
    EXPECT_EQ(first->pages[i].state, states[i]) << i;
    EXPECT_EQ(again->pages[i].state, states[i]) << i;
    EXPECT_EQ(again->pages[i].page.slot, first->pages[i].page.slot) << i;
    EXPECT_EQ(again->pages[i].page.generation, first->pages[i].page.generation) << i;
  }
  EXPECT_OK(index.CheckIntegrity());
  // It was renewed; the other one was not.
  now_ += absl::Seconds(9);
  ASSERT_OK(index.Commit(again->lease_id, Reserved(*again), now_));
  const auto third = index.Reserve(Keys(0, 4), Key(kRoot), now_, {.request_id = 77});
  ASSERT_OK(third);
  EXPECT_EQ(third->pages[1].state, State::kStored);
  EXPECT_EQ(third->pages[3].state, State::kBusy);
  Release(index, first->lease_id, now_);
  EXPECT_EQ(index.stats().leases, 0u);
  EXPECT_EQ(Found(index, 0, 3), 3u);
}

TEST_F(PageIndexTest, WhatAnotherClientHasCommittedSinceIsLeasedByTheRepetition) {
  PageIndex index(Options(4));
  const auto other = index.Reserve(Keys(0, 1), Key(kRoot), now_);
  ASSERT_OK(other);
  const auto first = index.Reserve(Keys(0, 1), Key(kRoot), now_, {.request_id = 5});
  ASSERT_OK(first);
  EXPECT_EQ(first->pages[0].state, State::kBusy);
  ASSERT_OK(index.Commit(other->lease_id, Reserved(*other), now_));
  Release(index, other->lease_id, now_);
  const auto again = index.Reserve(Keys(0, 1), Key(kRoot), now_, {.request_id = 5});
  ASSERT_OK(again);
  EXPECT_EQ(again->pages[0].state, State::kStored);
  EXPECT_EQ(index.stats().pages_leased, 1u);
  Release(index, first->lease_id, now_);
  EXPECT_EQ(index.stats().pages_leased, 0u);
}

TEST_F(PageIndexTest, ARequestIdIsForgottenWithItsLease) {
  PageIndex index(Options(4));
  const auto first = index.Reserve(Keys(0, 1), Key(kRoot), now_, {.request_id = 5});
  ASSERT_OK(first);
  EXPECT_THAT(
      index.Reserve(Keys(0, 2), Key(kRoot), now_, {.request_id = 5}),
      StatusIs(absl::StatusCode::kInvalidArgument, "request_id = 5: was used for other keys"));
  EXPECT_THAT(index.Reserve(Keys(0, 1), Key(7), now_, {.request_id = 5}),
              StatusIs(absl::StatusCode::kInvalidArgument, "was used for other keys"));
  Release(index, first->lease_id, now_);
  const auto other = index.Reserve(Keys(5, 6), Key(kRoot), now_, {.request_id = 5});
  ASSERT_OK(other);
  EXPECT_NE(other->lease_id, first->lease_id);
  now_ += absl::Seconds(10);
  const auto after_expiry = index.Reserve(Keys(5, 6), Key(kRoot), now_, {.request_id = 5});
  ASSERT_OK(after_expiry);
  EXPECT_EQ(after_expiry->pages[0].state, State::kReserved);
  EXPECT_NE(after_expiry->pages[0].page.slot, other->pages[0].page.slot) << "is in quarantine";
  // Without an id nothing is remembered.
  EXPECT_NE(index.Reserve(Keys(6, 7), Key(kRoot), now_)->lease_id,
            index.Reserve(Keys(6, 7), Key(kRoot), now_)->lease_id);
  EXPECT_OK(index.CheckIntegrity());
}

// Random operations against a plain model: what each lease holds, what was committed. The model
// knows what must hold (leased pages are found, in their slots; generations grow; a parent outlives
// its child), not what is evicted.
TEST_F(PageIndexTest, RandomOperationsKeepTheInvariants) {
  for (uint64_t seed = 1; seed <= 40; ++seed) {
    SCOPED_TRACE(seed);
    std::mt19937_64 random(seed);
    const uint64_t slots = 4 + random() % 20;
    PageIndex::Options options = Options(slots);
    options.eviction = seed % 2 == 0 ? EvictionKind::kLru : EvictionKind::kS3Fifo;
    options.quarantine = absl::Seconds(3);
    if (seed % 3 == 0) options.namespace_quota = 6;
    PageIndex index(options);
    struct ModelLease {
      absl::Time expires;
      std::map<int, PageIndex::Page> pages;         // committed or found
      std::map<int, PageIndex::Page> reservations;  // to be committed
    };
    std::map<uint64_t, ModelLease> leases;
    std::map<uint64_t, uint64_t> last_generation;  // by slot
    std::set<int> committed;                       // ever
    std::optional<PageIndex::Page> held;
    bool held_is_gone = false;  // was discarded
    // Chain c has blocks 100c .. 100c + 11, all behind the root.
    const auto chain_keys = [](int chain, int begin, int end) {
      return Keys(100 * chain + begin, 100 * chain + end);
    };
    const auto expire = [&] {
      for (auto it = leases.begin(); it != leases.end();) {
        it = it->second.expires <= now_ ? leases.erase(it) : std::next(it);
      }
    };
    for (int step = 0; step < 800; ++step) {
      now_ += absl::Milliseconds(random() % 400);
      expire();
      index.Expire(now_);
      const int chain = static_cast<int>(random() % 5);
      switch (random() % 9) {
        case 7: {  // evict some, or hold one
          if (held.has_value()) {
            const auto stored = index.StoredIn(held->slot);
            ASSERT_TRUE(held_is_gone ||
                        (stored.has_value() && stored->generation == held->generation));
            index.EndHold();
            held.reset();
          } else if (random() % 2 == 0) {
            held = index.Hold(random() % slots);
            held_is_gone = false;
          }
          const uint64_t evictable = index.stats().pages_evictable;
          const uint64_t count = random() % 3;
          ASSERT_EQ(index.Evict(count, now_), std::min(count, evictable));
          if (random() % 8 == 0) index.EvictNamespace(Key(7000 + chain), random() % 9, now_);
          break;
        }
        case 8: {  // the bytes of a page turn out to be bad
          const auto page = index.StoredIn(random() % slots);
          if (random() % 4 != 0 || !page.has_value()) break;
          index.Discard({*page}, now_);
          held_is_gone = held_is_gone || (held.has_value() && held->slot == page->slot);
          ASSERT_TRUE(index.Lookup({page->key}, now_).pages.empty());
          for (auto& [id, lease] : leases) {
            std::erase_if(lease.pages,
                          [&](const auto& entry) { return entry.second.slot == page->slot; });
          }
          break;
        }
        case 0: {  // look a chain up
          const int length = 1 + static_cast<int>(random() % 12);
          const auto found = index.Lookup(chain_keys(chain, 0, length), now_);
          ASSERT_EQ(found.lease_id == 0, found.pages.empty());
          if (found.pages.empty()) break;
          ModelLease& lease = leases[found.lease_id];
          lease.expires = now_ + absl::Seconds(10);
          for (size_t i = 0; i < found.pages.size(); ++i) {
            const int n = 100 * chain + static_cast<int>(i);
            ASSERT_EQ(found.pages[i].key, Key(n));
            ASSERT_TRUE(committed.contains(n));
            lease.pages[n] = found.pages[i];
          }
          break;
        }
        case 1:
        case 2: {  // reserve some blocks behind what is there
          const int begin = static_cast<int>(Found(index, 100 * chain, 100 * chain + 12));
          const int end = std::min(12, begin + 1 + static_cast<int>(random() % 3));
          const int from = std::max(0, begin - static_cast<int>(random() % 2));
          if (from >= end) break;
          const PageIndex::Stats before = index.stats();
          const auto result = index.Reserve(chain_keys(chain, from, end),
                                            from == 0 ? Key(kRoot) : Key(100 * chain + from - 1),
                                            now_, {.name_space = Key(7000 + chain % 3)});
          if (!result.ok()) {
            ASSERT_THAT(result, StatusIs(absl::StatusCode::kResourceExhausted, "full: "));
            ASSERT_EQ(index.stats().pages_evicted, before.pages_evicted);
            ASSERT_EQ(index.stats().slots_free, before.slots_free);
            ASSERT_EQ(index.stats().pages_evictable, before.pages_evictable);
            break;
          }
          if (options.namespace_quota > 0) {
            for (const auto& one : index.LargestNamespaces(1)) {
              ASSERT_LE(one.pages, options.namespace_quota);
            }
          }
          ModelLease& lease = leases[result->lease_id];
          lease.expires = now_ + absl::Seconds(10);
          for (size_t i = 0; i < result->pages.size(); ++i) {
            const PageIndex::Page& page = result->pages[i].page;
            const int n = 100 * chain + from + static_cast<int>(i);
            if (result->pages[i].state == State::kReserved) {
              ASSERT_GT(page.generation, last_generation[page.slot]);
              last_generation[page.slot] = page.generation;
              lease.reservations[n] = page;
            } else if (result->pages[i].state == State::kStored) {
              lease.pages[n] = page;
            }
          }
          break;
        }
        case 3:
        case 4: {  // commit all of a lease's reservations
          if (leases.empty()) break;
          auto it = std::next(leases.begin(), static_cast<long>(random() % leases.size()));
          std::vector<PageIndex::Page> pages;
          for (const auto& [n, page] : it->second.reservations) pages.push_back(page);
          if (pages.empty()) break;
          ASSERT_OK(index.Commit(it->first, pages, now_));
          ASSERT_EQ(index.StoredIn(pages[0].slot)->generation, pages[0].generation);
          for (const auto& [n, page] : it->second.reservations) {
            committed.insert(n);
            it->second.pages[n] = page;
          }
          it->second.reservations.clear();
          break;
        }
        case 6: {  // discard a page that somebody has leased
          if (leases.empty() || random() % 4 != 0) break;
          const auto it = std::next(leases.begin(), static_cast<long>(random() % leases.size()));
          if (it->second.pages.empty()) break;
          const auto [n, page] = *it->second.pages.begin();
          index.Discard({page}, now_);
          held_is_gone = held_is_gone || (held.has_value() && held->slot == page.slot);
          for (auto& [id, lease] : leases) {
            const auto found = lease.pages.find(n);
            if (found != lease.pages.end() && found->second.generation == page.generation) {
              lease.pages.erase(found);
            }
          }
          break;
        }
        case 5: {  // release or renew
          if (leases.empty()) break;
          auto it = std::next(leases.begin(), static_cast<long>(random() % leases.size()));
          if (random() % 3 == 0) {
            ASSERT_TRUE(index.Renew({&it->first, 1}, now_).empty());
            it->second.expires = now_ + absl::Seconds(10);
          } else {
            index.Release({&it->first, 1}, now_);
            leases.erase(it);
          }
          break;
        }
      }
      ASSERT_OK(index.CheckIntegrity()) << "step " << step;
      const PageIndex::Stats stats = index.stats();
      ASSERT_EQ(stats.leases, leases.size()) << "step " << step;
      ASSERT_EQ(
          stats.slots_free + stats.slots_stored + stats.slots_reserved + stats.slots_quarantined,
          slots);
      // Every page under a live lease is where it was, by a lookup of its own key.
      for (const auto& [id, lease] : leases) {
        for (const auto& [n, page] : lease.pages) {
          const auto found = index.Lookup({Key(n)}, now_);
          ASSERT_EQ(found.pages.size(), 1u) << "step " << step << " page " << n;
          ASSERT_EQ(found.pages[0].slot, page.slot);
          ASSERT_EQ(found.pages[0].generation, page.generation);
          index.Release({&found.lease_id, 1}, now_);
        }
      }
    }
    if (held.has_value()) index.EndHold();
    EXPECT_GT(index.stats().pages_committed, 25u);
    EXPECT_GT(index.stats().keys_found, 100u);
    // Nothing has leaked: without leases and quarantine every slot can be had.
    for (const auto& [id, lease] : leases) index.Release({&id, 1}, now_);
    now_ += absl::Hours(1);
    for (int page = 0; page < static_cast<int>(slots); ++page) {
      ASSERT_OK(
          index.Reserve({Key(5000 + page)}, Key(kRoot), now_, {.name_space = Key(8000 + page)}));
    }
    ASSERT_OK(index.CheckIntegrity());
  }
}

}  // namespace
}  // namespace nosara::kvstore
