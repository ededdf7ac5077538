#include "router/request_parsing.h"

#include <string>

#include "nosara/inference/v1/inference.pb.h"
#include "tests/status_matchers.h"

namespace nosara::router {
namespace {

using inference::v1::GenerateRequest;
using ::nosara::testing::StatusIs;

constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;

absl::Status ParseBytes(const std::string& bytes) {
  GenerateRequest parsed;
  return ParseRequest(bytes, &parsed);
}

TEST(ParseRequestTest, ParsesAMessage) {
  GenerateRequest request;
  request.set_text("sea \xe6\xb5\xb7");
  GenerateRequest parsed;
  ASSERT_OK(ParseRequest(request.SerializeAsString(), &parsed));
  EXPECT_EQ(parsed.text(), request.text());
  EXPECT_OK(ParseBytes(""));
}

TEST(ParseRequestTest, NamesTheFieldThatIsNotUtf8) {
  GenerateRequest request;
  request.set_model("fine");
  request.set_text("sea \xff");
  EXPECT_THAT(ParseBytes(request.SerializeAsString()),
              StatusIs(kInvalid, "text: not valid UTF-8 at byte 4 of 5"));
  request.set_text("fine");
  request.add_stop("ok");
  request.add_stop("\xc3(");
  EXPECT_THAT(ParseBytes(request.SerializeAsString()),
              StatusIs(kInvalid, "stop: not valid UTF-8 at byte 0 of 2"));
  request.clear_stop();
  auto& message = *request.mutable_chat()->add_messages();
  message.set_role("user");
  message.set_content("a\xed\xa0\x80");  // a surrogate
  EXPECT_THAT(ParseBytes(request.SerializeAsString()),
              StatusIs(kInvalid, "chat.messages.content: not valid UTF-8 at byte 1 of 4"));
}

TEST(ParseRequestTest, RefusesWhatIsNoMessage) {
  EXPECT_THAT(ParseBytes("\xff\xff\xff"),
              StatusIs(kInvalid, "the request is not a nosara.inference.v1.GenerateRequest"));
  GenerateRequest request;
  request.set_text("some text");
  const std::string whole = request.SerializeAsString();
  EXPECT_THAT(ParseBytes(whole.substr(0, whole.size() - 1)), StatusIs(kInvalid, "is not a"));
}

}  // namespace
}  // namespace nosara::router
