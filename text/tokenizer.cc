#include "text/tokenizer.h"

#include <algorithm>
#include <cerrno>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <string_view>
#include <system_error>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/strip.h"
#include "base/status_macros.h"
#include "text/chat_template.h"
#include "text/sentencepiece_model.h"
#include "text/utf8.h"

namespace nosara::text {
namespace {

using nlohmann::json;

// Ids index a table: a nonsensical one must not make it huge.
constexpr int64_t kMaxTokenId = (1 << 21) - 1;

constexpr absl::string_view kReplacement = "\xef\xbf\xbd";
constexpr absl::string_view kSpaceSymbol = "\xe2\x96\x81";

std::string_view Std(absl::string_view text) { return std::string_view(text.data(), text.size()); }

absl::StatusOr<std::string> ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file)
    return absl::NotFoundError(absl::StrCat(path, ": ", std::generic_category().message(errno)));
  std::string content((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  if (file.bad()) return absl::InvalidArgumentError(absl::StrCat(path, ": cannot be read"));
  return content;
}

/// The byte of a piece like "<0x0A>"; -1 if it is not written like that.
int ByteOfPiece(absl::string_view piece) {
  uint32_t value = 0;
  if (piece.size() != 6 || !absl::StartsWith(piece, "<0x") || piece[5] != '>') return -1;
  if (!absl::SimpleHexAtoi(piece.substr(3, 2), &value)) return -1;
  return static_cast<int>(value);
}

/// `object`[key] as a bool; `otherwise` where it is absent or null.
absl::StatusOr<bool> BoolField(const json& object, const char* key, bool otherwise) {
  const auto field = object.find(key);
  if (field == object.end() || field->is_null()) return otherwise;
  if (!field->is_boolean()) {
    return absl::InvalidArgumentError(absl::StrCat(key, " is not true or false"));
  }
  return field->get<bool>();
}

/// bos_token and eos_token are a string, or an object with "content".
absl::StatusOr<std::string> TokenField(const json& object, const char* key) {
  const auto field = object.find(key);
  if (field == object.end() || field->is_null()) return std::string();
  if (field->is_string()) return field->get<std::string>();
  if (field->is_object()) {
    const auto content = field->find("content");
    if (content != field->end() && content->is_string()) return content->get<std::string>();
  }
  return absl::InvalidArgumentError(
      absl::StrCat(key, " is neither a string nor an object with a string \"content\""));
}

}  // namespace

Tokenizer::Tokenizer() = default;
Tokenizer::~Tokenizer() = default;

absl::StatusOr<std::unique_ptr<Tokenizer>> Tokenizer::Load(const std::string& dir) {
  std::unique_ptr<Tokenizer> tokenizer(new Tokenizer());
  RETURN_IF_ERROR(tokenizer->LoadPieces(absl::StrCat(dir, "/tokenizer.model")));
  RETURN_IF_ERROR(tokenizer->LoadConfig(absl::StrCat(dir, "/tokenizer_config.json")));
  tokenizer->FinishLoading();
  return tokenizer;
}

absl::Status Tokenizer::LoadPieces(const std::string& path) {
  ASSIGN_OR_RETURN(const std::string serialized, ReadFile(path));
  std::string error;
  model_ = SentencePieceModel::Parse(serialized, &error);
  if (model_ == nullptr) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, ": not a valid SentencePiece model: ", error));
  }
  tokens_.resize(model_->size());
  for (int id = 0; id < model_->size(); ++id) {
    Token& token = tokens_[id];
    token.text = model_->Piece(id);
    switch (model_->KindOf(id)) {
      case SentencePieceModel::Kind::kControl:
        token.special = true;
        if (!token.text.empty()) added_tokens_.push_back({token.text, id, /*special=*/true});
        break;
      case SentencePieceModel::Kind::kUnknown:
        token.bytes = std::string(kReplacement);
        break;
      case SentencePieceModel::Kind::kByte: {
        const int byte = ByteOfPiece(token.text);
        if (byte < 0) {
          return absl::InvalidArgumentError(absl::StrCat(
              path, ": byte piece ", id, " is \"", token.text, "\"; allowed: <0x00>..<0xFF>"));
        }
        token.bytes = std::string(1, static_cast<char>(byte));
        break;
      }
      case SentencePieceModel::Kind::kUnused:
        break;
      case SentencePieceModel::Kind::kNormal:
        token.bytes = absl::StrReplaceAll(token.text, {{kSpaceSymbol, " "}});
        break;
    }
    id_by_text_.try_emplace(token.text, id);
  }
  bos_id_ = model_->bos_id();
  eos_id_ = model_->eos_id();
  adds_bos_ = bos_id_ >= 0;
  return absl::OkStatus();
}

