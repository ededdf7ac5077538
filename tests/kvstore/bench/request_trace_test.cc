#include "tests/kvstore/bench/request_trace.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <sstream>
#include <string>

#include "tests/status_matchers.h"

namespace nosara::kvstore {
namespace {

using ::nosara::testing::StatusIs;
using ::testing::ElementsAre;

absl::StatusOr<RequestTrace> Read(const std::string& text) {
  std::istringstream lines(text);
  return ReadMooncakeTrace(lines, "trace");
}

TEST(RequestTraceTest, BlocksBecomeFullPages) {
  const auto trace =
      Read(R"({"timestamp": 5000, "input_length": 700, "output_length": 3, "hash_ids": [7, 9]})"
           "\n"
           R"({"timestamp": 6500, "input_length": 600, "output_length": 0, "hash_ids": [7, 12]})"
           "\n"
           R"({"timestamp": 6500, "input_length": 50, "output_length": 1, "hash_ids": [3]})"
           "\n");
  ASSERT_OK(trace);
  ASSERT_EQ(trace->requests.size(), 3u);
  EXPECT_THAT(trace->requests[0].pages, ElementsAre(0, 1, 2, 3, 4, 5, 6, 7, 8, 9));
  EXPECT_THAT(trace->requests[1].pages, ElementsAre(0, 1, 2, 3, 4, 5, 6, 7, 16));
  EXPECT_TRUE(trace->requests[2].pages.empty());
  EXPECT_EQ(trace->requests[1].arrival, absl::Milliseconds(1500));
  EXPECT_EQ(trace->requests[0].output_tokens, 3u);
  EXPECT_EQ(trace->distinct_pages, 32u);
}

TEST(RequestTraceTest, RefusesWhatIsNoTrace) {
  const std::string good =
      R"({"timestamp": 1, "input_length": 600, "output_length": 1, "hash_ids": [1, 2]})"
      "\n";
  EXPECT_THAT(Read(""), StatusIs(absl::StatusCode::kInvalidArgument, "trace: has no requests"));
  EXPECT_THAT(Read(good + "{"),
              StatusIs(absl::StatusCode::kInvalidArgument, "trace:2: is no JSON object"));
  EXPECT_THAT(Read(R"({"timestamp": -1})"),
              StatusIs(absl::StatusCode::kInvalidArgument, "trace:1: timestamp"));
  EXPECT_THAT(
      Read(good +
           R"({"timestamp": 2, "input_length": 600, "output_length": 1, "hash_ids": [3, 2]})"),
      StatusIs(absl::StatusCode::kInvalidArgument, "block 2 is behind block 3"));
  EXPECT_THAT(
      Read(R"({"timestamp": 2, "input_length": 600, "output_length": 1, "hash_ids": [3]})"),
      StatusIs(absl::StatusCode::kInvalidArgument, "has 1 elements for input_length = 600"));
  EXPECT_THAT(
      Read(good +
           R"({"timestamp": 0, "input_length": 600, "output_length": 1, "hash_ids": [1, 2]})"),
      StatusIs(absl::StatusCode::kInvalidArgument, "trace:2: timestamp: is before"));
}

TEST(RequestTraceTest, DocumentsHaveTheirPartOfThePages) {
  ScanTraceOptions options;
  options.requests = 20000;
  const RequestTrace trace = MakeScanTrace(options);
  uint64_t documents = 0, all = 0;
  uint32_t largest = 0;
  for (const TraceRequest& request : trace.requests) {
    all += request.pages.size();
    if (request.pages.size() == static_cast<size_t>(options.scan_pages)) {
      documents += request.pages.size();
    } else {
      EXPECT_EQ(request.pages.size(), static_cast<size_t>(options.chain_pages));
    }
    largest = std::max(largest, *std::max_element(request.pages.begin(), request.pages.end()));
  }
  EXPECT_NEAR(static_cast<double>(documents) / static_cast<double>(all), 0.75, 0.02);
  EXPECT_LT(largest, trace.distinct_pages);
}

}  // namespace
}  // namespace nosara::kvstore
