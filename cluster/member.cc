#include "cluster/member.h"

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"

namespace nosara::cluster {

absl::Status EtcdLocation::Validate() const {
  if (endpoint.find(':') == std::string::npos) {
    return absl::InvalidArgumentError(
        absl::StrCat("etcd = '", endpoint, "': must be host:port of an etcd server"));
  }
  bool good = !cluster.empty() && cluster.size() <= 128;
  for (const char c : cluster) {
    good = good &&
           (absl::ascii_isalnum(static_cast<unsigned char>(c)) || c == '-' || c == '_' || c == '.');
  }
  if (!good) {
    return absl::InvalidArgumentError(absl::StrCat(
        "cluster = '", cluster, "': must be 1 to 128 letters, digits, '-', '_' and '.'"));
  }
  return absl::OkStatus();
}

std::string EtcdLocation::Prefix(Role role) const {
  const char* const folder = role == Role::kRouter   ? "routers"
                             : role == Role::kWorker ? "workers"
                                                     : "stores";
  return absl::StrCat("/nosara/", cluster, "/", folder, "/");
}

}  // namespace nosara::cluster
