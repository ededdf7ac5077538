// The element types that the engine computes with.
#pragma once

#include <cstddef>

#include "absl/strings/string_view.h"

namespace nosara::worker {

/// The dtype of a model's weights, activations and KV cache.
enum class DType { kF32, kBf16 };

/// Bytes of one element.
constexpr size_t DTypeBytes(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }

/// "f32" or "bf16".
constexpr absl::string_view DTypeName(DType dtype) {
  return dtype == DType::kF32 ? absl::string_view("f32") : absl::string_view("bf16");
}

}  // namespace nosara::worker
