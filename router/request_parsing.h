// Messages from the wire, with errors that name the field.
#pragma once

#include <google/protobuf/message.h>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace nosara::router {

/// Parses `bytes` into `message`. INVALID_ARGUMENT names the first string field that is not UTF-8
/// and the offset of its first bad byte, or says that the bytes are no such message. gRPC's own
/// parsing would answer both with an empty message.
absl::Status ParseRequest(absl::string_view bytes, google::protobuf::Message* message);

}  // namespace nosara::router
