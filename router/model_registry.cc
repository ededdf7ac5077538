#include "router/model_registry.h"

#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "base/status_macros.h"
#include "text/chat_template.h"

namespace nosara::router {

absl::StatusOr<std::unique_ptr<ModelRegistry>> ModelRegistry::Load(
    const std::vector<std::string>& specs) {
  if (specs.empty()) {
    return absl::InvalidArgumentError("model: none given; at least one name=directory is needed");
  }
  auto registry = std::unique_ptr<ModelRegistry>(new ModelRegistry);
  for (const std::string& spec : specs) {
    const std::pair<std::string, std::string> parts = absl::StrSplit(spec, absl::MaxSplits('=', 1));
    const auto& [name, directory] = parts;
    if (name.empty() || directory.empty()) {
      return absl::InvalidArgumentError(absl::StrCat("model '", spec, "': must be name=directory"));
    }
    ServedModel model;
    model.name = name;
    auto tokenizer = text::Tokenizer::Load(directory);
    if (!tokenizer.ok()) return Annotate(tokenizer.status(), absl::StrCat("model ", name));
    model.tokenizer = *std::move(tokenizer);
    if (model.tokenizer->eos_id() >= 0) model.end_token_ids.push_back(model.tokenizer->eos_id());
    const std::optional<int32_t> turn_end = model.tokenizer->TokenId(text::kTurnEnd);
    if (turn_end && *turn_end != model.tokenizer->eos_id()) {
      model.end_token_ids.push_back(*turn_end);
    }
    if (!registry->models_.emplace(name, std::move(model)).second) {
      return absl::InvalidArgumentError(absl::StrCat("model '", name, "' is given twice"));
    }
  }
  return registry;
}

absl::StatusOr<const ServedModel*> ModelRegistry::Find(absl::string_view name) const {
  if (name.empty()) {
    if (models_.size() == 1) return &models_.begin()->second;
    return absl::InvalidArgumentError(
        absl::StrCat("model: empty, but several models are served: ", Names()));
  }
  const auto found = models_.find(std::string(name));
  if (found == models_.end()) {
    return absl::NotFoundError(
        absl::StrCat("model '", name.substr(0, 200), "' is not served; served are: ", Names()));
  }
  return &found->second;
}

std::string ModelRegistry::Names() const {
  return absl::StrJoin(models_, ", ",
                       [](std::string* out, const auto& entry) { out->append(entry.first); });
}

}  // namespace nosara::router
