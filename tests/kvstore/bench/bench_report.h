// What the store's benchmarks share: waiting for a completion, and the file of figures.
#pragma once

#include <fstream>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"

namespace nosara::kvstore {

/// Calls start(done) and returns what `done` is called with.
template <typename T, typename Start>
T Await(Start start) {
  absl::Notification done;
  std::optional<T> result;
  start([&](T value) {
    result.emplace(std::move(value));
    done.Notify();
  });
  done.WaitForNotification();
  return *std::move(result);
}

/// Writes a list, one row a line; an empty `file`: nothing. UNAVAILABLE where it cannot be written.
inline absl::Status WriteRows(const std::string& file, const std::vector<nlohmann::json>& rows) {
  if (file.empty()) return absl::OkStatus();
  std::ofstream out(file);
  for (size_t i = 0; i < rows.size(); ++i) out << (i == 0 ? "[\n  " : ",\n  ") << rows[i].dump();
  out << "\n]\n";
  out.close();
  if (out) return absl::OkStatus();
  return absl::UnavailableError(absl::StrCat("json: cannot write '", file, "'"));
}

}  // namespace nosara::kvstore
