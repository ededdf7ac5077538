#include "kvstore/client/copy_table.h"

#include <gtest/gtest.h>

#include <map>
#include <random>
#include <set>
#include <tuple>

namespace nosara::kvstore {
namespace {

PageRef Ref(uint8_t key, uint32_t store, uint64_t slot, uint64_t generation) {
  PageRef ref;
  ref.key.bytes[0] = key;
  ref.store = StoreId{store};
  ref.slot = slot;
  ref.generation = generation;
  return ref;
}

TEST(CopyTableTest, ACopyIsNamedOnceAndLastsAsLongAsALeaseOfIt) {
  CopyTable table;
  table.Add(Ref(1, 0, 5, 7), LeaseId{1}, {});
  table.Add(Ref(1, 1, 6, 8), LeaseId{2}, {});
  table.Add(Ref(1, 0, 5, 7), LeaseId{3}, {});
  EXPECT_EQ(table.CopiesOf(Ref(1, 0, 0, 0).key).size(), 2u);
  table.SetChecksums(Ref(1, 0, 5, 7), std::make_shared<std::vector<uint64_t>>(3, 9));
  table.SetChecksums(Ref(2, 0, 5, 7), std::make_shared<std::vector<uint64_t>>(3, 9));
  table.Remove({LeaseId{1}, LeaseId{9}});
  const auto copies = table.CopiesOf(Ref(1, 0, 0, 0).key);
  ASSERT_EQ(copies.size(), 2u);
  for (const CopyTable::Copy& copy : copies) {
    EXPECT_EQ(copy.checksums != nullptr, copy.page.store == StoreId{0});
  }
  table.Remove({LeaseId{2}, LeaseId{3}});
  EXPECT_EQ(table.size(), 0u);
}

TEST(CopyTableTest, AgreesWithAPlainModel) {
  std::mt19937 random(std::random_device{}());
  CopyTable table;
  std::map<uint64_t, std::vector<std::tuple<uint8_t, uint32_t, uint64_t>>> model;  // by lease
  for (int step = 0; step < 5000; ++step) {
    const uint64_t lease = random() % 20;
    if (random() % 4 == 0) {
      table.Remove({LeaseId{lease}});
      model.erase(lease);
    } else {
      const uint8_t key = random() % 10;
      const uint32_t store = random() % 3;
      const uint64_t slot = random() % 4;
      table.Add(Ref(key, store, slot, 1), LeaseId{lease}, {});
      model[lease].push_back({key, store, slot});
    }
    std::map<uint8_t, std::set<std::pair<uint32_t, uint64_t>>> expected;
    for (const auto& [id, copies] : model) {
      for (const auto& [key, store, slot] : copies) expected[key].insert({store, slot});
    }
    ASSERT_EQ(table.size(), expected.size());
    for (uint8_t key = 0; key < 10; ++key) {
      std::set<std::pair<uint32_t, uint64_t>> actual;
      const auto copies = table.CopiesOf(Ref(key, 0, 0, 0).key);
      for (const CopyTable::Copy& copy : copies) {
        actual.insert({copy.page.store.value, copy.page.slot});
      }
      ASSERT_EQ(actual, expected[key]);
      ASSERT_EQ(actual.size(), copies.size());
    }
    for (uint32_t store = 0; store < 3; ++store) {
      std::set<uint8_t> keys, others;
      for (const auto& [key, copies] : expected) {
        bool there = false, elsewhere = false;
        for (const auto& copy : copies) (copy.first == store ? there : elsewhere) = true;
        if (there && elsewhere) keys.insert(key);
      }
      for (const auto& [page, origin] : table.OtherCopies(StoreId{store})) {
        ASSERT_FALSE(page.store == StoreId{store});
        others.insert(page.key.bytes[0]);
      }
      ASSERT_EQ(others, keys);
    }
  }
}

}  // namespace
}  // namespace nosara::kvstore
