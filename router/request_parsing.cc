#include "router/request_parsing.h"

#include <google/protobuf/descriptor.h>
#include <google/protobuf/unknown_field_set.h>

#include <optional>
#include <string>

#include "absl/strings/str_cat.h"
#include "text/utf8.h"

namespace nosara::router {
namespace {

using google::protobuf::Descriptor;
using google::protobuf::FieldDescriptor;
using google::protobuf::UnknownField;
using google::protobuf::UnknownFieldSet;

// Where the first string that is not UTF-8 is, e.g. "chat.messages.content: ...". The messages of
// our API nest to a fixed depth: the recursion ends.
std::optional<std::string> FindInvalidUtf8(const Descriptor& type, const UnknownFieldSet& fields) {
  for (int i = 0; i < fields.field_count(); ++i) {
    const UnknownField& field = fields.field(i);
    if (field.type() != UnknownField::TYPE_LENGTH_DELIMITED) continue;
    const FieldDescriptor* descriptor = type.FindFieldByNumber(field.number());
    if (descriptor == nullptr) continue;
    const std::string& value = field.length_delimited();
    if (descriptor->type() == FieldDescriptor::TYPE_STRING) {
      const std::optional<size_t> offset = text::FirstInvalidUtf8(value);
      if (offset) {
        return absl::StrCat(descriptor->name(), ": not valid UTF-8 at byte ", *offset, " of ",
                            value.size());
      }
    } else if (descriptor->type() == FieldDescriptor::TYPE_MESSAGE) {
      UnknownFieldSet nested;
      if (!nested.ParseFromString(value)) continue;
      if (auto found = FindInvalidUtf8(*descriptor->message_type(), nested)) {
        return absl::StrCat(descriptor->name(), ".", *found);
      }
    }
  }
  return std::nullopt;
}

}  // namespace

absl::Status ParseRequest(absl::string_view bytes, google::protobuf::Message* message) {
  if (message->ParseFromArray(bytes.data(), static_cast<int>(bytes.size()))) {
    return absl::OkStatus();
  }
  // Only now the slow way: all fields as unknown ones, whatever their bytes.
  UnknownFieldSet fields;
  if (fields.ParseFromArray(bytes.data(), static_cast<int>(bytes.size()))) {
    if (auto found = FindInvalidUtf8(*message->GetDescriptor(), fields)) {
      return absl::InvalidArgumentError(*found);
    }
  }
  return absl::InvalidArgumentError(
      absl::StrCat("the request is not a ", message->GetDescriptor()->full_name()));
}

}  // namespace nosara::router
