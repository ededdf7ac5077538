// What a worker asks of the KV stores. The seam between engine and storage.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/functional/any_invocable.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "kvstore/api/layout.h"
#include "kvstore/api/page_key.h"

namespace nosara::kvstore {

/// Which store node, as numbered by the client; stable during the client's life.
struct StoreId {
  uint32_t value = 0;
  friend bool operator==(StoreId a, StoreId b) { return a.value == b.value; }
};

/// A lease: the right to read a set of pages on one store until it expires. Renewed as a whole.
struct LeaseId {
  uint64_t value = 0;  // 0: none
  friend bool operator==(LeaseId a, LeaseId b) { return a.value == b.value; }
};

/// Where a copy of a page lies; valid while its lease is.
struct PageRef {
  PageKey key;
  StoreId store;
  uint64_t slot = 0;
  uint64_t generation = 0;
};

/// How bytes came from a store.
enum class Path { kMapped, kInProcess, kUcx };
const char* PathName(Path path);

/// The arena of a store as it is mapped in this process, of one incarnation of that store. The
/// mapping lives as long as this object, also when the store is gone.
struct MappedArena {
  /// Page `slot` begins at bytes[slot * layout.page_bytes()].
  absl::Span<std::byte> bytes;
  /// Keeps the mapping; null where somebody else does.
  std::shared_ptr<void> mapping;
};

/// One record to fetch: `landing` receives layout.record_bytes() bytes. It belongs to the client
/// from the call until the completion runs, whatever happens in between (cancel, timeout, death of
/// the peer): the client never completes a read whose landing slot could still be written.
struct RecordRead {
  PageRef page;
  int record = 0;
  /// From the page's verified prefix (RecordChecksum); checked against what was read.
  uint64_t checksum = 0;
  absl::Span<std::byte> landing;
};

/// One page prefix (header, checksums, index part) to fetch; same landing rule.
/// `landing.size() == layout.prefix_bytes()`.
struct PrefixRead {
  PageRef page;
  absl::Span<std::byte> landing;
};

/// Consecutive blocks of a chain that are placed together: blocks 16g .. 16g+15.
inline constexpr size_t kGroupBlocks = 16;

/// Where in its chain the first one of some blocks is.
struct ChainPosition {
  /// Its number; the first block of the chain is block 0.
  size_t block = 0;
  /// Key of the first block of its group, which decides the stores: its own key where it begins
  /// the group.
  PageKey group;
  /// Key of the block before it; the namespace key for block 0.
  PageKey parent;
  /// NamespaceKey() of the chain: by it the stores tell whose pages they hold.
  PageKey name_space;
};

/// One full page to store. `bytes` holds index part and records, in layout; its header need not be
/// filled. It is the client's from the call until the completion runs, and is sealed in place.
struct PageWrite {
  PageKey key;
  uint32_t tokens = kBlockTokens;
  absl::Span<std::byte> bytes;
};

struct LookupResult {
  /// The longest known prefix of the keys asked for, over all stores; element i is the nearest copy
  /// of the page of key i.
  std::vector<PageRef> pages;
  /// One lease per store that holds copies of some of them; they keep the pages until released or
  /// expired.
  std::vector<LeaseId> leases;
};

struct WriteResult {
  /// Element i is a copy of the page of write i (already there or newly committed); `leases` hold
  /// it and the other copies.
  std::vector<PageRef> pages;
  /// Element i is 1 when page i was stored already (by somebody else): its bytes, and so its
  /// checksums, need not be those that were offered; read its prefix before its records. Else 0.
  std::vector<uint8_t> already_stored;
  std::vector<LeaseId> leases;
};

/// Counters since creation.
struct ClientStats {
  uint64_t records_read = 0;
  uint64_t record_bytes_read = 0;
  uint64_t prefixes_read = 0;
  uint64_t prefix_bytes_read = 0;
  uint64_t pages_written = 0;
  uint64_t pages_already_stored = 0;
  uint64_t page_bytes_written = 0;
  uint64_t verification_failures = 0;
  uint64_t leases_lost = 0;
  /// Reads of records and prefixes that another copy than the one asked for has served.
  uint64_t reads_failed_over = 0;
  /// Copies of written pages that no store took, of those that there should be.
  uint64_t copies_missing = 0;
  /// Copies restored that a store had lost.
  uint64_t copies_repaired = 0;
  /// Pages reported to their stores as damaged.
  uint64_t pages_discarded = 0;
  uint64_t records_by_mapped = 0;
  uint64_t records_by_in_process = 0;
  uint64_t records_by_ucx = 0;
};

/// Client of all KV stores that one worker uses, for pages of one layout.
///
/// Thread-safe. Every operation is asynchronous: the call posts work and returns; `done` runs
/// exactly once, on a thread of the client, never inside the call, and must not block (it posts
/// into a queue of the caller or signals a notification). After Close(), operations complete with
/// CANCELLED; Close() returns once no completion is outstanding.
///
/// A page may have copies on several stores. A read goes to the copy that its PageRef names, and
/// where that fails to another one under the client's leases; what a copy holds is verified against
/// that copy's own checksums.
///
/// Errors, all operations: UNAVAILABLE (store cannot be reached or does not answer in time; safe to
/// retry), ABORTED (lease lost or slot reused: look the page up again), NOT_FOUND (page unknown:
/// recompute), DATA_LOSS (verification failed: the client has asked the store to discard the page;
/// recompute), RESOURCE_EXHAUSTED (store
/// full; try later), INVALID_ARGUMENT (our bug or another layout), CANCELLED (closed).
class StoreClient {
 public:
  template <typename T>
  using Done = absl::AnyInvocable<void(absl::StatusOr<T>) &&>;
  using DoneStatus = absl::AnyInvocable<void(absl::Status) &&>;

