#include "worker/model/checkpoint.h"

#include <openssl/evp.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/log.h"
#include "base/status_macros.h"

namespace nosara::worker {
namespace {

using nlohmann::json;

constexpr char kSingleFile[] = "model.safetensors";
constexpr char kIndexFile[] = "model.safetensors.index.json";
constexpr size_t kSampleBytes = 4096;  // of each end of a tensor, for the fingerprint
constexpr size_t kFingerprintBytes = 16;

TensorDType TensorDTypeOf(DType dtype) {
  return dtype == DType::kF32 ? TensorDType::kF32 : TensorDType::kBf16;
}

/// SHA-256 over fields that cannot run into each other: every one is preceded by its length.
class FieldHash final {
 public:
  FieldHash() : context_(EVP_MD_CTX_new()) {
    CHECK(context_ != nullptr && EVP_DigestInit_ex(context_, EVP_sha256(), nullptr) == 1);
  }
  ~FieldHash() { EVP_MD_CTX_free(context_); }
  FieldHash(const FieldHash&) = delete;
  FieldHash& operator=(const FieldHash&) = delete;

  void Add(const void* data, size_t size) {
    unsigned char length[8];
    for (int i = 0; i < 8; ++i) length[i] = static_cast<unsigned char>(uint64_t{size} >> (8 * i));
    CHECK(EVP_DigestUpdate(context_, length, sizeof(length)) == 1);
    CHECK(EVP_DigestUpdate(context_, data, size) == 1);
  }
  void Add(absl::string_view text) { Add(text.data(), text.size()); }
  void Add(int64_t number) { Add(absl::StrCat(number)); }
  /// Exact: hexadecimal floating point.
  void Add(double number) { Add(absl::StrFormat("%a", number)); }

  std::string Finish() {
    unsigned char digest[EVP_MAX_MD_SIZE];
    unsigned int size = 0;
    CHECK(EVP_DigestFinal_ex(context_, digest, &size) == 1 && size >= kFingerprintBytes);
    return absl::BytesToHexString(
        absl::string_view(reinterpret_cast<const char*>(digest), kFingerprintBytes));
  }

 private:
  EVP_MD_CTX* const context_;
};

/// A shard is a plain file name in the checkpoint's folder.
bool IsPlainFileName(absl::string_view name) {
  return !name.empty() && name != "." && name != ".." && !absl::StrContains(name, "/") &&
         !absl::StrContains(name, absl::string_view("\0", 1));
}

}  // namespace

struct Checkpoint::Files {
  std::string source;  // what lists the tensors, for messages
  std::vector<std::unique_ptr<SafetensorsFile>> files;
  absl::flat_hash_map<std::string, const SafetensorsFile*> by_tensor;

  static absl::StatusOr<Files> Open(const std::string& dir);
  static absl::StatusOr<Files> OpenSingle(const std::string& path);
  static absl::StatusOr<Files> OpenSharded(const std::string& dir, const std::string& index_path,
                                           const std::string& index);

  bool Contains(absl::string_view name) const { return by_tensor.contains(name); }

