#include "worker/model/config.h"

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <system_error>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/status_macros.h"

namespace nosara::worker {
namespace {

using nlohmann::json;

// What a checkpoint may call itself. The authors load theirs through the stock Llama class for full
// attention and through a class SparseLlamaForCausalLM for sparse attention (thunlp/NOSA,
// benchmarks/Efficiency); both have the tensors of a Llama plus the eviction head.
constexpr absl::string_view kArchitectures[] = {"LlamaForCausalLM", "SparseLlamaForCausalLM"};
constexpr absl::string_view kAllowedArchitectures =
    "one of LlamaForCausalLM, SparseLlamaForCausalLM";

// Bounds far above any model of this family. They keep products of sizes within 64 bits, and a
// nonsensical file from asking for terabytes.
constexpr int64_t kMaxWidth = 1 << 20;
constexpr int64_t kMaxLayers = 1 << 12;
constexpr int64_t kMaxVocab = 1 << 22;
constexpr int64_t kMaxContext = 1 << 24;
constexpr int kMaxTopkBlocks = 128;

/// `value` for a message: short, whatever the file holds.
std::string Show(const json& value) {
  if (value.is_object()) return "an object";
  if (value.is_array()) return "an array";
  std::string shown = value.dump(-1, ' ', /*ensure_ascii=*/true, json::error_handler_t::replace);
  if (shown.size() > 80) shown = absl::StrCat(shown.substr(0, 80), "...");
  return shown;
}

/// Typed access to the fields of one JSON object; errors name file, field, value and what is
/// allowed. A null counts as absent, as Python writes it for None.
class Fields final {
 public:
  /// `prefix` is put before the names of fields in messages, e.g. "nosa.".
  Fields(const json& object, absl::string_view file, absl::string_view prefix)
      : object_(object), file_(file), prefix_(prefix) {}

  const json* Find(const char* key) const {
    const auto field = object_.find(key);
    return field == object_.end() || field->is_null() ? nullptr : &*field;
  }

  absl::Status Refuse(absl::string_view key, const json& value, absl::string_view allowed) const {
    return absl::InvalidArgumentError(
        absl::StrCat(file_, ": ", prefix_, key, " is ", Show(value), "; allowed: ", allowed));
  }

  absl::Status Missing(absl::string_view key) const {
    return absl::InvalidArgumentError(absl::StrCat(file_, ": ", prefix_, key, " is missing"));
  }

  absl::Status GetInt(const char* key, int64_t low, int64_t high, int* out) const {
    const json* value = Find(key);
    if (value == nullptr) return Missing(key);
    return ReadInt(key, *value, low, high, out);
  }

  /// Leaves `out` alone where the field is absent.
  absl::Status GetOptionalInt(const char* key, int64_t low, int64_t high, int* out) const {
    const json* value = Find(key);
    if (value == nullptr) return absl::OkStatus();
    return ReadInt(key, *value, low, high, out);
  }

  absl::Status GetOptionalBool(const char* key, bool* out) const {
    const json* value = Find(key);
    if (value == nullptr) return absl::OkStatus();
    if (!value->is_boolean()) return Refuse(key, *value, "true or false");
    *out = value->get<bool>();
    return absl::OkStatus();
  }

  /// A positive, finite number.
  absl::Status GetOptionalPositive(const char* key, double* out) const {
    const json* value = Find(key);
    if (value == nullptr) return absl::OkStatus();
    const double number = value->is_number() ? value->get<double>() : 0;
    if (!(number > 0) || !std::isfinite(number)) return Refuse(key, *value, "a positive number");
    *out = number;
    return absl::OkStatus();
  }

  absl::Status ReadInt(absl::string_view key, const json& value, int64_t low, int64_t high,
                       int* out) const {
    const bool fits = value.is_number_unsigned()
                          ? value.get<uint64_t>() <= static_cast<uint64_t>(INT64_MAX)
                          : value.is_number_integer();
    const int64_t number = fits ? value.get<int64_t>() : 0;
    if (!fits || number < low || number > high) {
      return Refuse(key, value, absl::StrCat("an integer from ", low, " to ", high));
    }
    *out = static_cast<int>(number);
    return absl::OkStatus();
  }

  const json& object() const { return object_; }

