// Keeps a member published in etcd as long as it lives.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "absl/status/statusor.h"
#include "absl/synchronization/notification.h"
#include "absl/time/time.h"
#include "cluster/etcd_client.h"
#include "cluster/member.h"

namespace nosara::cluster {

/// Owns one thread, which publishes the member under a lease, renews the lease each third of its
/// time, and publishes anew when it was lost. A member that dies is gone when its lease has ended.
///
/// Thread-safe. While etcd cannot be reached it tries again; one line in the log says so.
class Registration final {
 public:
  /// `ttl`: whole seconds, at least 1. INVALID_ARGUMENT: the location's, or a member without
  /// address. Does not wait for etcd.
  static absl::StatusOr<std::unique_ptr<Registration>> Create(const EtcdLocation& location,
                                                              const Member& member,
                                                              absl::Duration ttl);
  Registration(const Registration&) = delete;
  Registration& operator=(const Registration&) = delete;
  ~Registration() { Stop(); }

  /// Takes the member out of etcd, as far as etcd can be reached. Idempotent.
  void Stop();

 private:
  Registration(const EtcdLocation& location, const Member& member, absl::Duration ttl);
  void Run();
  /// Publishes and renews until an error, which it returns, or Stop().
  absl::Status Publish();

  const std::string key_;
  const std::string value_;
  const absl::Duration ttl_;
  EtcdClient client_;
  absl::Notification stop_;
  std::once_flag stopped_;
  bool published_ = false;  // the thread's
  std::thread thread_;
};

}  // namespace nosara::cluster
