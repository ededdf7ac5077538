#include "kvstore/client/placement.h"

#include <xxhash.h>

#include <algorithm>
#include <cstdint>
#include <utility>

namespace nosara::kvstore {

std::vector<size_t> RankStores(absl::Span<const std::string> stores, const PageKey& group) {
  const uint64_t seed = XXH3_64bits(group.bytes.data(), group.bytes.size());
  std::vector<std::pair<uint64_t, size_t>> hashed;
  hashed.reserve(stores.size());
  for (size_t i = 0; i < stores.size(); ++i) {
    hashed.emplace_back(XXH3_64bits_withSeed(stores[i].data(), stores[i].size(), seed), i);
  }
  std::sort(hashed.begin(), hashed.end(), [&](const auto& a, const auto& b) {
    return a.first != b.first ? a.first > b.first : stores[a.second] < stores[b.second];
  });
  std::vector<size_t> ranked;
  ranked.reserve(hashed.size());
  for (const auto& [hash, store] : hashed) ranked.push_back(store);
  return ranked;
}

}  // namespace nosara::kvstore
