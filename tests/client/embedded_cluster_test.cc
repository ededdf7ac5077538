// `nosara serve` as a library: text through router, worker and store of one process, with a model
// of random weights.
#include "client/serve/embedded_cluster.h"

#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "client/client.h"
#include "tests/status_matchers.h"

namespace nosara::client {
namespace {

namespace fs = std::filesystem;

using inference::v1::GenerateRequest;
using inference::v1::GenerateResponse;
using ::nosara::testing::StatusIs;

// A folder with the weights of tiny-bf16 and the test tokenizer, whose ids it knows all.
class EmbeddedClusterTest : public ::testing::Test {
 protected:
  EmbeddedClusterTest() {
    folder_ = fs::path(::testing::TempDir()) / "nosara-embedded-model";
    fs::create_directories(folder_);
    for (const char* from : {"tests/testdata/tiny-bf16", "tests/testdata/tokenizer"}) {
      for (const auto& file : fs::directory_iterator(from)) {
        fs::copy_file(file.path(), folder_ / file.path().filename(),
                      fs::copy_options::overwrite_existing);
      }
    }
  }

  EmbeddedClusterOptions Options() const {
    EmbeddedClusterOptions options;
    options.listen = "127.0.0.1:0";
    options.model_dir = folder_.string();
    options.model_name = "tiny";
    options.arena_bytes = 16 << 20;
    options.cache_bytes = 64 << 20;
    options.threads = 1;
    return options;
  }

  struct Output {
    absl::Status status;
    std::vector<uint32_t> tokens;
    inference::v1::Finished finished;
  };
  static Output Ask(const EmbeddedCluster& cluster, const GenerateRequest& request) {
    const auto client = *Client::Connect(cluster.address());
    Output output;
    output.status = client->Generate(request, [&output](const GenerateResponse& event) {
      for (const uint32_t id : event.chunk().token_ids()) output.tokens.push_back(id);
      if (event.has_finished()) output.finished = event.finished();
      return Continue::kYes;
    });
    return output;
  }

  // Long enough that a step cannot select all blocks.
  static GenerateRequest LongRequest() {
    GenerateRequest request;
    for (uint32_t i = 0; i < 1000; ++i) request.mutable_token_ids()->add_ids(10 + i * 7 % 400);
    request.set_max_tokens(70);
    request.set_ignore_eos(true);
    request.mutable_sampling()->set_temperature(0);
    return request;
  }

  fs::path folder_;
};

TEST_F(EmbeddedClusterTest, FetchesWhatItDoesNotHoldAndReusesWhatItHasStored) {
  EmbeddedClusterOptions options = Options();
  ASSERT_OK_AND_ASSIGN(const auto all_resident, EmbeddedCluster::Create(options));
  const Output expected = Ask(*all_resident, LongRequest());
  ASSERT_OK(expected.status);
  EXPECT_EQ(expected.tokens.size(), 70u);
  EXPECT_EQ(expected.finished.usage().prompt_tokens(), 1000u);
  EXPECT_EQ(expected.finished.cache().records_fetched(), 0u);

  options.slots_per_head = -1;
  ASSERT_OK_AND_ASSIGN(const auto few_slots, EmbeddedCluster::Create(options));
  const Output fetched = Ask(*few_slots, LongRequest());
  ASSERT_OK(fetched.status);
  EXPECT_EQ(fetched.tokens, expected.tokens);
  EXPECT_GT(fetched.finished.cache().records_fetched(), 0u);
  EXPECT_EQ(fetched.finished.cache().records_by_in_process(),
            fetched.finished.cache().records_fetched());

  const Output again = Ask(*few_slots, LongRequest());
  ASSERT_OK(again.status);
  EXPECT_EQ(again.tokens, expected.tokens);
  EXPECT_GE(again.finished.usage().cached_prompt_tokens(), 14u * 64);
}

TEST_F(EmbeddedClusterTest, TextAndChat) {
  ASSERT_OK_AND_ASSIGN(const auto cluster, EmbeddedCluster::Create(Options()));
  GenerateRequest request;
  request.set_text("The captain");
  request.set_max_tokens(5);
  request.set_ignore_eos(true);
  EXPECT_OK(Ask(*cluster, request).status);
  auto& message = *request.mutable_chat()->add_messages();
  message.set_role("user");
  message.set_content("Hello");
  EXPECT_OK(Ask(*cluster, request).status);
  request.set_max_tokens(1 << 20);
  EXPECT_THAT(Ask(*cluster, request).status,
              StatusIs(absl::StatusCode::kInvalidArgument, "max_tokens"));
}

TEST_F(EmbeddedClusterTest, WhatCannotStartSaysWhy) {
  EmbeddedClusterOptions options = Options();
  options.model_dir = "tests/testdata/no-such-model";
  EXPECT_THAT(EmbeddedCluster::Create(options).status().message(),
              ::testing::HasSubstr("tests/testdata/no-such-model"));
  options = Options();
  options.listen = "nowhere";
  EXPECT_THAT(EmbeddedCluster::Create(options),
              StatusIs(absl::StatusCode::kInvalidArgument, "listen: 'nowhere'"));
}

}  // namespace
}  // namespace nosara::client
