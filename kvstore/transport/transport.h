// One-sided reads and writes of the arenas of KV stores. The seam between the client and the ways
// bytes can travel: another mapping of the same memory, the same process, UCX.
//
// Contract of every implementation:
//  1. Owned by one thread: all calls and all completions happen on the thread that made it.
//  2. A transfer and its local bytes belong to the transport from Post() until its Done() runs,
//  which
//     happens exactly once, inside Post(), Progress() or Close(), and after which the local bytes
//     are not touched any more.
//  3. Done(OK) of a read: the bytes are there. Done(OK) of a write: whoever reads the arena later
//     sees them.
//  4. Endpoint::Close() is synchronous: it returns when every posted transfer is done. So a peer
//     that died or hangs cannot write into memory that its reader took for free again.
//  5. An endpoint that failed once stays failed: posts complete with its error. Connect again.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "kvstore/api/store_client.h"

namespace nosara::kvstore {

/// What a registered memory region is made of.
enum class MemoryKind {
  kHost,    // pageable host memory
  kPinned,  // page-locked host memory, known to the GPU
  kCuda,    // device memory
};

/// A registration: ends when destroyed. No transfer that names it may be in flight then.
class MemoryRegion {
 public:
  virtual ~MemoryRegion() = default;
};

enum class Direction { kRead, kWrite };

/// One one-sided operation between local bytes and a range of a remote arena.
class Transfer {
 public:
  Direction direction = Direction::kRead;
  absl::Span<std::byte> local;
  /// Byte offset in the arena.
  uint64_t offset = 0;
  /// The registration that covers `local`; may be null for host memory.
  const MemoryRegion* region = nullptr;

  /// UNAVAILABLE: the peer cannot be reached; CANCELLED: the endpoint was closed;
  /// INVALID_ARGUMENT: beyond the arena. Must not call the endpoint.
  virtual void Done(absl::Status status) = 0;

 protected:
  ~Transfer() = default;
};

/// How to reach one arena: what its node tells in GetInfo.
struct ArenaAddress {
  /// For messages: node id and control address.
  std::string name;
  uint64_t epoch = 0;
  uint64_t arena_bytes = 0;
  std::string host_id;
  std::string arena_path;
  std::string ucx_address;
  std::string ucx_rkey;
  uint64_t remote_address = 0;
  /// The arena itself when it lives in this process; else null.
  std::byte* in_process = nullptr;
};

/// A connection to one arena.
class Endpoint {
 public:
  virtual ~Endpoint() = default;  // closes
  virtual void Post(Transfer* transfer) = 0;
  /// OK while usable.
  virtual absl::Status status() const = 0;
  /// See contract 4. Idempotent.
  virtual void Close() = 0;
};

class Transport {
 public:
  virtual ~Transport() = default;

  virtual Path path() const = 0;

  /// UNIMPLEMENTED when the transport cannot reach memory of this kind.
  virtual absl::StatusOr<std::unique_ptr<MemoryRegion>> Register(absl::Span<std::byte> memory,
                                                                 MemoryKind kind) = 0;

  /// Endpoints must be destroyed before their transport. FAILED_PRECONDITION when the arena cannot
  /// be reached by this transport (the message says why), UNAVAILABLE when it should but does not.
  virtual absl::StatusOr<std::unique_ptr<Endpoint>> Connect(const ArenaAddress& arena) = 0;

  /// Moves posted transfers on; true when anything happened.
  virtual bool Progress() = 0;

  /// To sleep until something happens: a descriptor that becomes readable then, after Arm() has
  /// returned true (false: call Progress() first). -1: everything completes inside Post().
  virtual int event_fd() const { return -1; }
  virtual bool Arm() { return true; }
};

}  // namespace nosara::kvstore
