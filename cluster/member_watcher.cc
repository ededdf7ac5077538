#include "cluster/member_watcher.h"

#include <google/protobuf/util/json_util.h>

#include <utility>

#include "base/log.h"
#include "base/status_macros.h"
#include "nosara/cluster/v1/cluster.pb.h"

namespace nosara::cluster {
namespace {

constexpr absl::Duration kRetryDelay = absl::Milliseconds(500);

}  // namespace

absl::StatusOr<std::unique_ptr<MemberWatcher>> MemberWatcher::Create(const EtcdLocation& location,
                                                                     Role role,
                                                                     OnChange on_change) {
  RETURN_IF_ERROR(location.Validate());
  return std::unique_ptr<MemberWatcher>(new MemberWatcher(location, role, std::move(on_change)));
}

MemberWatcher::MemberWatcher(const EtcdLocation& location, Role role, OnChange on_change)
    : prefix_(location.Prefix(role)),
      role_(role),
      on_change_(std::move(on_change)),
      client_(location.endpoint),
      thread_([this] { Run(); }) {}

void MemberWatcher::Run() {
  bool warned = false;
  while (!stop_.HasBeenNotified()) {
    absl::StatusOr<EtcdClient::Keys> keys = client_.List(prefix_);
    absl::Status status = keys.status();
    if (keys.ok()) {
      warned = false;
      Tell(*keys);
      status = client_.Watch(prefix_, *std::move(keys),
                             [this](const EtcdClient::Keys& changed) { Tell(changed); });
    }
    if (stop_.HasBeenNotified()) return;
    if (!warned) LogWarning("{} is not watched, trying again: {}", prefix_, status.ToString());
    warned = true;
    stop_.WaitForNotificationWithTimeout(kRetryDelay);
  }
}

void MemberWatcher::Tell(const EtcdClient::Keys& keys) {
  if (stop_.HasBeenNotified() || keys.values == told_) return;
  std::vector<Member> members;
  for (const auto& [key, value] : keys.values) {
    v1::Member proto;
    if (!google::protobuf::util::JsonStringToMessage(value, &proto).ok() ||
        proto.address().empty() || key != prefix_ + proto.address()) {
      LogWarning("{} holds no member: left out", key);
      continue;
    }
    members.push_back({role_, proto.id(), proto.address(), proto.epoch()});
  }
  if (members.empty()) {
    if (!told_.empty()) LogWarning("nobody is left under {}: going on with those before", prefix_);
    return;
  }
  told_ = keys.values;
  on_change_(members);
}

void MemberWatcher::Stop() {
  std::call_once(stopped_, [this] {
    stop_.Notify();
    client_.Stop();
    thread_.join();
  });
}

}  // namespace nosara::cluster