absl::Status Tokenizer::LoadConfig(const std::string& path) {
  absl::StatusOr<std::string> content = ReadFile(path);
  if (absl::IsNotFound(content.status())) return absl::OkStatus();
  RETURN_IF_ERROR(content.status());
  const json config = json::parse(*content, nullptr, /*allow_exceptions=*/false);
  if (!config.is_object()) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": not a JSON object"));
  }

  // Both spellings of the list of added tokens: an object by id, an array with an "id" each.
  std::vector<std::pair<int64_t, const json*>> entries;
  if (const auto by_id = config.find("added_tokens_decoder"); by_id != config.end()) {
    if (!by_id->is_object()) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, ": added_tokens_decoder is not an object"));
    }
    for (const auto& [key, entry] : by_id->items()) {
      int64_t id = 0;
      if (!absl::SimpleAtoi(absl::string_view(key.data(), key.size()), &id)) {
        return absl::InvalidArgumentError(
            absl::StrCat(path, ": added_tokens_decoder has the key \"", key, "\", not a token id"));
      }
      entries.emplace_back(id, &entry);
    }
  }
  if (const auto list = config.find("added_tokens"); list != config.end()) {
    if (!list->is_array()) {
      return absl::InvalidArgumentError(absl::StrCat(path, ": added_tokens is not an array"));
    }
    for (const json& entry : *list) {
      const auto id = entry.is_object() ? entry.find("id") : entry.end();
      if (!entry.is_object() || id == entry.end() || !id->is_number_integer()) {
        return absl::InvalidArgumentError(
            absl::StrCat(path, ": an entry of added_tokens has no integer \"id\""));
      }
      entries.emplace_back(id->get<int64_t>(), &entry);
    }
  }
  for (const auto& [id, entry] : entries) {
    const auto fail = [&path, id = id](absl::string_view what) {
      return absl::InvalidArgumentError(absl::StrCat(path, ": added token ", id, " ", what));
    };
    if (id < 0 || id > kMaxTokenId) {
      return fail(absl::StrCat("has an id out of range; allowed: 0 to ", kMaxTokenId));
    }
    if (!entry->is_object()) return fail("is not an object");
    const auto text = entry->find("content");
    if (text == entry->end() || !text->is_string() || text->get_ref<const std::string&>().empty()) {
      return fail("has no \"content\", a text that is not empty");
    }
    AddedToken token;
    token.id = static_cast<int32_t>(id);
    token.text = text->get<std::string>();
    absl::StatusOr<bool> special = BoolField(*entry, "special", false);
    absl::StatusOr<bool> left = BoolField(*entry, "lstrip", false);
    absl::StatusOr<bool> right = BoolField(*entry, "rstrip", false);
    absl::StatusOr<bool> single = BoolField(*entry, "single_word", false);
    for (const auto* field : {&special, &left, &right, &single}) {
      if (!field->ok())
        return fail(absl::StrCat("has an invalid field: ", field->status().message()));
    }
    if (*single) return fail("has single_word: true, which is not implemented");
    token.special = *special;
    token.strip_left = *left;
    token.strip_right = *right;
    RETURN_IF_ERROR(Annotate(AddToken(std::move(token)), path));
  }

  const auto special_id = [&](const char* key, int32_t* id) -> absl::Status {
    absl::StatusOr<std::string> text = TokenField(config, key);
    if (!text.ok()) return Annotate(text.status(), path);
    if (text->empty()) return absl::OkStatus();
    const auto known = id_by_text_.find(*text);
    if (known == id_by_text_.end()) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, ": ", key, " is \"", *text, "\", which is not in the vocabulary"));
    }
    *id = known->second;
    return absl::OkStatus();
  };
  RETURN_IF_ERROR(special_id("bos_token", &bos_id_));
  RETURN_IF_ERROR(special_id("eos_token", &eos_id_));
  absl::StatusOr<bool> adds_bos = BoolField(config, "add_bos_token", true);
  if (!adds_bos.ok()) return Annotate(adds_bos.status(), path);
  adds_bos_ = *adds_bos && bos_id_ >= 0;
  absl::StatusOr<bool> legacy = BoolField(config, "legacy", true);
  if (!legacy.ok()) return Annotate(legacy.status(), path);
  prefix_after_special_ = *legacy;
  return absl::OkStatus();
}

