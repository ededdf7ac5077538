#include "kvstore/client/placement.h"

#include <xxhash.h>

#include "base/check.h"

namespace nosara::kvstore {

size_t HomeStore(absl::Span<const std::string> stores, const PageKey& head) {
  CHECK(!stores.empty());
  size_t best = 0;
  uint64_t best_hash = 0;
  const uint64_t seed = XXH3_64bits(head.bytes.data(), head.bytes.size());
  for (size_t i = 0; i < stores.size(); ++i) {
    const uint64_t hash = XXH3_64bits_withSeed(stores[i].data(), stores[i].size(), seed);
    if (i == 0 || hash > best_hash || (hash == best_hash && stores[i] < stores[best])) {
      best = i;
      best_hash = hash;
    }
  }
  return best;
}

}  // namespace nosara::kvstore