  /// The tensor, checked: shape, and dtype `expected` or, where that is not given, F32 or BF16.
  absl::StatusOr<TensorView> Get(const std::string& name, std::vector<int64_t> shape,
                                 std::optional<TensorDType> expected) const;
};

absl::StatusOr<Checkpoint::Files> Checkpoint::Files::Open(const std::string& dir) {
  // The order of the Transformers: the single file, then the index.
  const std::string single_path = absl::StrCat(dir, "/", kSingleFile);
  absl::StatusOr<Files> single = OpenSingle(single_path);
  if (!absl::IsNotFound(single.status())) return single;
  const std::string index_path = absl::StrCat(dir, "/", kIndexFile);
  std::ifstream stream(index_path, std::ios::binary);
  if (!stream) {
    return absl::NotFoundError(
        absl::StrCat(dir, ": has neither ", kSingleFile, " nor ", kIndexFile));
  }
  const std::string index((std::istreambuf_iterator<char>(stream)),
                          std::istreambuf_iterator<char>());
  return OpenSharded(dir, index_path, index);
}

absl::StatusOr<Checkpoint::Files> Checkpoint::Files::OpenSingle(const std::string& path) {
  Files files;
  files.source = path;
  ASSIGN_OR_RETURN(std::unique_ptr<SafetensorsFile> file, SafetensorsFile::Open(path));
  for (const TensorInfo& info : file->tensors()) files.by_tensor.emplace(info.name, file.get());
  files.files.push_back(std::move(file));
  return files;
}

absl::StatusOr<Checkpoint::Files> Checkpoint::Files::OpenSharded(const std::string& dir,
                                                                 const std::string& index_path,
                                                                 const std::string& index) {
  const auto fail = [&index_path](const auto&... what) {
    return absl::InvalidArgumentError(absl::StrCat(index_path, ": ", what...));
  };
  const json root = json::parse(index, nullptr, /*allow_exceptions=*/false);
  if (!root.is_object()) return fail("not a JSON object");
  const auto weight_map = root.find("weight_map");
  if (weight_map == root.end() || !weight_map->is_object()) {
    return fail("weight_map is not an object");
  }
  Files files;
  files.source = index_path;
  std::map<std::string, const SafetensorsFile*> shards;
  for (const auto& [tensor, value] : weight_map->items()) {
    if (!value.is_string() || !IsPlainFileName(value.get_ref<const std::string&>())) {
      return fail("weight_map[\"", tensor, "\"] is not the name of a file in the same folder");
    }
    const std::string& shard = value.get_ref<const std::string&>();
    auto [entry, added] = shards.try_emplace(shard, nullptr);
    if (added) {
      absl::StatusOr<std::unique_ptr<SafetensorsFile>> file =
          SafetensorsFile::Open(absl::StrCat(dir, "/", shard));
      if (!file.ok()) return Annotate(file.status(), absl::StrCat("shard of ", index_path));
      entry->second = file->get();
      files.files.push_back(*std::move(file));
    }
    files.by_tensor.emplace(tensor, entry->second);
  }
  for (const auto& [tensor, file] : files.by_tensor) {
    if (file->Contains(tensor)) continue;
    for (const auto& [shard, other] : shards) {
      if (other->Contains(tensor)) {
        return fail("tensor \"", tensor, "\" is said to be in ", file->path(), ", but is in ",
                    shard);
      }
    }
    return fail("tensor \"", tensor, "\" is said to be in ", file->path(), ", but is in no shard");
  }
  return files;
}

absl::StatusOr<TensorView> Checkpoint::Files::Get(const std::string& name,
                                                  std::vector<int64_t> shape,
                                                  std::optional<TensorDType> expected) const {
  const auto found = by_tensor.find(name);
  if (found == by_tensor.end()) {
    return absl::InvalidArgumentError(absl::StrCat(
        source, ": tensor \"", name, "\" is missing; expected shape ", ShapeString(shape)));
  }
  ASSIGN_OR_RETURN(TensorView view, found->second->Find(name));
  const auto fail = [&](const auto&... what) {
    return absl::InvalidArgumentError(
        absl::StrCat(found->second->path(), ": tensor \"", name, "\": ", what...));
  };
  if (view.shape != shape) {
    return fail("shape is ", ShapeString(view.shape), "; config.json asks for ",
                ShapeString(shape));
  }
  if (view.dtype != TensorDType::kF32 && view.dtype != TensorDType::kBf16) {
    return fail("dtype is ", TensorDTypeName(view.dtype), "; allowed: F32, BF16");
  }
  if (expected.has_value() && view.dtype != *expected) {
    return fail("dtype is ", TensorDTypeName(view.dtype), ", that of the embedding is ",
                TensorDTypeName(*expected), "; all matrices need the same");
  }
  if (reinterpret_cast<uintptr_t>(view.data.data()) % TensorDTypeBytes(view.dtype) != 0) {
    return fail(
        "data is not aligned to its elements; write the file again with a current version "
        "of the safetensors library");
  }
  return view;
}

absl::StatusOr<std::unique_ptr<Checkpoint>> Checkpoint::Open(const std::string& dir) {
  std::unique_ptr<Checkpoint> checkpoint(new Checkpoint());
  ASSIGN_OR_RETURN(checkpoint->config_, ModelConfig::Load(dir));
  ASSIGN_OR_RETURN(Files files, Files::Open(dir));
  RETURN_IF_ERROR(checkpoint->LoadTensors(files));
  checkpoint->files_ = std::move(files.files);
  checkpoint->ComputeFingerprint();

  absl::flat_hash_set<std::string> used;
  for (const TensorView* tensor : checkpoint->AllTensors()) {
    used.insert(tensor->name);
    checkpoint->weight_bytes_ += tensor->data.size();
  }
  size_t unused = 0;
  std::string example;
  for (const std::unique_ptr<SafetensorsFile>& file : checkpoint->files_) {
    for (const TensorInfo& info : file->tensors()) {
      // Older checkpoints carry RoPE's frequencies, which follow from rope_theta.
      if (used.contains(info.name) || absl::EndsWith(info.name, "rotary_emb.inv_freq")) continue;
      if (unused++ == 0) example = info.name;
    }
  }
  if (unused > 0) {
    LogWarning("{}: {} tensor(s) not used by this model, e.g. {}", dir, unused, example);
  }
  return checkpoint;
}

absl::Status Checkpoint::LoadTensors(const Files& files) {
  const int64_t hidden = config_.hidden_size;
  const int64_t inter = config_.intermediate_size;
  const int64_t kv_heads = config_.num_kv_heads;
  const int64_t q_rows = int64_t{config_.num_heads} * config_.head_dim;
  const int64_t kv_rows = kv_heads * config_.head_dim;

  ASSIGN_OR_RETURN(embed_tokens_, files.Get("model.embed_tokens.weight",
                                            {config_.vocab_size, hidden}, std::nullopt));
  const TensorDType main = embed_tokens_.dtype;
  if (config_.dtype_declared && TensorDTypeOf(config_.dtype) != main) {
    return absl::InvalidArgumentError(absl::StrCat(
        files.source, ": tensor \"", embed_tokens_.name, "\": dtype is ", TensorDTypeName(main),
        ", config.json says ", TensorDTypeName(TensorDTypeOf(config_.dtype))));
  }
  config_.dtype = main == TensorDType::kF32 ? DType::kF32 : DType::kBf16;
  ASSIGN_OR_RETURN(final_norm_, files.Get("model.norm.weight", {hidden}, std::nullopt));
  if (config_.tie_word_embeddings) {
    lm_head_ = embed_tokens_;
  } else {
    ASSIGN_OR_RETURN(lm_head_, files.Get("lm_head.weight", {config_.vocab_size, hidden}, main));
  }

  has_eviction_head_ = files.Contains("model.layers.0.self_attn.A") ||
                       files.Contains("model.layers.0.self_attn.delta.weight");
  layers_.resize(config_.num_layers);
  for (int i = 0; i < config_.num_layers; ++i) {
    LayerTensors& layer = layers_[i];
    const std::string prefix = absl::StrCat("model.layers.", i, ".");
    const std::string attention = absl::StrCat(prefix, "self_attn.");
    struct Required {
      TensorView* to;
      std::string name;
      std::vector<int64_t> shape;
      std::optional<TensorDType> dtype;
    };
    const Required required[] = {
        {&layer.q, absl::StrCat(attention, "q_proj.weight"), {q_rows, hidden}, main},
        {&layer.k, absl::StrCat(attention, "k_proj.weight"), {kv_rows, hidden}, main},
        {&layer.v, absl::StrCat(attention, "v_proj.weight"), {kv_rows, hidden}, main},
        {&layer.o, absl::StrCat(attention, "o_proj.weight"), {hidden, q_rows}, main},
        {&layer.gate, absl::StrCat(prefix, "mlp.gate_proj.weight"), {inter, hidden}, main},
        {&layer.up, absl::StrCat(prefix, "mlp.up_proj.weight"), {inter, hidden}, main},
        {&layer.down, absl::StrCat(prefix, "mlp.down_proj.weight"), {hidden, inter}, main},
        {&layer.input_norm, absl::StrCat(prefix, "input_layernorm.weight"), {hidden}, {}},
        {&layer.post_norm, absl::StrCat(prefix, "post_attention_layernorm.weight"), {hidden}, {}}};
    for (const Required& tensor : required) {
      ASSIGN_OR_RETURN(*tensor.to, files.Get(tensor.name, tensor.shape, tensor.dtype));
    }

    struct Conditional {
      std::optional<TensorView>* to;
      std::string name;
      std::vector<int64_t> shape;
      std::optional<TensorDType> dtype;
      bool wanted;
      absl::string_view because;
    };
    const bool bias = config_.attention_bias;
    const bool head = has_eviction_head_;
    const absl::string_view head_reason =
        head ? "layer 0 has an eviction head: all layers need self_attn.A and self_attn.delta"
             : "layer 0 has no eviction head: no layer may have one";
    const absl::string_view bias_reason =
        bias ? "config.json has attention_bias true" : "config.json has attention_bias false";
    const Conditional conditional[] = {
        {&layer.A, absl::StrCat(attention, "A"), {kv_heads}, {}, head, head_reason},
        {&layer.delta,
         absl::StrCat(attention, "delta.weight"),
         {kv_heads, kv_rows},
         {},
         head,
         head_reason},
        {&layer.q_bias, absl::StrCat(attention, "q_proj.bias"), {q_rows}, main, bias, bias_reason},
        {&layer.k_bias, absl::StrCat(attention, "k_proj.bias"), {kv_rows}, main, bias, bias_reason},
        {&layer.v_bias, absl::StrCat(attention, "v_proj.bias"), {kv_rows}, main, bias, bias_reason},
        {&layer.o_bias, absl::StrCat(attention, "o_proj.bias"), {hidden}, main, bias, bias_reason},
        {&layer.delta_bias,
         absl::StrCat(attention, "delta.bias"),
         {kv_heads},
         {},
         bias && head,
         bias_reason}};
    for (const Conditional& tensor : conditional) {
      if (tensor.wanted) {
        absl::StatusOr<TensorView> view = files.Get(tensor.name, tensor.shape, tensor.dtype);
        if (!view.ok()) {
          return absl::Status(view.status().code(),
                              absl::StrCat(view.status().message(), " (", tensor.because, ")"));
        }
        *tensor.to = *std::move(view);
      } else if (files.Contains(tensor.name)) {
        return absl::InvalidArgumentError(
            absl::StrCat(files.source, ": has tensor \"", tensor.name, "\", but ", tensor.because));
      }
    }
  }
  return absl::OkStatus();
}

std::vector<const TensorView*> Checkpoint::AllTensors() const {
  std::vector<const TensorView*> tensors = {&embed_tokens_, &final_norm_};
  if (!config_.tie_word_embeddings) tensors.push_back(&lm_head_);
  for (const LayerTensors& layer : layers_) {
    tensors.insert(tensors.end(), {&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate, &layer.up,
                                   &layer.down, &layer.input_norm, &layer.post_norm});
    for (const std::optional<TensorView>* tensor :
         {&layer.A, &layer.delta, &layer.q_bias, &layer.k_bias, &layer.v_bias, &layer.o_bias,
          &layer.delta_bias}) {
      if (tensor->has_value()) tensors.push_back(&**tensor);
    }
  }
  return tensors;
}

void Checkpoint::ComputeFingerprint() {
  FieldHash hash;
  hash.Add("nosara model 1");
  for (const int64_t number :
       {config_.hidden_size, config_.num_layers, config_.num_heads, config_.num_kv_heads,
        config_.head_dim, config_.intermediate_size, config_.vocab_size,
        static_cast<int>(config_.tie_word_embeddings), static_cast<int>(config_.attention_bias),
        config_.nosa.block_size, config_.nosa.kernel_size, config_.nosa.kernel_stride,
        config_.nosa.init_blocks, config_.nosa.window_blocks, config_.nosa.topk_q_blocks,
        config_.nosa.topk_blocks}) {
    hash.Add(number);
  }
  hash.Add(static_cast<double>(config_.rms_norm_eps));
  hash.Add(config_.rope_theta);
  hash.Add(DTypeName(config_.dtype));
  for (const TensorView* tensor : AllTensors()) {
    hash.Add(tensor->name);
    hash.Add(TensorDTypeName(tensor->dtype));
    hash.Add(ShapeString(tensor->shape));
    const size_t sample = std::min(kSampleBytes, tensor->data.size());
    hash.Add(tensor->data.data(), sample);
    hash.Add(tensor->data.data() + tensor->data.size() - sample, sample);
  }
  fingerprint_ = hash.Finish();
}

}  // namespace nosara::worker
