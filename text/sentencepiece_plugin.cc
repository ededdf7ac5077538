#include "text/sentencepiece_plugin.h"

#include <sentencepiece_processor.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

namespace {

// A serialized ModelProto that sets normalizer_spec.add_dummy_prefix to false. Protobuf merges
// concatenated messages field by field, the last one wins: appended to a model, it changes this
// field alone. Bytes: field 3 (normalizer_spec), 2 bytes long: field 3 (add_dummy_prefix) = 0.
constexpr std::string_view kWithoutPrefix("\x1a\x02\x18\x00", 4);

// U+2581, by which SentencePiece writes a space.
constexpr std::string_view kSpaceSymbol = "\xe2\x96\x81";

struct Model {
  sentencepiece::SentencePieceProcessor as_model;
  sentencepiece::SentencePieceProcessor without_prefix;  // loaded only where it differs
  bool has_prefix = false;
};

const Model& Of(const void* model) { return *static_cast<const Model*>(model); }

void Tell(const std::string& message, char* error, size_t error_size) {
  if (error_size == 0) return;
  const size_t size = std::min(message.size(), error_size - 1);
  std::memcpy(error, message.data(), size);
  error[size] = '\0';
}

void* Parse(const char* bytes, size_t size, char* error, size_t error_size) {
  auto model = std::make_unique<Model>();
  const std::string serialized(bytes, size);
  const auto status = model->as_model.LoadFromSerializedProto(serialized);
  if (!status.ok()) {
    Tell(status.ToString(), error, error_size);
    return nullptr;
  }
  if (model->as_model.GetPieceSize() == 0) {
    Tell("it has no pieces", error, error_size);
    return nullptr;
  }
  std::vector<std::string> pieces;
  if (!model->as_model.Encode("a", &pieces).ok() || pieces.empty()) {
    Tell("it cannot encode the text \"a\"", error, error_size);
    return nullptr;
  }
  model->has_prefix = pieces.front().compare(0, kSpaceSymbol.size(), kSpaceSymbol) == 0;
  if (model->has_prefix) {
    const auto patched =
        model->without_prefix.LoadFromSerializedProto(serialized + std::string(kWithoutPrefix));
    if (!patched.ok()) {
      Tell(patched.ToString(), error, error_size);
      return nullptr;
    }
  }
  return model.release();
}

void Destroy(void* model) { delete static_cast<Model*>(model); }

int64_t Encode(const void* model, const char* text, size_t size, int without_prefix, int32_t* ids,
               size_t capacity, char* error, size_t error_size) {
  const Model& of = Of(model);
  const sentencepiece::SentencePieceProcessor& processor =
      of.has_prefix && without_prefix != 0 ? of.without_prefix : of.as_model;
  std::vector<int> encoded;
  const auto status = processor.Encode(std::string_view(text, size), &encoded);
  if (!status.ok()) {
    Tell(status.ToString(), error, error_size);
    return -1;
  }
  std::copy_n(encoded.begin(), std::min(encoded.size(), capacity), ids);
  return static_cast<int64_t>(encoded.size());
}

int32_t Size(const void* model) { return Of(model).as_model.GetPieceSize(); }

const char* Piece(const void* model, int32_t id, size_t* size) {
  const std::string& piece = Of(model).as_model.IdToPiece(id);
  *size = piece.size();
  return piece.data();
}

int32_t Kind(const void* model, int32_t id) {
  const sentencepiece::SentencePieceProcessor& processor = Of(model).as_model;
  if (processor.IsUnknown(id)) return 1;
  if (processor.IsControl(id)) return 2;
  if (processor.IsByte(id)) return 3;
  if (processor.IsUnused(id)) return 4;
  return 0;
}

int32_t UnkId(const void* model) { return Of(model).as_model.unk_id(); }
int32_t BosId(const void* model) { return Of(model).as_model.bos_id(); }
int32_t EosId(const void* model) { return Of(model).as_model.eos_id(); }
int32_t HasPrefix(const void* model) { return Of(model).has_prefix ? 1 : 0; }

}  // namespace

extern "C" const NosaraSentencePieceApi* nosara_sentencepiece_api() {
  static const NosaraSentencePieceApi api = {Parse, Destroy, Encode, Size,  Piece,
                                             Kind,  UnkId,   BosId,  EosId, HasPrefix};
  return &api;
}
