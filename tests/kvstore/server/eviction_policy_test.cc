// What a full store evicts, seen through the index.
#include "kvstore/server/eviction_policy.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <optional>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "kvstore/server/page_index.h"
#include "tests/status_matchers.h"

namespace nosara::kvstore {
namespace {

using ::nosara::testing::StatusIs;

constexpr int kRoot = -1;

PageKey Key(int n) {
  PageKey key;
  for (int i = 0; i < 4; ++i) key.bytes[i] = static_cast<uint8_t>(n >> (8 * i));
  key.bytes[15] = 0x5a;
  return key;
}

int NumberOf(const PageKey& key) {
  return key.bytes[0] | key.bytes[1] << 8 | key.bytes[2] << 16 | key.bytes[3] << 24;
}

/// An index whose time stands still, with pages named by numbers.
class Store final {
 public:
  Store(EvictionKind kind, uint64_t slots) : index_(Options(kind, slots)), slots_(slots) {}

  PageIndex& index() { return index_; }

  /// Leases on the longest stored prefix of `pages`; 0 without any.
  uint64_t Lookup(const std::vector<int>& pages, size_t* found = nullptr) {
    const PageIndex::LookupResult result = index_.Lookup(Keys(pages), kNow);
    if (found != nullptr) *found = result.pages.size();
    return result.lease_id;
  }
  /// The lease on `pages`, newly stored behind `parent`; none when the store is full.
  std::optional<uint64_t> Add(const std::vector<int>& pages, int parent) {
    const auto result = index_.Reserve(Keys(pages), Key(parent), kNow);
    if (!result.ok()) {
      EXPECT_THAT(result, StatusIs(absl::StatusCode::kResourceExhausted, "store full"));
      return std::nullopt;
    }
    std::vector<PageIndex::Page> reserved;
    for (const auto& page : result->pages) reserved.push_back(page.page);
    EXPECT_OK(index_.Commit(result->lease_id, reserved, kNow));
    return result->lease_id;
  }
  void Release(uint64_t lease) { index_.Release({&lease, 1}, kNow); }

  /// A request as workers make them; returns how many pages it found.
  size_t Request(const std::vector<int>& pages) {
    size_t found = 0;
    const uint64_t lease = Lookup(pages, &found);
    if (found < pages.size()) {
      const auto added = Add({pages.begin() + static_cast<long>(found), pages.end()},
                             found == 0 ? kRoot : pages[found - 1]);
      EXPECT_TRUE(added.has_value());
      Release(*added);
    }
    if (lease != 0) Release(lease);
    EXPECT_OK(index_.CheckIntegrity());
    return found;
  }

  std::set<int> Pages() const {
    std::set<int> pages;
    for (uint64_t slot = 0; slot < slots_; ++slot) {
      const auto page = index_.StoredIn(slot);
      if (page.has_value()) pages.insert(NumberOf(page->key));
    }
    return pages;
  }

 private:
  static PageIndex::Options Options(EvictionKind kind, uint64_t slots) {
    PageIndex::Options options;
    options.num_slots = slots;
    options.eviction = kind;
    return options;
  }
  static std::vector<PageKey> Keys(const std::vector<int>& pages) {
    std::vector<PageKey> keys;
    for (const int page : pages) keys.push_back(Key(page));
    return keys;
  }
  static constexpr absl::Time kNow = absl::UnixEpoch();

  PageIndex index_;
  const uint64_t slots_;
};

std::vector<int> Range(int begin, int end) {
  std::vector<int> pages;
  for (int page = begin; page < end; ++page) pages.push_back(page);
  return pages;
}

TEST(EvictionKindTest, IsParsed) {
  for (const EvictionKind kind : {EvictionKind::kLru, EvictionKind::kS3Fifo}) {
    const auto parsed = ParseEvictionKind(EvictionKindName(kind));
    ASSERT_OK(parsed);
    EXPECT_EQ(*parsed, kind);
  }
  EXPECT_THAT(ParseEvictionKind("LFU"),
              StatusIs(absl::StatusCode::kInvalidArgument, "'LFU': must be s3fifo or lru"));
}

/// The least recently leased of the pages without leases and without pages behind them, found by
/// looking at all of them.
class ReferenceLru final {
 public:
  explicit ReferenceLru(uint64_t slots) : slots_(slots) {}

