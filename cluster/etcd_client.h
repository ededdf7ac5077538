// What Nosara asks of etcd: keys under a lease, and a prefix of keys as it changes.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace nosara::cluster {

/// Thread-safe. Calls block, for 2 s at most where nothing else is said. Errors: UNAVAILABLE (etcd
/// cannot be reached or does not answer in time), CANCELLED after Stop(), else etcd's.
class EtcdClient final {
 public:
  /// `endpoint`: "host:port" of an etcd server's client address. Connects when first needed.
  explicit EtcdClient(const std::string& endpoint);
  EtcdClient(const EtcdClient&) = delete;
  EtcdClient& operator=(const EtcdClient&) = delete;
  ~EtcdClient();

  /// A lease of `ttl`, whole seconds of at least 1; its number.
  absl::StatusOr<int64_t> GrantLease(absl::Duration ttl);
  /// Renews a lease. NOT_FOUND: it has ended.
  absl::Status KeepLeaseAlive(int64_t lease);
  /// Ends a lease and deletes its keys. Works after Stop(), too.
  absl::Status RevokeLease(int64_t lease);

  /// Sets `key`, which ends with `lease`.
  absl::Status Put(const std::string& key, const std::string& value, int64_t lease);

  struct Keys {
    std::map<std::string, std::string> values;  // by key
    int64_t revision = 0;
  };
  /// The keys that begin with `prefix`, which is not empty.
  absl::StatusOr<Keys> List(const std::string& prefix);

  /// Brings `keys`, as List gave them, up to date with every change and calls `on_change` after
  /// each; until an error, which is the result, or Stop().
  absl::Status Watch(const std::string& prefix, Keys keys,
                     const std::function<void(const Keys&)>& on_change);

  /// Ends what runs; later calls fail. Idempotent.
  void Stop();

 private:
  struct Impl;
  const std::unique_ptr<Impl> impl_;
};

}  // namespace nosara::cluster