  virtual ~StoreClient() = default;

  virtual const PageLayout& layout() const = 0;

  /// Finds the longest known prefix of `keys` and leases it. Idempotent (another lease each time).
  virtual void Lookup(std::vector<PageKey> keys, Done<LookupResult> done) = 0;

  /// Stores consecutive pages: reserve, one-sided write, commit; as many copies of each as the
  /// client is set to, and at least one. All or nothing per call as far as the caller sees: on an
  /// error none of the pages is to be relied on (those already committed are evicted in time).
  /// Idempotent: pages that exist are leased, not written again.
  virtual void Write(ChainPosition position, std::vector<PageWrite> pages,
                     Done<WriteResult> done) = 0;

  /// Reads and verifies page prefixes. Element i of the answer is the copy that landing i is the
  /// prefix of: the one asked for, or another one; the checksums in it are those of that copy.
  virtual void ReadPrefixes(std::vector<PrefixRead> reads, Done<std::vector<PageRef>> done) = 0;

  /// Reads and verifies records. On an error the contents of all landing slots are undefined.
  virtual void ReadRecords(std::vector<RecordRead> reads, DoneStatus done) = 0;

  /// Ends leases: the pages become evictable. Unknown leases are ignored. Fire and forget; leases
  /// that cannot be released expire.
  virtual void Release(std::vector<LeaseId> leases) = 0;

  /// OK while `lease` is held by the client's own reckoning, which ends before the server's;
  /// ABORTED after. Leases are renewed by the client in the background until released.
  virtual absl::Status CheckLease(LeaseId lease) const = 0;

  /// How records of `store` are read at present.
  virtual Path PathTo(StoreId store) const = 0;

  /// Addresses of the stores that did not answer at the last try to connect. A store whose end was
  /// not noticed yet, or that was not tried yet, is not among them.
  virtual std::vector<std::string> UnreachableStores() const = 0;

  /// The memory of a store that is mapped here, for readers that read pages by themselves (a GPU):
  /// null where the store is on another machine or not connected. The same object until the store
  /// restarts. Nothing verifies what is read this way: check that the page's header has the key
  /// and the generation of its reference before, and that the leases are held after each read.
  virtual std::shared_ptr<const MappedArena> Map(StoreId store) const { return nullptr; }

  virtual ClientStats stats() const = 0;

  /// Idempotent.
  virtual void Close() = 0;
};

}  // namespace nosara::kvstore
