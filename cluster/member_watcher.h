// The members of one role, as etcd knows them.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/synchronization/notification.h"
#include "cluster/etcd_client.h"
#include "cluster/member.h"

namespace nosara::cluster {

/// Owns one thread, which reads the members, watches for changes, and tells them.
///
/// While etcd cannot be reached, what it said last holds; so it does when etcd says that nobody is
/// left: who is really gone is found out by calling, and a membership service that has lost its
/// keys must not take the cluster down.
class MemberWatcher final {
 public:
  /// The members by address; called on the watcher's thread, not after Stop().
  using OnChange = std::function<void(const std::vector<Member>& members)>;

  /// Errors: those of EtcdLocation::Validate(). Does not wait for etcd.
  static absl::StatusOr<std::unique_ptr<MemberWatcher>> Create(const EtcdLocation& location,
                                                               Role role, OnChange on_change);
  MemberWatcher(const MemberWatcher&) = delete;
  MemberWatcher& operator=(const MemberWatcher&) = delete;
  ~MemberWatcher() { Stop(); }

  /// Idempotent.
  void Stop();

 private:
  MemberWatcher(const EtcdLocation& location, Role role, OnChange on_change);
  void Run();
  void Tell(const EtcdClient::Keys& keys);

  const std::string prefix_;
  const Role role_;
  const OnChange on_change_;
  EtcdClient client_;
  absl::Notification stop_;
  std::once_flag stopped_;
  std::map<std::string, std::string> told_;  // the thread's
  std::thread thread_;
};

}  // namespace nosara::cluster
