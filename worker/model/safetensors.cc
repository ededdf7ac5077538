#include "worker/model/safetensors.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <functional>
#include <nlohmann/json.hpp>
#include <system_error>
#include <tuple>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/check.h"
#include "base/status_macros.h"

namespace nosara::worker {
namespace {

using nlohmann::json;

constexpr uint64_t kLengthBytes = 8;
constexpr uint64_t kMaxHeaderBytes = 100'000'000;  // the format's own limit
// {"tensor": {"shape": [..]}}: a valid header is nested three deep.
constexpr int kMaxDepth = 4;

struct DTypeRow {
  TensorDType dtype;
  absl::string_view name;
  size_t bytes;
};
constexpr DTypeRow kDTypes[] = {
    {TensorDType::kBool, "BOOL", 1},      {TensorDType::kU8, "U8", 1},
    {TensorDType::kI8, "I8", 1},          {TensorDType::kF8E5M2, "F8_E5M2", 1},
    {TensorDType::kF8E4M3, "F8_E4M3", 1}, {TensorDType::kI16, "I16", 2},
    {TensorDType::kU16, "U16", 2},        {TensorDType::kF16, "F16", 2},
    {TensorDType::kBf16, "BF16", 2},      {TensorDType::kI32, "I32", 4},
    {TensorDType::kU32, "U32", 4},        {TensorDType::kF32, "F32", 4},
    {TensorDType::kF64, "F64", 8},        {TensorDType::kI64, "I64", 8},
    {TensorDType::kU64, "U64", 8},
};

const DTypeRow& RowOf(TensorDType dtype) {
  for (const DTypeRow& row : kDTypes) {
    if (row.dtype == dtype) return row;
  }
  CHECK(false);
}

/// Follows the parser to see what a DOM hides: repeated keys and the nesting.
class HeaderObserver final {
 public:
  bool operator()(int depth, json::parse_event_t event, json& parsed) {
    if (depth > kMaxDepth) {
      too_deep_ = true;
      return false;  // nothing of it is kept
    }
    if (event == json::parse_event_t::object_start) {
      keys_[depth + 1].clear();
    } else if (event == json::parse_event_t::key && repeated_key_.empty()) {
      const std::string& key = parsed.get_ref<const std::string&>();
      if (!keys_[depth].insert(key).second) repeated_key_ = absl::StrCat("\"", key, "\"");
    }
    return true;
  }

  const std::string& repeated_key() const { return repeated_key_; }
  bool too_deep() const { return too_deep_; }

