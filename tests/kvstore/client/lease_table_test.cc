#include "kvstore/client/lease_table.h"

#include <gtest/gtest.h>

#include "tests/status_matchers.h"

namespace nosara::kvstore {
namespace {

using ::nosara::testing::StatusIs;

constexpr absl::Duration kTtl = absl::Seconds(24);
const absl::Time kStart = absl::UnixEpoch() + absl::Hours(1);
constexpr StoreId kStore{0};

TEST(LeaseTableTest, EndsBeforeTheServersLease) {
  LeaseTable table;
  const LeaseId lease = table.Add({kStore, 5, 77}, kStart, kTtl);
  EXPECT_OK(table.Check(lease, kStart + absl::Seconds(20)));
  EXPECT_THAT(table.Check(lease, kStart + absl::Seconds(21)),
              StatusIs(absl::StatusCode::kAborted, "lost"));
  EXPECT_THAT(table.Check(LeaseId{99}, kStart), StatusIs(absl::StatusCode::kAborted, "not held"));
}

TEST(LeaseTableTest, RenewsAtAThirdAndCountsFromWhenItAsked) {
  LeaseTable table;
  const LeaseId lease = table.Add({kStore, 5, 77}, kStart, kTtl);
  EXPECT_TRUE(table.TakeDue(kStore, kStart + absl::Seconds(7), 10).empty());
  EXPECT_TRUE(table.TakeDue(StoreId{1}, kStart + absl::Seconds(8), 10).empty());
  const auto due = table.TakeDue(kStore, kStart + absl::Seconds(8), 10);
  ASSERT_EQ(due.size(), 1u);
  EXPECT_EQ(due[0].server_id, 77u);
  EXPECT_EQ(due[0].epoch, 5u);
  EXPECT_TRUE(table.TakeDue(kStore, kStart + absl::Seconds(9), 10).empty()) << "asked already";
  table.Renewed(lease, kStart + absl::Seconds(8), kTtl);
  EXPECT_OK(table.Check(lease, kStart + absl::Seconds(28)));
  EXPECT_FALSE(table.Check(lease, kStart + absl::Seconds(29)).ok());
}

TEST(LeaseTableTest, ARenewalThatFailedIsAskedAgain) {
  LeaseTable table;
  table.Add({kStore, 5, 77}, kStart, kTtl);
  EXPECT_EQ(table.TakeDue(kStore, kStart + absl::Seconds(8), 10).size(), 1u);
  EXPECT_EQ(table.TakeDue(kStore, kStart + absl::Seconds(16), 10).size(), 1u);
}

TEST(LeaseTableTest, LostStaysLostAndIsCountedOnce) {
  LeaseTable table;
  const LeaseId refused = table.Add({kStore, 5, 1}, kStart, kTtl);
  const LeaseId expired = table.Add({kStore, 5, 2}, kStart, kTtl);
  const LeaseId restarted = table.Add({kStore, 5, 3}, kStart + absl::Minutes(1), kTtl);
  const LeaseId other = table.Add({StoreId{1}, 6, 4}, kStart + absl::Minutes(1), kTtl);
  table.Lost(refused);
  table.Lost(refused);
  table.Renewed(refused, kStart, kTtl);
  EXPECT_FALSE(table.Check(refused, kStart).ok());
  EXPECT_EQ(table.lost(), 1u);
  table.TakeDue(kStore, kStart + absl::Seconds(21), 10);
  EXPECT_EQ(table.lost(), 2u);
  table.Renewed(expired, kStart + absl::Seconds(20), kTtl);
  EXPECT_FALSE(table.Check(expired, kStart + absl::Seconds(20)).ok());
  table.LoseOthers(kStore, 9);
  EXPECT_EQ(table.lost(), 3u);
  EXPECT_FALSE(table.Check(restarted, kStart + absl::Minutes(1)).ok());
  EXPECT_OK(table.Check(other, kStart + absl::Minutes(1)));
  EXPECT_FALSE(table.Remove(restarted).has_value()) << "nothing to release";
  const auto removed = table.Remove(other);
  ASSERT_TRUE(removed.has_value());
  EXPECT_EQ(removed->id, 4u);
}

}  // namespace
}  // namespace nosara::kvstore
