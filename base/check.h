// CHECK(condition): aborts with file, line and condition when one of OUR invariants is broken.
//
// Anything that a peer, a file, a device or a user can cause is an absl::Status instead.
// DCHECK is for checks on the hot path: active unless NDEBUG is defined.
#pragma once

#include <cstdio>
#include <cstdlib>

namespace nosara::internal {

[[noreturn]] inline void CheckFailed(const char* file, int line, const char* condition) {
  std::fprintf(stderr, "%s:%d: CHECK failed: %s\n", file, line, condition);
  std::fflush(stderr);
  std::abort();
}

}  // namespace nosara::internal

#define CHECK(condition)                               \
  (static_cast<bool>(condition) ? static_cast<void>(0) \
                                : ::nosara::internal::CheckFailed(__FILE__, __LINE__, #condition))

#ifdef NDEBUG
#define DCHECK(condition) static_cast<void>(sizeof(static_cast<bool>(condition)))
#else
#define DCHECK(condition) CHECK(condition)
#endif
