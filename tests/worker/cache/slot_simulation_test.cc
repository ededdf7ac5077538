#include "worker/cache/slot_simulation.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <set>
#include <vector>

namespace nosara::worker {
namespace {

constexpr int kBlocks = 40;

std::vector<int> ResidentBlocks(const SlotSimulation& simulation) {
  std::vector<int> blocks;
  for (int block = 0; block < kBlocks; ++block) {
    if (simulation.Resident(block)) blocks.push_back(block);
  }
  return blocks;
}

TEST(SlotSimulationTest, AHandComputedSequence) {
  SlotSimulation simulation(4, kBlocks);
  EXPECT_EQ(simulation.Select({1, 2, 3}), 3);
  EXPECT_EQ(simulation.Select({2, 3, 4}), 1);  // the free slot
  EXPECT_EQ(simulation.Select({3, 4, 5}), 1);  // 1 is the oldest
  EXPECT_THAT(ResidentBlocks(simulation), ::testing::ElementsAre(2, 3, 4, 5));
  EXPECT_EQ(simulation.Select({1, 3, 5}), 1);  // 2 is the oldest; 4 stays
  EXPECT_THAT(ResidentBlocks(simulation), ::testing::ElementsAre(1, 3, 4, 5));
  EXPECT_EQ(simulation.Select({4, 5, 1}), 0);
  // 3 is the oldest; 1, 4 and 5 are equally old, and 1 is the smallest of them.
  EXPECT_EQ(simulation.Select({6, 2}), 2);
  EXPECT_THAT(ResidentBlocks(simulation), ::testing::ElementsAre(2, 4, 5, 6));
  simulation.CheckIntegrity();
}

TEST(SlotSimulationTest, ABegunBlockIsNotLoadedAndStays) {
  SlotSimulation simulation(3, kBlocks);
  EXPECT_EQ(simulation.Select({0, 1, 2}), 3);
  simulation.Open(3);  // in the place of 0, the smallest of three equally old ones
  EXPECT_THAT(ResidentBlocks(simulation), ::testing::ElementsAre(1, 2, 3));
  EXPECT_EQ(simulation.Select({0, 1, 3}), 1);  // so 0 is loaded, in the place of 2
  // Not selected for a while, the open block stays all the same.
  EXPECT_EQ(simulation.Select({4, 5}), 2);
  EXPECT_EQ(simulation.Select({6, 7}), 2);
  EXPECT_THAT(ResidentBlocks(simulation), ::testing::ElementsAre(3, 6, 7));
  // Once the next one is begun, it is stored and may go.
  simulation.Open(8);  // as old as the others, and the smallest
  EXPECT_EQ(simulation.Select({7, 9}), 1);
  EXPECT_THAT(ResidentBlocks(simulation), ::testing::ElementsAre(7, 8, 9));
  simulation.CheckIntegrity();
}

TEST(SlotSimulationTest, AsManySlotsAsASelectionHoldTheLastOne) {
  std::mt19937 random(3);
  constexpr int kSelected = 8;
  SlotSimulation simulation(kSelected, kBlocks);
  std::vector<int32_t> blocks(kBlocks);
  std::iota(blocks.begin(), blocks.end(), 0);
  std::set<int32_t> last;
  for (int step = 0; step < 500; ++step) {
    std::shuffle(blocks.begin(), blocks.end(), random);
    const std::set<int32_t> now(blocks.begin(), blocks.begin() + kSelected);
    int changed = 0;
    for (const int32_t block : now) changed += last.count(block) == 0 ? 1 : 0;
    ASSERT_EQ(simulation.Select(absl::MakeConstSpan(blocks).first(kSelected)), changed);
    last = now;
  }
  EXPECT_THAT(ResidentBlocks(simulation), ::testing::ElementsAreArray(last));
}

TEST(SlotSimulationTest, ARingLongerThanTheSlotsNeverHits) {
  // The worst case of any LRU rule: each block is gone just before it is needed again.
  constexpr int kRing = 12;
  SlotSimulation too_few(kRing - 1, kBlocks);
  SlotSimulation enough(kRing, kBlocks);
  for (int step = 0; step < 5 * kRing; ++step) {
    const int32_t block = step % kRing;
    EXPECT_EQ(too_few.Select({block}), 1) << step;
    EXPECT_EQ(enough.Select({block}), step < kRing ? 1 : 0) << step;
  }
}

TEST(SlotSimulationTest, MoreSlotsHoldMoreAndNeverLoadMore) {
  const uint32_t seed = std::random_device{}();
  SCOPED_TRACE(::testing::Message() << "seed " << seed);
  std::mt19937 random(seed);
  constexpr int kSelected = 5;
  std::vector<SlotSimulation> simulations;
  for (const int slots : {kSelected, kSelected + 1, kSelected + 4, kBlocks}) {
    simulations.emplace_back(slots, kBlocks);
  }
  std::vector<int64_t> loaded(simulations.size());
  for (int step = 0; step < 4000; ++step) {
    const int open = step / 100;
    std::set<int32_t> chosen = {open};
    // All blocks are begun before they are selected.
    while (chosen.size() < static_cast<size_t>(std::min(kSelected, open + 1))) {
      chosen.insert(static_cast<int32_t>(random() % (open + 1)));
    }
    const std::vector<int32_t> blocks(chosen.begin(), chosen.end());
    for (size_t i = 0; i < simulations.size(); ++i) {
      if (step % 100 == 0) simulations[i].Open(open);
      loaded[i] += simulations[i].Select(blocks);
      simulations[i].CheckIntegrity();
      for (const int32_t block : blocks) ASSERT_TRUE(simulations[i].Resident(block));
      if (i == 0) continue;
      ASSERT_LE(loaded[i], loaded[i - 1]);
      EXPECT_THAT(ResidentBlocks(simulations[i]),
                  ::testing::IsSupersetOf(ResidentBlocks(simulations[i - 1])));
    }
  }
  EXPECT_GT(loaded[0], loaded[1]);
  EXPECT_GT(loaded[2], 0);
  EXPECT_EQ(loaded[3], 0);  // every block was begun here and has stayed
}

}  // namespace
}  // namespace nosara::worker