absl::Status Tokenizer::AddToken(AddedToken token) {
  for (AddedToken& other : added_tokens_) {
    if (other.id != token.id && other.text != token.text) continue;
    if (other.id == token.id && other.text == token.text) {
      // Known from the model as a control piece, or listed twice: the flags given here count, but
      // a control piece stays special.
      token.special |= other.special;
      tokens_[token.id].special = token.special;
      other = std::move(token);
      return absl::OkStatus();
    }
    return absl::InvalidArgumentError(absl::StrCat("added token ", token.id, " \"", token.text,
                                                   "\" contradicts token ", other.id, " \"",
                                                   other.text, "\""));
  }
  if (static_cast<size_t>(token.id) >= tokens_.size()) tokens_.resize(token.id + 1);
  Token& entry = tokens_[token.id];
  const auto old = id_by_text_.find(entry.text);
  if (old != id_by_text_.end() && old->second == token.id) id_by_text_.erase(old);
  id_by_text_[token.text] = token.id;
  entry.text = token.text;
  // The unknown piece keeps what it shows: it stands for a text that the vocabulary lacks.
  if (token.id != model_->unk_id()) entry.bytes = token.text;
  entry.special = token.special;
  added_tokens_.push_back(std::move(token));
  return absl::OkStatus();
}

void Tokenizer::FinishLoading() {
  for (const absl::string_view marker : {kTurnStart, kTurnEnd}) {
    const auto known = id_by_text_.find(marker);
    if (known == id_by_text_.end()) continue;
    const auto listed =
        std::find_if(added_tokens_.begin(), added_tokens_.end(),
                     [&](const AddedToken& token) { return token.id == known->second; });
    if (listed == added_tokens_.end()) {
      added_tokens_.push_back({std::string(marker), known->second, /*special=*/true});
    } else {
      listed->special = true;
    }
    tokens_[known->second].special = true;
  }
  for (const int32_t id : {bos_id_, eos_id_}) {
    if (id >= 0) tokens_[id].special = true;
  }
  for (int32_t id = 0; id < vocab_size(); ++id) {
    if (tokens_[id].special) tokens_[id].bytes.clear();
  }
  std::stable_sort(
      added_tokens_.begin(), added_tokens_.end(),
      [](const AddedToken& a, const AddedToken& b) { return a.text.size() > b.text.size(); });
  for (size_t i = 0; i < added_tokens_.size(); ++i) {
    added_by_first_byte_[static_cast<uint8_t>(added_tokens_[i].text[0])].push_back(i);
  }
}

absl::StatusOr<std::vector<int32_t>> Tokenizer::Encode(absl::string_view text,
                                                       const EncodeOptions& options) const {
  if (const std::optional<size_t> bad = FirstInvalidUtf8(text)) {
    return absl::InvalidArgumentError(
        absl::StrFormat("text is not valid UTF-8: byte 0x%02x at offset %d",
                        static_cast<uint8_t>(text[*bad]), *bad));
  }
  std::vector<int32_t> ids;
  if (options.add_bos) {
    if (bos_id_ < 0) return absl::InvalidArgumentError("the tokenizer has no BOS token");
    ids.push_back(bos_id_);
  }
  TextPosition position = options.position;
  size_t from = 0;
  while (from < text.size()) {
    const Match match = FindAddedToken(text, from, options.special_tokens);
    absl::string_view plain = text.substr(from, match.begin - from);
    if (match.token == nullptr) {
      RETURN_IF_ERROR(EncodePlain(plain, position, &ids));
      break;
    }
    if (match.token->strip_left) plain = absl::StripTrailingAsciiWhitespace(plain);
    RETURN_IF_ERROR(EncodePlain(plain, position, &ids));
    ids.push_back(match.token->id);
    from = match.begin + match.token->text.size();
    if (match.token->strip_right) {
      while (from < text.size() && absl::ascii_isspace(text[from])) ++from;
    }
    position = TextPosition::kAfterSpecialToken;
  }
  return ids;
}

