// One client of several stores: placement, copies, failover, and bytes that are never wrong.
#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <map>
#include <random>
#include <set>
#include <thread>

#include "kvstore/transport/fault_transport.h"
#include "nosara/kvstore/v1/kvstore.grpc.pb.h"
#include "tests/kvstore/client/store_fixture.h"

namespace nosara::kvstore {
namespace {

using ::nosara::testing::StatusIs;

/// Servers in this process, each to be stopped and started anew at its address.
class Cluster {
 public:
  explicit Cluster(size_t count, uint64_t pages = 256,
                   KvStoreServerOptions::Ucx ucx = KvStoreServerOptions::Ucx::kOff,
                   absl::Duration lease_ttl = absl::Seconds(30)) {
    options_ = SmallServer();
    options_.lease_ttl = lease_ttl;
    options_.arena_bytes = pages * TestLayout().page_bytes();
    options_.ucx = ucx;
    options_.ucx_tls = ucx == KvStoreServerOptions::Ucx::kOn ? "tcp" : "";
    for (size_t i = 0; i < count; ++i) {
      servers_.push_back(StartServer(options_));
      addresses_.push_back(servers_.back()->address());
    }
  }

  GrpcStoreClientOptions Options(size_t replicas) const {
    GrpcStoreClientOptions options(TestLayout());
    for (const std::string& address : addresses_) options.stores.push_back({address, nullptr, {}});
    options.replicas = replicas;
    options.data_path =
        options_.ucx == KvStoreServerOptions::Ucx::kOn ? DataPath::kUcx : DataPath::kMapped;
    options.ucx_tls = options_.ucx_tls;
    return options;
  }
  size_t size() const { return servers_.size(); }
  bool up(size_t i) const { return servers_[i] != nullptr; }
  KvStoreServer& at(size_t i) { return *servers_[i]; }
  void Stop(size_t i) {
    servers_[i]->Stop();
    servers_[i] = nullptr;
  }
  void Start(size_t i) {
    options_.listen = addresses_[i];
    servers_[i] = StartServer(options_);
    ASSERT_NE(servers_[i], nullptr);
  }
  v1::GetStatsResponse Stats(size_t i) {
    const auto stub = v1::KvStoreService::NewStub(servers_[i]->InProcessChannel());
    grpc::ClientContext context;
    v1::GetStatsResponse stats;
    EXPECT_TRUE(stub->GetStats(&context, {}, &stats).ok());
    return stats;
  }

