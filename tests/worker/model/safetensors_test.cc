#include "worker/model/safetensors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/status_matchers.h"
#include "tests/text/temp_dir.h"
#include "tests/worker/model/safetensors_writer.h"

namespace nosara::worker {
namespace {

using nosara::testing::AsBytes;
using nosara::testing::SafetensorsFileBytes;
using nosara::testing::StatusIs;
using nosara::testing::TempDir;
using nosara::testing::TestTensor;
using nosara::testing::WithHeader;
using ::testing::ElementsAre;

std::string Floats(const std::vector<float>& values) {
  std::string bytes(values.size() * 4, '\0');
  std::memcpy(bytes.data(), values.data(), bytes.size());
  return bytes;
}

std::vector<TestTensor> SmallTensors() {
  return {{"weight", "F32", {2, 3}, Floats({1, 2, 3, 4, 5, 6})},
          {"half", "BF16", {2}, std::string("\x80\x3f\x00\xc0", 4)},  // 1, -2
          {"scalar", "F32", {}, Floats({7})},
          {"empty", "F16", {0, 5}, ""},
          {"flag", "BOOL", {3}, std::string(3, '\1')}};
}

TEST(SafetensorsTest, MapsWhatTheFileHolds) {
  const TempDir dir;
  const std::string path = dir.Write("a.safetensors", SafetensorsFileBytes(SmallTensors()));
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<SafetensorsFile> file, SafetensorsFile::Open(path));
  EXPECT_EQ(file->tensors().size(), 5u);
  ASSERT_OK_AND_ASSIGN(const TensorView weight, file->Find("weight"));
  EXPECT_EQ(weight.dtype, TensorDType::kF32);
  EXPECT_THAT(weight.shape, ElementsAre(2, 3));
  EXPECT_EQ(weight.NumElements(), 6);
  EXPECT_THAT(weight.AsF32(), ElementsAre(1, 2, 3, 4, 5, 6));
  ASSERT_OK_AND_ASSIGN(const TensorView half, file->Find("half"));
  EXPECT_THAT(half.AsBf16(), ElementsAre(FromFloat(1), FromFloat(-2)));
  std::vector<float> wide(2);
  half.CopyToFloat(absl::MakeSpan(wide));
  EXPECT_THAT(wide, ElementsAre(1, -2));
  ASSERT_OK_AND_ASSIGN(const TensorView scalar, file->Find("scalar"));
  EXPECT_EQ(scalar.NumElements(), 1);
  ASSERT_OK_AND_ASSIGN(const TensorView empty, file->Find("empty"));
  EXPECT_EQ(empty.NumElements(), 0);
  EXPECT_TRUE(empty.data.empty());
  EXPECT_THAT(file->Find("absent"),
              StatusIs(absl::StatusCode::kNotFound, path + ": has no tensor \"absent\""));
}

TEST(SafetensorsTest, EveryTruncationIsRefused) {
  const TempDir dir;
  const std::string bytes = SafetensorsFileBytes(SmallTensors());
  for (size_t length = 0; length < bytes.size(); ++length) {
    const std::string path = dir.Write("cut.safetensors", bytes.substr(0, length));
    ASSERT_THAT(SafetensorsFile::Open(path), StatusIs(absl::StatusCode::kInvalidArgument, path))
        << length;
  }
  dir.Write("cut.safetensors", bytes);
  EXPECT_OK(SafetensorsFile::Open(dir.path() + "/cut.safetensors"));
}

TEST(SafetensorsTest, MissingFilesAndFoldersAreNamed) {
  const TempDir dir;
  EXPECT_THAT(SafetensorsFile::Open(dir.path() + "/none"),
              StatusIs(absl::StatusCode::kNotFound, dir.path() + "/none"));
  EXPECT_THAT(SafetensorsFile::Open(dir.path()),
              StatusIs(absl::StatusCode::kInvalidArgument, "not a regular file"));
}

TEST(SafetensorsTest, BadHeadersAreRefusedWithTheReason) {
  // The data section has 8 bytes.
  const std::string data(8, 'x');
  const std::string deep = absl::StrCat(std::string(50000, '['), std::string(50000, ']'));
  const std::pair<std::string, const char*> cases[] = {
      {"", "not a JSON object"},
      {"[]", "not a JSON object"},
      {"{\"a\"", "not a JSON object"},
      {"{\"\xff\": 1}", "not a JSON object"},
      {R"({"a": 1})", "tensor \"a\": its entry is not an object"},
      {R"({"a": {}})", "dtype is not a string"},
      {R"({"a": {"dtype": "F33", "shape": [2], "data_offsets": [0, 8]}})",
       "dtype \"F33\" is not known"},
      {R"({"a": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}})", "shape is not an array"},
      {R"({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}})", "not a size"},
      {R"({"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}})", "not a size"},
      {R"({"a": {"dtype": "F32", "shape": [9223372036854775808], "data_offsets": [0, 8]}})",
       "not a size"},
      {R"({"a": {"dtype": "F32", "shape": [4611686018427387904, 2], "data_offsets": [0, 8]}})",
       "shape overflows"},
      {R"({"a": {"dtype": "F64", "shape": [2305843009213693953], "data_offsets": [0, 8]}})",
       "shape overflows"},
      {R"({"a": {"dtype": "F32", "shape": [2]}})", "data_offsets is not an array of two"},
      {R"({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}})", "data_offsets"},
      {R"({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]}})", "data_offsets"},
      {R"({"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}})", "data_offsets"},
      {R"({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}})", "after its end"},
      {R"({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}})", "ends at 16"},
      {R"({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}})", "needs 12 bytes"},
      {R"({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}})", "tensors cover 4"},
      {R"({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}})", "after a hole"},
      {R"({"a": {"dtype": "U8", "shape": [6], "data_offsets": [0, 6]},
           "b": {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]}})",
       "tensor \"b\": data begins at 4, inside the tensor before it, which ends at 6"},
      {R"({"a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]},
           "a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}})",
       "has \"a\" twice"},
      {R"({"a": {"dtype": "U8", "dtype": "I8", "shape": [8], "data_offsets": [0, 8]}})",
       "has \"dtype\" twice"},
      {R"({"__metadata__": 5, "a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}})",
       "__metadata__ is not an object"},
      {absl::StrCat(R"({"a": )", deep, "}"), "nested too deep"},
      {deep, "nested too deep"}};
  for (const auto& [header, message] : cases) {
    const std::string file = WithHeader(header, data);
    const absl::StatusOr<SafetensorsHeader> parsed =
        ParseSafetensorsHeader(AsBytes(file), "x.safetensors");
    EXPECT_THAT(parsed, StatusIs(absl::StatusCode::kInvalidArgument, message))
        << header.substr(0, 200);
    EXPECT_THAT(parsed, StatusIs(absl::StatusCode::kInvalidArgument, "x.safetensors: "));
  }
}

