// Transport to an arena of the same node, by mapping its shared-memory file.
#pragma once

#include "kvstore/transport/transport.h"

namespace nosara::kvstore {

/// Owned by one thread. Maps read-only at Connect and read-write at the first write, so that a
/// process that only reads cannot damage the store.
class MappedTransport final : public Transport {
 public:
  Path path() const override { return Path::kMapped; }
  absl::StatusOr<std::unique_ptr<MemoryRegion>> Register(absl::Span<std::byte> memory,
                                                         MemoryKind kind) override;
  /// FAILED_PRECONDITION when the arena is in other shared memory than ours (another machine or
  /// container), or its file is not the one of `arena.epoch`.
  absl::StatusOr<std::unique_ptr<Endpoint>> Connect(const ArenaAddress& arena) override;
  bool Progress() override { return false; }
};

}  // namespace nosara::kvstore
