// The models that a router serves, as far as their text is concerned.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "text/tokenizer.h"

namespace nosara::router {

/// One model: its name and its tokenizer. Immutable.
struct ServedModel {
  std::string name;
  std::unique_ptr<text::Tokenizer> tokenizer;
  // Tokens that end a generation unless ignore_eos is set: the end of the sequence, and the end of
  // a chat turn where the tokenizer has one.
  std::vector<uint32_t> end_token_ids;
};

/// Immutable, thread-safe.
class ModelRegistry final {
 public:
  /// Loads the tokenizers of `specs`, each "name=directory". INVALID_ARGUMENT for a bad or repeated
  /// spec or none at all; errors of Tokenizer::Load.
  static absl::StatusOr<std::unique_ptr<ModelRegistry>> Load(const std::vector<std::string>& specs);

  /// The model of that name; "" means the only one. NOT_FOUND lists the names that are served;
  /// INVALID_ARGUMENT for "" where there are several.
  absl::StatusOr<const ServedModel*> Find(absl::string_view name) const;

  /// In order of the names.
  const std::map<std::string, ServedModel>& models() const { return models_; }

 private:
  ModelRegistry() = default;
  std::string Names() const;

  std::map<std::string, ServedModel> models_;
};

}  // namespace nosara::router
