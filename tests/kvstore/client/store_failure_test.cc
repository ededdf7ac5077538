// What clients see when stores are full, slow, faulty, killed, stopped and restarted.
#include <grpcpp/channel.h>

#include <thread>

#include "base/retry_delay.h"
#include "tests/kvstore/client/store_fixture.h"
#include "tests/kvstore/transport/fault_transport.h"
#include "tests/program.h"

namespace nosara::kvstore {
namespace {

using ::nosara::testing::Program;
using ::nosara::testing::StatusIs;
using Fault = FaultPlan::Fault;

constexpr char kBinary[] = NOSARA_KVSTORE_BINARY;

/// Repeats `attempt` until it returns true; false after a minute.
bool Eventually(const std::function<bool()>& attempt) {
  const absl::Time give_up = Clock::Real()->Now() + absl::Minutes(1);
  while (!attempt()) {
    if (Clock::Real()->Now() > give_up) return false;
    std::this_thread::yield();
  }
  return true;
}

/// All record reads of `refs`, of sealed pages of `chain`; `landing` gets the bytes.
std::vector<RecordRead> RecordReads(const PageLayout& layout, const TestChain& chain,
                                    const std::vector<PageRef>& refs,
                                    std::vector<std::byte>& landing) {
  landing.resize(refs.size() * layout.num_records() * layout.record_bytes());
  std::vector<RecordRead> reads;
  for (size_t i = 0; i < refs.size(); ++i) {
    for (int record = 0; record < layout.num_records(); ++record) {
      reads.push_back({refs[i], record, RecordChecksum(layout, chain.pages[i], record),
                       absl::MakeSpan(landing).subspan(reads.size() * layout.record_bytes(),
                                                       layout.record_bytes())});
    }
  }
  return reads;
}

TEST(StoreSpaceTest, AnArenaSmallerThanOnePageSaysSo) {
  KvStoreServerOptions options = SmallServer();
  options.arena_bytes = 5000;
  const auto server = StartServer(options);
  const auto client = MakeClient(ClientOf(server->address()));
  TestChain chain(TestLayout(), 1, 1);
  const auto written = Write(*client, chain.At(0), chain.Writes());
  EXPECT_THAT(written, StatusIs(absl::StatusCode::kResourceExhausted,
                                absl::StrCat("one page needs ", TestLayout().page_bytes(),
                                             " bytes, node kvstore has 5000 bytes")));
  EXPECT_EQ(RetryDelay(written.status()), std::nullopt) << "trying again does not help";
}

TEST(StoreSpaceTest, PagesOfAnotherSizeAreRefused) {
  const auto server = StartServer(SmallServer());
  const auto client = MakeClient(ClientOf(server->address()));
  TestChain chain(TestLayout(), 1, 1);
  ASSERT_OK(Write(*client, chain.At(0), chain.Writes()));
  GrpcStoreClientOptions options(*PageLayout::Create(3, 2, 16, 4));
  options.stores.push_back({server->address(), nullptr, {}});
  const auto other = MakeClient(options);
  TestChain other_chain(options.layout, 1, 2);
  const auto refused = Write(*other, other_chain.At(0), other_chain.Writes());
  EXPECT_THAT(refused, StatusIs(absl::StatusCode::kInvalidArgument,
                                absl::StrCat("page_bytes = ", options.layout.page_bytes())));
  EXPECT_THAT(refused,
              StatusIs(absl::StatusCode::kInvalidArgument,
                       absl::StrCat("holds pages of ", TestLayout().page_bytes(), " bytes")));
}

TEST(StoreSpaceTest, PressureNeverTakesLeasedPages) {
  const auto server = StartServer(SmallServer());  // 32 pages
  const auto holder = MakeClient(ClientOf(server->address()));
  const auto other = MakeClient(ClientOf(server->address()));
  TestChain held(TestLayout(), 20, 1);
  ASSERT_OK_AND_ASSIGN(const WriteResult leased, Write(*holder, held.At(0), held.Writes()));
  for (uint64_t seed = 10; seed < 20; ++seed) {
    TestChain churn(TestLayout(), 8, seed);
    absl::StatusOr<WriteResult> written;
    // The release of the round before may still be on its way.
    ASSERT_TRUE(Eventually([&] {
      written = Write(*other, churn.At(0), churn.Writes());
      return written.ok() || !absl::IsResourceExhausted(written.status());
    }));
    ASSERT_OK(written);
    ASSERT_OK(ReadAndCompare(*other, churn, written->pages));
    other->Release(written->leases);
  }
  EXPECT_OK(ReadAndCompare(*holder, held, leased.pages));

  TestChain big(TestLayout(), 13, 99);
  const auto refused = Write(*other, big.At(0), big.Writes());
  EXPECT_THAT(refused, StatusIs(absl::StatusCode::kResourceExhausted, "store full"));
  EXPECT_EQ(RetryDelay(refused.status()), absl::Milliseconds(200));
  holder->Release(leased.leases);
  EXPECT_TRUE(Eventually([&] { return Write(*other, big.At(0), big.Writes()).ok(); }));
  EXPECT_OK(server->CheckIntegrity());
}

TEST(StoreSpaceTest, ClosedClientsLeaveNoLeases) {
  KvStoreServerOptions options = SmallServer();
  options.arena_bytes = 4 * TestLayout().page_bytes();
  const auto server = StartServer(options);
  for (uint64_t seed = 0; seed < 5; ++seed) {
    const auto client = MakeClient(ClientOf(server->address()));
    TestChain chain(TestLayout(), 4, seed);
    ASSERT_OK(Write(*client, chain.At(0), chain.Writes())) << "pages of the client before";
  }
}

TEST(LeaseTest, TheClientLosesALeaseBeforeTheServerDoes) {
  FakeClock clock;
  KvStoreServerOptions server_options = SmallServer();
  server_options.arena_bytes = 2 * TestLayout().page_bytes();
  server_options.clock = &clock;
  server_options.lease_ttl = absl::Hours(1);
  const auto server = StartServer(server_options);
  GrpcStoreClientOptions options = ClientOf(server->address());
  options.clock = &clock;
  const auto client = MakeClient(options);
  TestChain chain(TestLayout(), 2, 1);
  ASSERT_OK_AND_ASSIGN(const WriteResult written, Write(*client, chain.At(0), chain.Writes()));
  // Beyond the client's reckoning (7/8), so that no renewal is tried, within the server's.
  clock.Advance(absl::Minutes(55));
  EXPECT_THAT(client->CheckLease(written.leases[0]), StatusIs(absl::StatusCode::kAborted, "lost"));
  const auto other = MakeClient(ClientOf(server->address()));
  TestChain more(TestLayout(), 1, 2);
  EXPECT_THAT(Write(*other, more.At(0), more.Writes()),
              StatusIs(absl::StatusCode::kResourceExhausted, "2 leased"));
  clock.Advance(absl::Minutes(5));
  EXPECT_OK(Write(*other, more.At(0), more.Writes()));
}

TEST(LeaseTest, LeasesAreRenewedInTheBackground) {
  KvStoreServerOptions server_options = SmallServer();
  server_options.lease_ttl = absl::Milliseconds(400);
  const auto server = StartServer(server_options);
  const auto client = MakeClient(ClientOf(server->address()));
  TestChain chain(TestLayout(), 1, 1);
  ASSERT_OK_AND_ASSIGN(const WriteResult written, Write(*client, chain.At(0), chain.Writes()));
  const absl::Time until = Clock::Real()->Now() + absl::Seconds(2);
  ASSERT_TRUE(Eventually([&] {
    EXPECT_OK(client->CheckLease(written.leases[0]));
    return Clock::Real()->Now() > until || ::testing::Test::HasFailure();
  }));
  EXPECT_EQ(client->stats().leases_lost, 0u);
}

class FaultTest : public ::testing::Test {
 protected:
  FaultTest() : plan_(std::make_shared<FaultPlan>()), server_(StartServer(SmallServer())) {}
  GrpcStoreClientOptions Faulty() const {
    GrpcStoreClientOptions options = ClientOf(server_->address());
    options.wrap_transport = FaultTransport::Wrapper(plan_);
    return options;
  }

