// What a member of a cluster publishes, and where.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace nosara::cluster {

enum class Role { kRouter, kWorker, kStore };

/// One process of a cluster: nosara.cluster.v1.Member in our own terms.
struct Member {
  Role role = Role::kStore;
  /// Name, unique among the members of its role.
  std::string id;
  /// "host:port" that others reach it at.
  std::string address;
  /// Incarnation; never 0.
  uint64_t epoch = 0;
};

/// Where a cluster is published.
struct EtcdLocation {
  /// "host:port" of an etcd server's client address.
  std::string endpoint;
  /// Name of the cluster: letters, digits, '-', '_' and '.'.
  std::string cluster = "nosara";

  /// INVALID_ARGUMENT names the flag, its value and what is allowed.
  absl::Status Validate() const;
  /// "/nosara/<cluster>/<role>s/", under which each member has the key of its address.
  std::string Prefix(Role role) const;
};

}  // namespace nosara::cluster
