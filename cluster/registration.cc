#include "cluster/registration.h"

#include <google/protobuf/util/json_util.h>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/log.h"
#include "base/status_macros.h"
#include "nosara/cluster/v1/cluster.pb.h"

namespace nosara::cluster {
namespace {

constexpr absl::Duration kRetryDelay = absl::Milliseconds(500);

/// JSON, so that people can read it with etcdctl.
std::string ToValue(const Member& member) {
  v1::Member proto;
  proto.set_role(member.role == Role::kRouter   ? v1::ROLE_ROUTER
                 : member.role == Role::kWorker ? v1::ROLE_WORKER
                                                : v1::ROLE_KVSTORE);
  proto.set_id(member.id);
  proto.set_address(member.address);
  proto.set_epoch(member.epoch);
  proto.set_state(v1::MEMBER_STATE_READY);
  std::string json;
  CHECK(google::protobuf::util::MessageToJsonString(proto, &json).ok());
  return json;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Registration>> Registration::Create(const EtcdLocation& location,
                                                                   const Member& member,
                                                                   absl::Duration ttl) {
  RETURN_IF_ERROR(location.Validate());
  if (member.address.empty()) return absl::InvalidArgumentError("address: must not be empty");
  if (ttl < absl::Seconds(1)) {
    return absl::InvalidArgumentError(
        absl::StrCat("ttl = ", absl::FormatDuration(ttl), ": must be at least 1s"));
  }
  return std::unique_ptr<Registration>(new Registration(location, member, ttl));
}

Registration::Registration(const EtcdLocation& location, const Member& member, absl::Duration ttl)
    : key_(absl::StrCat(location.Prefix(member.role), member.address)),
      value_(ToValue(member)),
      ttl_(ttl),
      client_(location.endpoint),
      thread_([this] { Run(); }) {}

void Registration::Run() {
  bool warned = false;
  while (!stop_.HasBeenNotified()) {
    const absl::Status status = Publish();
    if (stop_.HasBeenNotified()) return;
    if (published_) warned = false;
    if (!warned) LogWarning("{} is not published, trying again: {}", key_, status.ToString());
    warned = true;
    stop_.WaitForNotificationWithTimeout(kRetryDelay);
  }
}

absl::Status Registration::Publish() {
  published_ = false;
  ASSIGN_OR_RETURN(const int64_t lease, client_.GrantLease(ttl_));
  absl::Status status = client_.Put(key_, value_, lease);
  if (status.ok()) {
    LogInfo("published as {}", key_);
    published_ = true;
  }
  while (status.ok() && !stop_.WaitForNotificationWithTimeout(ttl_ / 3)) {
    status = client_.KeepLeaseAlive(lease);
  }
  // Of what could not be renewed, nothing is to be left either.
  if (stop_.HasBeenNotified()) (void)client_.RevokeLease(lease);
  return status;
}

void Registration::Stop() {
  std::call_once(stopped_, [this] {
    stop_.Notify();
    client_.Stop();
    thread_.join();
  });
}

}  // namespace nosara::cluster
