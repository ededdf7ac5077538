// The yardstick of the benchmark: ucp_get in a loop, with nothing around it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "kvstore/transport/transport.h"

namespace nosara::kvstore {

/// Reads `bytes` at the given offsets of the arena in turn, `depth` gets in flight, for `duration`;
/// returns reads per second. Uses the same UCX settings as the store's client. The arena's
/// UcxTarget progresses on its own thread.
absl::StatusOr<double> BareUcxGets(const ArenaAddress& arena, const std::string& tls, size_t bytes,
                                   const std::vector<uint64_t>& offsets, size_t depth,
                                   absl::Duration duration);

}  // namespace nosara::kvstore
