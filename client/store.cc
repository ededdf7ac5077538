#include "client/store.h"

#include <algorithm>
#include <iostream>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "client/store_admin_client.h"

namespace nosara::client {
namespace {

namespace v1 = kvstore::v1;

constexpr absl::Duration kPollInterval = absl::Milliseconds(200);

constexpr absl::string_view kUsage =
    "nosara store: looks after a KV store node.\n"
    "  nosara store stats --store=10.0.0.7:50061    what it holds and has done\n"
    "  nosara store evict --store=...               lets go of all pages that nobody leases, or\n"
    "                                               of those of one --namespace\n"
    "  nosara store verify --store=...              checks all pages against their checksums;\n"
    "                                               exit code 1 when some do not match (they are\n"
    "                                               dropped)\n"
    "  nosara store drain --store=...               no new pages from now on; --wait: until no\n"
    "                                               lease is alive\n";

std::string Bytes(uint64_t bytes) {
  if (bytes < 1 << 20) return absl::StrCat(bytes, " B");
  if (bytes < 1 << 30) {
    return absl::StrFormat("%.1f MiB", static_cast<double>(bytes) / (1 << 20));
  }
  return absl::StrFormat("%.1f GiB", static_cast<double>(bytes) / (1 << 30));
}

std::string Share(uint64_t part, uint64_t whole) {
  if (whole == 0) return "";
  return absl::StrFormat("%.1f %%", 100.0 * static_cast<double>(part) / static_cast<double>(whole));
}

int Fail(const absl::Status& status) {
  // Of what Report() adds, the advice to start a router would be wrong here.
  std::cerr << "nosara: " << status.message() << " [" << absl::StatusCodeToString(status.code())
            << "]\n";
  return absl::IsUnavailable(status) || absl::IsDeadlineExceeded(status) ? kExitUnavailable
                                                                         : kExitFailed;
}

int RunStats(StoreAdminClient& client) {
  const auto stats = client.Stats();
  if (!stats.ok()) return Fail(stats.status());
  std::cout << FormatStoreStats(*stats);
  return kExitOk;
}

int RunEvict(StoreAdminClient& client, uint64_t max_pages, const std::string& name_space) {
  const auto evicted = client.Evict(max_pages, name_space);
  if (!evicted.ok()) return Fail(evicted.status());
  const auto stats = client.Stats();
  if (!stats.ok()) return Fail(stats.status());
  std::cout << evicted->pages_evicted() << " pages evicted, " << stats->slots_stored()
            << " left, of which " << stats->pages_leased() << " leased\n";
  return kExitOk;
}

int RunDrain(StoreAdminClient& client, bool wait) {
  const auto drained = client.Drain();
  if (!drained.ok()) return Fail(drained.status());
  uint64_t leases = drained->leases();
  std::cout << "draining, " << leases << " leases alive\n" << std::flush;
  while (wait && leases > 0) {
    absl::SleepFor(kPollInterval);
    const auto stats = client.Stats();
    if (!stats.ok()) return Fail(stats.status());
    leases = stats->leases();
  }
  if (wait) std::cout << "no lease is alive\n";
  return kExitOk;
}

int RunVerify(StoreAdminClient& client, uint64_t bytes_per_second) {
  auto progress = client.StartVerify(bytes_per_second);
  while (progress.ok() && progress->state() == v1::VerifyProgress::STATE_RUNNING) {
    absl::SleepFor(kPollInterval);
    progress = client.VerifyProgress();
  }
  if (!progress.ok()) return Fail(progress.status());
  std::cout << progress->pages_verified() << " pages verified, " << progress->pages_mismatched()
            << " did not match their checksums"
            << (progress->pages_mismatched() > 0 ? " and were dropped" : "") << "\n";
  if (progress->slots_done() < progress->slots_total()) {
    std::cerr << "nosara: the store stopped after " << progress->slots_done() << " of "
              << progress->slots_total() << " slots\n";
    return kExitFailed;
  }
  return progress->pages_mismatched() > 0 ? kExitFailed : kExitOk;
}

int RunStore(const std::vector<std::string>& args) {
  std::string address = "127.0.0.1:50061";
  bool wait = false;
  std::string name_space;
  int64_t max_pages = 0;
  int64_t mib_per_second = 0;
  FlagSet set;
  set.Add("store", &address, "host:port of the store (also --address)");
  set.AddAlias("address", "store");
  set.Add("wait", &wait, "drain: wait until no lease is alive");
  set.Add("max_pages", &max_pages, "evict: how many pages at most; 0: all that nobody leases");
  set.Add("namespace", &name_space,
          "evict: only pages of this namespace, 32 hexadecimal digits as stats shows them");
  set.Add("mib_per_second", &mib_per_second,
          "verify: how much to check per second at most, in MiB; 0: what the store takes (256)");
  std::vector<std::string> actions;
  if (const auto exit = ParseFlags(set, kUsage, args, 1, &actions)) return *exit;
  const auto usage = [](absl::string_view what) {
    std::cerr << "nosara: " << what << "\n";
    return kExitUsage;
  };
  if (actions.empty()) return usage("store: must be followed by stats, evict, verify or drain");
  if (max_pages < 0) {
    return usage(absl::StrCat("max_pages = ", max_pages, ": must be 0 or more"));
  }
  std::string namespace_key;
  if (!name_space.empty()) {
    const bool is_hex = std::all_of(name_space.begin(), name_space.end(), absl::ascii_isxdigit);
    if (name_space.size() != 32 || !is_hex) {
      return usage(absl::StrCat("namespace = '", name_space, "': must be 32 hexadecimal digits"));
    }
    namespace_key = absl::HexStringToBytes(name_space);
  }
  if (mib_per_second < 0 || mib_per_second > (int64_t{1} << 30)) {
    return usage(absl::StrCat("mib_per_second = ", mib_per_second, ": must be 0 to 2^30"));
  }
  const auto client = StoreAdminClient::Connect(address);
  if (!client.ok()) return usage(std::string(client.status().message()));
  const std::string& action = actions.front();
  if (action == "stats") return RunStats(**client);
  if (action == "evict") return RunEvict(**client, static_cast<uint64_t>(max_pages), namespace_key);
  if (action == "verify") return RunVerify(**client, static_cast<uint64_t>(mib_per_second) << 20);
  if (action == "drain") return RunDrain(**client, wait);
  return usage(absl::StrCat("store ", action, ": must be stats, evict, verify or drain"));
}

}  // namespace

std::string FormatStoreStats(const v1::GetStatsResponse& stats) {
  std::string text;
  const auto line = [&text](absl::string_view name, const std::string& value,
                            const std::string& note = "") {
    absl::StrAppendFormat(&text, "%-30s %14s%s%s\n", name, value, note.empty() ? "" : "  ", note);
  };
  const auto pages = [&](absl::string_view name, uint64_t count) {
    line(name, absl::StrCat(count),
         stats.page_bytes() == 0 ? "" : Bytes(count * stats.page_bytes()));
  };
  line("node", stats.node_id(), stats.draining() ? "draining" : "");
  line("arena", Bytes(stats.arena_bytes()));
  line("page size", stats.page_bytes() == 0 ? "not yet known" : Bytes(stats.page_bytes()));
  pages("page slots", stats.slots_total());
  pages("  free", stats.slots_free());
  pages("  stored", stats.slots_stored());
  pages("    leased", stats.pages_leased());
  pages("    evictable", stats.pages_evictable());
  pages("  being written", stats.slots_reserved());
  pages("  in quarantine", stats.slots_quarantined());
  line("leases", absl::StrCat(stats.leases()));
  line("  lost (expired)", absl::StrCat(stats.leases_expired()));
  line("lookups, keys", absl::StrCat(stats.keys_looked_up()));
  line("  hits", absl::StrCat(stats.keys_found()),
       Share(stats.keys_found(), stats.keys_looked_up()));
  line("  misses", absl::StrCat(stats.keys_looked_up() - stats.keys_found()),
       Share(stats.keys_looked_up() - stats.keys_found(), stats.keys_looked_up()));
  pages("pages committed", stats.pages_committed());
  line("  refused, bad checksum", absl::StrCat(stats.commit_checksum_failures()));
  pages("pages evicted to make room", stats.pages_evicted());
  pages("pages evicted for a quota", stats.pages_evicted_by_quota());
  pages("pages evicted by request", stats.pages_evicted_by_request());
  pages("pages verified", stats.pages_verified());
  line("  discarded, bad checksum", absl::StrCat(stats.pages_discarded()));
  line("reservations refused, full", absl::StrCat(stats.reservations_refused()));
  line("  namespace at its quota", absl::StrCat(stats.reservations_refused_by_quota()));
  line("namespaces", absl::StrCat(stats.namespaces_total()));
  for (const v1::NamespaceStats& entry : stats.namespaces()) {
    absl::StrAppendFormat(&text, "  %s %10d  %s", absl::BytesToHexString(entry.namespace_key()),
                          entry.pages(), Bytes(entry.pages() * stats.page_bytes()));
    if (entry.quota_pages() > 0) {
      absl::StrAppend(&text, " of ", Bytes(entry.quota_pages() * stats.page_bytes()));
    }
    absl::StrAppend(&text, "\n");
  }
  return text;
}

Command StoreCommand() {
  return {"store", "statistics of a KV store; evict, verify, drain", RunStore};
}

}  // namespace nosara::client
