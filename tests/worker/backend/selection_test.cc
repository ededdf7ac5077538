// The properties of the selection that offloading rests on, and its hand-computed parts.
#include "worker/backend/selection.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <random>
#include <set>

namespace nosara::worker {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

TEST(SelectionTest, WindowsBecomeVisibleWhenTheirLastTokenIsThere) {
  EXPECT_EQ(VisibleWindows(-1), 0);
  EXPECT_EQ(VisibleWindows(30), 0);
  EXPECT_EQ(VisibleWindows(31), 1);
  EXPECT_EQ(VisibleWindows(46), 1);
  EXPECT_EQ(VisibleWindows(47), 2);
  EXPECT_EQ(VisibleWindows(63), 3);
}

TEST(SelectionTest, ABlockScoresAsItsBestOverlappingWindow) {
  // t = 200: windows 0 .. 10 are visible, blocks 0 .. 3 exist.
  const std::vector<float> s = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11};
  std::vector<float> S(4);
  PoolQueryScores(s, 200, absl::MakeSpan(S));
  EXPECT_EQ(S, (std::vector<float>{4, 8, 11, -kInfinity}));  // windows 0-3, 3-7, 7-10; 11 not yet
  std::vector<float> none(1, 7.0f);
  PoolQueryScores({}, 30, absl::MakeSpan(none));
  EXPECT_EQ(none[0], 0.0f);
}

TEST(SelectionTest, ConsecutiveSelectionsShareTheQueryAgnosticPart) {
  const uint32_t seed = std::random_device{}();
  SCOPED_TRACE(::testing::Message() << "seed " << seed);
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  const NosaConfig config;  // 33 of 64 depend on the query
  SelectionScratch scratch;
  for (int round = 0; round < 50; ++round) {
    const int64_t t = 64 * (80 + random() % 200) + random() % 63;
    const size_t blocks = t / 64 + 1;
    std::vector<float> S(blocks), E(blocks);
    for (float& e : E) e = normal(random);
    std::vector<int32_t> before, after, both;
    for (float& s : S) s = normal(random);
    Select(config, AttentionPolicy::kNosa, t, S, E, scratch, before);
    for (float& s : S) s = normal(random);  // any other query
    Select(config, AttentionPolicy::kNosa, t + 1, S, E, scratch, after);
    std::set_intersection(before.begin(), before.end(), after.begin(), after.end(),
                          std::back_inserter(both));
    EXPECT_EQ(before.size(), 64u);
    EXPECT_TRUE(std::is_sorted(before.begin(), before.end()));
    EXPECT_EQ(std::set<int32_t>(before.begin(), before.end()).size(), 64u);
    EXPECT_GE(both.size(), 31u);
    EXPECT_EQ(before.front(), 0);
    for (int32_t n = blocks - 17; n < static_cast<int32_t>(blocks); ++n) {
      EXPECT_TRUE(std::binary_search(before.begin(), before.end(), n)) << n;
    }
  }
}

TEST(SelectionTest, AgreesWithASlowOne) {
  const uint32_t seed = std::random_device{}();
  SCOPED_TRACE(::testing::Message() << "seed " << seed);
  std::mt19937 random(seed);
  SelectionScratch scratch;
  for (int round = 0; round < 3000; ++round) {
    NosaConfig config;
    config.init_blocks = random() % 3;
    config.window_blocks = 1 + random() % 4;
    config.topk_q_blocks = 1 + random() % 4;
    config.topk_blocks = config.QueryAwareBlocks() + random() % 6;
    const int b = random() % 40;
    const int64_t t = 64 * b + random() % 64;
    std::vector<float> S(b + 1), E(b + 1);
    // Few values: many ties, of both zeros and -inf too.
    const float values[] = {-kInfinity, -1, -0.0f, 0.0f, 0.5f, 1};
    for (float& s : S) s = values[random() % 6];
    for (float& e : E) e = values[random() % 6];
    const auto best = [&](std::vector<int32_t> from, const std::vector<float>& scores,
                          size_t count) {
      std::stable_sort(from.begin(), from.end(),
                       [&](int32_t a, int32_t b) { return scores[a] > scores[b]; });
      from.resize(std::min(from.size(), count));
      return from;
    };
    std::vector<float> forced = S;
    std::vector<int32_t> all;
    for (int n = 0; n <= b; ++n) {
      all.push_back(n);
      if (n < config.init_blocks || n >= b - config.window_blocks) forced[n] = kInfinity;
    }
    std::vector<int32_t> expected = best(all, forced, config.QueryAwareBlocks());
    std::vector<int32_t> rest;
    for (int32_t n : all) {
      if (std::find(expected.begin(), expected.end(), n) == expected.end()) rest.push_back(n);
    }
    for (int32_t n : best(rest, E, config.topk_blocks - expected.size())) expected.push_back(n);
    std::sort(expected.begin(), expected.end());
    std::vector<int32_t> actual;
    Select(config, AttentionPolicy::kNosa, t, S, E, scratch, actual);
    ASSERT_EQ(actual, expected) << "t " << t;
  }
}

}  // namespace
}  // namespace nosara::worker
