// Only in builds with the thread sanitizer: tells it of Abseil's locks.
//
// The distributions' Abseil is built without the sanitizer, which therefore sees neither its locks
// nor what they order, and would report every guarded member as a race. The functions below stand
// before the library's (a program's definitions do), call it, and tell the sanitizer what was
// acquired and released. gRPC's own use of these locks goes through them too.
#include <dlfcn.h>

#include <string>

#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "base/check.h"

// The sanitizer's names. NOLINTBEGIN(bugprone-reserved-identifier)
extern "C" {
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
// NOLINTEND(bugprone-reserved-identifier)

#define NOSARA_STRINGIFY_(x) #x
#define NOSARA_STRINGIFY(x) NOSARA_STRINGIFY_(x)

namespace absl {
ABSL_NAMESPACE_BEGIN
namespace {

/// The library's function with this name after the namespace, in the mangling of the Itanium ABI.
template <typename Function>
Function* Real(const char* constness, const char* rest) {
  const std::string inline_namespace = NOSARA_STRINGIFY(ABSL_OPTION_INLINE_NAMESPACE_NAME);
  const std::string name = std::string("_ZN") + constness + "4absl" +
                           std::to_string(inline_namespace.size()) + inline_namespace + rest;
  auto* function = reinterpret_cast<Function*>(dlsym(RTLD_NEXT, name.c_str()));
  CHECK(function != nullptr);
  return function;
}

void Acquired(const void* lock) { __tsan_acquire(const_cast<void*>(lock)); }
void Released(const void* lock) { __tsan_release(const_cast<void*>(lock)); }

/// `condition` with what its evaluation under the lock, by whichever thread, acquires and releases.
class Watched final {
 public:
  Watched(const void* lock, const Condition& condition) : lock_(lock), condition_(condition) {}
  bool operator()() const {
    Acquired(lock_);
    const bool result = condition_.Eval();
    Released(lock_);
    return result;
  }

 private:
  const void* const lock_;
  const Condition& condition_;
};

}  // namespace

void Mutex::Lock() {
  static auto* const real = Real<void(Mutex*)>("", "5Mutex4LockEv");
  real(this);
  Acquired(this);
}

void Mutex::Unlock() {
  static auto* const real = Real<void(Mutex*)>("", "5Mutex6UnlockEv");
  Released(this);
  real(this);
}

bool Mutex::TryLock() {
  static auto* const real = Real<bool(Mutex*)>("", "5Mutex7TryLockEv");
  const bool locked = real(this);
  if (locked) Acquired(this);
  return locked;
}

void Mutex::ReaderLock() {
  static auto* const real = Real<void(Mutex*)>("", "5Mutex10ReaderLockEv");
  real(this);
  Acquired(this);
}

void Mutex::ReaderUnlock() {
  static auto* const real = Real<void(Mutex*)>("", "5Mutex12ReaderUnlockEv");
  Released(this);
  real(this);
}

void Mutex::Await(const Condition& condition) {
  static auto* const real =
      Real<void(Mutex*, const Condition&)>("", "5Mutex5AwaitERKNS0_9ConditionE");
  const Watched watched(this, condition);
  Released(this);
  real(this, Condition(&watched));
  Acquired(this);
}

bool Mutex::AwaitWithTimeout(const Condition& condition, Duration timeout) {
  static auto* const real = Real<bool(Mutex*, const Condition&, Duration)>(
      "", "5Mutex16AwaitWithTimeoutERKNS0_9ConditionENS0_8DurationE");
  const Watched watched(this, condition);
  Released(this);
  const bool result = real(this, Condition(&watched), timeout);
  Acquired(this);
  return result;
}

bool Mutex::AwaitWithDeadline(const Condition& condition, Time deadline) {
  static auto* const real = Real<bool(Mutex*, const Condition&, Time)>(
      "", "5Mutex17AwaitWithDeadlineERKNS0_9ConditionENS0_4TimeE");
  const Watched watched(this, condition);
  Released(this);
  const bool result = real(this, Condition(&watched), deadline);
  Acquired(this);
  return result;
}

void CondVar::Wait(Mutex* mutex) {
  static auto* const real = Real<void(CondVar*, Mutex*)>("", "7CondVar4WaitEPNS0_5MutexE");
  Released(mutex);
  real(this, mutex);
  Acquired(mutex);
}

bool CondVar::WaitWithDeadline(Mutex* mutex, Time deadline) {
  static auto* const real =
      Real<bool(CondVar*, Mutex*, Time)>("", "7CondVar16WaitWithDeadlineEPNS0_5MutexENS0_4TimeE");
  Released(mutex);
  const bool result = real(this, mutex, deadline);
  Acquired(mutex);
  return result;
}

bool CondVar::WaitWithTimeout(Mutex* mutex, Duration timeout) {
  static auto* const real = Real<bool(CondVar*, Mutex*, Duration)>(
      "", "7CondVar15WaitWithTimeoutEPNS0_5MutexENS0_8DurationE");
  Released(mutex);
  const bool result = real(this, mutex, timeout);
  Acquired(mutex);
  return result;
}

void Notification::Notify() {
  static auto* const real = Real<void(Notification*)>("", "12Notification6NotifyEv");
  Released(this);
  real(this);
}

void Notification::WaitForNotification() const {
  static auto* const real =
      Real<void(const Notification*)>("K", "12Notification19WaitForNotificationEv");
  real(this);
  Acquired(this);
}

bool Notification::WaitForNotificationWithTimeout(Duration timeout) const {
  static auto* const real = Real<bool(const Notification*, Duration)>(
      "K", "12Notification30WaitForNotificationWithTimeoutENS0_8DurationE");
  const bool notified = real(this, timeout);
  if (notified) Acquired(this);
  return notified;
}

bool Notification::WaitForNotificationWithDeadline(Time deadline) const {
  static auto* const real = Real<bool(const Notification*, Time)>(
      "K", "12Notification31WaitForNotificationWithDeadlineENS0_4TimeE");
  const bool notified = real(this, deadline);
  if (notified) Acquired(this);
  return notified;
}

ABSL_NAMESPACE_END
}  // namespace absl