 private:
  KvStoreServerOptions options_;
  std::vector<std::unique_ptr<KvStoreServer>> servers_;
  std::vector<std::string> addresses_;
};

/// Blocks [begin, end) of `chain`, in writes of 16 from `begin`.
absl::Status WriteBlocks(StoreClient& client, TestChain& chain, size_t begin, size_t end,
                         std::vector<PageRef>* refs = nullptr,
                         std::vector<LeaseId>* leases = nullptr) {
  for (size_t first = begin; first < end; first += kGroupBlocks) {
    const size_t last = std::min(end, first + kGroupBlocks);
    const auto written = Write(client, chain.At(first), chain.Writes(first, last));
    if (!written.ok()) return written.status();
    if (refs != nullptr) refs->insert(refs->end(), written->pages.begin(), written->pages.end());
    if (leases != nullptr) {
      leases->insert(leases->end(), written->leases.begin(), written->leases.end());
    }
  }
  return absl::OkStatus();
}

TEST(ClusterTest, GroupsOfAChainSpreadAndAreFoundTogether) {
  Cluster cluster(3);
  const auto client = MakeClient(cluster.Options(1));
  TestChain chain(TestLayout(), 40 * 16 / 4 + 5, 1);  // 10 groups and 5 blocks
  std::vector<PageRef> refs;
  // Begins within a group now and then.
  ASSERT_OK(WriteBlocks(*client, chain, 0, 7, &refs));
  ASSERT_OK(WriteBlocks(*client, chain, 7, chain.keys.size(), &refs));
  std::set<uint32_t> stores;
  for (size_t i = 0; i < refs.size(); ++i) {
    stores.insert(refs[i].store.value);
    EXPECT_EQ(refs[i].store, refs[i - i % kGroupBlocks].store) << "a group stays together";
  }
  EXPECT_GE(stores.size(), 2u);
  EXPECT_OK(ReadAndCompare(*client, chain, refs));

  const auto other = MakeClient(cluster.Options(1));
  ASSERT_OK_AND_ASSIGN(const LookupResult found, Lookup(*other, chain.keys));
  ASSERT_EQ(found.pages.size(), chain.keys.size());
  for (size_t i = 0; i < refs.size(); ++i) EXPECT_EQ(found.pages[i].store, refs[i].store);
  EXPECT_LE(found.leases.size(), 3u) << "one call and one lease a store";
  EXPECT_OK(ReadAndCompare(*other, chain, found.pages));
  EXPECT_EQ(other->stats().reads_failed_over, 0u);

  // A hole ends the chain, wherever the pages behind it are.
  const size_t hole = 2 * kGroupBlocks + 3;
  v1::DiscardRequest discard;
  v1::Page* const page = discard.add_pages();
  page->set_key(refs[hole].key.ToBytes());
  page->set_slot(refs[hole].slot);
  page->set_generation(refs[hole].generation);
  const auto stub =
      v1::KvStoreService::NewStub(cluster.at(refs[hole].store.value).InProcessChannel());
  grpc::ClientContext context;
  v1::DiscardResponse discarded;
  ASSERT_TRUE(stub->Discard(&context, discard, &discarded).ok());
  ASSERT_OK_AND_ASSIGN(const LookupResult shorter, Lookup(*other, chain.keys));
  EXPECT_EQ(shorter.pages.size(), hole);
}

TEST(ClusterTest, EachCopyIsOnAnotherStoreAndReleasedWithTheOthers) {
  Cluster cluster(3);
  auto client = MakeClient(cluster.Options(2));
  TestChain chain(TestLayout(), 64, 2);
  std::vector<PageRef> refs;
  std::vector<LeaseId> leases;
  ASSERT_OK(WriteBlocks(*client, chain, 0, 64, &refs, &leases));
  uint64_t stored = 0, leased = 0;
  for (size_t i = 0; i < 3; ++i) {
    stored += cluster.Stats(i).slots_stored();
    leased += cluster.Stats(i).pages_leased();
  }
  EXPECT_EQ(stored, 128u);
  EXPECT_EQ(leased, 128u);
  EXPECT_EQ(client->stats().copies_missing, 0u);
  // Written again by another client: both copies are there, each page's bytes as they were.
  const auto other = MakeClient(cluster.Options(2));
  TestChain same(TestLayout(), 64, 2);
  std::vector<PageRef> again;
  ASSERT_OK(WriteBlocks(*other, same, 0, 64, &again));
  EXPECT_EQ(other->stats().pages_already_stored, 128u);
  EXPECT_OK(ReadAndCompare(*other, chain, again));
  other->Close();
  client->Release(leases);
  const absl::Time give_up = Clock::Real()->Now() + absl::Minutes(1);
  for (size_t i = 0; i < 3; ++i) {
    while (cluster.Stats(i).pages_leased() > 0 && Clock::Real()->Now() < give_up) {
      std::this_thread::yield();
    }
    EXPECT_EQ(cluster.Stats(i).pages_leased(), 0u);
  }
}

TEST(ClusterTest, WritesWithoutEnoughStoresAreCounted) {
  Cluster cluster(2);
  const auto client = MakeClient(cluster.Options(2));
  TestChain chain(TestLayout(), 16, 3);
  cluster.Stop(1);
  ASSERT_OK(WriteBlocks(*client, chain, 0, 16));
  EXPECT_EQ(client->stats().copies_missing, 16u);
  EXPECT_OK(ReadAndCompare(*client, chain, Lookup(*client, chain.keys)->pages));
  cluster.Stop(0);
  TestChain more(TestLayout(), 16, 4);
  EXPECT_THAT(WriteBlocks(*client, more, 0, 16), StatusIs(absl::StatusCode::kUnavailable, "store"));
  EXPECT_THAT(Lookup(*client, more.keys), StatusIs(absl::StatusCode::kUnavailable, "store"));
}

TEST(ClusterTest, AFullStoresPagesGoToTheNextOne) {
  KvStoreServerOptions small = SmallServer();
  small.arena_bytes = 8 * TestLayout().page_bytes();
  const auto full = StartServer(small);
  const auto roomy = StartServer(SmallServer());
  GrpcStoreClientOptions options = ClientOf(full->address());
  options.stores.push_back({roomy->address(), nullptr, {}});
  const auto client = MakeClient(options);
  // Chains of one group each, leased: some find their home full.
  std::vector<TestChain> chains;
  for (uint64_t seed = 0; seed < 8; ++seed) chains.emplace_back(TestLayout(), 4, seed);
  size_t at_first = 0;
  for (TestChain& chain : chains) {
    ASSERT_OK_AND_ASSIGN(const WriteResult written, Write(*client, chain.At(0), chain.Writes()));
    at_first += written.pages[0].store == StoreId{0} ? 4 : 0;
  }
  EXPECT_LE(at_first, 8u);
  EXPECT_EQ(client->stats().copies_missing, 0u);
  const auto reader = MakeClient(options);
  for (const TestChain& chain : chains) {
    ASSERT_OK_AND_ASSIGN(const LookupResult found, Lookup(*reader, chain.keys));
    ASSERT_EQ(found.pages.size(), 4u);
    EXPECT_OK(ReadAndCompare(*reader, chain, found.pages));
  }
}

TEST(ClusterTest, ReadsGoOnWhenTheStoreOfACopyDies) {
  Cluster cluster(3, 256, KvStoreServerOptions::Ucx::kOn);
  const auto client = MakeClient(cluster.Options(2));
  TestChain chain(TestLayout(), 80, 5);
  std::vector<PageRef> refs;
  ASSERT_OK(WriteBlocks(*client, chain, 0, 80, &refs));
  const size_t victim = refs[0].store.value;
  cluster.Stop(victim);
  // The references of before: no look-up in between.
  EXPECT_OK(ReadAndCompare(*client, chain, refs));
  EXPECT_GT(client->stats().reads_failed_over, 0u);
  // Records alone, as a running sequence reads them, with the checksums of the copy that is gone.
  const PageLayout layout = TestLayout();
  std::vector<std::byte> landing(layout.record_bytes());
  const auto reader = MakeClient(cluster.Options(2));
  ASSERT_OK_AND_ASSIGN(const LookupResult found, Lookup(*reader, chain.keys));
  ASSERT_EQ(found.pages.size(), 80u);
  EXPECT_OK(ReadAndCompare(*reader, chain, found.pages));
  // What is written now has two copies on the stores that are left.
  TestChain more(TestLayout(), 16, 6);
  ASSERT_OK(WriteBlocks(*client, more, 0, 16));
  EXPECT_EQ(client->stats().copies_missing, 0u);

  // The store comes back empty: its old pages are read elsewhere still.
  cluster.Start(victim);
  const absl::Time give_up = Clock::Real()->Now() + absl::Minutes(1);
  while (!client->UnreachableStores().empty() && Clock::Real()->Now() < give_up) {
    std::this_thread::yield();
  }
  EXPECT_OK(ReadAndCompare(*client, chain, refs));
  EXPECT_EQ(client->stats().verification_failures, 0u);
  EXPECT_EQ(client->stats().pages_discarded, 0u);
}

TEST(ClusterTest, ADamagedCopyIsDiscardedAndTheOtherOneRead) {
  Cluster cluster(3);
  const auto client = MakeClient(cluster.Options(2));
  const PageLayout layout = TestLayout();
  TestChain chain(layout, 4, 7);
  std::vector<PageRef> refs;
  ASSERT_OK(WriteBlocks(*client, chain, 0, 4, &refs));
  const PageRef& bad = refs[1];
  cluster.at(bad.store.value).arena()[bad.slot * layout.page_bytes() + layout.record_offset(3)] ^=
      std::byte{4};
  std::vector<std::byte> landing(layout.record_bytes());
  EXPECT_OK(ReadRecords(
      *client, {{bad, 3, RecordChecksum(layout, chain.pages[1], 3), absl::MakeSpan(landing)}}));
  EXPECT_EQ(
      std::memcmp(landing.data(), chain.pages[1].data() + layout.record_offset(3), landing.size()),
      0);
  EXPECT_EQ(client->stats().pages_discarded, 1u);
  EXPECT_EQ(client->stats().reads_failed_over, 1u);
  const absl::Time give_up = Clock::Real()->Now() + absl::Minutes(1);
  while (cluster.Stats(bad.store.value).pages_discarded() == 0 && Clock::Real()->Now() < give_up) {
    std::this_thread::yield();
  }
  // Written anew, it is whole again.
  TestChain same(layout, 4, 7);
  std::vector<PageRef> again;
  ASSERT_OK(WriteBlocks(*client, same, 0, 4, &again));
  for (size_t i = 0; i < cluster.size(); ++i) EXPECT_OK(cluster.at(i).CheckIntegrity());
  EXPECT_OK(ReadAndCompare(*client, chain, again));
}

TEST(ClusterTest, StoresJoinAndLeave) {
  Cluster cluster(3);
  GrpcStoreClientOptions options = cluster.Options(1);
  const std::vector<StoreEndpoint> all = std::exchange(options.stores, {});
  EXPECT_THAT(GrpcStoreClient::Create(options),
              StatusIs(absl::StatusCode::kInvalidArgument, "stores"));
  options.membership = GrpcStoreClientOptions::Membership::kDynamic;
  const auto client = MakeClient(options);
  TestChain chain(TestLayout(), 64, 8);
  EXPECT_THAT(Lookup(*client, chain.keys), StatusIs(absl::StatusCode::kUnavailable, "no KV store"));
  EXPECT_THAT(WriteBlocks(*client, chain, 0, 16),
              StatusIs(absl::StatusCode::kUnavailable, "no KV store"));
  EXPECT_THAT(client->SetStores({all[0], all[0]}),
              StatusIs(absl::StatusCode::kInvalidArgument, "occurs twice"));
  ASSERT_OK(client->SetStores({all[0]}));
  std::vector<PageRef> refs;
  ASSERT_OK(WriteBlocks(*client, chain, 0, 64, &refs));
  // Two join, each in front of the old home of some groups: these are found as the others.
  ASSERT_OK(client->SetStores({all[1], all[0]}));
  ASSERT_OK_AND_ASSIGN(const LookupResult found, Lookup(*client, chain.keys));
  EXPECT_EQ(found.pages.size(), 64u);
  EXPECT_OK(ReadAndCompare(*client, chain, found.pages));
  // The first one leaves: nothing is written there any more, what is leased there is read on.
  ASSERT_OK(client->SetStores({all[1], all[2]}));
  const uint64_t stored = cluster.Stats(0).slots_stored();
  TestChain more(TestLayout(), 64, 9);
  std::vector<PageRef> new_refs;
  ASSERT_OK(WriteBlocks(*client, more, 0, 64, &new_refs));
  EXPECT_EQ(cluster.Stats(0).slots_stored(), stored);
  EXPECT_EQ(cluster.Stats(1).slots_stored() + cluster.Stats(2).slots_stored(), 64u);
  EXPECT_OK(ReadAndCompare(*client, chain, refs));
  EXPECT_OK(ReadAndCompare(*client, more, new_refs));
}

/// Waits until `client` has restored `copies` copies.
void AwaitRepairs(const StoreClient& client, uint64_t copies) {
  const absl::Time give_up = Clock::Real()->Now() + absl::Minutes(1);
  while (client.stats().copies_repaired < copies && Clock::Real()->Now() < give_up) {
    std::this_thread::yield();
  }
  EXPECT_EQ(client.stats().copies_repaired, copies);
}

TEST(ClusterTest, PagesInUseGetNewCopiesWhenAStoreComesBackEmpty) {
  // Its leases are renewed each second, which is when the client notices.
  Cluster cluster(3, 256, KvStoreServerOptions::Ucx::kOff, absl::Seconds(3));
  const auto client = MakeClient(cluster.Options(2));
  TestChain chain(TestLayout(), 64, 10);
  ASSERT_OK(WriteBlocks(*client, chain, 0, 64));
  const uint64_t lost = cluster.Stats(1).slots_stored();
  ASSERT_GT(lost, 0u);
  cluster.Stop(1);
  cluster.Start(1);
  AwaitRepairs(*client, lost);
  EXPECT_EQ(cluster.Stats(1).slots_stored(), lost);
  // Now another one may die.
  cluster.Stop(0);
  const auto reader = MakeClient(cluster.Options(2));
  ASSERT_OK_AND_ASSIGN(const LookupResult found, Lookup(*reader, chain.keys));
  ASSERT_EQ(found.pages.size(), 64u);
  EXPECT_OK(ReadAndCompare(*reader, chain, found.pages));
}

TEST(ClusterTest, PagesInUseGetNewCopiesWhenAStoreIsGone) {
  Cluster cluster(3);
  GrpcStoreClientOptions options = cluster.Options(2);
  options.repair_delay = absl::ZeroDuration();
  const auto client = MakeClient(options);
  TestChain chain(TestLayout(), 64, 11);
  ASSERT_OK(WriteBlocks(*client, chain, 0, 64));
  const uint64_t lost = cluster.Stats(2).slots_stored();
  ASSERT_GT(lost, 0u);
  cluster.Stop(2);
  // By itself the client notices when it renews leases; a call tells it sooner.
  ASSERT_OK(Lookup(*client, chain.keys));
  AwaitRepairs(*client, lost);
  EXPECT_EQ(cluster.Stats(0).slots_stored() + cluster.Stats(1).slots_stored(), 128u);
}

TEST(ClusterTest, ALookupHasMissingCopiesRestored) {
  Cluster cluster(3);
  TestChain chain(TestLayout(), 32, 12);
  {
    const auto single = MakeClient(cluster.Options(1));
    ASSERT_OK(WriteBlocks(*single, chain, 0, 32));
  }
  GrpcStoreClientOptions options = cluster.Options(2);
  options.repair_bytes_per_second = 0;
  const auto idle = MakeClient(options);
  ASSERT_OK(Lookup(*idle, chain.keys));
  const auto client = MakeClient(cluster.Options(2));
  ASSERT_OK_AND_ASSIGN(const LookupResult found, Lookup(*client, chain.keys));
  EXPECT_EQ(found.pages.size(), 32u);
  AwaitRepairs(*client, 32);
  EXPECT_EQ(idle->stats().copies_repaired, 0u);
  uint64_t stored = 0;
  for (size_t i = 0; i < 3; ++i) {
    stored += cluster.Stats(i).slots_stored();
    EXPECT_OK(cluster.at(i).CheckIntegrity());
  }
  EXPECT_EQ(stored, 64u);
  ASSERT_OK_AND_ASSIGN(const LookupResult again, Lookup(*client, chain.keys));
  EXPECT_OK(ReadAndCompare(*client, chain, again.pages));
}

/// Everything at random, against what was written: bytes are never wrong, nothing hangs, landing
/// buffers are left alone once their read is over, and while no more than one store has lost its
/// pages everything is there.
class RandomClusterTest : public ::testing::TestWithParam<bool> {};

TEST_P(RandomClusterTest, NeverWrongBytesNeverAHang) {
  const bool faults = GetParam();
  const uint64_t seed = std::random_device()();
  SCOPED_TRACE(seed);
  std::mt19937_64 random(seed);
  const PageLayout layout = TestLayout();
  Cluster cluster(3, 2000);
  const auto source = std::make_shared<FaultSource>(seed);
  GrpcStoreClientOptions options = cluster.Options(2);
  options.stall_timeout = absl::Milliseconds(50);
  options.wrap_transport = [&](std::unique_ptr<Transport> inner) {
    return MakeFaultTransport(std::move(inner), source);
  };
  const auto client = MakeClient(options);

  struct Chain {
    explicit Chain(uint64_t chain_seed) : content(TestLayout(), 48, chain_seed) {}
    TestChain content;
    size_t stored = 0;  // blocks written so far
  };
  std::vector<std::unique_ptr<Chain>> chains;
  for (uint64_t i = 0; i < 6; ++i) chains.push_back(std::make_unique<Chain>(seed * 100 + i));
  std::vector<std::vector<std::byte>> finished;  // landing buffers of reads that are over
  int restarts = 0;
  int down = -1;
  const auto allowed = [](const absl::Status& status) {
    return absl::IsUnavailable(status) || absl::IsAborted(status) || absl::IsDataLoss(status) ||
           absl::IsNotFound(status);
  };
  uint64_t failed = 0, succeeded = 0;
  for (int step = 0; step < 150; ++step) {
    if (faults) {
      FaultRates rates;
      if (step % 3 != 0) {
        rates.delay = 0.1;
        rates.duplicate = 0.05;
        rates.corrupt = 0.01;
        rates.error = 0.01;
        rates.drop = step % 5 == 0 ? 0.005 : 0;
        rates.half_close = step % 10 == 0 ? 0.005 : 0;
      }
      source->Set(rates);
    }
    Chain& chain = *chains[random() % chains.size()];
    switch (random() % 8) {
      case 0: {  // a store dies, or comes back
        if (down >= 0) {
          cluster.Start(static_cast<size_t>(down));
          down = -1;
        } else if (faults || restarts == 0) {
          down = static_cast<int>(random() % 3);
          cluster.Stop(static_cast<size_t>(down));
          ++restarts;
        }
        break;
      }
      case 1:
      case 2: {  // some more blocks
        const size_t end = std::min<size_t>(48, chain.stored + 1 + random() % 20);
        if (chain.stored == end) break;
        const absl::Status written = WriteBlocks(*client, chain.content, chain.stored, end);
        if (written.ok()) {
          chain.stored = end;
        } else {
          ASSERT_TRUE(allowed(written)) << written;
          ASSERT_TRUE(faults || down >= 0) << written;
        }
        break;
      }
      default: {  // look up and read
        const absl::StatusOr<LookupResult> found = Lookup(*client, chain.content.keys);
        if (!found.ok()) {
          ASSERT_TRUE(allowed(found.status())) << found.status();
          ASSERT_TRUE(faults || down >= 0) << found.status();
          break;
        }
        // All of it is there as long as one store at most has ever lost its pages.
        if (!faults && restarts <= 1) {
          ASSERT_GE(found->pages.size(), chain.stored) << "step " << step;
        }
        std::vector<PrefixRead> reads;
        std::vector<std::byte> prefixes(found->pages.size() * layout.prefix_bytes());
        for (size_t i = 0; i < found->pages.size(); ++i) {
          reads.push_back({found->pages[i], absl::MakeSpan(prefixes).subspan(
                                                i * layout.prefix_bytes(), layout.prefix_bytes())});
        }
        const auto copies = ReadPrefixes(*client, reads);
        if (copies.ok()) {
          std::vector<RecordRead> records;
          std::vector<std::byte> landing(found->pages.size() * layout.record_bytes());
          std::vector<int> numbers;
          for (size_t i = 0; i < found->pages.size(); ++i) {
            const absl::Span<const std::byte> prefix = absl::MakeConstSpan(prefixes).subspan(
                i * layout.prefix_bytes(), layout.prefix_bytes());
            ASSERT_EQ(std::memcmp(prefix.data() + layout.index_offset(),
                                  chain.content.pages[i].data() + layout.index_offset(),
                                  layout.index_bytes()),
                      0);
            const int record = static_cast<int>(random() % layout.num_records());
            numbers.push_back(record);
            records.push_back({(*copies)[i], record, RecordChecksum(layout, prefix, record),
                               absl::MakeSpan(landing).subspan(i * layout.record_bytes(),
                                                               layout.record_bytes())});
          }
          const absl::Status read = ReadRecords(*client, records);
          if (read.ok()) {
            ++succeeded;
            for (size_t i = 0; i < numbers.size(); ++i) {
              ASSERT_EQ(
                  std::memcmp(landing.data() + i * layout.record_bytes(),
                              chain.content.pages[i].data() + layout.record_offset(numbers[i]),
                              layout.record_bytes()),
                  0)
                  << "wrong bytes at step " << step;
            }
          } else {
            ++failed;
            ASSERT_TRUE(allowed(read)) << read;
            ASSERT_TRUE(faults) << read;
          }
          // Ours again, whatever came of it.
          std::fill(landing.begin(), landing.end(), std::byte{0x77});
          finished.push_back(std::move(landing));
        } else {
          ASSERT_TRUE(allowed(copies.status())) << copies.status();
          ASSERT_TRUE(faults) << copies.status();
        }
        if (random() % 2 == 0) client->Release(found->leases);
        break;
      }
    }
  }
  source->Set({});
  client->Close();
  for (const std::vector<std::byte>& landing : finished) {
    ASSERT_TRUE(std::all_of(landing.begin(), landing.end(), [](std::byte byte) {
      return byte == std::byte{0x77};
    })) << "written to after the completion";
  }
  for (size_t i = 0; i < cluster.size(); ++i) {
    if (!cluster.up(i)) continue;
    EXPECT_OK(cluster.at(i).CheckIntegrity());
  }
  EXPECT_GT(succeeded, 0u);
  EXPECT_EQ(source->faults() > 0, faults);
  RecordProperty("failed_reads", static_cast<int>(failed));
  RecordProperty("succeeded_reads", static_cast<int>(succeeded));
  RecordProperty("failed_over", static_cast<int>(client->stats().reads_failed_over));
}

INSTANTIATE_TEST_SUITE_P(Cases, RandomClusterTest, ::testing::Bool(), [](const auto& info) {
  return info.param ? "WithFaults" : "WithoutFaults";
});

}  // namespace
}  // namespace nosara::kvstore
