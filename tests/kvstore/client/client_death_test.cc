// What a store does when clients die in the middle of reads and writes.
//
// The clients are forked before anything else starts, because a process with threads (gRPC, UCX)
// cannot fork; each waits for the store's address in a pipe.
#include <sys/wait.h>
#include <unistd.h>

#include "tests/kvstore/client/store_fixture.h"
#include "tests/program.h"

namespace nosara::kvstore {
namespace {

constexpr int kClients = 8;

struct ClientProcess {
  pid_t pid = 0;
  int address_pipe = -1;  // we write
  int busy_pipe = -1;     // a byte comes once it is at work
};

std::vector<ClientProcess>& Clients() {
  static auto* const clients = new std::vector<ClientProcess>;
  return *clients;
}

/// Reads and writes without end.
[[noreturn]] void RunClient(int number, int address_pipe, int busy_pipe) {
  char text[256] = {};
  if (read(address_pipe, text, sizeof(text) - 1) <= 0) _exit(0);
  GrpcStoreClientOptions options = ClientOf(text);
  options.data_path = DataPath::kUcx;
  options.ucx_tls = "tcp";
  const auto client = MakeClient(options);
  TestChain chain(TestLayout(), 16, static_cast<uint64_t>(number));
  const auto written = Write(*client, chain.At(0), chain.Writes());
  if (!written.ok()) _exit(1);
  std::vector<std::byte> landing(TestLayout().record_bytes());
  // Keeps hundreds of reads in flight.
  std::function<void()> post = [&] {
    std::vector<RecordRead> reads;
    for (const PageRef& page : written->pages) {
      for (int record = 0; record < TestLayout().num_records(); ++record) {
        reads.push_back({page, record, 0, absl::MakeSpan(landing)});
      }
    }
    client->ReadRecords(std::move(reads), [&](absl::Status) { post(); });
  };
  for (int i = 0; i < 8; ++i) post();
  const char byte = 1;
  while (client->stats().records_read < 1000) {
  }
  if (write(busy_pipe, &byte, 1) != 1) _exit(1);
  for (uint64_t seed = 2000;; ++seed) {
    TestChain more(TestLayout(), 4, seed);
    const auto result = Write(*client, more.At(0), more.Writes());
    if (result.ok()) client->Release(result->leases);
  }
}

TEST(ClientDeathTest, TheStoreOutlivesItsClients) {
  testing::Program store(NOSARA_KVSTORE_BINARY,
                         {"--listen=127.0.0.1:0", "--arena_bytes=8MiB", "--ucx_tls=tcp",
                          "--lease_ttl=500ms", "--quarantine=0s"});
  ASSERT_NE(store.address(), "") << store.announcement();
  GrpcStoreClientOptions options = ClientOf(store.address());
  options.data_path = DataPath::kUcx;
  options.ucx_tls = "tcp";
  const auto survivor = MakeClient(options);
  TestChain chain(TestLayout(), 8, 1000);
  ASSERT_OK_AND_ASSIGN(const WriteResult written, Write(*survivor, chain.At(0), chain.Writes()));
  for (ClientProcess& client : Clients()) {
    ASSERT_EQ(write(client.address_pipe, store.address().data(), store.address().size()),
              static_cast<ssize_t>(store.address().size()));
    char byte;
    ASSERT_EQ(read(client.busy_pipe, &byte, 1), 1) << "the client gave up";
    ASSERT_EQ(kill(client.pid, SIGKILL), 0);
    ASSERT_EQ(waitpid(client.pid, nullptr, 0), client.pid);
    client.pid = 0;
    // The others are not disturbed: same endpoint, no error.
    ASSERT_OK(ReadAndCompare(*survivor, chain, written.pages));
  }
  EXPECT_EQ(survivor->stats().leases_lost, 0u);
  store.Signal(SIGTERM);
  EXPECT_EQ(store.Wait(), 0);
}

}  // namespace
}  // namespace nosara::kvstore

int main(int argc, char** argv) {
  ::testing::InitGoogleTest(&argc, argv);
  for (int i = 0; i < nosara::kvstore::kClients; ++i) {
    int address[2], busy[2];
    if (pipe2(address, O_CLOEXEC) != 0 || pipe2(busy, O_CLOEXEC) != 0) return 1;
    const pid_t pid = fork();
    if (pid < 0) return 1;
    if (pid == 0) {
      close(address[1]);
      nosara::kvstore::RunClient(i, address[0], busy[1]);
    }
    close(address[0]);
    close(busy[1]);
    nosara::kvstore::Clients().push_back({pid, address[1], busy[0]});
  }
  const int result = RUN_ALL_TESTS();
  for (const auto& client : nosara::kvstore::Clients()) {
    if (client.pid > 0) kill(client.pid, SIGKILL);
  }
  return result;
}