 private:
  const json& object_;
  const absl::string_view file_;
  const absl::string_view prefix_;
};

absl::Status ReadArchitecture(const Fields& fields, ModelConfig* config) {
  const json* value = fields.Find("architectures");
  if (value == nullptr) return fields.Missing("architectures");
  if (!value->is_array() || value->size() != 1) {
    return fields.Refuse("architectures", *value,
                         absl::StrCat("an array with ", kAllowedArchitectures));
  }
  const json& name = (*value)[0];
  const bool known =
      name.is_string() && std::find(std::begin(kArchitectures), std::end(kArchitectures),
                                    name.get_ref<const std::string&>()) != std::end(kArchitectures);
  if (!known) return fields.Refuse("architectures[0]", name, kAllowedArchitectures);
  config->architecture = name.get<std::string>();
  return absl::OkStatus();
}

/// The newer Transformers write "dtype", the older ones "torch_dtype".
absl::Status ReadDType(const Fields& fields, ModelConfig* config) {
  for (const char* key : {"dtype", "torch_dtype"}) {
    const json* value = fields.Find(key);
    if (value == nullptr) continue;
    const std::string name = value->is_string() ? value->get<std::string>() : "";
    if (name == "bfloat16") {
      config->dtype = DType::kBf16;
    } else if (name == "float32") {
      config->dtype = DType::kF32;
    } else {
      return fields.Refuse(key, *value, "\"bfloat16\", \"float32\"");
    }
    config->dtype_declared = true;
    return absl::OkStatus();
  }
  return absl::OkStatus();
}

/// Only plain RoPE. `key` is rope_scaling, or rope_parameters, which newer Transformers write and
/// which may hold rope_theta as well.
absl::Status ReadRope(const Fields& fields, const char* key, absl::string_view file,
                      ModelConfig* config) {
  const json* value = fields.Find(key);
  if (value == nullptr) return absl::OkStatus();
  if (!value->is_object()) return fields.Refuse(key, *value, "null or an object");
  const std::string prefix = absl::StrCat(key, ".");
  const Fields rope(*value, file, prefix);
  for (const char* kind_key : {"rope_type", "type"}) {
    const json* kind = rope.Find(kind_key);
    if (kind != nullptr && *kind != "default") {
      return rope.Refuse(kind_key, *kind, "\"default\" (no other kind of RoPE is implemented)");
    }
  }
  if (rope.Find("rope_type") == nullptr && rope.Find("type") == nullptr &&
      rope.Find("factor") != nullptr) {
    return rope.Refuse("factor", *rope.Find("factor"), "none (scaled RoPE is not implemented)");
  }
  return rope.GetOptionalPositive("rope_theta", &config->rope_theta);
}

/// Fields of this and of related families that change what the model computes. Each may only have
/// the value that means "not used".
absl::Status RefuseUnimplemented(const Fields& fields, const ModelConfig& config) {
  constexpr absl::string_view kNotImplemented = " (anything else is not implemented)";
  const json* act = fields.Find("hidden_act");
  if (act != nullptr && *act != "silu" && *act != "swish") {
    return fields.Refuse("hidden_act", *act, absl::StrCat("\"silu\"", kNotImplemented));
  }
  for (const char* key : {"mlp_bias", "use_qk_norm", "qk_norm", "rope_interleaved",
                          "rope_interleave", "add_cross_attention"}) {
    const json* value = fields.Find(key);
    if (value != nullptr && *value != false) {
      return fields.Refuse(key, *value, absl::StrCat("false", kNotImplemented));
    }
  }
  for (const char* key : {"scale_emb", "partial_rotary_factor", "embedding_multiplier",
                          "residual_multiplier", "logits_scaling"}) {
    const json* value = fields.Find(key);
    if (value != nullptr && *value != 1) {
      return fields.Refuse(key, *value, absl::StrCat("1", kNotImplemented));
    }
  }
  for (const char* key :
       {"scale_depth", "attention_multiplier", "attn_logit_softcapping", "final_logit_softcapping",
        "attn_logit_softcap", "query_pre_attn_scalar", "num_local_experts", "num_experts",
        "quantization_config", "sparse_config"}) {
    const json* value = fields.Find(key);
    if (value != nullptr) {
      return fields.Refuse(key, *value, absl::StrCat("null", kNotImplemented));
    }
  }
  // MiniCPM divides the logits by hidden_size / dim_model_base.
  const json* base = fields.Find("dim_model_base");
  if (base != nullptr && *base != config.hidden_size) {
    return fields.Refuse("dim_model_base", *base,
                         absl::StrCat("hidden_size = ", config.hidden_size, kNotImplemented));
  }
  const json* window = fields.Find("sliding_window");
  const json* use_window = fields.Find("use_sliding_window");
  if (window != nullptr && !(use_window != nullptr && *use_window == false) &&
      !(window->is_number() && *window >= config.max_position_embeddings)) {
    return fields.Refuse("sliding_window", *window,
                         absl::StrCat("null, or not less than max_position_embeddings = ",
                                      config.max_position_embeddings, kNotImplemented));
  }
  const json* layers = fields.Find("layer_types");
  if (layers != nullptr) {
    const bool all_full = layers->is_array() &&
                          std::all_of(layers->begin(), layers->end(),
                                      [](const json& type) { return type == "full_attention"; });
    if (!all_full) {
      return fields.Refuse("layer_types", *layers,
                           absl::StrCat("\"full_attention\" for each layer", kNotImplemented));
    }
  }
  return absl::OkStatus();
}

absl::Status ReadNosa(const Fields& fields, absl::string_view file, ModelConfig* config) {
  const json* value = fields.Find("nosa");
  if (value == nullptr) return absl::OkStatus();
  if (!value->is_object()) return fields.Refuse("nosa", *value, "an object");
  NosaConfig& nosa = config->nosa;
  const Fields sub(*value, file, "nosa.");
  const std::pair<const char*, int*> numbers[] = {
      {"block_size", &nosa.block_size},       {"kernel_size", &nosa.kernel_size},
      {"kernel_stride", &nosa.kernel_stride}, {"init_blocks", &nosa.init_blocks},
      {"window_blocks", &nosa.window_blocks}, {"topk_q_blocks", &nosa.topk_q_blocks},
      {"topk_blocks", &nosa.topk_blocks}};
  for (const auto& [key, number] : numbers) {
    RETURN_IF_ERROR(sub.GetOptionalInt(key, 0, 1 << 20, number));
  }
  // A misspelt number would silently leave its default in force.
  for (const auto& [key, field] : value->items()) {
    const bool known =
        std::any_of(std::begin(numbers), std::end(numbers),
                    [&key = key](const auto& number) { return key == number.first; });
    if (!known) {
      return absl::InvalidArgumentError(
          absl::StrCat(file, ": nosa.", key, " is not known; allowed: ",
                       absl::StrJoin(numbers, ", ", [](std::string* out, const auto& number) {
                         absl::StrAppend(out, number.first);
                       })));
    }
  }
  return absl::OkStatus();
}

/// Adds the ids of eos_token_id, an integer or an array of them.
absl::Status ReadEos(const Fields& fields, int vocab_size, std::vector<int32_t>* ids) {
  const json* value = fields.Find("eos_token_id");
  if (value == nullptr) return absl::OkStatus();
  const json list = value->is_array() ? *value : json::array({*value});
  for (const json& entry : list) {
    int id = 0;
    RETURN_IF_ERROR(fields.ReadInt("eos_token_id", entry, 0, vocab_size - 1, &id));
    ids->push_back(id);
  }
  std::sort(ids->begin(), ids->end());
  ids->erase(std::unique(ids->begin(), ids->end()), ids->end());
  return absl::OkStatus();
}

absl::StatusOr<std::string> ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file)
    return absl::NotFoundError(absl::StrCat(path, ": ", std::generic_category().message(errno)));
  std::string content((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  if (file.bad()) return absl::InvalidArgumentError(absl::StrCat(path, ": cannot be read"));
  return content;
}

absl::StatusOr<json> ParseObject(absl::string_view text, absl::string_view name) {
  json object = json::parse(text.begin(), text.end(), nullptr, /*allow_exceptions=*/false);
  if (!object.is_object()) {
    return absl::InvalidArgumentError(absl::StrCat(name, ": not a JSON object"));
  }
  return object;
}

absl::Status CheckNumber(absl::string_view name, int value, bool valid, absl::string_view allowed) {
  if (valid) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(name, " is ", value, "; allowed: ", allowed));
}

absl::Status ValidateNosa(const NosaConfig& nosa) {
  constexpr absl::string_view kFixed = " (the page layout is built for it)";
  RETURN_IF_ERROR(CheckNumber("nosa.block_size", nosa.block_size, nosa.block_size == 64,
                              absl::StrCat("64", kFixed)));
  RETURN_IF_ERROR(CheckNumber("nosa.kernel_size", nosa.kernel_size, nosa.kernel_size == 32,
                              absl::StrCat("32", kFixed)));
  RETURN_IF_ERROR(CheckNumber("nosa.kernel_stride", nosa.kernel_stride, nosa.kernel_stride == 16,
                              absl::StrCat("16", kFixed)));
  RETURN_IF_ERROR(CheckNumber("nosa.topk_blocks", nosa.topk_blocks,
                              nosa.topk_blocks >= 1 && nosa.topk_blocks <= kMaxTopkBlocks,
                              absl::StrCat("1 to ", kMaxTopkBlocks)));
  const std::string up_to_topk = absl::StrCat(" to topk_blocks = ", nosa.topk_blocks);
  RETURN_IF_ERROR(CheckNumber("nosa.init_blocks", nosa.init_blocks,
                              nosa.init_blocks >= 0 && nosa.init_blocks <= nosa.topk_blocks,
                              absl::StrCat("0", up_to_topk)));
  RETURN_IF_ERROR(CheckNumber("nosa.window_blocks", nosa.window_blocks,
                              nosa.window_blocks >= 1 && nosa.window_blocks <= nosa.topk_blocks,
                              absl::StrCat("1", up_to_topk)));
  RETURN_IF_ERROR(CheckNumber(
      "nosa.topk_q_blocks", nosa.topk_q_blocks,
      nosa.topk_q_blocks >= 1 && nosa.topk_q_blocks <= nosa.topk_blocks,
      absl::StrCat("1", up_to_topk, " (the query's own block is forced and needs a place)")));
  return CheckNumber("nosa.init_blocks + window_blocks + topk_q_blocks", nosa.QueryAwareBlocks(),
                     nosa.QueryAwareBlocks() <= nosa.topk_blocks, absl::StrCat("up", up_to_topk));
}

}  // namespace