TEST(SafetensorsTest, TheHeaderLengthIsBounded) {
  std::string file = SafetensorsFileBytes(SmallTensors());
  for (int i = 0; i < 8; ++i) file[i] = '\xff';
  EXPECT_THAT(ParseSafetensorsHeader(AsBytes(file), "x"),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       "header length is 18446744073709551615; allowed: up to 100000000"));
}

TEST(SafetensorsTest, AFileWithoutTensorsIsValid) {
  const std::string file = WithHeader("{}", "");
  ASSERT_OK_AND_ASSIGN(const SafetensorsHeader header, ParseSafetensorsHeader(AsBytes(file), "x"));
  EXPECT_TRUE(header.tensors.empty());
  EXPECT_EQ(header.data_offset, 10u);
}

TEST(SafetensorsTest, DTypesHaveNamesAndSizes) {
  EXPECT_EQ(TensorDTypeName(TensorDType::kBf16), "BF16");
  EXPECT_EQ(TensorDTypeBytes(TensorDType::kBf16), 2u);
  EXPECT_EQ(TensorDTypeName(TensorDType::kF8E4M3), "F8_E4M3");
  EXPECT_EQ(TensorDTypeBytes(TensorDType::kF64), 8u);
}

}  // namespace
}  // namespace nosara::worker
