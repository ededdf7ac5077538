// Which store a chain of pages lives on.
#pragma once

#include <cstddef>
#include <string>

#include "absl/types/span.h"
#include "kvstore/api/page_key.h"

namespace nosara::kvstore {

/// Rendezvous hashing: the index of the store with the highest hash of (name, head). Pure; all
/// clients with the same names agree, whatever their order; a store that comes or goes moves only
/// the chains that it gains or loses. `head`: key of block 0 of the chain, so that a chain stays
/// together. Precondition: `stores` is not empty.
size_t HomeStore(absl::Span<const std::string> stores, const PageKey& head);

}  // namespace nosara::kvstore