absl::StatusOr<ModelConfig> ModelConfig::Load(const std::string& dir) {
  const std::string path = absl::StrCat(dir, "/config.json");
  ASSIGN_OR_RETURN(const std::string content, ReadFile(path));
  ASSIGN_OR_RETURN(ModelConfig config, Parse(content, path));
  const std::string generation_path = absl::StrCat(dir, "/generation_config.json");
  const absl::StatusOr<std::string> generation = ReadFile(generation_path);
  if (absl::IsNotFound(generation.status())) return config;
  RETURN_IF_ERROR(generation.status());
  ASSIGN_OR_RETURN(const json object, ParseObject(*generation, generation_path));
  RETURN_IF_ERROR(
      ReadEos(Fields(object, generation_path, ""), config.vocab_size, &config.eos_token_ids));
  return config;
}

absl::StatusOr<ModelConfig> ModelConfig::Parse(absl::string_view text, absl::string_view name) {
  ASSIGN_OR_RETURN(const json object, ParseObject(text, name));
  const Fields fields(object, name, "");
  ModelConfig config;
  RETURN_IF_ERROR(ReadArchitecture(fields, &config));
  RETURN_IF_ERROR(fields.GetInt("hidden_size", 1, kMaxWidth, &config.hidden_size));
  RETURN_IF_ERROR(fields.GetInt("num_hidden_layers", 1, kMaxLayers, &config.num_layers));
  RETURN_IF_ERROR(fields.GetInt("num_attention_heads", 1, kMaxWidth, &config.num_heads));
  config.num_kv_heads = config.num_heads;
  RETURN_IF_ERROR(fields.GetOptionalInt("num_key_value_heads", 1, kMaxWidth, &config.num_kv_heads));
  if (fields.Find("head_dim") == nullptr) {
    if (config.hidden_size % config.num_heads != 0) {
      return absl::InvalidArgumentError(absl::StrCat(
          name, ": hidden_size ", config.hidden_size, " is not a multiple of num_attention_heads ",
          config.num_heads, ", and head_dim is missing"));
    }
    config.head_dim = config.hidden_size / config.num_heads;
  }
  RETURN_IF_ERROR(fields.GetOptionalInt("head_dim", 1, kMaxWidth, &config.head_dim));
  RETURN_IF_ERROR(fields.GetInt("intermediate_size", 1, kMaxWidth, &config.intermediate_size));
  RETURN_IF_ERROR(fields.GetInt("vocab_size", 1, kMaxVocab, &config.vocab_size));
  RETURN_IF_ERROR(
      fields.GetInt("max_position_embeddings", 1, kMaxContext, &config.max_position_embeddings));
  if (fields.Find("rms_norm_eps") == nullptr) return fields.Missing("rms_norm_eps");
  double eps = 0;
  RETURN_IF_ERROR(fields.GetOptionalPositive("rms_norm_eps", &eps));
  config.rms_norm_eps = static_cast<float>(eps);
  RETURN_IF_ERROR(fields.GetOptionalPositive("rope_theta", &config.rope_theta));
  RETURN_IF_ERROR(ReadRope(fields, "rope_scaling", name, &config));
  RETURN_IF_ERROR(ReadRope(fields, "rope_parameters", name, &config));
  RETURN_IF_ERROR(fields.GetOptionalBool("tie_word_embeddings", &config.tie_word_embeddings));
  RETURN_IF_ERROR(fields.GetOptionalBool("attention_bias", &config.attention_bias));
  RETURN_IF_ERROR(ReadDType(fields, &config));
  RETURN_IF_ERROR(ReadNosa(fields, name, &config));
  RETURN_IF_ERROR(
      fields.GetOptionalInt("bos_token_id", 0, config.vocab_size - 1, &config.bos_token_id));
  RETURN_IF_ERROR(ReadEos(fields, config.vocab_size, &config.eos_token_ids));
  RETURN_IF_ERROR(RefuseUnimplemented(fields, config));
  RETURN_IF_ERROR(Annotate(config.Validate(), name));
  return config;
}

