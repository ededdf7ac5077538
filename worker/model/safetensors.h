// The safetensors file format, read-only and memory-mapped.
//
// Layout: 8 bytes little-endian header length H, H bytes of JSON
// {"name": {"dtype": "BF16", "shape": [..], "data_offsets": [begin, end]}, "__metadata__": {..}},
// then the data, to which the offsets are relative.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "worker/model/bf16.h"

namespace nosara::worker {

/// Every dtype that the format defines; the engine computes with F32 and BF16 only.
enum class TensorDType {
  kBool,
  kU8,
  kI8,
  kF8E5M2,
  kF8E4M3,
  kI16,
  kU16,
  kF16,
  kBf16,
  kI32,
  kU32,
  kF32,
  kF64,
  kI64,
  kU64,
};

/// Bytes of one element.
size_t TensorDTypeBytes(TensorDType dtype);

/// As in the file: "F32", "BF16", ...
absl::string_view TensorDTypeName(TensorDType dtype);

/// A tensor inside a mapped file: row-major, little-endian, valid as long as the file's object.
struct TensorView {
  std::string name;
  TensorDType dtype = TensorDType::kF32;
  std::vector<int64_t> shape;
  absl::Span<const std::byte> data;

  /// The product of the shape.
  int64_t NumElements() const;

  /// The elements in place. Preconditions: dtype is kF32 (kBf16), `data` is aligned to the element
  /// (Checkpoint guarantees it for all that it exposes).
  absl::Span<const float> AsF32() const;
  absl::Span<const Bf16> AsBf16() const;

  /// Copies the elements to `out`, widened to float. Preconditions: dtype is kF32 or kBf16;
  /// out.size() == NumElements(). Any alignment.
  void CopyToFloat(absl::Span<float> out) const;
};

/// "[2, 256]".
std::string ShapeString(absl::Span<const int64_t> shape);

/// One entry of a header. `begin` and `end` are bytes, relative to the data section.
struct TensorInfo {
  std::string name;
  TensorDType dtype = TensorDType::kF32;
  std::vector<int64_t> shape;
  uint64_t begin = 0;
  uint64_t end = 0;
};

/// A parsed header. Invariants: (1) names are unique; (2) `tensors` is in the order of `begin`;
/// (3) they cover the data section exactly, without hole, overlap or trailing bytes, as the format
/// demands; (4) shape * dtype size == end - begin for each, computed without overflow.
struct SafetensorsHeader {
  std::vector<TensorInfo> tensors;
  uint64_t data_offset = 0;  // where the data section begins in the file, bytes
};

/// Parses the header of a whole file. Pure; never throws, reads nothing outside `file`, whatever
/// its content. INVALID_ARGUMENT names `name`, the tensor and what is wrong with it.
absl::StatusOr<SafetensorsHeader> ParseSafetensorsHeader(absl::Span<const std::byte> file,
                                                         absl::string_view name);

/// An open file: owns the mapping. Immutable after Open, thread-safe.
///
/// The mapping is private and read-only. A file that another process truncates while it is mapped
/// ends this process (SIGBUS): checkpoints are replaced by renaming, never rewritten in place.
class SafetensorsFile final {
 public:
  /// NOT_FOUND when there is no such file, INVALID_ARGUMENT when it is not valid.
  static absl::StatusOr<std::unique_ptr<SafetensorsFile>> Open(const std::string& path);
  ~SafetensorsFile();
  SafetensorsFile(const SafetensorsFile&) = delete;
  SafetensorsFile& operator=(const SafetensorsFile&) = delete;

  /// NOT_FOUND names the file and the tensor. The view's data lives as long as this object.
  absl::StatusOr<TensorView> Find(absl::string_view name) const;

  bool Contains(absl::string_view name) const { return index_.contains(name); }

  /// All tensors in the order of their data.
  const std::vector<TensorInfo>& tensors() const { return header_.tensors; }

  const std::string& path() const { return path_; }

 private:
  SafetensorsFile(std::string path, absl::Span<const std::byte> mapping);

  // Constant after Open.
  const std::string path_;
  const absl::Span<const std::byte> mapping_;
  SafetensorsHeader header_;
  absl::flat_hash_map<std::string, size_t> index_;  // name -> position in header_.tensors
};

}  // namespace nosara::worker