 private:
  std::array<absl::flat_hash_set<std::string>, kMaxDepth + 2> keys_;  // of the open object at depth
  std::string repeated_key_;
  bool too_deep_ = false;
};

/// A JSON number as a size; false unless it is an integer in [0, INT64_MAX].
bool ReadSize(const json& value, uint64_t* out) {
  if (!value.is_number_unsigned()) return false;
  *out = value.get<uint64_t>();
  return *out <= static_cast<uint64_t>(INT64_MAX);
}

absl::StatusOr<TensorInfo> ParseTensor(const std::string& name, const json& entry,
                                       uint64_t data_bytes) {
  const auto fail = [&name](const auto&... what) {
    return absl::InvalidArgumentError(absl::StrCat("tensor \"", name, "\": ", what...));
  };
  if (!entry.is_object()) return fail("its entry is not an object");
  TensorInfo info;
  info.name = name;

  const auto dtype = entry.find("dtype");
  if (dtype == entry.end() || !dtype->is_string()) return fail("dtype is not a string");
  const std::string& dtype_name = dtype->get_ref<const std::string&>();
  const auto* row = std::find_if(std::begin(kDTypes), std::end(kDTypes),
                                 [&](const DTypeRow& known) { return known.name == dtype_name; });
  if (row == std::end(kDTypes)) return fail("dtype \"", dtype_name, "\" is not known");
  info.dtype = row->dtype;

  const auto shape = entry.find("shape");
  if (shape == entry.end() || !shape->is_array()) return fail("shape is not an array");
  uint64_t bytes = row->bytes;
  for (const json& dimension : *shape) {
    uint64_t size = 0;
    if (!ReadSize(dimension, &size)) return fail("shape has an entry that is not a size");
    if (__builtin_mul_overflow(bytes, size, &bytes)) return fail("shape overflows 64 bits");
    info.shape.push_back(static_cast<int64_t>(size));
  }

  const auto offsets = entry.find("data_offsets");
  if (offsets == entry.end() || !offsets->is_array() || offsets->size() != 2 ||
      !ReadSize((*offsets)[0], &info.begin) || !ReadSize((*offsets)[1], &info.end)) {
    return fail("data_offsets is not an array of two offsets");
  }
  if (info.begin > info.end)
    return fail("data_offsets begins at ", info.begin, ", after its end ", info.end);
  if (info.end > data_bytes) {
    return fail("data ends at ", info.end, ", but the file has ", data_bytes,
                " bytes of data (is it truncated?)");
  }
  if (bytes != info.end - info.begin) {
    return fail("shape ", ShapeString(info.shape), " of ", dtype_name, " needs ", bytes,
                " bytes, data_offsets give ", info.end - info.begin);
  }
  return info;
}

/// Invariant 3 of SafetensorsHeader. Precondition: sorted, every end within `data_bytes`.
absl::Status CheckCoverage(const std::vector<TensorInfo>& tensors, uint64_t data_bytes) {
  uint64_t covered = 0;
  for (const TensorInfo& info : tensors) {
    if (info.begin != covered) {
      return absl::InvalidArgumentError(
          absl::StrCat("tensor \"", info.name, "\": data begins at ", info.begin,
                       info.begin < covered ? ", inside the tensor before it, which ends at "
                                            : ", after a hole; the tensor before it ends at ",
                       covered));
    }
    covered = info.end;
  }
  if (covered != data_bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("the file has ", data_bytes, " bytes of data, its tensors cover ", covered));
  }
  return absl::OkStatus();
}

absl::StatusOr<SafetensorsHeader> Parse(absl::Span<const std::byte> file) {
  if (file.size() < kLengthBytes) {
    return absl::InvalidArgumentError(absl::StrCat("the file is ", file.size(),
                                                   " bytes long, a safetensors file has at least ",
                                                   kLengthBytes));
  }
  uint64_t header_bytes = 0;
  for (size_t i = 0; i < kLengthBytes; ++i) {
    header_bytes |= std::to_integer<uint64_t>(file[i]) << (8 * i);
  }
  if (header_bytes > kMaxHeaderBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("the header length is ", header_bytes, "; allowed: up to ", kMaxHeaderBytes));
  }
  if (header_bytes > file.size() - kLengthBytes) {
    return absl::InvalidArgumentError(absl::StrCat("the header length is ", header_bytes,
                                                   ", but only ", file.size() - kLengthBytes,
                                                   " bytes follow (is it truncated?)"));
  }
  const auto header_text = file.subspan(kLengthBytes, header_bytes);
  const char* text = reinterpret_cast<const char*>(header_text.data());
  HeaderObserver observer;
  const json root = json::parse(text, text + header_text.size(), std::ref(observer),
                                /*allow_exceptions=*/false);
  if (observer.too_deep()) return absl::InvalidArgumentError("the header is nested too deep");
  if (!root.is_object()) return absl::InvalidArgumentError("the header is not a JSON object");
  if (!observer.repeated_key().empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat("the header has ", observer.repeated_key(), " twice"));
  }

  SafetensorsHeader header;
  header.data_offset = kLengthBytes + header_bytes;
  const uint64_t data_bytes = file.size() - header.data_offset;
  for (const auto& [name, entry] : root.items()) {
    if (name == "__metadata__") {
      if (!entry.is_object()) return absl::InvalidArgumentError("__metadata__ is not an object");
      continue;
    }
    ASSIGN_OR_RETURN(TensorInfo info, ParseTensor(name, entry, data_bytes));
    header.tensors.push_back(std::move(info));
  }
  std::sort(header.tensors.begin(), header.tensors.end(),
            [](const TensorInfo& a, const TensorInfo& b) {
              return std::tie(a.begin, a.end, a.name) < std::tie(b.begin, b.end, b.name);
            });
  RETURN_IF_ERROR(CheckCoverage(header.tensors, data_bytes));
  return header;
}

/// Closes a file descriptor at the end of a scope.
class ScopedFd final {
 public:
  explicit ScopedFd(int fd) : fd_(fd) {}
  ~ScopedFd() {
    if (fd_ >= 0) close(fd_);
  }
  ScopedFd(const ScopedFd&) = delete;
  ScopedFd& operator=(const ScopedFd&) = delete;
  int get() const { return fd_; }

