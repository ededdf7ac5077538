// The shared-memory file of an arena: its trailer and its identity, known to the server that makes
// it and to the clients that map it.
//
//   offset 0               arena_bytes of page slots
//   offset arena_bytes     ArenaTrailer, then padding up to the file system's block size
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <string>

#include "absl/status/statusor.h"

namespace nosara::kvstore {

inline constexpr uint64_t kArenaMagic = 0x314152415253304e;

/// Tells a client that the file is the arena of the very incarnation it talks to.
struct ArenaTrailer {
  uint64_t magic = kArenaMagic;
  uint64_t epoch = 0;
  uint64_t arena_bytes = 0;
};

/// A mapping of a file, unmapped when destroyed. Immutable; thread-safe.
class FileMapping final {
 public:
  enum class Access { kReadOnly, kReadWrite };

  /// Maps the first `bytes` bytes of the open file `fd`; `path` is for messages.
  static absl::StatusOr<FileMapping> Create(int fd, size_t bytes, Access access,
                                            const std::string& path);
  FileMapping(FileMapping&& other) noexcept;
  FileMapping& operator=(FileMapping&&) = delete;
  ~FileMapping();

  std::byte* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  FileMapping(std::byte* data, size_t size) : data_(data), size_(size) {}

  std::byte* data_;
  size_t size_;
};

/// A file descriptor, closed when destroyed.
class FileDescriptor final {
 public:
  FileDescriptor() = default;
  explicit FileDescriptor(int fd) : fd_(fd) {}
  FileDescriptor(FileDescriptor&& other) noexcept;
  FileDescriptor& operator=(FileDescriptor&& other) noexcept;
  ~FileDescriptor();

  int get() const { return fd_; }
  bool valid() const { return fd_ >= 0; }

 private:
  int fd_ = -1;
};

/// Identity of the shared memory in which `path` lies: equal strings mean that a file made by one
/// process can be opened by the other under the same path. Made of the boot id of the kernel and of
/// the device number of the folder's file system, which differs between containers that do not
/// share /dev/shm. Error: the folder does not exist.
absl::StatusOr<std::string> SharedMemoryId(const std::string& path);

/// Maps the arena file at `path` after checking that it is the one of `epoch` with `arena_bytes`.
/// FAILED_PRECONDITION (with the reason) when it is not or cannot be opened.
absl::StatusOr<FileMapping> MapArena(const std::string& path, uint64_t epoch, uint64_t arena_bytes,
                                     FileMapping::Access access);

}  // namespace nosara::kvstore
