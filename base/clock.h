// The time source of everything that expires, so that tests move it by hand.
#pragma once

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

namespace nosara {

/// Monotonic time. Thread-safe.
class Clock {
 public:
  virtual ~Clock() = default;

  /// Time since an arbitrary fixed point; never goes back.
  virtual absl::Time Now() const = 0;

  /// The process's steady clock. Lives for ever.
  static const Clock* Real();
};

/// A clock that moves only when told to. Thread-safe.
class FakeClock final : public Clock {
 public:
  absl::Time Now() const override {
    absl::MutexLock lock(&mu_);
    return now_;
  }
  /// Precondition: `by` is not negative.
  void Advance(absl::Duration by) {
    absl::MutexLock lock(&mu_);
    now_ += by;
  }

 private:
  mutable absl::Mutex mu_;
  absl::Time now_ ABSL_GUARDED_BY(mu_) = absl::UnixEpoch() + absl::Hours(1);
};

}  // namespace nosara
