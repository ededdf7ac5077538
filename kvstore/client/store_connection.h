// A client's connection to one store: which incarnation it talks to, and reconnecting.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/functional/any_invocable.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "kvstore/client/control_client.h"
#include "kvstore/client/transfer_thread.h"

namespace nosara::kvstore {

/// True for errors after which a connection is in doubt: the store is gone or has restarted.
inline bool IsConnectionError(const absl::Status& status) {
  return absl::IsUnavailable(status) || absl::IsAborted(status);
}

/// How far the bytes of a store are by `path`: smaller is nearer.
int Distance(Path path);

/// Thread-safe. States: disconnected -> connecting (GetInfo, then the data path) -> ready; an error
/// of a call or of the data path leads back to disconnected, the next WhenReady() connects again.
class StoreConnection final {
 public:
  /// What a ready connection is good for.
  struct Session {
    uint64_t epoch = 0;
    absl::Duration lease_ttl;
    Path path = Path::kMapped;
  };
  using Ready = absl::AnyInvocable<void(absl::StatusOr<Session>) &&>;

  struct Options {
    size_t store = 0;
    std::string address;
    std::shared_ptr<grpc::Channel> channel;
    absl::Span<std::byte> in_process_arena;
    TransferThread* transfer_thread = nullptr;
    /// The store answered as this incarnation: leases of others are lost.
    std::function<void(uint64_t epoch, absl::Duration lease_ttl)> on_session;
  };

  explicit StoreConnection(Options options);

  /// Calls `ready` when connected (inside the call if it is already), or with the error of the
  /// attempt under way (never inside the call).
  void WhenReady(Ready ready);

  /// A call or transfer of incarnation `epoch` failed so that the connection is in doubt.
  void Doubt(uint64_t epoch);
  /// The data path failed.
  void DataPathBroken();

  /// The last try to connect that has ended failed.
  bool unreachable() const;
  /// No failure since it was last connected. Not live is a store in doubt: it is left out where
  /// there are others, until a try to connect succeeds.
  bool live() const;
  /// Of the last session; kMapped before the first.
  Path path() const;
  /// Of the last session; 0 before the first.
  uint64_t epoch() const { return session().epoch; }
  /// Of the current session; null unless its path is kMapped or kInProcess.
  std::shared_ptr<const MappedArena> arena() const;
  ControlClient& control() { return control_; }
  const std::string& address() const { return options_.address; }

 private:
  enum class State { kDisconnected, kConnecting, kReady };
  enum class Enlisted { kReady, kFirst, kWaiting };
  /// Puts `ready` among the waiting unless the connection is ready; whoever is kFirst connects.
  Enlisted Enlist(Ready& ready);
  Session session() const;
  void OnInfo(absl::StatusOr<v1::GetInfoResponse> info);
  void KeepArena(const ArenaAddress& address, const Session& session);
  void Finish(absl::StatusOr<Session> session);

  const Options options_;
  ControlClient control_;

  mutable absl::Mutex mu_;
  State state_ ABSL_GUARDED_BY(mu_) = State::kDisconnected;
  bool unreachable_ ABSL_GUARDED_BY(mu_) = false;
  bool live_ ABSL_GUARDED_BY(mu_) = true;
  Session session_ ABSL_GUARDED_BY(mu_);
  std::shared_ptr<const MappedArena> arena_ ABSL_GUARDED_BY(mu_);
  uint64_t arena_epoch_ ABSL_GUARDED_BY(mu_) = 0;
  std::vector<Ready> waiting_ ABSL_GUARDED_BY(mu_);
};

}  // namespace nosara::kvstore
