// When to try again: between processes as trailing metadata, within one carried by a Status.
#pragma once

#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"

namespace nosara {

/// The trailing metadata that carries the delay between processes: whole milliseconds, in decimal.
inline constexpr char kRetryDelayMetadata[] = "retry-delay-ms";

/// The value of that metadata for `delay`, rounded up to whole milliseconds.
std::string RetryDelayValue(absl::Duration delay);

/// `status` with a delay, rounded up to whole milliseconds. OK stays OK.
absl::Status WithRetryDelay(absl::Status status, absl::Duration delay);
/// The same from the value of the metadata; a value that is no number, or negative, is ignored.
absl::Status WithRetryDelay(absl::Status status, absl::string_view value);

/// The delay that `status` carries, if it does.
std::optional<absl::Duration> RetryDelay(const absl::Status& status);

}  // namespace nosara
