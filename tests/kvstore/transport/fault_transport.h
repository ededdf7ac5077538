// A transport that misbehaves on demand, around a real one.
#pragma once

#include <sys/eventfd.h>
#include <unistd.h>

#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "base/check.h"
#include "kvstore/transport/arena_file.h"
#include "kvstore/transport/transport.h"

namespace nosara::kvstore {

/// What happens to the transfers of a FaultTransport. Thread-safe; shared by test and transport.
class FaultPlan final {
 public:
  enum class Fault {
    kNone,
    kDrop,     // is done only when the endpoint closes
    kDelay,    // is posted once Release() is called
    kCorrupt,  // a read is done with one bit of its bytes flipped
    kError,    // is done with UNAVAILABLE at once
  };

  FaultPlan() : event_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) { CHECK(event_.valid()); }

  /// What meets transfers of `direction` from now on.
  void Set(Direction direction, Fault fault) {
    absl::MutexLock lock(&mu_);
    (direction == Direction::kRead ? reads_ : writes_) = fault;
  }
  /// Lets delayed transfers go; those that come later are delayed again.
  void Release() {
    {
      absl::MutexLock lock(&mu_);
      ++releases_;
    }
    const uint64_t one = 1;
    CHECK(write(event_.get(), &one, sizeof(one)) == sizeof(one));
  }
  /// Waits until `count` transfers were met by a fault.
  void AwaitFaults(int count) {
    absl::MutexLock lock(&mu_);
    const auto enough = [this, count]()
                            ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return faults_ >= count; };
    CHECK(mu_.AwaitWithTimeout(absl::Condition(&enough), absl::Minutes(1)));
  }

  /// The fault that a transfer meets, and how often Release() was called before.
  std::pair<Fault, int> Meet(Direction direction) {
    absl::MutexLock lock(&mu_);
    const Fault fault = direction == Direction::kRead ? reads_ : writes_;
    faults_ += fault != Fault::kNone;
    return {fault, releases_};
  }
  int releases() const {
    absl::MutexLock lock(&mu_);
    return releases_;
  }
  int event_fd() const { return event_.get(); }
  void DrainEvent() {
    uint64_t count;
    [[maybe_unused]] const ssize_t bytes = read(event_.get(), &count, sizeof(count));
  }

 private:
  const FileDescriptor event_;
  mutable absl::Mutex mu_;
  Fault reads_ ABSL_GUARDED_BY(mu_) = Fault::kNone;
  Fault writes_ ABSL_GUARDED_BY(mu_) = Fault::kNone;
  int releases_ ABSL_GUARDED_BY(mu_) = 0;
  int faults_ ABSL_GUARDED_BY(mu_) = 0;
};

/// Only around transports without an event descriptor of their own (mapped, in-process).
class FaultTransport final : public Transport {
 public:
  FaultTransport(std::unique_ptr<Transport> inner, std::shared_ptr<FaultPlan> plan)
      : inner_(std::move(inner)), plan_(std::move(plan)) {}

  static std::function<std::unique_ptr<Transport>(std::unique_ptr<Transport>)> Wrapper(
      std::shared_ptr<FaultPlan> plan) {
    return [plan](std::unique_ptr<Transport> inner) {
      return std::make_unique<FaultTransport>(std::move(inner), plan);
    };
  }

  Path path() const override { return inner_->path(); }
  absl::StatusOr<std::unique_ptr<MemoryRegion>> Register(absl::Span<std::byte> memory,
                                                         MemoryKind kind) override {
    return inner_->Register(memory, kind);
  }
  absl::StatusOr<std::unique_ptr<Endpoint>> Connect(const ArenaAddress& arena) override {
    absl::StatusOr<std::unique_ptr<Endpoint>> endpoint = inner_->Connect(arena);
    if (!endpoint.ok()) return endpoint;
    return std::make_unique<FaultEndpoint>(this, *std::move(endpoint));
  }
  bool Progress() override {
    plan_->DrainEvent();
    bool active = false;
    for (FaultEndpoint* endpoint : endpoints_) active |= endpoint->PostReleased();
    return inner_->Progress() || active;
  }
  int event_fd() const override { return plan_->event_fd(); }

 private:
  class FaultEndpoint final : public Endpoint {
   public:
    FaultEndpoint(FaultTransport* transport, std::unique_ptr<Endpoint> inner)
        : transport_(transport), inner_(std::move(inner)) {
      transport_->endpoints_.push_back(this);
    }
    ~FaultEndpoint() override {
      Close();
      std::erase(transport_->endpoints_, this);
    }

    void Post(Transfer* transfer) override {
      const auto [fault, releases] = transport_->plan_->Meet(transfer->direction);
      switch (fault) {
        case FaultPlan::Fault::kNone:
          inner_->Post(transfer);
          break;
        case FaultPlan::Fault::kDrop:
          dropped_.push_back(transfer);
          break;
        case FaultPlan::Fault::kDelay:
          delayed_.push_back({releases, transfer});
          break;
        case FaultPlan::Fault::kCorrupt: {
          Probe probe;
          probe.direction = transfer->direction;
          probe.local = transfer->local;
          probe.offset = transfer->offset;
          inner_->Post(&probe);
          if (transfer->direction == Direction::kRead) {
            transfer->local[transfer->local.size() / 2] ^= std::byte{1};
          }
          transfer->Done(probe.status);
          break;
        }
        case FaultPlan::Fault::kError:
          transfer->Done(absl::UnavailableError("injected error"));
          break;
      }
    }
    absl::Status status() const override { return inner_->status(); }
    void Close() override {
      for (Transfer* transfer : std::exchange(dropped_, {})) {
        transfer->Done(absl::CancelledError("closed"));
      }
      for (auto& [release, transfer] : std::exchange(delayed_, {})) {
        transfer->Done(absl::CancelledError("closed"));
      }
      inner_->Close();
    }
    bool PostReleased() {
      bool posted = false;
      for (auto it = delayed_.begin(); it != delayed_.end();) {
        if (it->first >= transport_->plan_->releases()) {
          ++it;
          continue;
        }
        Transfer* const transfer = it->second;
        it = delayed_.erase(it);
        inner_->Post(transfer);
        posted = true;
      }
      return posted;
    }

   private:
    /// Completes inside Post(), as copying transports do.
    struct Probe final : Transfer {
      void Done(absl::Status result) override { status = std::move(result); }
      absl::Status status = absl::UnknownError("not done");
    };

    FaultTransport* const transport_;
    const std::unique_ptr<Endpoint> inner_;
    std::vector<Transfer*> dropped_;
    std::vector<std::pair<int, Transfer*>> delayed_;
  };

  const std::unique_ptr<Transport> inner_;
  const std::shared_ptr<FaultPlan> plan_;
  std::vector<FaultEndpoint*> endpoints_;
};

}  // namespace nosara::kvstore