  const std::shared_ptr<FaultPlan> plan_;
  const std::unique_ptr<KvStoreServer> server_;
  TestChain chain_{TestLayout(), 3, 1};
  std::vector<std::byte> landing_;
};

TEST_F(FaultTest, CorruptedReadsAreDataLossAndCounted) {
  const auto client = MakeClient(Faulty());
  ASSERT_OK_AND_ASSIGN(const WriteResult written, Write(*client, chain_.At(0), chain_.Writes()));
  plan_->Set(Direction::kRead, Fault::kCorrupt);
  EXPECT_THAT(ReadRecords(*client, RecordReads(TestLayout(), chain_, written.pages, landing_)),
              StatusIs(absl::StatusCode::kDataLoss, "checksum differs"));
  EXPECT_GE(client->stats().verification_failures, 1u);
  plan_->Set(Direction::kRead, Fault::kNone);
  EXPECT_OK(ReadAndCompare(*client, chain_, written.pages));
}

TEST_F(FaultTest, FailingReadsAndWritesAreUnavailable) {
  const auto client = MakeClient(Faulty());
  plan_->Set(Direction::kWrite, Fault::kError);
  EXPECT_THAT(Write(*client, chain_.At(0), chain_.Writes()),
              StatusIs(absl::StatusCode::kUnavailable, "injected error"));
  EXPECT_OK(server_->CheckIntegrity());
}

TEST_F(FaultTest, AReadIsOpenUntilItsTransferIsDone) {
  const auto client = MakeClient(Faulty());
  ASSERT_OK_AND_ASSIGN(const WriteResult written, Write(*client, chain_.At(0), chain_.Writes()));
  plan_->Set(Direction::kRead, Fault::kDelay);
  Waiter<absl::Status> waiter;
  client->ReadRecords(RecordReads(TestLayout(), chain_, written.pages, landing_),
                      waiter.Callback());
  plan_->AwaitFaults(12);
  EXPECT_FALSE(waiter.done());
  plan_->Release();
  EXPECT_OK(waiter.Wait());
}

TEST_F(FaultTest, LostReadsEndByTheStallTimeoutAndTheClientRecovers) {
  GrpcStoreClientOptions options = Faulty();
  options.stall_timeout = absl::Milliseconds(50);
  const auto client = MakeClient(options);
  ASSERT_OK_AND_ASSIGN(const WriteResult written, Write(*client, chain_.At(0), chain_.Writes()));
  plan_->Set(Direction::kRead, Fault::kDrop);
  EXPECT_THAT(ReadRecords(*client, RecordReads(TestLayout(), chain_, written.pages, landing_)),
              StatusIs(absl::StatusCode::kUnavailable, "no transfer has completed for 50ms"));
  plan_->Set(Direction::kRead, Fault::kNone);
  ASSERT_OK(Lookup(*client, chain_.keys)) << "connects again";
  EXPECT_OK(ReadAndCompare(*client, chain_, written.pages));
}

TEST_F(FaultTest, CloseEndsLostReadsAndLaterCalls) {
  const auto client = MakeClient(Faulty());
  ASSERT_OK_AND_ASSIGN(const WriteResult written, Write(*client, chain_.At(0), chain_.Writes()));
  plan_->Set(Direction::kRead, Fault::kDrop);
  Waiter<absl::Status> waiter;
  client->ReadRecords(RecordReads(TestLayout(), chain_, written.pages, landing_),
                      waiter.Callback());
  plan_->AwaitFaults(12);
  client->Close();
  EXPECT_TRUE(waiter.done()) << "Close waits for completions";
  EXPECT_THAT(waiter.Wait(), StatusIs(absl::StatusCode::kCancelled, "closed"));
  EXPECT_THAT(Lookup(*client, chain_.keys), StatusIs(absl::StatusCode::kCancelled, "closed"));
  EXPECT_THAT(Write(*client, chain_.At(0), chain_.Writes()),
              StatusIs(absl::StatusCode::kCancelled, "closed"));
  client->Close();
}

TEST_F(FaultTest, AWriterWaitsForAnotherThatWritesTheSamePage) {
  const auto slow = MakeClient(Faulty());
  const auto quick = MakeClient(ClientOf(server_->address()));
  plan_->Set(Direction::kWrite, Fault::kDelay);
  TestChain copy(TestLayout(), 3, 1);
  Waiter<absl::StatusOr<WriteResult>> slow_waiter, quick_waiter;
  slow->Write(chain_.At(0), chain_.Writes(0, 2), slow_waiter.Callback());
  plan_->AwaitFaults(2);
  quick->Write(copy.At(0), copy.Writes(), quick_waiter.Callback());
  // The third page is written by the quick one while it waits for the others.
  ASSERT_TRUE(Eventually([&] { return quick->stats().page_bytes_written > 0; }));
  EXPECT_FALSE(quick_waiter.done());
  plan_->Release();
  ASSERT_OK(slow_waiter.Wait());
  ASSERT_OK_AND_ASSIGN(const WriteResult written, quick_waiter.Wait());
  EXPECT_THAT(written.already_stored, ::testing::ElementsAre(1, 1, 0));
  EXPECT_OK(ReadAndCompare(*quick, copy, written.pages));
}

TEST_F(FaultTest, AWriterThatHangsIsNotWaitedForForEver) {
  const auto hanging = MakeClient(Faulty());
  GrpcStoreClientOptions options = ClientOf(server_->address());
  options.busy_timeout = absl::Milliseconds(20);
  const auto other = MakeClient(options);
  plan_->Set(Direction::kWrite, Fault::kDrop);
  Waiter<absl::StatusOr<WriteResult>> waiter;
  hanging->Write(chain_.At(0), chain_.Writes(0, 1), waiter.Callback());
  plan_->AwaitFaults(1);
  TestChain copy(TestLayout(), 3, 1);
  EXPECT_THAT(Write(*other, copy.At(0), copy.Writes(0, 1)),
              StatusIs(absl::StatusCode::kAborted, "being written by another client"));
  hanging->Close();
  EXPECT_THAT(waiter.Wait(), StatusIs(absl::StatusCode::kCancelled, "closed"));
  EXPECT_OK(server_->CheckIntegrity());
}

TEST(StoreDeathTest, AStoreThatIsNotThereIsUnavailable) {
  const auto client = MakeClient(ClientOf("127.0.0.1:1"));
  TestChain chain(TestLayout(), 1, 1);
  EXPECT_THAT(Lookup(*client, chain.keys),
              StatusIs(absl::StatusCode::kUnavailable, "store 127.0.0.1:1"));
  EXPECT_THAT(Write(*client, chain.At(0), chain.Writes()),
              StatusIs(absl::StatusCode::kUnavailable, "store 127.0.0.1:1"));
  EXPECT_THAT(client->UnreachableStores(), ::testing::ElementsAre("127.0.0.1:1"));
}

std::vector<std::string> Flags(const std::string& listen) {
  return {"--listen=" + listen, "--arena_bytes=1MiB", "--ucx_tls=tcp"};
}

class StoreDeathPathTest : public ::testing::TestWithParam<DataPath> {};

TEST_P(StoreDeathPathTest, KilledInTheMiddleOfReadsThenRestarted) {
  auto store = std::make_unique<Program>(kBinary, Flags("127.0.0.1:0"));
  const std::string address = store->address();
  ASSERT_NE(address, "") << store->announcement();
  GrpcStoreClientOptions options = ClientOf(address);
  options.data_path = GetParam();
  options.ucx_tls = "tcp";
  const auto client = MakeClient(options);
  TestChain chain(TestLayout(), 16, 1);
  ASSERT_OK_AND_ASSIGN(const WriteResult written, Write(*client, chain.At(0), chain.Writes()));

  EXPECT_THAT(client->UnreachableStores(), ::testing::IsEmpty());

  // Many reads in flight, killed among them; each ends, with the right bytes or UNAVAILABLE.
  constexpr int kBatches = 200;
  std::vector<std::vector<std::byte>> landings(kBatches);
  std::vector<Waiter<absl::Status>> waiters(kBatches);
  for (int i = 0; i < kBatches; ++i) {
    client->ReadRecords(RecordReads(TestLayout(), chain, written.pages, landings[i]),
                        waiters[i].Callback());
    if (i == kBatches / 4) store->Kill();
  }
  for (Waiter<absl::Status>& waiter : waiters) {
    const absl::Status status = waiter.Wait();
    EXPECT_TRUE(status.ok() || absl::IsUnavailable(status)) << status;
  }
  if (GetParam() == DataPath::kUcx) {
    EXPECT_THAT(ReadRecords(*client, RecordReads(TestLayout(), chain, written.pages, landings[0])),
                StatusIs(absl::StatusCode::kUnavailable, ""));
  }
  EXPECT_THAT(Lookup(*client, chain.keys), StatusIs(absl::StatusCode::kUnavailable, address));
  EXPECT_THAT(client->UnreachableStores(), ::testing::ElementsAre(address));

  store = std::make_unique<Program>(kBinary, Flags(address));
  ASSERT_EQ(store->address(), address) << store->announcement();
  absl::StatusOr<LookupResult> found;
  ASSERT_TRUE(Eventually([&] {
    found = Lookup(*client, chain.keys);
    return found.ok();
  })) << found.status();
  EXPECT_TRUE(found->pages.empty());
  EXPECT_THAT(client->UnreachableStores(), ::testing::IsEmpty());
  EXPECT_THAT(client->CheckLease(written.leases[0]), StatusIs(absl::StatusCode::kAborted, "lost"));
  EXPECT_THAT(ReadRecords(*client, RecordReads(TestLayout(), chain, written.pages, landings[0])),
              StatusIs(absl::StatusCode::kAborted, "restarted"));
  ASSERT_OK_AND_ASSIGN(const WriteResult again, Write(*client, chain.At(0), chain.Writes()));
  EXPECT_OK(ReadAndCompare(*client, chain, again.pages));
}

INSTANTIATE_TEST_SUITE_P(Paths, StoreDeathPathTest,
                         ::testing::Values(DataPath::kMapped, DataPath::kUcx),
                         [](const auto& info) {
                           return info.param == DataPath::kUcx ? "Ucx" : "Mapped";
                         });

class StoppedStoreTest : public ::testing::TestWithParam<std::string> {};

TEST_P(StoppedStoreTest, AStoppedStoreIsUnavailableAndComesBack) {
  std::vector<std::string> flags = Flags("127.0.0.1:0");
  flags.back() = "--ucx_tls=" + GetParam();
  Program store(kBinary, flags);
  ASSERT_NE(store.address(), "") << store.announcement();
  GrpcStoreClientOptions options = ClientOf(store.address());
  options.data_path = DataPath::kUcx;
  options.ucx_tls = GetParam();
  options.stall_timeout = absl::Milliseconds(200);
  const auto client = MakeClient(options);
  TestChain chain(TestLayout(), 16, 1);
  ASSERT_OK_AND_ASSIGN(const WriteResult written, Write(*client, chain.At(0), chain.Writes()));
  store.Stop();
  std::vector<std::byte> landing;
  EXPECT_THAT(ReadRecords(*client, RecordReads(TestLayout(), chain, written.pages, landing)),
              StatusIs(absl::StatusCode::kUnavailable, "no transfer has completed"));
  // The landing buffer is ours again: nothing may write into it once the store goes on.
  std::fill(landing.begin(), landing.end(), std::byte{0x77});
  store.Signal(SIGCONT);
  absl::StatusOr<LookupResult> found;
  ASSERT_TRUE(Eventually([&] {
    found = Lookup(*client, chain.keys);
    return found.ok();
  })) << found.status();
  ASSERT_EQ(found->pages.size(), 16u);
  EXPECT_OK(ReadAndCompare(*client, chain, found->pages));
  EXPECT_THAT(landing, ::testing::Each(std::byte{0x77}));
}

INSTANTIATE_TEST_SUITE_P(Transports, StoppedStoreTest, ::testing::Values("tcp", "sm,self"),
                         [](const auto& info) {
                           return info.param == "tcp" ? "Tcp" : "SharedMemory";
                         });

TEST(ProgramTest, StopsGracefullyAndRemovesItsArena) {
  Program store(kBinary, Flags("127.0.0.1:0"));
  ASSERT_NE(store.address(), "");
  const size_t begin = store.announcement().find("/dev/shm/");
  ASSERT_NE(begin, std::string::npos);
  const std::string arena =
      store.announcement().substr(begin, store.announcement().find(',', begin) - begin);
  EXPECT_EQ(access(arena.c_str(), F_OK), 0) << arena;
  store.Signal(SIGTERM);
  EXPECT_EQ(store.Wait(), 0);
  EXPECT_NE(access(arena.c_str(), F_OK), 0) << arena;
}

// UCX 1.13 aborts a process whose peer goes away while it connects back over TCP.
TEST(ProgramTest, ClientsThatLeaveAtOnceDoNotEndTheStore) {
  Program store(kBinary, Flags("127.0.0.1:0"));
  ASSERT_NE(store.address(), "") << store.announcement();
  TestChain chain(TestLayout(), 1, 1);
  for (int i = 0; i < 30; ++i) {
    GrpcStoreClientOptions options = ClientOf(store.address());
    options.data_path = DataPath::kUcx;
    options.ucx_tls = "tcp";
    const auto client = MakeClient(options);
    // Connected, and no byte read.
    ASSERT_OK_AND_ASSIGN(const LookupResult found, Lookup(*client, chain.keys));
    EXPECT_TRUE(found.pages.empty());
  }
  store.Signal(SIGTERM);
  EXPECT_EQ(store.Wait(), 0);
}

TEST(ProgramTest, ACrashedStoresArenaIsRemovedByTheNext) {
  // A folder of its own: any store that starts on this machine would clear up the common one.
  char folder[] = "/dev/shm/nosara-test-XXXXXX";
  ASSERT_NE(mkdtemp(folder), nullptr);
  std::vector<std::string> flags = Flags("127.0.0.1:0");
  flags.push_back(absl::StrCat("--arena_dir=", folder));
  Program crashed(kBinary, flags);
  const size_t begin = crashed.announcement().find(folder);
  ASSERT_NE(begin, std::string::npos);
  const std::string arena =
      crashed.announcement().substr(begin, crashed.announcement().find(',', begin) - begin);
  crashed.Kill();
  EXPECT_EQ(access(arena.c_str(), F_OK), 0);
  Program next(kBinary, flags);
  ASSERT_NE(next.address(), "");
  EXPECT_NE(access(arena.c_str(), F_OK), 0);
  next.Signal(SIGTERM);
  EXPECT_EQ(next.Wait(), 0);
  EXPECT_EQ(rmdir(folder), 0) << "something was left in " << folder;
}

TEST(ProgramTest, BadFlagsAreRefusedWithAMessage) {
  const auto refused = [](const std::string& flag, const std::string& message) {
    Program store(kBinary, {flag});
    EXPECT_EQ(store.address(), "") << flag;
    EXPECT_NE(store.announcement().find(message), std::string::npos) << store.announcement();
    EXPECT_EQ(store.Wait(), 1) << flag;
  };
  refused("--arena_bytes=lots", "must be a size such as 2GiB");
  refused("--arena_bytes=0", "must be a size such as 2GiB");
  refused("--lease_ttl=1ms", "lease_ttl = 1ms: must be 100ms to 24h");
  refused("--node_id=", "node_id '': must have 1 to 255 characters");
  refused("--ucx=maybe", "must be on or off");
  refused("--log_level=loud", "must be debug, info, warning or error");
  refused("--arena_dir=/nonexistent", "/nonexistent");
  refused("--ucx_tls=nosuchtransport", "ucx_tls = 'nosuchtransport': UCX cannot start");
  refused("extra", "unknown argument 'extra'");
}

TEST(OptionsTest, NonsenseIsRefusedByName) {
  const auto refused = absl::StatusCode::kInvalidArgument;
  GrpcStoreClientOptions options(TestLayout());
  EXPECT_THAT(GrpcStoreClient::Create(options), StatusIs(refused, "stores"));
  options = ClientOf("a:1");
  options.stores.push_back({"a:1", nullptr, {}});
  EXPECT_THAT(GrpcStoreClient::Create(options), StatusIs(refused, "occurs twice"));
  options = ClientOf("a:1");
  options.window = 0;
  EXPECT_THAT(GrpcStoreClient::Create(options), StatusIs(refused, "window = 0"));
  KvStoreServerOptions server;
  server.arena_bytes = 0;
  EXPECT_THAT(KvStoreServer::Create(server), StatusIs(refused, "arena_bytes = 0"));
}

}  // namespace
}  // namespace nosara::kvstore
