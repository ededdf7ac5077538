// The memory of a KV store node: one shared-memory file.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "kvstore/transport/arena_file.h"

namespace nosara::kvstore {

/// Owns the arena's file (removed when destroyed) and its mapping. Immutable after Create; what
/// lies in it is written by clients, at any time.
class Arena final {
 public:
  struct Options {
    /// At least 1. All of it is allocated at Create: later writes cannot fail for lack of memory.
    uint64_t bytes = 0;
    /// Folder of the file, in shared memory: /dev/shm or a hugetlbfs mount.
    std::string folder = "/dev/shm";
    /// Incarnation of the node, in the file's name and trailer.
    uint64_t epoch = 0;
  };

  /// What Create took.
  struct Startup {
    absl::Duration map;       // making the file and its mapping
    absl::Duration allocate;  // of all its memory
    /// How much of it lies in huge pages.
    uint64_t huge_bytes = 0;
  };

  /// Removes arena files that a crashed process has left in `folder` (a live owner holds a lock on
  /// its file), then makes a new one, of mode 0600. In huge pages where the system grants them to
  /// shared memory (transparent_hugepage/shmem_enabled, or the mount option huge=, is advise or
  /// more), and on hugetlbfs.
  /// RESOURCE_EXHAUSTED when the file system has not enough room, otherwise the system's error.
  static absl::StatusOr<std::unique_ptr<Arena>> Create(const Options& options);
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena();

  std::byte* data() const { return mapping_.data(); }
  uint64_t bytes() const { return bytes_; }
  const std::string& path() const { return path_; }
  /// SharedMemoryId() of the file.
  const std::string& host_id() const { return host_id_; }
  const Startup& startup() const { return startup_; }

 private:
  Arena(FileDescriptor file, FileMapping mapping, uint64_t bytes, std::string path,
        std::string host_id, Startup startup);

  const FileDescriptor file_;  // holds the lock
  const FileMapping mapping_;
  const uint64_t bytes_;
  const std::string path_;
  const std::string host_id_;
  const Startup startup_;
};

}  // namespace nosara::kvstore
