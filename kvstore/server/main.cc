// nosara-kvstore: one KV store node. Turns flags into options; everything else is KvStoreServer.
#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/flags/marshalling.h"
#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "base/log.h"
#include "base/metrics.h"
#include "base/process.h"
#include "base/program.h"
#include "base/status_macros.h"
#include "cluster/member.h"
#include "cluster/registration.h"
#include "kvstore/server/kvstore_metrics.h"
#include "kvstore/server/kvstore_server.h"

namespace {

/// A number of bytes as people write it: "2GiB", "512MiB", "1073741824".
struct ByteSize {
  uint64_t bytes = 0;
};

bool AbslParseFlag(absl::string_view text, ByteSize* size, std::string* error) {
  struct Unit {
    const char* name;
    double factor;
  };
  static constexpr Unit kUnits[] = {{"TiB", 0x1p40}, {"GiB", 0x1p30}, {"MiB", 0x1p20},
                                    {"KiB", 0x1p10}, {"TB", 1e12},    {"GB", 1e9},
                                    {"MB", 1e6},     {"KB", 1e3},     {"B", 1}};
  absl::string_view number = absl::StripAsciiWhitespace(text);
  double factor = 1;
  for (const Unit& unit : kUnits) {
    if (absl::EndsWithIgnoreCase(number, unit.name)) {
      factor = unit.factor;
      number.remove_suffix(absl::string_view(unit.name).size());
      break;
    }
  }
  double value = 0;
  if (!absl::SimpleAtod(absl::StripAsciiWhitespace(number), &value) || !std::isfinite(value) ||
      value * factor < 1 || value * factor > 0x1p46) {
    *error = "must be a size such as 2GiB, 512MiB or 1073741824, from 1B to 64TiB";
    return false;
  }
  size->bytes = static_cast<uint64_t>(value * factor);
  return true;
}

std::string AbslUnparseFlag(ByteSize size) {
  static constexpr const char* kUnits[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  uint64_t value = size.bytes;
  int unit = 0;
  while (unit < 4 && value % 1024 == 0 && value > 0) {
    value /= 1024;
    ++unit;
  }
  return absl::StrCat(value, kUnits[unit]);
}

/// "SIZE" for every namespace, "NAMESPACE=SIZE" for one, in any number and order.
struct Quotas {
  ByteSize every;  // 0: no limit
  absl::flat_hash_map<nosara::kvstore::PageKey, uint64_t> bytes;
};

bool AbslParseFlag(absl::string_view text, Quotas* quotas, std::string* error) {
  *quotas = Quotas();
  for (const absl::string_view item : absl::StrSplit(text, ',', absl::SkipEmpty())) {
    const size_t equals = item.find('=');
    ByteSize size;
    if (item.substr(equals == item.npos ? 0 : equals + 1) != "none" &&
        !AbslParseFlag(item.substr(equals == item.npos ? 0 : equals + 1), &size, error)) {
      *error = absl::StrCat("'", item, "': ", *error, ", or none");
      return false;
    }
    if (equals == item.npos) {
      quotas->every = size;
      continue;
    }
    const absl::string_view digits = item.substr(0, equals);
    if (digits.size() != 32 || !std::all_of(digits.begin(), digits.end(), absl::ascii_isxdigit)) {
      *error = absl::StrCat("'", item,
                            "': must be SIZE, or NAMESPACE=SIZE with a namespace of 32 hexadecimal "
                            "digits");
      return false;
    }
    const auto key = nosara::kvstore::PageKey::FromBytes(absl::HexStringToBytes(digits));
    quotas->bytes[*key] = size.bytes;
  }
  return true;
}

std::string AbslUnparseFlag(const Quotas& quotas) {
  std::vector<std::string> items;
  const auto size = [](uint64_t bytes) {
    return bytes == 0 ? std::string("none") : AbslUnparseFlag(ByteSize{bytes});
  };
  if (quotas.every.bytes > 0) items.push_back(size(quotas.every.bytes));
  for (const auto& [key, bytes] : quotas.bytes) {
    items.push_back(absl::StrCat(key.ToHex(), "=", size(bytes)));
  }
  return absl::StrJoin(items, ",");
}

/// "on" or "off".
struct OnOff {
  bool on = true;
};

bool AbslParseFlag(absl::string_view text, OnOff* value, std::string* error) {
  if (text != "on" && text != "off") {
    *error = "must be on or off";
    return false;
  }
  value->on = text == "on";
  return true;
}

std::string AbslUnparseFlag(OnOff value) { return value.on ? "on" : "off"; }

}  // namespace

namespace nosara::kvstore {

// Found by the flag library in the namespace of the type.
static bool AbslParseFlag(absl::string_view text, EvictionKind* kind, std::string* error) {
  const absl::StatusOr<EvictionKind> parsed = ParseEvictionKind(text);
  if (!parsed.ok()) {
    *error = "must be s3fifo or lru";
    return false;
  }
  *kind = *parsed;
  return true;
}

static std::string AbslUnparseFlag(EvictionKind kind) {
  return std::string(EvictionKindName(kind));
}

}  // namespace nosara::kvstore

ABSL_FLAG(std::string, listen, "127.0.0.1:50061",
          "Address of the control plane, host:port. Port 0 takes a free one (see --port_file).");
ABSL_FLAG(ByteSize, arena_bytes, ByteSize{uint64_t{1} << 30},
          "Memory for pages, e.g. 2GiB. Allocated at start. At least one page of the model.");
ABSL_FLAG(
    std::string, arena_dir, "/dev/shm",
    "Folder of the arena's file, in shared memory (or on hugetlbfs). Huge pages are used where "
    "its mount allows them (huge=advise or always).");
ABSL_FLAG(std::string, node_id, "kvstore", "Name of this node, unique in its cluster.");
ABSL_FLAG(absl::Duration, lease_ttl, absl::Seconds(30),
          "How long a lease lives without renewal, 100ms to 24h.");
ABSL_FLAG(absl::Duration, quarantine, absl::Seconds(60),
          "How long a slot whose writer has vanished is kept from reuse, 0s to 24h.");
ABSL_FLAG(nosara::kvstore::EvictionKind, eviction, nosara::kvstore::EvictionKind::kS3Fifo,
          "Which pages a full store gives up first. s3fifo: those used once, before those used "
          "again. lru: those not used for longest.");
ABSL_FLAG(
    Quotas, namespace_quotas, Quotas{},
    "How much the pages of one namespace (model, layout and tenant) may take: SIZE for each, "
    "NAMESPACE=SIZE or NAMESPACE=none for one, separated by commas, with a namespace as "
    "`nosara store stats` shows it. One that has reached this gives up its own idle pages for "
    "new ones, or is refused. Empty: no limits.");
ABSL_FLAG(OnOff, ucx, OnOff{true},
          "on: the arena can be read and written through UCX from other hosts. off: only from this "
          "host, by mapping.");
ABSL_FLAG(std::string, ucx_tls, "",
          "UCX transports, e.g. tcp or sm,self,tcp or rc,tcp. Empty: UCX takes the best there is.");
ABSL_FLAG(std::string, etcd, "",
          "host:port of an etcd server where the node publishes itself. Empty: nowhere.");
ABSL_FLAG(std::string, cluster, "nosara", "Name of the cluster in etcd.");
ABSL_FLAG(std::string, advertise, "",
          "host:port that workers reach the node at, for etcd. Empty: that of --listen.");
ABSL_FLAG(absl::Duration, membership_ttl, absl::Seconds(5),
          "How long etcd names a node that has died; whole seconds, 1s to 1h.");
ABSL_FLAG(std::string, log_level, "info", "debug, info, warning or error.");
ABSL_FLAG(
    std::string, metrics_listen, "",
    "Address that serves metrics to Prometheus at /metrics, host:port; port 0 takes a free one. "
    "Empty: none.");
ABSL_FLAG(std::string, port_file, "",
          "File to write host:port into once the node listens. Empty: none.");

namespace nosara::kvstore {
namespace {

absl::Status Run() {
  RETURN_IF_ERROR(InitLogging("nosara-kvstore", absl::GetFlag(FLAGS_log_level)));
  StopSignal stop;
  KvStoreServerOptions options;
  options.listen = absl::GetFlag(FLAGS_listen);
  options.arena_bytes = absl::GetFlag(FLAGS_arena_bytes).bytes;
  options.arena_folder = absl::GetFlag(FLAGS_arena_dir);
  options.node_id = absl::GetFlag(FLAGS_node_id);
  options.lease_ttl = absl::GetFlag(FLAGS_lease_ttl);
  options.quarantine = absl::GetFlag(FLAGS_quarantine);
  options.eviction = absl::GetFlag(FLAGS_eviction);
  const Quotas quotas = absl::GetFlag(FLAGS_namespace_quotas);
  options.namespace_quota_bytes = quotas.every.bytes;
  options.namespace_quotas_bytes = quotas.bytes;
  options.ucx = absl::GetFlag(FLAGS_ucx).on ? KvStoreServerOptions::Ucx::kOn
                                            : KvStoreServerOptions::Ucx::kOff;
  options.ucx_tls = absl::GetFlag(FLAGS_ucx_tls);
  // Allowed in the options, where it means: no socket.
  if (options.listen.empty()) {
    return absl::InvalidArgumentError("listen is empty: must be host:port");
  }
  const cluster::EtcdLocation etcd{absl::GetFlag(FLAGS_etcd), absl::GetFlag(FLAGS_cluster)};
  if (!etcd.endpoint.empty()) RETURN_IF_ERROR(etcd.Validate());
  const absl::Duration ttl = absl::GetFlag(FLAGS_membership_ttl);
  if (ttl < absl::Seconds(1) || ttl > absl::Hours(1) ||
      ttl % absl::Seconds(1) != absl::ZeroDuration()) {
    return absl::InvalidArgumentError(absl::StrCat("membership_ttl = ", absl::FormatDuration(ttl),
                                                   ": must be whole seconds, 1s to 1h"));
  }
  ASSIGN_OR_RETURN(const auto server, KvStoreServer::Create(options));
  std::unique_ptr<MetricsServer> metrics;
  if (const std::string address = absl::GetFlag(FLAGS_metrics_listen); !address.empty()) {
    ASSIGN_OR_RETURN(metrics, MetricsServer::Create(address, "nosara-kvstore",
                                                    [raw = server.get()](MetricSink& sink) {
                                                      ReportMetrics(raw->Stats(), sink);
                                                    }));
    LogInfo("metrics at http://{}/metrics", metrics->address());
  }
  RETURN_IF_ERROR(WritePortFile(absl::GetFlag(FLAGS_port_file), server->address()));
  const std::string ucx = options.ucx_tls.empty() ? "on" : options.ucx_tls;
  const KvStoreServer::Startup& startup = server->startup();
  LogInfo(
      "arena: mapped in {:.1f} ms, memory allocated in {:.1f} ms, registered with UCX in {:.1f} "
      "ms; {} % of it in huge pages",
      absl::ToDoubleMilliseconds(startup.map), absl::ToDoubleMilliseconds(startup.allocate),
      absl::ToDoubleMilliseconds(startup.register_memory),
      100 * startup.huge_bytes / options.arena_bytes);
  LogInfo("node {} listening on {}, arena of {} at {}, UCX {}", options.node_id, server->address(),
          AbslUnparseFlag(absl::GetFlag(FLAGS_arena_bytes)), server->arena_path(),
          options.ucx == KvStoreServerOptions::Ucx::kOn ? ucx : "off");
  std::unique_ptr<cluster::Registration> registration;
  if (!etcd.endpoint.empty()) {
    const std::string advertised = absl::GetFlag(FLAGS_advertise);
    ASSIGN_OR_RETURN(registration,
                     cluster::Registration::Create(
                         etcd,
                         {cluster::Role::kStore, options.node_id,
                          advertised.empty() ? server->address() : advertised, server->epoch()},
                         ttl));
  }
  LogInfo("{}: stopping", stop.Wait());
  // First, so that nobody new comes.
  if (registration != nullptr) registration->Stop();
  server->Stop();
  return absl::OkStatus();
}

}  // namespace
}  // namespace nosara::kvstore

int main(int argc, char** argv) {
  return nosara::RunProgram(
      argc, argv,
      {"nosara-kvstore",
       "The KV store: keeps pages of KV cache in shared memory and serves them to workers.\n"
       "  nosara-kvstore --listen=0.0.0.0:50061 --arena_bytes=16GiB\n"
       "Exit codes: 0 stopped by a signal, 1 could not start.",
       "kvstore/server/main.cc"},
      nosara::kvstore::Run);
}
