#include "kvstore/transport/in_process_transport.h"

#include "absl/strings/str_cat.h"
#include "kvstore/transport/copy_endpoint.h"

namespace nosara::kvstore {

absl::StatusOr<std::unique_ptr<MemoryRegion>> InProcessTransport::Register(
    absl::Span<std::byte> memory, MemoryKind kind) {
  if (kind == MemoryKind::kCuda) {
    return absl::UnimplementedError("in-process transport: cannot copy into CUDA memory");
  }
  return std::make_unique<MemoryRegion>();
}

absl::StatusOr<std::unique_ptr<Endpoint>> InProcessTransport::Connect(const ArenaAddress& arena) {
  if (arena.in_process == nullptr) {
    return absl::FailedPreconditionError(
        absl::StrCat("store ", arena.name, ": its arena is not in this process"));
  }
  std::byte* const base = arena.in_process;
  return std::make_unique<CopyEndpoint>(
      arena, base, [base]() -> absl::StatusOr<std::byte*> { return base; }, nullptr);
}

}  // namespace nosara::kvstore