  size_t Prefix(const std::vector<int>& pages) const {
    size_t found = 0;
    while (found < pages.size() && pages_.contains(pages[found])) ++found;
    return found;
  }
  void Lease(const std::vector<int>& pages) {
    for (const int page : pages) ++pages_.at(page).leases;
  }
  void Release(const std::vector<int>& pages) {
    // The head of a chain is the one used last.
    for (auto page = pages.rbegin(); page != pages.rend(); ++page) {
      Page& entry = pages_.at(*page);
      if (--entry.leases == 0) entry.last_use = ++uses_;
    }
  }
  /// False, and nothing changes, when there is not enough room.
  bool Add(const std::vector<int>& pages, int parent) {
    const std::map<int, Page> before = pages_;
    if (parent != kRoot) ++pages_.at(parent).leases;
    while (pages_.size() + pages.size() > slots_ && EvictOne()) {
    }
    if (pages_.size() + pages.size() > slots_) {
      pages_ = before;
      return false;
    }
    if (parent != kRoot) --pages_.at(parent).leases;
    for (const int page : pages) {
      pages_[page] = {parent, /*leases=*/1, /*last_use=*/0};
      parent = page;
    }
    return true;
  }
  std::set<int> Pages() const {
    std::set<int> pages;
    for (const auto& [number, page] : pages_) pages.insert(number);
    return pages;
  }
  int leases(int page) const { return pages_.at(page).leases; }
  int parent(int page) const { return pages_.at(page).parent; }

 private:
  struct Page {
    int parent = kRoot;
    int leases = 0;
    uint64_t last_use = 0;
  };

  bool EvictOne() {
    std::set<int> parents;
    for (const auto& [number, page] : pages_) parents.insert(page.parent);
    auto victim = pages_.end();
    for (auto page = pages_.begin(); page != pages_.end(); ++page) {
      if (page->second.leases > 0 || parents.contains(page->first)) continue;
      if (victim == pages_.end() || page->second.last_use < victim->second.last_use) victim = page;
    }
    if (victim == pages_.end()) return false;
    pages_.erase(victim);
    return true;
  }

