// Which stores a group of pages lives on.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "absl/types/span.h"
#include "kvstore/api/page_key.h"

namespace nosara::kvstore {

/// Rendezvous hashing: the indices of `stores`, that with the highest hash of (name, group) first.
/// Pure; all clients with the same names agree, whatever their order; a store that comes or goes
/// moves only the groups that it gains or loses, and the order of the others stays. `group`: key of
/// the first block of the group (kGroupBlocks).
std::vector<size_t> RankStores(absl::Span<const std::string> stores, const PageKey& group);

}  // namespace nosara::kvstore
