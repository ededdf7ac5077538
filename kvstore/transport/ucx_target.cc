#include "kvstore/transport/ucx_target.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <thread>
#include <utility>

#include "base/check.h"
#include "base/log.h"
#include "base/status_macros.h"
#include "kvstore/transport/arena_file.h"
#include "kvstore/transport/ucx_handles.h"

namespace nosara::kvstore {
namespace {

/// Empty progress calls before the thread sleeps: some tens of microseconds, about what waking up
/// costs.
constexpr int kIdleSpins = 200;

}  // namespace

class UcxTarget::Impl final {
 public:
  Impl(UcxContext context, UcxWorker worker, UcxMemory memory, FileDescriptor wake)
      : context_(std::move(context)),
        worker_(std::move(worker)),
        memory_(std::move(memory)),
        wake_(std::move(wake)),
        thread_([this] { Run(); }) {}

  ~Impl() {
    // Release: nothing is published but the flag; the thread reads it after the wake-up.
    stop_.store(true, std::memory_order_release);
    const uint64_t one = 1;
    CHECK(write(wake_.get(), &one, sizeof(one)) == sizeof(one));
    thread_.join();
  }

 private:
  void Run() {
    int idle = 0;
    while (!stop_.load(std::memory_order_acquire)) {
      if (worker_.Progress()) {
        idle = 0;
        continue;
      }
      if (++idle < kIdleSpins || !worker_.Arm()) continue;
      pollfd fds[2] = {{worker_.event_fd(), POLLIN, 0}, {wake_.get(), POLLIN, 0}};
      if (poll(fds, 2, -1) < 0 && errno != EINTR) {
        LogError("UCX thread: poll failed with errno {}", errno);
        return;
      }
      idle = 0;
    }
  }

  UcxContext context_;
  UcxWorker worker_;
  UcxMemory memory_;
  FileDescriptor wake_;
  std::atomic<bool> stop_ = false;
  std::thread thread_;
};

absl::StatusOr<std::unique_ptr<UcxTarget>> UcxTarget::Create(absl::Span<std::byte> arena,
                                                             const std::string& tls) {
  FileDescriptor wake(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!wake.valid()) return absl::ErrnoToStatus(errno, "eventfd");
  ASSIGN_OR_RETURN(UcxContext context, UcxContext::Create(tls));
  ASSIGN_OR_RETURN(UcxWorker worker, UcxWorker::Create(context));
  ASSIGN_OR_RETURN(UcxMemory memory, UcxMemory::Create(context, arena, UCS_MEMORY_TYPE_HOST));
  ASSIGN_OR_RETURN(std::string address, worker.Address());
  ASSIGN_OR_RETURN(std::string rkey, memory.PackKey());
  auto impl = std::make_unique<Impl>(std::move(context), std::move(worker), std::move(memory),
                                     std::move(wake));
  return std::unique_ptr<UcxTarget>(
      new UcxTarget(std::move(impl), std::move(address), std::move(rkey)));
}

UcxTarget::UcxTarget(std::unique_ptr<Impl> impl, std::string address, std::string rkey)
    : impl_(std::move(impl)), address_(std::move(address)), rkey_(std::move(rkey)) {}

UcxTarget::~UcxTarget() = default;

}  // namespace nosara::kvstore
