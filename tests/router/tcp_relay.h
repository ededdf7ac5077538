// A TCP connection that a test can break.
#pragma once

#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

namespace nosara::router {

/// Listens on a free port of the loopback and relays every connection to a target, until Cut().
/// Thread-safe.
class TcpRelay final {
 public:
  /// `target_port`: on the loopback.
  explicit TcpRelay(int target_port);
  ~TcpRelay() { Cut(); }
  TcpRelay(const TcpRelay&) = delete;
  TcpRelay& operator=(const TcpRelay&) = delete;

  std::string address() const;

  /// Closes all connections, as the death of the target's machine would, and refuses new ones.
  /// Idempotent; one caller at a time.
  void Cut();

 private:
  void Accept();

  const int target_port_;
  int listener_ = -1;
  int port_ = 0;
  std::thread accept_thread_;
  absl::Mutex mu_;
  bool cut_ ABSL_GUARDED_BY(mu_) = false;
  std::vector<int> sockets_ ABSL_GUARDED_BY(mu_);
  std::vector<std::thread> pumps_ ABSL_GUARDED_BY(mu_);
};

}  // namespace nosara::router
