#include "text/sentencepiece_model.h"

#include <dlfcn.h>

#include "text/sentencepiece_plugin.h"

namespace nosara::text {
namespace {

constexpr char kModule[] = "libnosara_sentencepiece.so";

/// The module, loaded once and never unloaded; null with the reason in `error`.
const NosaraSentencePieceApi* LoadModule(std::string* error) {
  struct Loaded {
    const NosaraSentencePieceApi* api = nullptr;
    std::string error;
  };
  static const Loaded* const loaded = [] {
    auto* result = new Loaded;
    // RTLD_DEEPBIND: the library inside looks for its protobuf in its own scope first, RTLD_LOCAL:
    // nobody else finds it there. dlmopen, not dlopen, because the sanitizers' dlopen refuses
    // RTLD_DEEPBIND; it is harmless here, since no allocation crosses the module's interface.
    void* handle = dlmopen(LM_ID_BASE, kModule, RTLD_NOW | RTLD_LOCAL | RTLD_DEEPBIND);
    if (handle == nullptr) {
      result->error = dlerror();
      return result;
    }
    const auto get = reinterpret_cast<const NosaraSentencePieceApi* (*)()>(
        dlsym(handle, "nosara_sentencepiece_api"));
    if (get == nullptr) {
      result->error = dlerror();
      return result;
    }
    result->api = get();
    return result;
  }();
  *error = loaded->error;
  return loaded->api;
}

}  // namespace

std::unique_ptr<SentencePieceModel> SentencePieceModel::Parse(const std::string& serialized,
                                                              std::string* error) {
  const NosaraSentencePieceApi* api = LoadModule(error);
  if (api == nullptr) return nullptr;
  char message[512] = "";
  void* model = api->parse(serialized.data(), serialized.size(), message, sizeof(message));
  if (model == nullptr) {
    *error = message;
    return nullptr;
  }
  return std::unique_ptr<SentencePieceModel>(new SentencePieceModel(api, model));
}

SentencePieceModel::SentencePieceModel(const NosaraSentencePieceApi* api, void* model)
    : api_(api), model_(model) {
  const int count = api_->size(model_);
  pieces_.reserve(count);
  for (int id = 0; id < count; ++id) {
    size_t size = 0;
    const char* bytes = api_->piece(model_, id, &size);
    pieces_.emplace_back(bytes, size);
    kinds_.push_back(static_cast<Kind>(api_->kind(model_, id)));
  }
  for (int id = 0; id < count; ++id) ids_.emplace(pieces_[id], id);
  unk_id_ = api_->unk_id(model_);
  bos_id_ = api_->bos_id(model_);
  eos_id_ = api_->eos_id(model_);
  has_prefix_ = api_->has_prefix(model_) != 0;
}

SentencePieceModel::~SentencePieceModel() { api_->destroy(model_); }

std::string SentencePieceModel::Encode(std::string_view text, Prefix prefix,
                                       std::vector<int32_t>* ids) const {
  const size_t old_size = ids->size();
  // No text has more ids than bytes, but for the space before it.
  size_t capacity = text.size() + 8;
  for (;;) {
    ids->resize(old_size + capacity);
    char message[512] = "";
    const int64_t count =
        api_->encode(model_, text.data(), text.size(), prefix == Prefix::kNone ? 1 : 0,
                     ids->data() + old_size, capacity, message, sizeof(message));
    if (count < 0) {
      ids->resize(old_size);
      return message[0] != '\0' ? message : "unknown error";
    }
    if (static_cast<size_t>(count) <= capacity) {
      ids->resize(old_size + count);
      return "";
    }
    capacity = count;
  }
}

int SentencePieceModel::Find(std::string_view piece) const {
  const auto found = ids_.find(piece);
  return found == ids_.end() ? -1 : found->second;
}

}  // namespace nosara::text
