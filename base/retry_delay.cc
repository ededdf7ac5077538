#include "base/retry_delay.h"

#include <cstdint>

#include "absl/strings/cord.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace nosara {
namespace {

constexpr char kPayload[] = "nosara/retry-delay-ms";

}  // namespace

std::string RetryDelayValue(absl::Duration delay) {
  return absl::StrCat(absl::ToInt64Milliseconds(absl::Ceil(delay, absl::Milliseconds(1))));
}

absl::Status WithRetryDelay(absl::Status status, absl::Duration delay) {
  status.SetPayload(kPayload, absl::Cord(RetryDelayValue(delay)));
  return status;
}

absl::Status WithRetryDelay(absl::Status status, absl::string_view value) {
  int64_t milliseconds = 0;
  if (!absl::SimpleAtoi(value, &milliseconds) || milliseconds < 0) return status;
  return WithRetryDelay(std::move(status), absl::Milliseconds(milliseconds));
}

std::optional<absl::Duration> RetryDelay(const absl::Status& status) {
  const auto payload = status.GetPayload(kPayload);
  int64_t milliseconds = 0;
  if (!payload || !absl::SimpleAtoi(std::string(*payload), &milliseconds)) return std::nullopt;
  return absl::Milliseconds(milliseconds);
}

}  // namespace nosara