Tokenizer::Match Tokenizer::FindAddedToken(absl::string_view text, size_t from,
                                           SpecialTokens mode) const {
  for (size_t at = from; at < text.size(); ++at) {
    for (const size_t i : added_by_first_byte_[static_cast<uint8_t>(text[at])]) {
      const AddedToken& token = added_tokens_[i];
      if (token.special && mode == SpecialTokens::kAsText) continue;
      if (absl::StartsWith(text.substr(at), token.text)) return {&token, at};
    }
  }
  return {nullptr, text.size()};
}

absl::Status Tokenizer::EncodePlain(absl::string_view text, TextPosition position,
                                    std::vector<int32_t>* ids) const {
  if (text.empty()) return absl::OkStatus();
  const bool as_model = position == TextPosition::kStart || prefix_after_special_;
  std::vector<int32_t> encoded;
  const std::string error = model_->Encode(
      Std(text),
      as_model ? SentencePieceModel::Prefix::kAsModel : SentencePieceModel::Prefix::kNone,
      &encoded);
  if (!error.empty()) {
    return absl::InternalError(absl::StrCat("SentencePiece cannot encode the text: ", error));
  }
  for (const int32_t id : encoded) {
    // A model may hold a special token as a piece that its own segmentation finds. What is special
    // has been taken out before, so that here it is text.
    if (tokens_[id].special && id != model_->unk_id()) {
      AppendAsCharacters(model_->Piece(id), ids);
    } else {
      ids->push_back(id);
    }
  }
  return absl::OkStatus();
}

void Tokenizer::AppendAsCharacters(absl::string_view text, std::vector<int32_t>* ids) const {
  while (!text.empty()) {
    size_t length = 1;
    while (length < text.size() && (static_cast<uint8_t>(text[length]) & 0xc0) == 0x80) ++length;
    const absl::string_view character = text.substr(0, length);
    const int id = model_->Find(Std(character));
    if (id >= 0 && !tokens_[id].special) {
      ids->push_back(id);
    } else {
      for (const char byte : character) {
        const int byte_id = model_->Find(absl::StrFormat("<0x%02X>", static_cast<uint8_t>(byte)));
        ids->push_back(byte_id >= 0 ? byte_id : model_->unk_id());
      }
    }
    text.remove_prefix(length);
  }
}

absl::StatusOr<std::string> Tokenizer::Decode(absl::Span<const int32_t> ids) const {
  std::string bytes;
  for (size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < 0 || ids[i] >= vocab_size()) {
      return absl::InvalidArgumentError(
          absl::StrCat("token ", i, " is ", ids[i], "; allowed: 0 to ", vocab_size() - 1));
    }
    bytes += tokens_[ids[i]].bytes;
  }
  absl::string_view text = bytes;
  if (model_->has_prefix()) absl::ConsumePrefix(&text, " ");
  return ReplaceInvalidUtf8(text);
}

absl::string_view Tokenizer::TokenBytes(int32_t id) const {
  if (id < 0 || id >= vocab_size()) return "";
  return tokens_[id].bytes;
}

absl::string_view Tokenizer::TokenText(int32_t id) const {
  if (id < 0 || id >= vocab_size()) return "";
  return tokens_[id].text;
}

std::optional<int32_t> Tokenizer::TokenId(absl::string_view token_text) const {
  const auto known = id_by_text_.find(token_text);
  if (known == id_by_text_.end()) return std::nullopt;
  return known->second;
}

bool Tokenizer::IsSpecial(int32_t id) const {
  return id >= 0 && id < vocab_size() && tokens_[id].special;
}

}  // namespace nosara::text
