#include "kvstore/transport/arena_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <system_error>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"

namespace nosara::kvstore {

absl::StatusOr<FileMapping> FileMapping::Create(int fd, size_t bytes, Access access,
                                                const std::string& path) {
  const int protection = access == Access::kReadOnly ? PROT_READ : PROT_READ | PROT_WRITE;
  void* const data = mmap(nullptr, bytes, protection, MAP_SHARED, fd, 0);
  if (data == MAP_FAILED) {
    return absl::ErrnoToStatus(errno, absl::StrCat("mapping ", bytes, " bytes of ", path));
  }
  return FileMapping(static_cast<std::byte*>(data), bytes);
}

FileMapping::FileMapping(FileMapping&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(other.size_) {}

FileMapping::~FileMapping() {
  if (data_ != nullptr) munmap(data_, size_);
}

FileDescriptor::FileDescriptor(FileDescriptor&& other) noexcept
    : fd_(std::exchange(other.fd_, -1)) {}

FileDescriptor& FileDescriptor::operator=(FileDescriptor&& other) noexcept {
  std::swap(fd_, other.fd_);
  return *this;
}

FileDescriptor::~FileDescriptor() {
  if (fd_ >= 0) close(fd_);
}

absl::StatusOr<std::string> SharedMemoryId(const std::string& path) {
  const size_t slash = path.rfind('/');
  const std::string folder = slash == std::string::npos ? "." : path.substr(0, slash + 1);
  struct stat info;
  if (stat(folder.c_str(), &info) != 0) return absl::ErrnoToStatus(errno, folder);
  std::string boot_id;
  std::ifstream file("/proc/sys/kernel/random/boot_id");
  if (!std::getline(file, boot_id)) {
    return absl::UnavailableError("cannot read /proc/sys/kernel/random/boot_id");
  }
  return absl::StrCat(boot_id, ":", info.st_dev);
}

absl::StatusOr<FileMapping> MapArena(const std::string& path, uint64_t epoch, uint64_t arena_bytes,
                                     FileMapping::Access access) {
  const int flags = access == FileMapping::Access::kReadOnly ? O_RDONLY : O_RDWR;
  const FileDescriptor fd(open(path.c_str(), flags | O_CLOEXEC | O_NOFOLLOW));
  if (!fd.valid()) {
    return absl::FailedPreconditionError(
        absl::StrCat("arena file ", path, ": ", std::generic_category().message(errno)));
  }
  struct stat info;
  if (fstat(fd.get(), &info) != 0) return absl::ErrnoToStatus(errno, path);
  const uint64_t needed = arena_bytes + sizeof(ArenaTrailer);
  if (info.st_size < 0 || needed < arena_bytes || static_cast<uint64_t>(info.st_size) < needed) {
    return absl::FailedPreconditionError(absl::StrCat("arena file ", path, ": has ", info.st_size,
                                                      " bytes: must have at least ", needed));
  }
  // The whole file, because mappings of hugetlbfs must be whole huge pages.
  ASSIGN_OR_RETURN(FileMapping mapping,
                   FileMapping::Create(fd.get(), static_cast<size_t>(info.st_size), access, path));
  ArenaTrailer trailer;
  std::memcpy(&trailer, mapping.data() + arena_bytes, sizeof(trailer));
  if (trailer.magic != kArenaMagic || trailer.epoch != epoch ||
      trailer.arena_bytes != arena_bytes) {
    return absl::FailedPreconditionError(
        absl::StrCat("arena file ", path, ": belongs to another incarnation of the store"));
  }
  return mapping;
}

}  // namespace nosara::kvstore
