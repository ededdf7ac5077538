// What a KV store node says of itself.
#pragma once

#include <cstdint>
#include <vector>

#include "kvstore/server/page_index.h"

namespace nosara::kvstore {

/// Counters since the start, and gauges, of one moment.
struct KvStoreStats {
  /// All zeros until the first Reserve.
  PageIndex::Stats index;
  /// Those with the most pages, up to 64.
  std::vector<PageIndex::NamespacePages> largest_namespaces;
  uint64_t arena_bytes = 0;
  /// 0 until the first Reserve.
  uint64_t page_bytes = 0;
  uint64_t commit_checksum_failures = 0;
  uint64_t pages_verified = 0;
  bool draining = false;
};

}  // namespace nosara::kvstore
