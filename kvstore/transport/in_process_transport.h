// Transport to an arena of this process, by pointer.
#pragma once

#include "kvstore/transport/transport.h"

namespace nosara::kvstore {

/// Owned by one thread. The arena must outlive the endpoints.
class InProcessTransport final : public Transport {
 public:
  Path path() const override { return Path::kInProcess; }
  absl::StatusOr<std::unique_ptr<MemoryRegion>> Register(absl::Span<std::byte> memory,
                                                         MemoryKind kind) override;
  /// FAILED_PRECONDITION unless `arena.in_process` is set.
  absl::StatusOr<std::unique_ptr<Endpoint>> Connect(const ArenaAddress& arena) override;
  bool Progress() override { return false; }
};

}  // namespace nosara::kvstore
