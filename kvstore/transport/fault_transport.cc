#include "kvstore/transport/fault_transport.h"

#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <utility>

#include "base/check.h"
#include "kvstore/transport/arena_file.h"

namespace nosara::kvstore {
namespace {

/// A delayed transfer waits for fewer turns of Progress() than this.
constexpr uint64_t kMaxDelay = 40;

class FaultTransport;

/// One transfer on its way through the inner endpoint.
class Shadow final : public Transfer {
 public:
  Shadow(Transfer* outer, std::function<void(Shadow*)> gone)
      : outer_(outer), gone_(std::move(gone)) {
    direction = outer->direction;
    local = outer->local;
    offset = outer->offset;
    region = outer->region;
  }
  virtual ~Shadow() = default;

  /// To be done once more before it counts: set by the endpoint.
  std::function<void(Shadow*)> again;
  bool twice = false;
  /// A bit to flip, of a read that is done; beyond the bytes: none.
  uint64_t flip = ~uint64_t{0};
  /// What a write sends instead of its bytes.
  std::vector<std::byte> changed;

  void Done(absl::Status status) override {
    if (again != nullptr && status.ok()) {
      std::exchange(again, nullptr)(this);
      return;
    }
    if (direction == Direction::kRead && status.ok() && flip / 8 < local.size()) {
      local[flip / 8] ^= std::byte{1} << (flip % 8);
    }
    outer_->Done(status);
    if (twice) outer_->Done(std::move(status));
    gone_(this);  // deletes this
  }

 private:
  Transfer* const outer_;
  const std::function<void(Shadow*)> gone_;
};

class FaultEndpoint final : public Endpoint {
 public:
  FaultEndpoint(FaultTransport* transport, std::unique_ptr<Endpoint> inner, FaultSource* source);
  ~FaultEndpoint() override;

  void Post(Transfer* transfer) override;
  absl::Status status() const override { return inner_->status(); }
  void Close() override {
    closed_ = true;
    inner_->Close();
    for (Transfer* transfer : std::exchange(dropped_, {})) {
      transfer->Done(absl::CancelledError("closed"));
    }
    for (auto& [turns, transfer] : std::exchange(delayed_, {})) {
      transfer->Done(absl::CancelledError("closed"));
    }
  }
  /// Lets delayed transfers go whose time has come.
  bool Turn() {
    std::vector<Transfer*> due;
    for (auto& [turns, transfer] : delayed_) {
      if (turns-- == 0) due.push_back(transfer);
    }
    std::erase_if(delayed_, [&](const auto& one) {
      return std::find(due.begin(), due.end(), one.second) != due.end();
    });
    for (Transfer* transfer : due) Forward(transfer, FaultSource::Fault::kNone);
    return !due.empty();
  }
  bool delays() const { return !delayed_.empty(); }

 private:
  void Forward(Transfer* transfer, FaultSource::Fault fault);

  FaultTransport* const transport_;
  const std::unique_ptr<Endpoint> inner_;
  FaultSource* const source_;
  bool closed_ = false;
  bool half_closed_[2] = {false, false};  // by Direction
  std::vector<Transfer*> dropped_;
  std::vector<std::pair<uint64_t, Transfer*>> delayed_;  // turns to wait
  std::vector<std::unique_ptr<Shadow>> shadows_;
};

class FaultTransport final : public Transport {
 public:
  FaultTransport(std::unique_ptr<Transport> inner, std::shared_ptr<FaultSource> source)
      : inner_(std::move(inner)),
        source_(std::move(source)),
        wake_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)),
        events_(epoll_create1(EPOLL_CLOEXEC)) {
    CHECK(wake_.valid() && events_.valid());
    Watch(wake_.get());
    if (inner_->event_fd() >= 0) Watch(inner_->event_fd());
  }

  Path path() const override { return inner_->path(); }
  absl::StatusOr<std::unique_ptr<MemoryRegion>> Register(absl::Span<std::byte> memory,
                                                         MemoryKind kind) override {
    return inner_->Register(memory, kind);
  }
  absl::StatusOr<std::unique_ptr<Endpoint>> Connect(const ArenaAddress& arena) override {
    absl::StatusOr<std::unique_ptr<Endpoint>> endpoint = inner_->Connect(arena);
    if (!endpoint.ok()) return endpoint;
    return std::make_unique<FaultEndpoint>(this, *std::move(endpoint), source_.get());
  }
  bool Progress() override {
    uint64_t count;
    [[maybe_unused]] const ssize_t bytes = read(wake_.get(), &count, sizeof(count));
    bool active = false;
    bool delays = false;
    for (FaultEndpoint* endpoint : endpoints_) {
      active |= endpoint->Turn();
      delays |= endpoint->delays();
    }
    // Whoever sleeps on the descriptor must come back for those that wait.
    if (delays) {
      const uint64_t one = 1;
      CHECK(write(wake_.get(), &one, sizeof(one)) == sizeof(one));
    }
    return inner_->Progress() || active;
  }
  int event_fd() const override { return events_.get(); }
  bool Arm() override { return inner_->event_fd() < 0 || inner_->Arm(); }

