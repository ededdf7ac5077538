#include "kvstore/transport/mapped_transport.h"

#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "kvstore/transport/arena_file.h"
#include "kvstore/transport/copy_endpoint.h"

namespace nosara::kvstore {

absl::StatusOr<std::unique_ptr<MemoryRegion>> MappedTransport::Register(
    absl::Span<std::byte> memory, MemoryKind kind) {
  if (kind == MemoryKind::kCuda) {
    return absl::UnimplementedError("mapped transport: cannot copy into CUDA memory");
  }
  return std::make_unique<MemoryRegion>();
}

absl::StatusOr<std::unique_ptr<Endpoint>> MappedTransport::Connect(const ArenaAddress& arena) {
  const absl::StatusOr<std::string> host_id = SharedMemoryId(arena.arena_path);
  if (!host_id.ok() || *host_id != arena.host_id) {
    return absl::FailedPreconditionError(
        absl::StrCat("store ", arena.name, ": its shared memory is not this host's"));
  }
  auto mappings = std::make_shared<std::vector<FileMapping>>();
  mappings->reserve(2);
  ASSIGN_OR_RETURN(FileMapping read_only, MapArena(arena.arena_path, arena.epoch, arena.arena_bytes,
                                                   FileMapping::Access::kReadOnly));
  mappings->push_back(std::move(read_only));
  const std::byte* const base = mappings->front().data();
  auto writable = [arena, mappings]() -> absl::StatusOr<std::byte*> {
    ASSIGN_OR_RETURN(FileMapping mapping, MapArena(arena.arena_path, arena.epoch, arena.arena_bytes,
                                                   FileMapping::Access::kReadWrite));
    mappings->push_back(std::move(mapping));
    return mappings->back().data();
  };
  return std::make_unique<CopyEndpoint>(arena, base, std::move(writable), mappings);
}

}  // namespace nosara::kvstore
