// What the main functions of our programs share.
#pragma once

#include <string>

#include "absl/status/status.h"

namespace nosara {

/// Blocks SIGTERM and SIGINT in this thread and all that it starts, so that the main thread can
/// wait for them. Make one before any thread starts.
class StopSignal final {
 public:
  StopSignal();
  StopSignal(const StopSignal&) = delete;
  StopSignal& operator=(const StopSignal&) = delete;

  /// Waits for one of the signals; its name. After that the next one ends the process at once.
  std::string Wait();
};

/// Writes "<address>\n" to `path`, so that scripts learn the port; readers never see half of it.
/// Nothing to do for an empty path. UNAVAILABLE when it cannot be written.
absl::Status WritePortFile(const std::string& path, const std::string& address);

}  // namespace nosara
