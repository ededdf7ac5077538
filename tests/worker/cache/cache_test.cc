#include <gtest/gtest.h>

#include <map>
#include <random>

#include "worker/cache/page_pool.h"
#include "worker/cache/slot_table.h"

namespace nosara::worker {
namespace {

TEST(SlotTableTest, TakesFreeSlotsThenTheLeastRecentlyUsed) {
  SlotTable table(2, 10);
  EXPECT_EQ(table.slot_of(3), kNoSlot);
  const SlotId first = table.Acquire(3, 1);
  table.Touch(3, 1);
  const SlotId second = table.Acquire(5, 1);
  table.Touch(5, 1);
  EXPECT_NE(first, second);
  // Both are of this step: nothing may go.
  EXPECT_EQ(table.Acquire(7, 1), kNoSlot);
  table.Touch(3, 2);
  EXPECT_EQ(table.Acquire(7, 2), second);
  EXPECT_EQ(table.slot_of(5), kNoSlot);
  EXPECT_EQ(table.slot_of(7), second);
  table.CheckIntegrity();
}

TEST(SlotTableTest, RandomOperationsAgainstAMap) {
  const uint32_t seed = std::random_device{}();
  SCOPED_TRACE(::testing::Message() << "seed " << seed);
  std::mt19937 random(seed);
  constexpr int kSlots = 7;
  constexpr int kBlocks = 40;
  SlotTable table(kSlots, kBlocks);
  std::map<int, uint64_t> resident;  // block -> last use
  std::map<int, uint64_t> used;
  for (uint64_t step = 1; step < 3000; ++step) {
    for (int i = random() % 6; i >= 0; --i) {
      const int block = random() % kBlocks;
      table.Touch(block, step);
      used[block] = step;
      if (table.slot_of(block) != kNoSlot) {
        ASSERT_TRUE(resident.count(block));
        continue;
      }
      ASSERT_FALSE(resident.count(block));
      // The model's victim: the oldest, the smallest among equals.
      int victim = -1;
      for (const auto& [candidate, ignored] : resident) {
        if (used[candidate] >= step) continue;
        if (victim < 0 || used[candidate] < used[victim]) victim = candidate;
      }
      const SlotId slot = table.Acquire(block, step);
      if (resident.size() == kSlots) {
        ASSERT_EQ(slot == kNoSlot, victim < 0);
        if (victim < 0) continue;
        resident.erase(victim);
        ASSERT_EQ(table.slot_of(victim), kNoSlot);
      }
      resident[block] = step;
      ASSERT_EQ(table.block_of(slot), block);
    }
    if (random() % 50 == 0 && !resident.empty()) {
      table.Drop(resident.begin()->first);
      resident.erase(resident.begin());
    }
    table.CheckIntegrity();
    ASSERT_EQ(table.occupied(), static_cast<int>(resident.size()));
  }
}

TEST(PagePoolTest, BoundsAndReusesPages) {
  PageBuffer survivor;
  {
    PagePool pool(1000, 2);
    PageBuffer a = pool.Allocate();
    survivor = pool.Allocate();
    ASSERT_NE(a, nullptr);
    EXPECT_EQ(pool.Allocate(), nullptr);
    EXPECT_EQ(pool.in_use(), 2);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(a->data()) % 4096, 0u);
    (*a)[999] = std::byte{7};
    a = nullptr;
    EXPECT_EQ(pool.in_use(), 1);
    a = pool.Allocate();
    EXPECT_EQ((*a)[999], std::byte{0});
  }
  (*survivor)[0] = std::byte{1};  // outlives the pool
}

}  // namespace
}  // namespace nosara::worker
