#include "kvstore/server/arena.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <string>
#include <utility>
#include <vector>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/status_macros.h"

namespace nosara::kvstore {
namespace {

constexpr char kFilePrefix[] = "nosara-kv-";

/// True when `fd` is still the file at `path`.
bool IsLinked(int fd, const std::string& path) {
  struct stat opened, named;
  return fstat(fd, &opened) == 0 && stat(path.c_str(), &named) == 0 &&
         opened.st_ino == named.st_ino && opened.st_dev == named.st_dev;
}

/// Removes arena files without a living owner. Best effort: files of other users stay.
void RemoveStaleFiles(const std::string& folder) {
  DIR* const dir = opendir(folder.c_str());
  if (dir == nullptr) return;
  std::vector<std::string> names;
  // Nobody else reads this stream. NOLINTNEXTLINE(concurrency-mt-unsafe)
  while (const dirent* entry = readdir(dir)) {
    if (absl::StartsWith(entry->d_name, kFilePrefix)) names.push_back(entry->d_name);
  }
  closedir(dir);
  for (const std::string& name : names) {
    const std::string path = absl::StrCat(folder, "/", name);
    const FileDescriptor fd(open(path.c_str(), O_RDWR | O_CLOEXEC | O_NOFOLLOW));
    if (!fd.valid() || flock(fd.get(), LOCK_EX | LOCK_NB) != 0) continue;
    if (IsLinked(fd.get(), path) && unlink(path.c_str()) == 0) {
      LogWarning("removed arena file {} of a store that crashed", path);
    }
  }
}

/// How much of the mapping that begins at `data` lies in huge pages, as the kernel tells; 0 where
/// it does not.
uint64_t HugeBytes(const std::byte* data) {
  const std::string begin = absl::StrCat(absl::Hex(reinterpret_cast<uintptr_t>(data)), "-");
  std::ifstream smaps("/proc/self/smaps");
  bool here = false;
  uint64_t kib = 0;
  for (std::string line; std::getline(smaps, line);) {
    // A mapping's header begins with its addresses, a field with its name.
    if (!absl::ascii_isupper(static_cast<unsigned char>(line[0]))) {
      if (here) break;
      here = absl::StartsWith(line, begin);
      continue;
    }
    if (!here) continue;
    const std::vector<std::string> words = absl::StrSplit(line, ' ', absl::SkipEmpty());
    uint64_t value = 0;
    if (words.size() < 2 || !absl::SimpleAtoi(words[1], &value)) continue;
    for (const char* name :
         {"ShmemPmdMapped:", "FilePmdMapped:", "Shared_Hugetlb:", "Private_Hugetlb:"}) {
      if (words[0] == name) kib += value;
    }
  }
  return kib << 10;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Arena>> Arena::Create(const Options& options) {
  const absl::Time started = Clock::Real()->Now();
  struct statfs fs;
  if (statfs(options.folder.c_str(), &fs) != 0) {
    return absl::ErrnoToStatus(errno, absl::StrCat("arena folder '", options.folder, "'"));
  }
  RemoveStaleFiles(options.folder);
  const std::string path =
      absl::StrCat(options.folder, "/", kFilePrefix, absl::Hex(options.epoch, absl::kZeroPad16));
  FileDescriptor file(open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
  if (!file.valid()) return absl::ErrnoToStatus(errno, absl::StrCat("arena file ", path));
  auto unlinker = absl::MakeCleanup([&path] { unlink(path.c_str()); });
  // A store that starts at this moment may have taken the file for a stale one.
  if (flock(file.get(), LOCK_EX | LOCK_NB) != 0 || !IsLinked(file.get(), path)) {
    return absl::UnavailableError(
        absl::StrCat("arena file ", path, ": removed by another store that starts; try again"));
  }

  const uint64_t block = static_cast<uint64_t>(fs.f_bsize);
  const uint64_t needed = options.bytes + sizeof(ArenaTrailer);
  const uint64_t file_bytes = (needed + block - 1) / block * block;
  const auto no_room = [&] {
    return absl::ResourceExhaustedError(
        absl::StrCat("arena of ", options.bytes, " bytes: ", options.folder, " has room for ",
                     static_cast<uint64_t>(fs.f_bavail) * block,
                     " bytes; make it larger or choose another arena size or folder"));
  };
  // Filled up to the brim, the file system would fail others too before it fails us. (0: no limit.)
  if (fs.f_blocks > 0 && file_bytes / block > fs.f_bavail) return no_room();
  if (ftruncate(file.get(), static_cast<off_t>(file_bytes)) != 0) {
    if (errno == EFBIG || errno == ENOSPC || errno == ENOMEM) return no_room();
    return absl::ErrnoToStatus(errno, absl::StrCat("sizing ", path));
  }
  ASSIGN_OR_RETURN(FileMapping mapping, FileMapping::Create(file.get(), file_bytes,
                                                            FileMapping::Access::kReadWrite, path));
  Startup startup;
  const absl::Time mapped = Clock::Real()->Now();
  startup.map = mapped - started;
  // Large pages save TLB misses. Memory that comes by writing to such a mapping is in large pages
  // where that is allowed; memory that comes by fallocate is not. Where this does nothing, or less
  // than all, fallocate does the rest, and tells whether there was room: a full /dev/shm is an
  // error here instead of a SIGBUS in a client.
  madvise(mapping.data(), mapping.size(), MADV_HUGEPAGE);
  madvise(mapping.data(), mapping.size(), MADV_POPULATE_WRITE);
  const int error = posix_fallocate(file.get(), 0, static_cast<off_t>(file_bytes));
  if (error == ENOSPC || error == ENOMEM || error == EFBIG) return no_room();
  if (error != 0) return absl::ErrnoToStatus(error, absl::StrCat("allocating ", path));
  startup.allocate = Clock::Real()->Now() - mapped;
  startup.huge_bytes = HugeBytes(mapping.data());
  ArenaTrailer trailer;
  trailer.epoch = options.epoch;
  trailer.arena_bytes = options.bytes;
  std::memcpy(mapping.data() + options.bytes, &trailer, sizeof(trailer));
  ASSIGN_OR_RETURN(std::string host_id, SharedMemoryId(path));
  std::move(unlinker).Cancel();
  return std::unique_ptr<Arena>(new Arena(std::move(file), std::move(mapping), options.bytes, path,
                                          std::move(host_id), startup));
}

Arena::Arena(FileDescriptor file, FileMapping mapping, uint64_t bytes, std::string path,
             std::string host_id, Startup startup)
    : file_(std::move(file)),
      mapping_(std::move(mapping)),
      bytes_(bytes),
      path_(std::move(path)),
      host_id_(std::move(host_id)),
      startup_(startup) {}

Arena::~Arena() { unlink(path_.c_str()); }

}  // namespace nosara::kvstore
