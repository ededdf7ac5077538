// What nosara-kvstore serves at /metrics, against docs/metrics.md.
#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "kvstore/server/kvstore_metrics.h"
#include "tests/http_get.h"
#include "tests/program.h"
#include "tests/status_matchers.h"

namespace nosara::kvstore {
namespace {

using ::nosara::testing::HttpGet;
using ::nosara::testing::Program;
using ::testing::HasSubstr;

using Types = std::map<std::string, std::string>;  // metric -> type

/// The rows of the tables of docs/metrics.md under these headings.
Types Documented(const std::vector<std::string>& headings) {
  std::ifstream file("docs/metrics.md");
  EXPECT_TRUE(file) << "docs/metrics.md cannot be read";
  Types types;
  bool wanted = false;
  for (std::string line; std::getline(file, line);) {
    if (line.rfind("## ", 0) == 0) {
      wanted = std::find(headings.begin(), headings.end(), line.substr(3)) != headings.end();
    }
    if (!wanted || line.rfind("| `", 0) != 0) continue;
    const std::vector<std::string> cells = absl::StrSplit(line, " | ");
    EXPECT_EQ(cells.size(), 3u) << line;
    const std::string name = cells[0].substr(3, cells[0].size() - 4);
    EXPECT_TRUE(types.emplace(name, cells[1]).second) << name << " is listed twice";
  }
  return types;
}

Types Exported(const std::string& text) {
  Types types;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    absl::string_view rest = line;
    if (!absl::ConsumePrefix(&rest, "# TYPE ")) continue;
    const std::vector<std::string> words = absl::StrSplit(absl::StripSuffix(rest, "\r"), ' ');
    EXPECT_EQ(words.size(), 2u) << line;
    EXPECT_TRUE(types.emplace(words[0], words[1]).second) << words[0] << " is exported twice";
  }
  return types;
}

TEST(KvStoreMetricsTest, TheDocumentListsWhatTheProgramExports) {
  const Program program(
      NOSARA_KVSTORE_BINARY,
      {"--listen=127.0.0.1:0", "--metrics_listen=127.0.0.1:0", "--ucx=off", "--arena_bytes=1MiB"});
  ASSERT_FALSE(program.address().empty());
  const std::string& said = program.announcement();
  const std::string before = "metrics at http://";
  const size_t begin = said.find(before) + before.size();
  ASSERT_GE(begin, before.size()) << said;
  const std::string address = said.substr(begin, said.find("/metrics", begin) - begin);
  const std::string answer = HttpGet(address, "/metrics");
  EXPECT_THAT(answer, HasSubstr("200 OK"));
  EXPECT_THAT(answer, HasSubstr("nosara_kvstore_arena_bytes 1048576"));
  EXPECT_EQ(Exported(answer), Documented({"All programs", "`nosara-kvstore`"}));
}

TEST(KvStoreMetricsTest, EachFigureStandsInItsPlace) {
  KvStoreStats stats;
  stats.index.slots_free = 1;
  stats.index.slots_reserved = 2;
  stats.index.slots_stored = 3;
  stats.index.slots_quarantined = 4;
  stats.index.pages_leased = 5;
  stats.index.pages_evictable = 6;
  stats.index.leases = 7;
  stats.index.keys_looked_up = 8;
  stats.index.keys_found = 9;
  stats.index.pages_committed = 10;
  stats.index.pages_evicted = 11;
  stats.index.pages_evicted_by_request = 12;
  stats.index.pages_discarded = 13;
  stats.index.leases_expired = 14;
  stats.index.reservations_refused = 15;
  stats.pages_verified = 16;
  stats.commit_checksum_failures = 17;
  stats.page_bytes = 18;
  stats.arena_bytes = 19;
  stats.index.namespaces = 20;
  stats.index.pages_evicted_by_quota = 21;
  stats.index.reservations_refused_by_quota = 22;
  stats.draining = true;
  MetricSink sink;
  ReportMetrics(stats, sink);
  const std::string text = sink.Text();
  for (const char* line : {"slots{state=\"free\"} 1",
                           "slots{state=\"reserved\"} 2",
                           "slots{state=\"stored\"} 3",
                           "slots{state=\"quarantined\"} 4",
                           "pages_leased 5",
                           "pages_evictable 6",
                           "leases 7",
                           "keys_looked_up_total 8",
                           "keys_found_total 9",
                           "pages_committed_total 10",
                           "pages_evicted_total{cause=\"room\"} 11",
                           "pages_evicted_total{cause=\"request\"} 12",
                           "pages_discarded_total 13",
                           "leases_expired_total 14",
                           "reservations_refused_total{cause=\"full\"} 15",
                           "pages_evicted_total{cause=\"quota\"} 21",
                           "reservations_refused_total{cause=\"quota\"} 22",
                           "pages_verified_total 16",
                           "commit_checksum_failures_total 17",
                           "page_bytes 18",
                           "namespaces 20",
                           "arena_bytes 19",
                           "draining 1"}) {
    EXPECT_THAT(text, HasSubstr(std::string("\nnosara_kvstore_") + line + "\n"));
  }
}

}  // namespace
}  // namespace nosara::kvstore
