// A transport that misbehaves at random, around a real one: for tests of what stands on transports.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "kvstore/transport/transport.h"

namespace nosara::kvstore {

/// How often what goes wrong, per posted transfer: probabilities of 0 to 1, which add up to 1 at
/// most. What is left goes well.
struct FaultRates {
  /// Never happens: done with CANCELLED when the endpoint closes.
  double drop = 0;
  /// Happens some turns later, each transfer after a number of its own: they overtake each other.
  double delay = 0;
  /// Happens twice before it is done, as of a peer that repeats itself, and Done() is called twice,
  /// the second time right after the first. That breaks the transport's contract on purpose.
  double duplicate = 0;
  /// One bit of it is flipped on the way; a write's local bytes stay as they are.
  double corrupt = 0;
  /// Is done with UNAVAILABLE, without happening.
  double error = 0;
  /// From now on nothing of its direction happens on its endpoint: as drop, for all that follow.
  double half_close = 0;
};

/// What the faults of one or more FaultTransports are drawn from. Thread-safe.
class FaultSource final {
 public:
  explicit FaultSource(uint64_t seed) : random_(seed) {}

  void Set(const FaultRates& rates) {
    absl::MutexLock lock(&mu_);
    rates_ = rates;
  }

  enum class Fault { kNone, kDrop, kDelay, kDuplicate, kCorrupt, kError, kHalfClose };
  Fault Draw();
  /// Uniform in [0, bound).
  uint64_t Below(uint64_t bound);
  /// Transfers that something was done to.
  uint64_t faults() const { return faults_.load(std::memory_order_relaxed); }

 private:
  mutable absl::Mutex mu_;
  FaultRates rates_ ABSL_GUARDED_BY(mu_);
  std::mt19937_64 random_ ABSL_GUARDED_BY(mu_);
  std::atomic<uint64_t> faults_{0};  // relaxed: only counts
};

/// `inner` with faults. Closes as the contract says: every posted transfer is done then, and none
/// writes into its local bytes afterwards.
std::unique_ptr<Transport> MakeFaultTransport(std::unique_ptr<Transport> inner,
                                              std::shared_ptr<FaultSource> source);

}  // namespace nosara::kvstore
