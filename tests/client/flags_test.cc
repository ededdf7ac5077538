#include "client/flags.h"

#include <optional>
#include <string>
#include <vector>

#include "tests/status_matchers.h"

namespace nosara::client {
namespace {

using ::nosara::testing::StatusIs;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;

class FlagsTest : public ::testing::Test {
 protected:
  FlagsTest() {
    set_.Add("name", &name_, "a name");
    set_.Add("verbose", &verbose_, "says more");
    set_.Add("count", &count_, "how many");
    set_.Add("wait", &wait_, "how long");
    set_.Add("temperature", &temperature_, "how warm");
    set_.Add("top_k", &top_k_, "how many tokens");
    set_.Add("seed", &seed_, "the seed");
    set_.Add("stop", &stop_, "where to stop");
    set_.AddAlias("called", "name");
  }

  FlagSet set_;
  std::string name_ = "nobody";
  bool verbose_ = true;
  int64_t count_ = 3;
  absl::Duration wait_ = absl::Seconds(5);
  std::optional<float> temperature_;
  std::optional<uint32_t> top_k_;
  std::optional<uint64_t> seed_;
  std::vector<std::string> stop_;
};

TEST_F(FlagsTest, AllForms) {
  ASSERT_OK_AND_ASSIGN(const auto rest, set_.Parse({"--name=a=b", "first", "--noverbose", "--count",
                                                    "-7", "--wait=250ms", "--temperature=0.5",
                                                    "--top-k=4", "--seed=18446744073709551615",
                                                    "--stop=x", "--stop", "--", "--", "--name=c"}));
  EXPECT_THAT(rest, ElementsAre("first", "--name=c"));
  EXPECT_EQ(name_, "a=b");
  EXPECT_FALSE(verbose_);
  EXPECT_EQ(count_, -7);
  EXPECT_EQ(wait_, absl::Milliseconds(250));
  EXPECT_EQ(temperature_, 0.5f);
  EXPECT_EQ(top_k_, 4u);
  EXPECT_EQ(seed_, 18446744073709551615u);
  EXPECT_THAT(stop_, ElementsAre("x", "--"));
}

TEST_F(FlagsTest, DefaultsAndAliases) {
  ASSERT_OK(set_.Parse({"--called=me"}));
  EXPECT_EQ(name_, "me");
  EXPECT_TRUE(verbose_);
  EXPECT_EQ(temperature_, std::nullopt);
  ASSERT_OK(set_.Parse({"--verbose=false"}));
  EXPECT_FALSE(verbose_);
  ASSERT_OK(set_.Parse({"--verbose"}));
  EXPECT_TRUE(verbose_);
}

TEST_F(FlagsTest, Mistakes) {
  EXPECT_THAT(set_.Parse({"--bogus=1"}), StatusIs(kInvalid, "unknown flag --bogus"));
  EXPECT_THAT(set_.Parse({"--noname"}), StatusIs(kInvalid, "unknown flag --noname"));
  EXPECT_THAT(set_.Parse({"--name"}), StatusIs(kInvalid, "--name: a value is missing"));
  EXPECT_THAT(set_.Parse({"--count=many"}), StatusIs(kInvalid, "--count: 'many' is not a whole"));
  EXPECT_THAT(set_.Parse({"--top_k=-1"}), StatusIs(kInvalid, "a whole number of 0 or more"));
  EXPECT_THAT(set_.Parse({"--seed=1.5"}), StatusIs(kInvalid, "--seed: '1.5'"));
  EXPECT_THAT(set_.Parse({"--temperature=warm"}), StatusIs(kInvalid, "is not a number"));
  EXPECT_THAT(set_.Parse({"--wait=5"}), StatusIs(kInvalid, "a duration such as"));
  EXPECT_THAT(set_.Parse({"--verbose=perhaps"}), StatusIs(kInvalid, "true or false"));
}

TEST_F(FlagsTest, HelpShowsNamesDefaultsAndMeanings) {
  const std::string help = set_.Help();
  EXPECT_THAT(help, HasSubstr("--name=...  (default nobody)\n      a name\n"));
  EXPECT_THAT(help, HasSubstr("--verbose  (default true)\n"));
  EXPECT_THAT(help, HasSubstr("--wait=...  (default 5s)\n"));
  EXPECT_THAT(help, HasSubstr("--top_k=...\n      how many tokens\n"));
}

}  // namespace
}  // namespace nosara::client
