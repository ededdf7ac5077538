// The endpoint of transports whose arena is visible in this address space: plain copies.
#pragma once

#include <memory>

#include "absl/functional/any_invocable.h"
#include "kvstore/transport/transport.h"

namespace nosara::kvstore {

/// Copies inside Post(). Owned by one thread.
class CopyEndpoint final : public Endpoint {
 public:
  /// Gives the arena for writing, or why it cannot; called at the first write.
  using WritableArena = absl::AnyInvocable<absl::StatusOr<std::byte*>()>;

  /// `mapping` keeps the memory valid and may be null.
  CopyEndpoint(ArenaAddress arena, const std::byte* base, WritableArena writable,
               std::shared_ptr<void> mapping);

  void Post(Transfer* transfer) override;
  absl::Status status() const override;
  void Close() override;

 private:
  absl::Status Copy(Transfer* transfer);

  const ArenaAddress arena_;
  const std::byte* base_;
  WritableArena writable_;
  std::byte* write_base_ = nullptr;
  std::shared_ptr<void> mapping_;
};

}  // namespace nosara::kvstore
