#include "kvstore/client/placement.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

namespace nosara::kvstore {
namespace {

TEST(PlacementTest, IsStableBalancedAndMovesOnlyWhatItMust) {
  const std::vector<std::string> three = {"a:1", "b:1", "c:1"};
  const std::vector<std::string> shuffled = {"c:1", "a:1", "b:1"};
  const std::vector<std::string> four = {"a:1", "b:1", "c:1", "d:1"};
  std::vector<std::vector<int>> count(4, std::vector<int>(4, 0));  // [rank][store]
  for (int n = 0; n < 4000; ++n) {
    const PageKey key = NamespaceKey(std::to_string(n), 0, "", "");
    const std::vector<size_t> ranked = RankStores(three, key);
    const std::vector<size_t> other = RankStores(shuffled, key);
    ASSERT_EQ(ranked.size(), 3u);
    for (size_t rank = 0; rank < 3; ++rank) {
      ASSERT_EQ(three[ranked[rank]], shuffled[other[rank]]) << "the order of the list counts";
    }
    std::vector<size_t> more = RankStores(four, key);
    for (size_t rank = 0; rank < 4; ++rank) ++count[rank][more[rank]];
    // The newcomer gets in between; nobody else changes places.
    more.erase(std::find(more.begin(), more.end(), 3u));
    ASSERT_EQ(more, ranked);
  }
  for (const std::vector<int>& rank : count) {
    for (const int n : rank) EXPECT_NEAR(n, 1000, 150);
  }
  EXPECT_TRUE(RankStores({}, NamespaceKey("", 0, "", "")).empty());
}

}  // namespace
}  // namespace nosara::kvstore