  std::vector<FaultEndpoint*> endpoints_;

 private:
  void Watch(int fd) {
    epoll_event event = {};
    event.events = EPOLLIN;
    CHECK(epoll_ctl(events_.get(), EPOLL_CTL_ADD, fd, &event) == 0);
  }

  const std::unique_ptr<Transport> inner_;
  const std::shared_ptr<FaultSource> source_;
  const FileDescriptor wake_;
  const FileDescriptor events_;
};

FaultEndpoint::FaultEndpoint(FaultTransport* transport, std::unique_ptr<Endpoint> inner,
                             FaultSource* source)
    : transport_(transport), inner_(std::move(inner)), source_(source) {
  transport_->endpoints_.push_back(this);
}

FaultEndpoint::~FaultEndpoint() {
  Close();
  std::erase(transport_->endpoints_, this);
}

void FaultEndpoint::Post(Transfer* transfer) {
  using Fault = FaultSource::Fault;
  const Fault fault = source_->Draw();
  const int direction = static_cast<int>(transfer->direction);
  if (fault == Fault::kHalfClose) half_closed_[direction] = true;
  if (closed_) {
    Forward(transfer, Fault::kNone);  // which says so
  } else if (half_closed_[direction] || fault == Fault::kDrop) {
    dropped_.push_back(transfer);
  } else if (fault == Fault::kDelay) {
    delayed_.emplace_back(source_->Below(kMaxDelay), transfer);
  } else if (fault == Fault::kError) {
    transfer->Done(absl::UnavailableError("injected error"));
  } else {
    Forward(transfer, fault);
  }
}

void FaultEndpoint::Forward(Transfer* transfer, FaultSource::Fault fault) {
  auto shadow = std::make_unique<Shadow>(transfer, [this](Shadow* gone) {
    std::erase_if(shadows_, [&](const auto& one) { return one.get() == gone; });
  });
  if (fault == FaultSource::Fault::kDuplicate) {
    shadow->twice = true;
    shadow->again = [this](Shadow* again) { inner_->Post(again); };
  }
  if (fault == FaultSource::Fault::kCorrupt && !transfer->local.empty()) {
    shadow->flip = source_->Below(8 * transfer->local.size());
    if (transfer->direction == Direction::kWrite) {
      shadow->changed.assign(transfer->local.begin(), transfer->local.end());
      shadow->changed[shadow->flip / 8] ^= std::byte{1} << (shadow->flip % 8);
      shadow->local = absl::MakeSpan(shadow->changed);
      shadow->region = nullptr;
    }
  }
  Shadow* const raw = shadow.get();
  shadows_.push_back(std::move(shadow));
  inner_->Post(raw);
}

}  // namespace

FaultSource::Fault FaultSource::Draw() {
  Fault fault = Fault::kNone;
  {
    absl::MutexLock lock(&mu_);
    double draw = std::uniform_real_distribution<double>()(random_);
    const std::pair<double, Fault> rates[] = {
        {rates_.drop, Fault::kDrop},           {rates_.delay, Fault::kDelay},
        {rates_.duplicate, Fault::kDuplicate}, {rates_.corrupt, Fault::kCorrupt},
        {rates_.error, Fault::kError},         {rates_.half_close, Fault::kHalfClose}};
    for (const auto& [rate, kind] : rates) {
      if (draw < rate) {
        fault = kind;
        break;
      }
      draw -= rate;
    }
  }
  if (fault != Fault::kNone) faults_.fetch_add(1, std::memory_order_relaxed);
  return fault;
}

uint64_t FaultSource::Below(uint64_t bound) {
  absl::MutexLock lock(&mu_);
  return random_() % bound;
}

std::unique_ptr<Transport> MakeFaultTransport(std::unique_ptr<Transport> inner,
                                              std::shared_ptr<FaultSource> source) {
  return std::make_unique<FaultTransport>(std::move(inner), std::move(source));
}

}  // namespace nosara::kvstore
