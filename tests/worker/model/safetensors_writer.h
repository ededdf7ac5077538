// Writes safetensors files for tests, correct ones and, through WithHeader, any others.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/types/span.h"

namespace nosara::testing {

struct TestTensor {
  std::string name;
  std::string dtype;  // as in the file, e.g. "BF16"
  std::vector<int64_t> shape;
  std::string data;
};

/// The length, `header` as it is, then `data`.
inline std::string WithHeader(const std::string& header, const std::string& data) {
  std::string file;
  for (int i = 0; i < 8; ++i) {
    file.push_back(static_cast<char>(static_cast<uint64_t>(header.size()) >> (8 * i)));
  }
  return file + header + data;
}

/// A valid file, its data section aligned to 8 bytes.
inline std::string SafetensorsFileBytes(const std::vector<TestTensor>& tensors) {
  std::vector<std::string> entries = {R"("__metadata__":{"format":"pt"})"};
  std::string data;
  for (const TestTensor& tensor : tensors) {
    entries.push_back(absl::StrCat("\"", tensor.name, R"(":{"dtype":")", tensor.dtype,
                                   R"(","shape":[)", absl::StrJoin(tensor.shape, ","),
                                   R"(],"data_offsets":[)", data.size(), ",",
                                   data.size() + tensor.data.size(), "]}"));
    data += tensor.data;
  }
  std::string header = absl::StrCat("{", absl::StrJoin(entries, ","), "}");
  while (header.size() % 8 != 0) header.push_back(' ');
  return WithHeader(header, data);
}

inline absl::Span<const std::byte> AsBytes(const std::string& text) {
  return {reinterpret_cast<const std::byte*>(text.data()), text.size()};
}

}  // namespace nosara::testing
