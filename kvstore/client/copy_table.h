// Where else the pages are that a client holds.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/synchronization/mutex.h"
#include "absl/types/span.h"
#include "kvstore/api/store_client.h"

namespace nosara::kvstore {

/// Where a page belongs: what the placement and the order of eviction need of it.
struct PageOrigin {
  PageKey group;
  PageKey parent;
  /// All zeros where it is not known: the store takes that of the parent, if it has it.
  PageKey name_space;
};

/// The copies of pages under the client's leases. A copy has a slot, a generation and so checksums
/// of its own.
///
/// Thread-safe. Invariant: a copy is here as long as its lease has not been removed.
class CopyTable final {
 public:
  using Checksums = std::shared_ptr<const std::vector<uint64_t>>;
  struct Copy {
    PageRef page;
    LeaseId lease;
    /// Of its records; null until they were read.
    Checksums checksums;
  };

  /// `page` is a copy held under `lease`.
  void Add(const PageRef& page, LeaseId lease, const PageOrigin& origin);
  /// Forgets all that was held under `leases`.
  void Remove(absl::Span<const LeaseId> leases);

  /// All copies known of a page; one that several leases hold is named once.
  std::vector<Copy> CopiesOf(const PageKey& key) const;

  /// Of each page that has a copy on `store`: another one, where there is one, and its origin.
  std::vector<std::pair<PageRef, PageOrigin>> OtherCopies(StoreId store) const;

  /// Notes the checksums of a copy; nothing when it is not here any more.
  void SetChecksums(const PageRef& page, Checksums checksums);

  /// Pages with an entry, for tests.
  size_t size() const;

 private:
  mutable absl::Mutex mu_;
  struct Entry {
    PageOrigin origin;
    std::vector<Copy> copies;
  };
  absl::flat_hash_map<PageKey, Entry> pages_ ABSL_GUARDED_BY(mu_);
  absl::flat_hash_map<uint64_t, std::vector<PageKey>> by_lease_ ABSL_GUARDED_BY(mu_);
};

}  // namespace nosara::kvstore
