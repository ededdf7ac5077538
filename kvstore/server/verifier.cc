#include "kvstore/server/verifier.h"

#include <utility>

#include "absl/time/time.h"
#include "base/clock.h"

namespace nosara::kvstore {

Verifier::Verifier(absl::AnyInvocable<SlotState(uint64_t slot)> check) : check_(std::move(check)) {}

Verifier::~Verifier() { Stop(); }

Verifier::Progress Verifier::Start(uint64_t slots, uint64_t slot_bytes, uint64_t bytes_per_second) {
  absl::MutexLock lock(&mu_);
  if (stopping_ || !Idle()) return progress_;
  // That of the last pass, which takes the lock no more.
  if (thread_.joinable()) thread_.join();
  progress_ = Progress();
  progress_.state = Progress::State::kRunning;
  progress_.slots_total = slots;
  thread_ = std::thread([=, this] { Run(slots, slot_bytes, bytes_per_second); });
  return progress_;
}

void Verifier::Run(uint64_t slots, uint64_t slot_bytes, uint64_t bytes_per_second) {
  const absl::Time started = Clock::Real()->Now();
  const absl::Duration per_page =
      absl::Seconds(static_cast<double>(slot_bytes) / static_cast<double>(bytes_per_second));
  for (uint64_t slot = 0; slot < slots; ++slot) {
    const SlotState state = check_(slot);
    absl::MutexLock lock(&mu_);
    ++progress_.slots_done;
    if (state != SlotState::kEmpty) {
      ++progress_.pages_verified;
      ++pages_verified_;
      progress_.pages_mismatched += state == SlotState::kMismatched;
      const absl::Time due = started + static_cast<double>(progress_.pages_verified) * per_page;
      mu_.AwaitWithTimeout(absl::Condition(&stopping_), due - Clock::Real()->Now());
    }
    if (stopping_) break;
  }
  absl::MutexLock lock(&mu_);
  progress_.state = Progress::State::kDone;
}

Verifier::Progress Verifier::progress() const {
  absl::MutexLock lock(&mu_);
  return progress_;
}

uint64_t Verifier::pages_verified() const {
  absl::MutexLock lock(&mu_);
  return pages_verified_;
}

void Verifier::WaitIdle() {
  absl::MutexLock lock(&mu_);
  mu_.Await(absl::Condition(
      +[](Verifier* self) ABSL_NO_THREAD_SAFETY_ANALYSIS { return self->Idle(); }, this));
}

void Verifier::Stop() {
  std::thread thread;
  {
    absl::MutexLock lock(&mu_);
    stopping_ = true;
    thread.swap(thread_);
  }
  if (thread.joinable()) thread.join();
}

}  // namespace nosara::kvstore
