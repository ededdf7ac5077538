// Logging: one line per event to stderr, through spdlog.
//
//   LogInfo("listening on {}", address);
//
// Who returns an error does not log it; the top of a thread loop or an RPC handler logs it once.
// Levels by volume: Error = something is broken and somebody must act; Warning = a degraded mode
// begins or ends; Info = life cycle; Debug = per request; never per token or per record.
// Thread-safe.
#pragma once

#include <spdlog/spdlog.h>

#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace nosara {

/// Sets up the process-wide logger. `program` is shown on each line; `level` is one of debug, info,
/// warning, error. INVALID_ARGUMENT for another level. Call once, from main.
absl::Status InitLogging(absl::string_view program, absl::string_view level);

template <typename... Args>
void LogDebug(spdlog::format_string_t<Args...> format, Args&&... args) {
  spdlog::debug(format, std::forward<Args>(args)...);
}
template <typename... Args>
void LogInfo(spdlog::format_string_t<Args...> format, Args&&... args) {
  spdlog::info(format, std::forward<Args>(args)...);
}
template <typename... Args>
void LogWarning(spdlog::format_string_t<Args...> format, Args&&... args) {
  spdlog::warn(format, std::forward<Args>(args)...);
}
template <typename... Args>
void LogError(spdlog::format_string_t<Args...> format, Args&&... args) {
  spdlog::error(format, std::forward<Args>(args)...);
}

}  // namespace nosara
