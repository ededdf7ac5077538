#include "kvstore/transport/copy_endpoint.h"

#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"

namespace nosara::kvstore {

CopyEndpoint::CopyEndpoint(ArenaAddress arena, const std::byte* base, WritableArena writable,
                           std::shared_ptr<void> mapping)
    : arena_(std::move(arena)),
      base_(base),
      writable_(std::move(writable)),
      mapping_(std::move(mapping)) {}

void CopyEndpoint::Post(Transfer* transfer) { transfer->Done(Copy(transfer)); }

absl::Status CopyEndpoint::Copy(Transfer* transfer) {
  if (base_ == nullptr) {
    return absl::CancelledError(absl::StrCat("store ", arena_.name, ": endpoint is closed"));
  }
  const uint64_t bytes = transfer->local.size();
  if (bytes > arena_.arena_bytes || transfer->offset > arena_.arena_bytes - bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("store ", arena_.name, ": bytes ", transfer->offset, " to ",
                     transfer->offset + bytes, ": the arena has ", arena_.arena_bytes));
  }
  if (transfer->direction == Direction::kRead) {
    std::memcpy(transfer->local.data(), base_ + transfer->offset, bytes);
    return absl::OkStatus();
  }
  if (write_base_ == nullptr) {
    ASSIGN_OR_RETURN(write_base_, writable_());
  }
  std::memcpy(write_base_ + transfer->offset, transfer->local.data(), bytes);
  return absl::OkStatus();
}

absl::Status CopyEndpoint::status() const {
  if (base_ == nullptr) {
    return absl::CancelledError(absl::StrCat("store ", arena_.name, ": endpoint is closed"));
  }
  return absl::OkStatus();
}

void CopyEndpoint::Close() {
  base_ = nullptr;
  write_base_ = nullptr;
  writable_ = nullptr;
  mapping_.reset();
}

}  // namespace nosara::kvstore
