// Every element of the public and internal protos says what it means.
#include <gmock/gmock.h>
#include <google/protobuf/descriptor.h>
#include <google/protobuf/descriptor.pb.h>
#include <gtest/gtest.h>

#include <fstream>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"

namespace nosara {
namespace {

using google::protobuf::Descriptor;
using google::protobuf::DescriptorPool;
using google::protobuf::EnumDescriptor;
using google::protobuf::FileDescriptor;
using google::protobuf::FileDescriptorProto;
using google::protobuf::FileDescriptorSet;
using google::protobuf::ServiceDescriptor;
using google::protobuf::SourceLocation;

// Walks a file and collects what breaks a rule. The comment of an element stands before it, or
// behind it on its line.
class Walker {
 public:
  std::vector<std::string> Walk(const FileDescriptor& file) {
    for (int i = 0; i < file.message_type_count(); ++i) WalkMessage(*file.message_type(i));
    for (int i = 0; i < file.enum_type_count(); ++i) WalkEnum(*file.enum_type(i));
    for (int i = 0; i < file.service_count(); ++i) WalkService(*file.service(i));
    return std::move(violations_);
  }
  int elements() const { return elements_; }

 private:
  template <typename T>
  void CheckComment(const T& element, const char* kind) {
    ++elements_;
    SourceLocation location;
    const bool found = element.GetSourceLocation(&location);
    const std::string comment = location.leading_comments + location.trailing_comments;
    if (!found || absl::StripAsciiWhitespace(comment).empty()) {
      violations_.push_back(absl::StrCat(kind, " ", element.full_name(), " has no comment"));
    }
  }

  void WalkMessage(const Descriptor& message) {
    if (message.options().map_entry()) return;  // made up by protoc
    CheckComment(message, "message");
    for (int i = 0; i < message.field_count(); ++i) CheckComment(*message.field(i), "field");
    // Not those that protoc makes for `optional`.
    for (int i = 0; i < message.real_oneof_decl_count(); ++i) {
      CheckComment(*message.oneof_decl(i), "oneof");
    }
    for (int i = 0; i < message.nested_type_count(); ++i) WalkMessage(*message.nested_type(i));
    for (int i = 0; i < message.enum_type_count(); ++i) WalkEnum(*message.enum_type(i));
  }

  void WalkEnum(const EnumDescriptor& type) {
    CheckComment(type, "enum");
    for (int i = 0; i < type.value_count(); ++i) CheckComment(*type.value(i), "value");
    if (!absl::EndsWith(type.value(0)->name(), "_UNSPECIFIED") || type.value(0)->number() != 0) {
      violations_.push_back(
          absl::StrCat("enum ", type.full_name(), " does not begin with ..._UNSPECIFIED = 0"));
    }
  }

  void WalkService(const ServiceDescriptor& service) {
    CheckComment(service, "service");
    for (int i = 0; i < service.method_count(); ++i) CheckComment(*service.method(i), "RPC");
  }

  std::vector<std::string> violations_;
  int elements_ = 0;
};

// Imported files come before those that import them, as protoc writes them.
std::vector<const FileDescriptor*> Build(const FileDescriptorSet& set, DescriptorPool* pool) {
  std::vector<const FileDescriptor*> files;
  for (const FileDescriptorProto& file : set.file()) {
    files.push_back(pool->BuildFile(file));
    EXPECT_NE(files.back(), nullptr) << file.name();
  }
  return files;
}

TEST(ProtoCommentsTest, EveryElementHasAComment) {
  std::ifstream input(NOSARA_DESCRIPTORS, std::ios::binary);
  FileDescriptorSet set;
  ASSERT_TRUE(set.ParseFromIstream(&input)) << NOSARA_DESCRIPTORS;
  DescriptorPool pool;
  std::vector<std::string> names;
  for (const FileDescriptor* file : Build(set, &pool)) {
    ASSERT_NE(file, nullptr);
    names.push_back(file->name());
    Walker walker;
    EXPECT_THAT(walker.Walk(*file), ::testing::IsEmpty()) << file->name();
    EXPECT_GT(walker.elements(), 0) << file->name();
    // Packages are the folders.
    EXPECT_TRUE(
        absl::StartsWith(file->name(), absl::StrReplaceAll(file->package(), {{".", "/"}}) + "/"))
        << file->name() << " has the package " << file->package();
  }
  EXPECT_THAT(names, ::testing::IsSupersetOf(
                         {"nosara/cluster/v1/cluster.proto", "nosara/inference/v1/inference.proto",
                          "nosara/kvstore/v1/kvstore.proto", "nosara/worker/v1/worker.proto"}));
}

// The walker itself: one file in which nothing has a comment.
TEST(ProtoCommentsTest, TheWalkerFindsWhatIsMissing) {
  FileDescriptorProto file;
  file.set_name("bare.proto");
  file.set_syntax("proto3");
  auto& message = *file.add_message_type();
  message.set_name("M");
  auto& field = *message.add_field();
  field.set_name("f");
  field.set_number(1);
  field.set_type(google::protobuf::FieldDescriptorProto::TYPE_INT32);
  field.set_label(google::protobuf::FieldDescriptorProto::LABEL_OPTIONAL);
  field.set_oneof_index(0);
  message.add_oneof_decl()->set_name("o");
  message.add_nested_type()->set_name("N");
  auto& type = *file.add_enum_type();
  type.set_name("E");
  auto& value = *type.add_value();
  value.set_name("DEFAULT");
  value.set_number(0);
  auto& service = *file.add_service();
  service.set_name("S");
  auto& method = *service.add_method();
  method.set_name("R");
  method.set_input_type("M");
  method.set_output_type("M");
  DescriptorPool pool;
  const FileDescriptor* const built = pool.BuildFile(file);
  ASSERT_NE(built, nullptr);
  EXPECT_THAT(Walker().Walk(*built),
              ::testing::UnorderedElementsAre(
                  "message M has no comment", "field M.f has no comment",
                  "oneof M.o has no comment", "message M.N has no comment", "enum E has no comment",
                  "value DEFAULT has no comment", "enum E does not begin with ..._UNSPECIFIED = 0",
                  "service S has no comment", "RPC S.R has no comment"));
}

}  // namespace
}  // namespace nosara
