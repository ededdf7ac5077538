// Registration and MemberWatcher against a real etcd.
#include <gmock/gmock.h>
#include <grpc/grpc.h>
#include <gtest/gtest.h>

#include <set>

#include "absl/synchronization/mutex.h"
#include "cluster/member_watcher.h"
#include "cluster/registration.h"
#include "tests/etcd.h"
#include "tests/status_matchers.h"

namespace nosara::cluster {
namespace {

using ::nosara::testing::Etcd;
using ::nosara::testing::StatusIs;
using Addresses = std::set<std::string>;

/// What a watcher has said last.
class Seen {
 public:
  MemberWatcher::OnChange Callback() {
    return [this](const std::vector<Member>& members) {
      absl::MutexLock lock(&mu_);
      addresses_.clear();
      for (const Member& member : members) addresses_.insert(member.address);
      ++changes_;
    };
  }
  /// Waits until exactly these are seen.
  bool Await(const Addresses& expected) {
    absl::MutexLock lock(&mu_);
    const auto reached = [&]()
                             ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return addresses_ == expected; };
    return mu_.AwaitWithTimeout(absl::Condition(&reached), absl::Minutes(1));
  }
  int changes() const {
    absl::MutexLock lock(&mu_);
    return changes_;
  }

 private:
  mutable absl::Mutex mu_;
  Addresses addresses_ ABSL_GUARDED_BY(mu_);
  int changes_ ABSL_GUARDED_BY(mu_) = 0;
};

Member Store(const std::string& address) { return {Role::kStore, "id of " + address, address, 7}; }

class MembershipTest : public ::testing::Test {
 protected:
  // Never undone: when its last object dies, gRPC waits up to 10 s for a poller of its own.
  static void SetUpTestSuite() { grpc_init(); }
};

TEST_F(MembershipTest, MembersComeAndGoAndClustersAndRolesAreApart) {
  Etcd etcd;
  const EtcdLocation location{etcd.endpoint(), "test"};
  Seen seen, late;
  ASSERT_OK_AND_ASSIGN(const auto watcher,
                       MemberWatcher::Create(location, Role::kStore, seen.Callback()));
  ASSERT_OK_AND_ASSIGN(auto first, Registration::Create(location, Store("a:1"), absl::Seconds(5)));
  EXPECT_TRUE(seen.Await({"a:1"}));
  ASSERT_OK_AND_ASSIGN(auto second, Registration::Create(location, Store("b:1"), absl::Seconds(5)));
  ASSERT_OK_AND_ASSIGN(auto worker, Registration::Create(location, {Role::kWorker, "w", "w:1", 1},
                                                         absl::Seconds(5)));
  ASSERT_OK_AND_ASSIGN(auto foreign, Registration::Create({etcd.endpoint(), "test2"}, Store("x:1"),
                                                          absl::Seconds(5)));
  EXPECT_TRUE(seen.Await({"a:1", "b:1"}));
  // One who comes later sees the same at once.
  ASSERT_OK_AND_ASSIGN(const auto late_watcher,
                       MemberWatcher::Create(location, Role::kStore, late.Callback()));
  EXPECT_TRUE(late.Await({"a:1", "b:1"}));
  first->Stop();
  EXPECT_TRUE(seen.Await({"b:1"}));
  // The last one that leaves stays known: somebody has to be asked.
  second->Stop();
  ASSERT_OK_AND_ASSIGN(auto third, Registration::Create(location, Store("c:1"), absl::Seconds(5)));
  EXPECT_TRUE(seen.Await({"c:1"}));
  EXPECT_EQ(seen.changes(), 4) << "a; a and b; b; c, never nobody";
}

TEST_F(MembershipTest, ADeadMembersLeaseEnds) {
  Etcd etcd;
  const EtcdLocation location{etcd.endpoint(), "test"};
  Seen seen;
  ASSERT_OK_AND_ASSIGN(const auto watcher,
                       MemberWatcher::Create(location, Role::kStore, seen.Callback()));
  ASSERT_OK_AND_ASSIGN(auto alive, Registration::Create(location, Store("a:1"), absl::Seconds(5)));
  // As a member that dies: published, never renewed, never revoked.
  EtcdClient dead(etcd.endpoint());
  ASSERT_OK_AND_ASSIGN(const int64_t lease, dead.GrantLease(absl::Seconds(1)));
  ASSERT_OK(dead.Put(location.Prefix(Role::kStore) + "b:1", R"({"address": "b:1"})", lease));
  EXPECT_TRUE(seen.Await({"a:1", "b:1"}));
  EXPECT_TRUE(seen.Await({"a:1"}));
  EXPECT_THAT(dead.KeepLeaseAlive(lease), StatusIs(absl::StatusCode::kNotFound, "has ended"));
  // Nonsense is left out.
  ASSERT_OK_AND_ASSIGN(const int64_t other, dead.GrantLease(absl::Seconds(60)));
  ASSERT_OK(dead.Put(location.Prefix(Role::kStore) + "c:1", "nonsense", other));
  ASSERT_OK(dead.Put(location.Prefix(Role::kStore) + "d:1", R"({"address": "e:1"})", other));
  ASSERT_OK(dead.Put(location.Prefix(Role::kStore) + "f:1", R"({"address": "f:1"})", other));
  EXPECT_TRUE(seen.Await({"a:1", "f:1"}));
}

TEST_F(MembershipTest, EtcdThatDiesTakesNobodyAlong) {
  Etcd etcd;
  const EtcdLocation location{etcd.endpoint(), "test"};
  Seen seen;
  ASSERT_OK_AND_ASSIGN(auto first, Registration::Create(location, Store("a:1"), absl::Seconds(5)));
  ASSERT_OK_AND_ASSIGN(const auto watcher,
                       MemberWatcher::Create(location, Role::kStore, seen.Callback()));
  EXPECT_TRUE(seen.Await({"a:1"}));
  etcd.Kill();
  ASSERT_OK_AND_ASSIGN(auto second, Registration::Create(location, Store("b:1"), absl::Seconds(5)));
  EXPECT_TRUE(seen.Await({"a:1"}));
  etcd.Restart();
  EXPECT_TRUE(seen.Await({"a:1", "b:1"}));
  first->Stop();
  EXPECT_TRUE(seen.Await({"b:1"}));
}

TEST_F(MembershipTest, StopsAtOnceWithoutEtcd) {
  const EtcdLocation nowhere{"127.0.0.1:1", "test"};
  Seen seen;
  ASSERT_OK_AND_ASSIGN(auto watcher, MemberWatcher::Create(nowhere, Role::kStore, seen.Callback()));
  ASSERT_OK_AND_ASSIGN(auto member, Registration::Create(nowhere, Store("a:1"), absl::Seconds(5)));
  watcher->Stop();
  member->Stop();
  EXPECT_EQ(seen.changes(), 0);
}

TEST_F(MembershipTest, NonsenseIsRefusedByName) {
  const auto refused = absl::StatusCode::kInvalidArgument;
  EXPECT_THAT(EtcdLocation({"etcd", "x"}).Validate(), StatusIs(refused, "etcd = 'etcd'"));
  EXPECT_THAT(EtcdLocation({"e:1", "a/b"}).Validate(), StatusIs(refused, "cluster = 'a/b'"));
  EXPECT_THAT(EtcdLocation({"e:1", ""}).Validate(), StatusIs(refused, "cluster = ''"));
  EXPECT_THAT(Registration::Create({"e:1", "x"}, Store(""), absl::Seconds(5)),
              StatusIs(refused, "address"));
  EXPECT_THAT(Registration::Create({"e:1", "x"}, Store("a:1"), absl::Milliseconds(10)),
              StatusIs(refused, "ttl = 10ms"));
}

}  // namespace
}  // namespace nosara::cluster