 private:
  const int fd_;
};

}  // namespace

size_t TensorDTypeBytes(TensorDType dtype) { return RowOf(dtype).bytes; }

absl::string_view TensorDTypeName(TensorDType dtype) { return RowOf(dtype).name; }

std::string ShapeString(absl::Span<const int64_t> shape) {
  return absl::StrCat("[", absl::StrJoin(shape, ", "), "]");
}

int64_t TensorView::NumElements() const {
  int64_t count = 1;
  for (const int64_t size : shape) count *= size;
  return count;
}

absl::Span<const float> TensorView::AsF32() const {
  CHECK(dtype == TensorDType::kF32);
  CHECK(reinterpret_cast<uintptr_t>(data.data()) % alignof(float) == 0);
  return {reinterpret_cast<const float*>(data.data()), data.size() / sizeof(float)};
}

absl::Span<const Bf16> TensorView::AsBf16() const {
  CHECK(dtype == TensorDType::kBf16);
  CHECK(reinterpret_cast<uintptr_t>(data.data()) % alignof(Bf16) == 0);
  return {reinterpret_cast<const Bf16*>(data.data()), data.size() / sizeof(Bf16)};
}

void TensorView::CopyToFloat(absl::Span<float> out) const {
  CHECK(static_cast<int64_t>(out.size()) == NumElements());
  if (dtype == TensorDType::kF32) {
    if (!out.empty()) std::memcpy(out.data(), data.data(), data.size());
    return;
  }
  CHECK(dtype == TensorDType::kBf16);
  for (size_t i = 0; i < out.size(); ++i) {
    Bf16 value;
    std::memcpy(&value, data.data() + i * sizeof(Bf16), sizeof(Bf16));
    out[i] = ToFloat(value);
  }
}

absl::StatusOr<SafetensorsHeader> ParseSafetensorsHeader(absl::Span<const std::byte> file,
                                                         absl::string_view name) {
  absl::StatusOr<SafetensorsHeader> header = Parse(file);
  if (!header.ok()) return Annotate(header.status(), name);
  return header;
}

SafetensorsFile::SafetensorsFile(std::string path, absl::Span<const std::byte> mapping)
    : path_(std::move(path)), mapping_(mapping) {}

SafetensorsFile::~SafetensorsFile() {
  munmap(const_cast<std::byte*>(mapping_.data()), mapping_.size());
}

absl::StatusOr<std::unique_ptr<SafetensorsFile>> SafetensorsFile::Open(const std::string& path) {
  const ScopedFd fd(open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (fd.get() < 0) {
    const std::string message = absl::StrCat(path, ": ", std::generic_category().message(errno));
    return errno == ENOENT ? absl::NotFoundError(message) : absl::InvalidArgumentError(message);
  }
  struct stat info;
  if (fstat(fd.get(), &info) != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, ": ", std::generic_category().message(errno)));
  }
  if (!S_ISREG(info.st_mode)) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": not a regular file"));
  }
  if (info.st_size == 0)
    return absl::InvalidArgumentError(absl::StrCat(path, ": the file is empty"));
  const size_t size = static_cast<size_t>(info.st_size);
  void* const address = mmap(nullptr, size, PROT_READ, MAP_PRIVATE, fd.get(), 0);
  if (address == MAP_FAILED) {
    return absl::ResourceExhaustedError(
        absl::StrCat(path, ": cannot be mapped: ", std::generic_category().message(errno)));
  }
  std::unique_ptr<SafetensorsFile> file(
      new SafetensorsFile(path, {static_cast<const std::byte*>(address), size}));
  ASSIGN_OR_RETURN(file->header_, ParseSafetensorsHeader(file->mapping_, path));
  for (size_t i = 0; i < file->header_.tensors.size(); ++i) {
    file->index_.emplace(file->header_.tensors[i].name, i);
  }
  return file;
}

absl::StatusOr<TensorView> SafetensorsFile::Find(absl::string_view name) const {
  const auto found = index_.find(name);
  if (found == index_.end()) {
    return absl::NotFoundError(absl::StrCat(path_, ": has no tensor \"", name, "\""));
  }
  const TensorInfo& info = header_.tensors[found->second];
  TensorView view;
  view.name = info.name;
  view.dtype = info.dtype;
  view.shape = info.shape;
  view.data = mapping_.subspan(header_.data_offset + info.begin, info.end - info.begin);
  return view;
}

}  // namespace nosara::worker
