// The client against a real server, over every data path.
#include "kvstore/client/grpc_store_client.h"

#include <grpcpp/channel.h>

#include <thread>

#include "tests/kvstore/client/store_fixture.h"

namespace nosara::kvstore {
namespace {

using ::nosara::testing::StatusIs;

struct PathCase {
  const char* name;
  DataPath path;
  Path expected;
  const char* server_tls;
  const char* client_tls;
};

void PrintTo(const PathCase& path, std::ostream* out) { *out << path.name; }

class StorePathTest : public ::testing::TestWithParam<PathCase> {
 protected:
  // Not in the constructor: without a server (no device for UCX) no test can go on.
  void SetUp() override {
    KvStoreServerOptions options = SmallServer();
    if (GetParam().path == DataPath::kUcx) {
      options.ucx = KvStoreServerOptions::Ucx::kOn;
      options.ucx_tls = GetParam().server_tls;
    }
    server_ = StartServer(options);
    ASSERT_NE(server_, nullptr);
  }

  GrpcStoreClientOptions Options() {
    GrpcStoreClientOptions options = ClientOf(server_->address());
    options.data_path = GetParam().path;
    options.ucx_tls = GetParam().client_tls;
    if (GetParam().path == DataPath::kInProcess) {
      options.stores[0].channel = server_->InProcessChannel();
      options.stores[0].in_process_arena = server_->arena();
    }
    return options;
  }

