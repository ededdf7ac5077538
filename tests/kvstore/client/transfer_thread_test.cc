// The transfer thread alone: no server, no timers but its own.
#include "kvstore/client/transfer_thread.h"

#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/synchronization/notification.h"
#include "tests/kvstore/transport/fault_transport.h"
#include "tests/status_matchers.h"

namespace nosara::kvstore {
namespace {

using ::nosara::testing::StatusIs;

/// Far beyond any time that an operation may take.
constexpr absl::Duration kForever = absl::Minutes(1);

class TransferThreadTest : public ::testing::Test {
 protected:
  TransferThreadTest() : arena_(4 * layout_.page_bytes()), landing_(layout_.record_bytes()) {}

  TransferThread::Options MakeOptions() {
    TransferThread::Options options{layout_};
    options.stall_timeout = absl::Milliseconds(20);
    options.wrap_transport = FaultTransport::Wrapper(plan_);
    options.on_broken = [this](size_t, const absl::Status& status) { broken_ = status; };
    return options;
  }
  void Connect(TransferThread& thread) {
    ArenaAddress address;
    address.name = "arena";
    address.arena_bytes = arena_.size();
    address.in_process = arena_.data();
    absl::Notification connected;
    thread.Connect(0, address, [&](absl::StatusOr<Path> path) {
      EXPECT_OK(path);
      connected.Notify();
    });
    ASSERT_TRUE(connected.WaitForNotificationWithTimeout(kForever));
  }
  TransferThread::Piece ReadOfFirstRecord() {
    TransferThread::Piece piece;
    piece.local = absl::MakeSpan(landing_);
    return piece;
  }

  const PageLayout layout_ = *PageLayout::Create(2, 2, 16, 4);
  std::vector<std::byte> arena_;
  std::vector<std::byte> landing_;
  const std::shared_ptr<FaultPlan> plan_ = std::make_shared<FaultPlan>();
  absl::Status broken_;  // the thread's until a completion came
};

// Nothing else wakes this thread: what its stall check ends must complete in the same turn.
TEST_F(TransferThreadTest, AStalledReadCompletesThoughNoTimerIsSet) {
  absl::Notification done;
  absl::Status status;
  TransferThread thread(MakeOptions());
  Connect(thread);
  plan_->Set(Direction::kRead, FaultPlan::Fault::kDrop);
  thread.Submit({ReadOfFirstRecord()}, [&](absl::Status result) {
    status = std::move(result);
    done.Notify();
  });
  ASSERT_TRUE(done.WaitForNotificationWithTimeout(kForever));
  EXPECT_THAT(status,
              StatusIs(absl::StatusCode::kUnavailable, "no transfer has completed for 20ms"));
  EXPECT_EQ(broken_, status);
}

}  // namespace
}  // namespace nosara::kvstore
