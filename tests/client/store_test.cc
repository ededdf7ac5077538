// `nosara store` against a store.
#include "client/store.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "kvstore/server/kvstore_server.h"
#include "tests/kvstore/server/service_fixture.h"

namespace nosara::kvstore {
namespace {

using ::testing::HasSubstr;

class StoreCommandTest : public ServiceTest {
 protected:
  void SetUp() override {
    KvStoreServerOptions options;
    options.listen = "127.0.0.1:0";
    options.arena_bytes = 8 * layout_.page_bytes();
    options.node_id = "node-1";
    options.ucx = KvStoreServerOptions::Ucx::kOff;
    Start(options);
  }

  /// Runs `nosara store ARGS --store=...`; what it printed is in out_ and err_.
  int Run(std::vector<std::string> args) {
    args.push_back("--store=" + server_->address());
    ::testing::internal::CaptureStdout();
    ::testing::internal::CaptureStderr();
    const int exit = client::StoreCommand().run(args);
    out_ = ::testing::internal::GetCapturedStdout();
    err_ = ::testing::internal::GetCapturedStderr();
    return exit;
  }

  std::string out_, err_;
};

TEST_F(StoreCommandTest, StatsShowsWhatTheStoreHolds) {
  EXPECT_EQ(Run({"stats"}), client::kExitOk);
  EXPECT_THAT(out_, HasSubstr("not yet known"));
  Release(Store({0, 1, 2}, kRoot));
  Store({10}, kRoot);
  EXPECT_EQ(Found({0, 1, 2, 3}), 3);
  EXPECT_EQ(Run({"stats"}), client::kExitOk) << err_;
  const auto has = [this](const std::string& name, const std::string& value) {
    EXPECT_THAT(out_, ::testing::ContainsRegex("(^|\n) *" + name + " +" + value)) << out_;
  };
  has("node", "node-1");
  has("page slots", "8");
  has("free", "4");
  has("stored", "4");
  has("leased", "1");
  has("evictable", "3");
  has("hits", "3  75.0 %");
  has("misses", "1  25.0 %");
  has("pages committed", "4");
  has("namespaces", "1");
  has(std::string(32, '0'), "4");
}

TEST_F(StoreCommandTest, EvictVerifyAndDrain) {
  Release(Store({0, 1, 2}, kRoot));
  const uint64_t lease = Store({10}, kRoot);
  EXPECT_EQ(Run({"verify"}), client::kExitOk) << err_;
  EXPECT_EQ(out_, "4 pages verified, 0 did not match their checksums\n");
  const auto found = Lookup({0});
  ASSERT_OK(found);
  Release(found->lease_id());
  SlotBytes(found->pages(0).slot()).back() ^= std::byte{1};
  EXPECT_EQ(Run({"verify", "--mib_per_second=1000"}), client::kExitFailed);
  // The store, in this process, logs to stdout as well.
  EXPECT_THAT(out_,
              HasSubstr("4 pages verified, 1 did not match their checksums and were dropped"));
  EXPECT_EQ(Run({"evict", "--namespace=" + Key(77).ToHex()}), client::kExitOk);
  EXPECT_EQ(out_, "0 pages evicted, 3 left, of which 1 leased\n");
  EXPECT_EQ(Run({"evict", "--max_pages", "1"}), client::kExitOk);
  EXPECT_EQ(out_, "1 pages evicted, 2 left, of which 1 leased\n");
  EXPECT_EQ(Run({"evict"}), client::kExitOk);
  EXPECT_EQ(out_, "1 pages evicted, 1 left, of which 1 leased\n");
  EXPECT_EQ(Run({"drain"}), client::kExitOk);
  EXPECT_EQ(out_, "draining, 1 leases alive\n");
  EXPECT_THAT(Reserve({20}, kRoot),
              nosara::testing::StatusIs(absl::StatusCode::kFailedPrecondition, "is draining"));
  Release(lease);
  EXPECT_EQ(Run({"drain", "--wait"}), client::kExitOk);
  EXPECT_THAT(out_, HasSubstr("no lease is alive"));
}

TEST_F(StoreCommandTest, SaysWhatIsWrong) {
  EXPECT_EQ(Run({}), client::kExitUsage);
  EXPECT_THAT(err_, HasSubstr("must be followed by stats, evict, verify or drain"));
  EXPECT_EQ(Run({"erase"}), client::kExitUsage);
  EXPECT_THAT(err_, HasSubstr("store erase: must be stats"));
  EXPECT_EQ(Run({"evict", "--max_pages=-1"}), client::kExitUsage);
  EXPECT_THAT(err_, HasSubstr("max_pages = -1"));
  EXPECT_EQ(Run({"evict", "--namespace=xyz"}), client::kExitUsage);
  EXPECT_THAT(err_, HasSubstr("namespace = 'xyz': must be 32 hexadecimal digits"));
  EXPECT_EQ(Run({"verify"}), client::kExitFailed);
  EXPECT_THAT(err_, HasSubstr("nothing was ever reserved"));
  server_->Stop();
  EXPECT_EQ(Run({"stats"}), client::kExitUnavailable);
  EXPECT_THAT(err_, HasSubstr(server_->address()));
}

}  // namespace
}  // namespace nosara::kvstore
