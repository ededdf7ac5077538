// A RequestSink that keeps what it is told.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "worker/engine/request.h"

namespace nosara::worker {

/// Thread-safe: the engine tells it, the test waits and reads.
class CollectingSink final : public RequestSink {
 public:
  void OnAccepted(int64_t cached_tokens) override {
    absl::MutexLock lock(&mu_);
    EXPECT_FALSE(accepted_);
    cached_ = cached_tokens;
    accepted_ = true;
  }
  void OnPrefillProgress(int64_t done, int64_t total) override {
    absl::MutexLock lock(&mu_);
    EXPECT_LE(done, total);
    progress_.push_back(done);
  }
  void OnToken(const SampledToken& token) override {
    absl::MutexLock lock(&mu_);
    tokens_.push_back(token.id);
  }
  void OnCompleted(const Completion& completion) override {
    {
      absl::MutexLock lock(&mu_);
      completion_ = completion;
    }
    done_.Notify();
  }
  void OnFailed(const absl::Status& status) override {
    {
      absl::MutexLock lock(&mu_);
      status_ = status;
    }
    done_.Notify();
  }

  void Wait() { ASSERT_TRUE(done_.WaitForNotificationWithTimeout(absl::Seconds(60))); }
  bool EndsWithin(absl::Duration timeout) { return done_.WaitForNotificationWithTimeout(timeout); }
  bool ended() const { return done_.HasBeenNotified(); }
  void WaitForTokens(size_t count) {
    absl::MutexLock lock(&mu_);
    const auto enough = [this, count]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
      return tokens_.size() >= count || !status_.ok();
    };
    ASSERT_TRUE(mu_.AwaitWithTimeout(absl::Condition(&enough), absl::Seconds(60)));
  }
  std::vector<int32_t> tokens() const {
    absl::MutexLock lock(&mu_);
    return tokens_;
  }
  absl::Status status() const {
    absl::MutexLock lock(&mu_);
    return status_;
  }
  Completion completion() const {
    absl::MutexLock lock(&mu_);
    return completion_;
  }
  /// No progress was told twice or backwards.
  bool ProgressGrows() const {
    absl::MutexLock lock(&mu_);
    return std::adjacent_find(progress_.begin(), progress_.end(), std::greater_equal<>()) ==
           progress_.end();
  }
  int64_t cached() const {
    absl::MutexLock lock(&mu_);
    return cached_;
  }

 private:
  mutable absl::Mutex mu_;
  absl::Notification done_;
  bool accepted_ ABSL_GUARDED_BY(mu_) = false;
  int64_t cached_ ABSL_GUARDED_BY(mu_) = -1;
  std::vector<int64_t> progress_ ABSL_GUARDED_BY(mu_);
  std::vector<int32_t> tokens_ ABSL_GUARDED_BY(mu_);
  absl::Status status_ ABSL_GUARDED_BY(mu_);
  Completion completion_ ABSL_GUARDED_BY(mu_);
};

}  // namespace nosara::worker
