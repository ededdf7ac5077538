// When to try again, carried by a Status.
#pragma once

#include <optional>

#include "absl/status/status.h"
#include "absl/time/time.h"

namespace nosara::router {

/// The trailing metadata that carries the delay between processes, a decimal number.
inline constexpr char kRetryDelayMetadata[] = "retry-delay-ms";

/// `status` with a delay, rounded up to whole milliseconds. OK stays OK.
absl::Status WithRetryDelay(absl::Status status, absl::Duration delay);

/// The delay that `status` carries, if it does.
std::optional<absl::Duration> RetryDelay(const absl::Status& status);

}  // namespace nosara::router
