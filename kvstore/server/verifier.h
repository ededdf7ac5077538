// Looks at all slots of a store, one after the other, at a bounded rate.
#pragma once

#include <cstdint>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/functional/any_invocable.h"
#include "absl/synchronization/mutex.h"

namespace nosara::kvstore {

/// Owns a thread while a pass runs. Thread-safe.
class Verifier final {
 public:
  enum class SlotState { kEmpty, kIntact, kMismatched };
  struct Progress {
    enum class State { kNone, kRunning, kDone };
    State state = State::kNone;
    uint64_t slots_total = 0;
    uint64_t slots_done = 0;
    uint64_t pages_verified = 0;
    uint64_t pages_mismatched = 0;
  };

  /// `check` looks at the page in a slot; it is called by one thread at a time, without locks held,
  /// until Stop() has returned.
  explicit Verifier(absl::AnyInvocable<SlotState(uint64_t slot)> check);
  Verifier(const Verifier&) = delete;
  Verifier& operator=(const Verifier&) = delete;
  ~Verifier();

  /// Begins a pass over slots 0 to `slots` - 1, `slot_bytes` each, unless one runs already or
  /// Stop() was called; how far the last one is. `bytes_per_second` is at least 1.
  Progress Start(uint64_t slots, uint64_t slot_bytes, uint64_t bytes_per_second);
  Progress progress() const;
  /// Pages verified by all passes.
  uint64_t pages_verified() const;
  /// Blocks until no pass runs.
  void WaitIdle();
  /// Ends a running pass where it is; none starts any more. Idempotent.
  void Stop();

 private:
  void Run(uint64_t slots, uint64_t slot_bytes, uint64_t bytes_per_second);
  bool Idle() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    return progress_.state != Progress::State::kRunning;
  }

  absl::AnyInvocable<SlotState(uint64_t slot)> check_;  // called by thread_ only

  mutable absl::Mutex mu_;
  Progress progress_ ABSL_GUARDED_BY(mu_);
  uint64_t pages_verified_ ABSL_GUARDED_BY(mu_) = 0;
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
  std::thread thread_ ABSL_GUARDED_BY(mu_);
};

}  // namespace nosara::kvstore
