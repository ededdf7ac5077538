// Early return on errors.
//
//   RETURN_IF_ERROR(file.Close());
//   ASSIGN_OR_RETURN(Config config, Config::Load(path));
//
// Both return the status unchanged from the enclosing function, whose return type is absl::Status
// or absl::StatusOr<T>. Annotate() adds context where the callee cannot know it.
#pragma once

#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"

namespace nosara {

/// `status` with "<context>: " before its message; OK stays OK. Payloads are kept.
inline absl::Status Annotate(const absl::Status& status, absl::string_view context) {
  if (status.ok()) return status;
  absl::Status annotated(status.code(), absl::StrCat(context, ": ", status.message()));
  status.ForEachPayload([&annotated](absl::string_view type_url, const absl::Cord& payload) {
    annotated.SetPayload(type_url, payload);
  });
  return annotated;
}

}  // namespace nosara

#define NOSARA_CONCAT_INNER_(a, b) a##b
#define NOSARA_CONCAT_(a, b) NOSARA_CONCAT_INNER_(a, b)

#define RETURN_IF_ERROR(expr)                        \
  do {                                               \
    ::absl::Status nosara_status_ = (expr);          \
    if (!nosara_status_.ok()) return nosara_status_; \
  } while (false)

#define ASSIGN_OR_RETURN(lhs, expr) \
  NOSARA_ASSIGN_OR_RETURN_(NOSARA_CONCAT_(nosara_statusor_, __LINE__), lhs, expr)

#define NOSARA_ASSIGN_OR_RETURN_(statusor, lhs, expr) \
  auto statusor = (expr);                             \
  if (!statusor.ok()) return statusor.status();       \
  lhs = *std::move(statusor)