absl::Status ModelConfig::Validate() const {
  const std::pair<absl::string_view, int> sizes[] = {
      {"hidden_size", hidden_size},
      {"num_hidden_layers", num_layers},
      {"num_attention_heads", num_heads},
      {"num_key_value_heads", num_kv_heads},
      {"head_dim", head_dim},
      {"intermediate_size", intermediate_size},
      {"vocab_size", vocab_size},
      {"max_position_embeddings", max_position_embeddings}};
  for (const auto& [name, value] : sizes) {
    RETURN_IF_ERROR(CheckNumber(name, value, value >= 1, "1 or more"));
  }
  RETURN_IF_ERROR(CheckNumber("num_key_value_heads", num_kv_heads, num_heads % num_kv_heads == 0,
                              absl::StrCat("a divisor of num_attention_heads = ", num_heads)));
  RETURN_IF_ERROR(
      CheckNumber("head_dim", head_dim, head_dim % 2 == 0, "an even number (RoPE turns pairs)"));
  const int64_t width = int64_t{num_heads} * head_dim;
  if (width > kMaxWidth) {
    return absl::InvalidArgumentError(
        absl::StrCat("num_attention_heads * head_dim is ", width, "; allowed: up to ", kMaxWidth));
  }
  if (!(rms_norm_eps > 0) || !std::isfinite(rms_norm_eps)) {
    return absl::InvalidArgumentError(
        absl::StrCat("rms_norm_eps is ", rms_norm_eps, "; allowed: a positive number"));
  }
  if (!(rope_theta > 0) || !std::isfinite(rope_theta)) {
    return absl::InvalidArgumentError(
        absl::StrCat("rope_theta is ", rope_theta, "; allowed: a positive number"));
  }
  RETURN_IF_ERROR(CheckNumber("bos_token_id", bos_token_id,
                              bos_token_id >= -1 && bos_token_id < vocab_size,
                              absl::StrCat("-1 (none) to ", vocab_size - 1)));
  for (const int32_t id : eos_token_ids) {
    RETURN_IF_ERROR(CheckNumber("eos_token_id", id, id >= 0 && id < vocab_size,
                                absl::StrCat("0 to ", vocab_size - 1)));
  }
  return ValidateNosa(nosa);
}

}  // namespace nosara::worker