  std::unique_ptr<KvStoreServer> server_;
};

TEST_P(StorePathTest, MapsArenasOfThisMachineForDirectReaders) {
  const auto client = MakeClient(Options());
  TestChain chain(TestLayout(), 3, 9);
  ASSERT_OK_AND_ASSIGN(const WriteResult written, Write(*client, chain.At(0), chain.Writes()));
  const auto arena = client->Map(StoreId{0});
  EXPECT_EQ(client->Map(StoreId{7}), nullptr);
  if (GetParam().expected == Path::kUcx) {
    EXPECT_EQ(arena, nullptr);
    return;
  }
  ASSERT_NE(arena, nullptr);
  EXPECT_EQ(client->Map(StoreId{0}), arena);
  const PageLayout layout = TestLayout();
  for (size_t i = 0; i < chain.pages.size(); ++i) {
    const PageRef& ref = written.pages[i];
    const size_t offset = ref.slot * layout.page_bytes();
    ASSERT_LE(offset + layout.page_bytes(), arena->bytes.size());
    PageHeader header;
    std::memcpy(&header, arena->bytes.data() + offset, sizeof(header));
    EXPECT_EQ(header.key, ref.key);
    EXPECT_EQ(header.generation, ref.generation);
    EXPECT_EQ(std::memcmp(arena->bytes.data() + offset + layout.record_offset(0),
                          chain.pages[i].data() + layout.record_offset(0),
                          layout.num_records() * layout.record_bytes()),
              0);
  }
  if (GetParam().path == DataPath::kInProcess) return;
  // The mapping outlives the store.
  server_->Stop();
  server_ = nullptr;
  EXPECT_EQ(std::memcmp(arena->bytes.data() + written.pages[0].slot * layout.page_bytes() +
                            layout.record_offset(0),
                        chain.pages[0].data() + layout.record_offset(0), layout.record_bytes()),
            0);
}

TEST_P(StorePathTest, WritesLooksUpAndReadsBack) {
  const auto writer = MakeClient(Options());
  TestChain chain(TestLayout(), 5, 1);
  ASSERT_OK_AND_ASSIGN(const WriteResult written, Write(*writer, chain.At(0), chain.Writes()));
  ASSERT_EQ(written.pages.size(), 5u);
  EXPECT_THAT(written.already_stored, ::testing::Each(0));
  EXPECT_EQ(writer->PathTo(StoreId{0}), GetParam().expected);
  ASSERT_EQ(written.leases.size(), 1u);
  EXPECT_OK(writer->CheckLease(written.leases[0]));
  EXPECT_OK(ReadAndCompare(*writer, chain, written.pages));

  const auto reader = MakeClient(Options());
  std::vector<PageKey> keys = chain.keys;
  keys.push_back(ChildKey(keys.back(), std::vector<int32_t>(kBlockTokens, 7)));
  ASSERT_OK_AND_ASSIGN(const LookupResult found, Lookup(*reader, keys));
  ASSERT_EQ(found.pages.size(), 5u);
  EXPECT_OK(ReadAndCompare(*reader, chain, found.pages));
  const ClientStats stats = reader->stats();
  EXPECT_EQ(stats.records_read, 20u);
  EXPECT_EQ(stats.prefixes_read, 5u);
  EXPECT_EQ(stats.records_by_mapped + stats.records_by_in_process + stats.records_by_ucx, 20u);
  EXPECT_EQ(stats.verification_failures, 0u);
  EXPECT_OK(server_->CheckIntegrity());
}

TEST_P(StorePathTest, DamagedBytesAreDataLoss) {
  const auto client = MakeClient(Options());
  const PageLayout layout = client->layout();
  TestChain chain(layout, 1, 2);
  ASSERT_OK_AND_ASSIGN(const WriteResult written, Write(*client, chain.At(0), chain.Writes()));
  const PageRef page = written.pages[0];
  std::byte* const stored = server_->arena().data() + page.slot * layout.page_bytes();
  stored[layout.record_offset(2) + 5] ^= std::byte{1};
  std::vector<std::byte> landing(layout.record_bytes());
  const auto read = [&](int record) {
    return ReadRecords(*client, {{page, record, RecordChecksum(layout, chain.pages[0], record),
                                  absl::MakeSpan(landing)}});
  };
  EXPECT_OK(read(1));
  EXPECT_THAT(read(2), StatusIs(absl::StatusCode::kDataLoss, "record 2: checksum differs"));
  stored[layout.index_offset()] ^= std::byte{1};
  std::vector<std::byte> prefix(layout.prefix_bytes());
  EXPECT_THAT(ReadPrefixes(*client, {{page, absl::MakeSpan(prefix)}}),
              StatusIs(absl::StatusCode::kDataLoss, "index checksum differs"));
  EXPECT_EQ(client->stats().verification_failures, 2u);
}

TEST_P(StorePathTest, ConcurrentClientsAgree) {
  TestChain chain(TestLayout(), 8, 3);
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      const auto client = MakeClient(Options());
      TestChain mine(TestLayout(), 8, 3);  // the same pages in every client
      TestChain own(TestLayout(), 3, 100 + static_cast<uint64_t>(t));
      for (int round = 0; round < 3; ++round) {
        const auto written = Write(*client, mine.At(0), mine.Writes());
        ASSERT_OK(written);
        ASSERT_OK(ReadAndCompare(*client, chain, written->pages));
        const auto other = Write(*client, own.At(0), own.Writes());
        ASSERT_OK(other);
        ASSERT_OK(ReadAndCompare(*client, own, other->pages));
        client->Release(written->leases);
        client->Release(other->leases);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_OK(server_->CheckIntegrity());
}

INSTANTIATE_TEST_SUITE_P(
    Paths, StorePathTest,
    ::testing::Values(PathCase{"InProcess", DataPath::kInProcess, Path::kInProcess, "", ""},
                      PathCase{"Mapped", DataPath::kMapped, Path::kMapped, "", ""},
                      PathCase{"Auto", DataPath::kAuto, Path::kMapped, "", ""},
                      PathCase{"UcxTcp", DataPath::kUcx, Path::kUcx, "tcp", "tcp"},
                      PathCase{"UcxSharedMemory", DataPath::kUcx, Path::kUcx, "", "sm,self"},
                      PathCase{"UcxDefault", DataPath::kUcx, Path::kUcx, "", ""}),
    [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace nosara::kvstore
