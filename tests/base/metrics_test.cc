#include "base/metrics.h"

#include <gtest/gtest.h>

#include <atomic>
#include <string>

#include "tests/http_get.h"
#include "tests/status_matchers.h"

namespace nosara {
namespace {

using ::nosara::testing::HttpGet;
using ::nosara::testing::StatusIs;
using ::testing::HasSubstr;

TEST(MetricSinkTest, WritesPrometheusText) {
  MetricSink sink;
  sink.Counter("a_total", "first", 3, {{"kind", "x"}});
  sink.Counter("a_total", "first", 4.5, {{"kind", "say \"y\""}});
  sink.Gauge("b", "second", -1);
  EXPECT_EQ(sink.Text(),
            "# HELP a_total first\n"
            "# TYPE a_total counter\n"
            "a_total{kind=\"x\"} 3\n"
            "a_total{kind=\"say \\\"y\\\"\"} 4.5\n"
            "# HELP b second\n"
            "# TYPE b gauge\n"
            "b -1\n");
}

TEST(MetricsServerTest, AsksTheCollectorEachTime) {
  std::atomic<int> calls = 0;
  const auto server = MetricsServer::Create("127.0.0.1:0", "tester", [&](MetricSink& sink) {
    sink.Counter("calls_total", "calls", ++calls);
  });
  ASSERT_OK(server);
  const std::string first = HttpGet((*server)->address(), "/metrics");
  EXPECT_THAT(first, HasSubstr("200 OK"));
  EXPECT_THAT(first, HasSubstr("calls_total 1\n"));
  EXPECT_THAT(
      first, HasSubstr("nosara_build_info{program=\"tester\",version=\"" NOSARA_VERSION "\"} 1\n"));
  EXPECT_THAT(HttpGet((*server)->address(), "/metrics"), HasSubstr("calls_total 2\n"));
  EXPECT_THAT(HttpGet((*server)->address(), "/other"), HasSubstr("404"));
}

TEST(MetricsServerTest, SaysWhyItCannotListen) {
  const auto nothing = [](MetricSink&) {};
  for (const char* address :
       {"", "8080", "127.0.0.1", "127.0.0.1:", "127.0.0.1:99999", "127.0.0.1:80s", ":80"}) {
    EXPECT_THAT(MetricsServer::Create(address, "tester", nothing),
                StatusIs(absl::StatusCode::kInvalidArgument, "must be host:port"))
        << address;
  }
  const auto server = MetricsServer::Create("127.0.0.1:0", "tester", nothing);
  ASSERT_OK(server);
  EXPECT_THAT(MetricsServer::Create((*server)->address(), "tester", nothing),
              StatusIs(absl::StatusCode::kUnavailable, "cannot listen there"));
}

}  // namespace
}  // namespace nosara