  const uint64_t slots_;
  std::map<int, Page> pages_;
  uint64_t uses_ = 0;
};

// A tree of chains: page n hangs on page n / 3 - 1 (the first ones on nothing), so that prefixes
// are shared. Random lookups, additions and ends of leases.
void RunTree(EvictionKind kind, uint64_t seed) {
  SCOPED_TRACE(::testing::Message() << EvictionKindName(kind) << ", seed " << seed);
  std::mt19937_64 random(seed);
  const uint64_t slots = 5 + random() % 40;
  Store store(kind, slots);
  ReferenceLru reference(slots);
  struct Held {
    uint64_t id;
    std::vector<int> pages;
  };
  std::vector<Held> held;
  for (int step = 0; step < 600; ++step) {
    if (!held.empty() && random() % 5 < 2) {
      const size_t i = random() % held.size();
      store.Release(held[i].id);
      if (kind == EvictionKind::kLru) reference.Release(held[i].pages);
      held.erase(held.begin() + static_cast<long>(i));
    } else {
      std::vector<int> chain;
      for (int page = static_cast<int>(random() % 120); page >= 0; page = page / 3 - 1) {
        chain.push_back(page);
      }
      std::reverse(chain.begin(), chain.end());
      size_t found = 0;
      const uint64_t lease = store.Lookup(chain, &found);
      const std::vector<int> prefix(chain.begin(), chain.begin() + static_cast<long>(found));
      const std::vector<int> rest(chain.begin() + static_cast<long>(found), chain.end());
      if (kind == EvictionKind::kLru) {
        ASSERT_EQ(found, reference.Prefix(chain)) << "step " << step;
        reference.Lease(prefix);
      }
      if (lease != 0) held.push_back({lease, prefix});
      if (!rest.empty()) {
        const std::set<int> before = store.Pages();
        const int parent = found == 0 ? kRoot : prefix.back();
        const auto added = store.Add(rest, parent);
        if (kind == EvictionKind::kLru) {
          ASSERT_EQ(added.has_value(), reference.Add(rest, parent)) << "step " << step;
        }
        if (added.has_value()) {
          held.push_back({*added, rest});
        } else {
          ASSERT_EQ(store.Pages(), before) << "step " << step;
        }
      }
    }
    ASSERT_OK(store.index().CheckIntegrity()) << "step " << step;
    const std::set<int> pages = store.Pages();
    if (kind == EvictionKind::kLru) {
      ASSERT_EQ(pages, reference.Pages()) << "step " << step;
    }
    for (const int page : pages) {
      ASSERT_TRUE(page < 3 || pages.contains(page / 3 - 1)) << page << " has outlived its parent";
    }
    for (const Held& lease : held) {
      for (const int page : lease.pages) ASSERT_TRUE(pages.contains(page)) << "leased: " << page;
    }
    const PageIndex::Stats stats = store.index().stats();
    ASSERT_EQ(stats.slots_free + stats.slots_stored, slots);
    ASSERT_EQ(stats.slots_stored, pages.size());
  }
  for (const Held& lease : held) store.Release(lease.id);
  EXPECT_EQ(store.index().stats().pages_evictable, store.index().stats().slots_stored);
  EXPECT_TRUE(store.Add(Range(1000, 1000 + static_cast<int>(slots)), kRoot).has_value());
}

TEST(EvictionPolicyTest, LruEvictsWhatAPlainReferenceEvicts) {
  for (uint64_t seed = 1; seed <= 40; ++seed) RunTree(EvictionKind::kLru, seed);
}

TEST(EvictionPolicyTest, S3FifoKeepsLeasedPagesAndParents) {
  for (uint64_t seed = 1; seed <= 40; ++seed) RunTree(EvictionKind::kS3Fifo, seed);
}

// Pages that are asked for again and again, and a document of many times the store's size.
size_t HotPagesAfterAScan(EvictionKind kind) {
  Store store(kind, 100);
  for (int round = 0; round < 3; ++round) {
    for (int chain = 0; chain < 4; ++chain) store.Request(Range(10 * chain, 10 * chain + 10));
  }
  for (int document = 0; document < 400; ++document) {
    store.Request(Range(1000 + 5 * document, 1000 + 5 * document + 5));
  }
  const std::set<int> pages = store.Pages();
  return static_cast<size_t>(
      std::count_if(pages.begin(), pages.end(), [](int page) { return page < 40; }));
}

TEST(EvictionPolicyTest, S3FifoSurvivesAScanAndLruDoesNot) {
  EXPECT_EQ(HotPagesAfterAScan(EvictionKind::kS3Fifo), 40u);
  EXPECT_EQ(HotPagesAfterAScan(EvictionKind::kLru), 0u);
}

TEST(EvictionPolicyTest, AWholeChainOfS3FifoGoesFromItsTail) {
  Store store(EvictionKind::kS3Fifo, 20);
  store.Request(Range(0, 10));
  for (int n = 1; n <= 15; ++n) {
    store.Request({1000 + n});
    const std::set<int> pages = store.Pages();
    const int left = std::max(0, std::min(10, 20 - n));
    for (int page = 0; page < 10; ++page) {
      EXPECT_EQ(pages.contains(page), page < left) << "page " << page << " after " << n;
    }
  }
}

// Without a memory of what was evicted, pages that come back later than the store is large would
// never be found.
TEST(EvictionPolicyTest, S3FifoLearnsFromWhatComesBack) {
  Store store(EvictionKind::kS3Fifo, 100);
  int next = 1000;
  const auto scan = [&](int pages) {
    for (int i = 0; i < pages; ++i) store.Request({next++});
  };
  scan(200);
  size_t found = 0;
  for (int round = 0; round < 10; ++round) {
    found = store.Request(Range(0, 10));
    // Longer than the store is large: nothing survives this by being recent.
    scan(110);
  }
  EXPECT_EQ(found, 10u);
}

}  // namespace
}  // namespace nosara::kvstore
