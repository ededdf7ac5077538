// What UcxMessageEndpoint and UcxTarget say to each other where there is no hardware for one-sided
// accesses (TCP). UCX would emulate ucp_get and ucp_put there, but in 1.13 (later ones not checked)
// its target ends the whole process (ucs_fatal) when it answers a client that has died; active
// messages report an error instead. See docs of UcxTarget.
//
//   client -> target   kHello (payload: the client's worker address), kRead, kWrite (payload:
//   bytes) target -> client   kReadReply (payload: bytes), kWriteReply
//
// Messages of one client arrive in order. All numbers are little endian.
#pragma once

#include <cstddef>
#include <cstdint>

namespace nosara::kvstore {

/// Ids of the active messages.
enum UcxMessageId : unsigned { kUcxHello = 1, kUcxRead, kUcxWrite, kUcxReadReply, kUcxWriteReply };

/// Larger transfers go in parts of this size, which with their headers fit one TCP segment of UCX.
inline constexpr size_t kUcxPartBytes = 60 * 1024;

/// Header of all five. The target sends back `operation` and `position` as they came.
struct UcxMessageHeader {
  /// Random; names the connection.
  uint64_t client = 0;
  /// Number of the transfer.
  uint64_t operation = 0;
  /// Offset of this part within the transfer's local bytes.
  uint64_t position = 0;
  /// Byte offset in the arena, and size, of this part.
  uint64_t offset = 0;
  uint64_t bytes = 0;
  /// Replies: 0, or an absl::StatusCode.
  uint64_t error = 0;
};
static_assert(sizeof(UcxMessageHeader) == 48);

}  // namespace nosara::kvstore
