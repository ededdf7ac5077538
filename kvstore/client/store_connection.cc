#include "kvstore/client/store_connection.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "kvstore/transport/arena_file.h"

namespace nosara::kvstore {

int Distance(Path path) {
  switch (path) {
    case Path::kInProcess:
      return 0;
    case Path::kMapped:
      return 1;
    case Path::kUcx:
      return 2;
  }
  return 3;
}

StoreConnection::StoreConnection(Options options)
    : options_(std::move(options)), control_(options_.address, options_.channel) {}

void StoreConnection::WhenReady(Ready ready) {
  switch (Enlist(ready)) {
    case Enlisted::kReady:
      std::move(ready)(session());
      break;
    case Enlisted::kFirst:
      control_.GetInfo(
          {}, [this](absl::StatusOr<v1::GetInfoResponse> info) { OnInfo(std::move(info)); });
      break;
    case Enlisted::kWaiting:
      break;
  }
}

StoreConnection::Enlisted StoreConnection::Enlist(Ready& ready) {
  absl::MutexLock lock(&mu_);
  if (state_ == State::kReady) return Enlisted::kReady;
  waiting_.push_back(std::move(ready));
  if (state_ == State::kConnecting) return Enlisted::kWaiting;
  state_ = State::kConnecting;
  return Enlisted::kFirst;
}

StoreConnection::Session StoreConnection::session() const {
  absl::MutexLock lock(&mu_);
  return session_;
}

void StoreConnection::OnInfo(absl::StatusOr<v1::GetInfoResponse> info) {
  if (!info.ok()) {
    Finish(info.status());
    return;
  }
  ArenaAddress arena;
  arena.name = absl::StrCat(info->node_id(), " at ", options_.address);
  arena.epoch = info->epoch();
  arena.arena_bytes = info->arena_bytes();
  arena.host_id = info->host_id();
  arena.arena_path = info->arena_path();
  arena.ucx_address = info->ucx_address();
  arena.ucx_rkey = info->ucx_rkey();
  arena.remote_address = info->remote_address();
  if (options_.in_process_arena.size() == info->arena_bytes()) {
    arena.in_process = options_.in_process_arena.data();
  }
  Session session;
  session.epoch = info->epoch();
  session.lease_ttl = absl::Milliseconds(info->lease_ttl_ms());
  if (options_.on_session) options_.on_session(session.epoch, session.lease_ttl);
  ArenaAddress copy = arena;
  options_.transfer_thread->Connect(
      options_.store, std::move(arena),
      [this, session, arena = std::move(copy)](absl::StatusOr<Path> path) mutable {
        if (!path.ok()) {
          Finish(path.status());
          return;
        }
        session.path = *path;
        KeepArena(arena, session);
        Finish(session);
      });
}

void StoreConnection::KeepArena(const ArenaAddress& address, const Session& session) {
  auto arena = std::make_shared<MappedArena>();
  if (session.path == Path::kInProcess) {
    arena->bytes = options_.in_process_arena;
  } else if (session.path == Path::kMapped) {
    {
      absl::MutexLock lock(&mu_);
      if (arena_ != nullptr && arena_epoch_ == session.epoch) return;
    }
    absl::StatusOr<FileMapping> mapping = MapArena(
        address.arena_path, address.epoch, address.arena_bytes, FileMapping::Access::kReadWrite);
    // Not an error: the data path works; only direct readers are without.
    if (!mapping.ok()) return;
    auto kept = std::make_shared<FileMapping>(*std::move(mapping));
    arena->bytes = absl::MakeSpan(kept->data(), address.arena_bytes);
    arena->mapping = std::move(kept);
  } else {
    arena = nullptr;
  }
  absl::MutexLock lock(&mu_);
  arena_ = std::move(arena);
  arena_epoch_ = session.epoch;
}

std::shared_ptr<const MappedArena> StoreConnection::arena() const {
  absl::MutexLock lock(&mu_);
  return arena_;
}

void StoreConnection::Finish(absl::StatusOr<Session> session) {
  std::vector<Ready> waiting;
  {
    absl::MutexLock lock(&mu_);
    state_ = session.ok() ? State::kReady : State::kDisconnected;
    unreachable_ = !session.ok();
    live_ = session.ok();
    if (session.ok()) session_ = *session;
    waiting.swap(waiting_);
  }
  for (Ready& ready : waiting) std::move(ready)(session);
}

void StoreConnection::Doubt(uint64_t epoch) {
  absl::MutexLock lock(&mu_);
  // A late error of an earlier incarnation says nothing about this one.
  if (state_ != State::kReady || session_.epoch != epoch) return;
  state_ = State::kDisconnected;
  live_ = false;
}

void StoreConnection::DataPathBroken() {
  absl::MutexLock lock(&mu_);
  if (state_ != State::kReady) return;
  state_ = State::kDisconnected;
  live_ = false;
}

Path StoreConnection::path() const { return session().path; }

bool StoreConnection::live() const {
  absl::MutexLock lock(&mu_);
  return live_;
}

bool StoreConnection::unreachable() const {
  absl::MutexLock lock(&mu_);
  return unreachable_;
}

}  // namespace nosara::kvstore
