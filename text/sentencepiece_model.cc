#include "text/sentencepiece_model.h"

#include <sentencepiece_processor.h>

namespace nosara::text {
namespace {

// A serialized ModelProto that sets normalizer_spec.add_dummy_prefix to false. Protobuf merges
// concatenated messages field by field, the last one wins: appended to a model, it changes this
// field alone. Bytes: field 3 (normalizer_spec), 2 bytes long: field 3 (add_dummy_prefix) = 0.
constexpr std::string_view kWithoutPrefix("\x1a\x02\x18\x00", 4);

// U+2581, by which SentencePiece writes a space.
constexpr std::string_view kSpaceSymbol = "\xe2\x96\x81";

}  // namespace

struct SentencePieceModel::Processors {
  sentencepiece::SentencePieceProcessor as_model;
  sentencepiece::SentencePieceProcessor without_prefix;  // loaded only where it differs
};

SentencePieceModel::SentencePieceModel() : processors_(std::make_unique<Processors>()) {}
SentencePieceModel::~SentencePieceModel() = default;

std::unique_ptr<SentencePieceModel> SentencePieceModel::Parse(const std::string& serialized,
                                                              std::string* error) {
  std::unique_ptr<SentencePieceModel> model(new SentencePieceModel());
  sentencepiece::SentencePieceProcessor& as_model = model->processors_->as_model;
  const sentencepiece::util::Status status = as_model.LoadFromSerializedProto(serialized);
  if (!status.ok()) {
    *error = status.ToString();
    return nullptr;
  }
  if (as_model.GetPieceSize() == 0) {
    *error = "it has no pieces";
    return nullptr;
  }
  std::vector<std::string> pieces;
  if (!as_model.Encode("a", &pieces).ok() || pieces.empty()) {
    *error = "it cannot encode the text \"a\"";
    return nullptr;
  }
  model->has_prefix_ = pieces.front().compare(0, kSpaceSymbol.size(), kSpaceSymbol) == 0;
  if (model->has_prefix_) {
    const sentencepiece::util::Status patched =
        model->processors_->without_prefix.LoadFromSerializedProto(serialized +
                                                                   std::string(kWithoutPrefix));
    if (!patched.ok()) {
      *error = patched.ToString();
      return nullptr;
    }
  }
  return model;
}

std::string SentencePieceModel::Encode(std::string_view text, Prefix prefix,
                                       std::vector<int32_t>* ids) const {
  const sentencepiece::SentencePieceProcessor& processor =
      has_prefix_ && prefix == Prefix::kNone ? processors_->without_prefix : processors_->as_model;
  std::vector<int> encoded;
  const sentencepiece::util::Status status = processor.Encode(text, &encoded);
  if (!status.ok()) return status.ToString();
  ids->insert(ids->end(), encoded.begin(), encoded.end());
  return "";
}

int SentencePieceModel::size() const { return processors_->as_model.GetPieceSize(); }

const std::string& SentencePieceModel::Piece(int id) const {
  return processors_->as_model.IdToPiece(id);
}

SentencePieceModel::Kind SentencePieceModel::KindOf(int id) const {
  const sentencepiece::SentencePieceProcessor& processor = processors_->as_model;
  if (processor.IsUnknown(id)) return Kind::kUnknown;
  if (processor.IsControl(id)) return Kind::kControl;
  if (processor.IsByte(id)) return Kind::kByte;
  if (processor.IsUnused(id)) return Kind::kUnused;
  return Kind::kNormal;
}

int SentencePieceModel::Find(std::string_view piece) const {
  // The library answers with the unknown piece's id for what it does not know.
  const int id = processors_->as_model.PieceToId(piece);
  return id >= 0 && id < size() && Piece(id) == piece ? id : -1;
}

int SentencePieceModel::unk_id() const { return processors_->as_model.unk_id(); }
int SentencePieceModel::bos_id() const { return processors_->as_model.bos_id(); }
int SentencePieceModel::eos_id() const { return processors_->as_model.eos_id(); }

}  // namespace nosara::text
