// A model on disk: config.json and the weights, checked and mapped, not converted.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/container/flat_hash_set.h"
#include "absl/status/statusor.h"
#include "worker/model/config.h"
#include "worker/model/safetensors.h"

namespace nosara::worker {

/// The weights of one decoder layer; rows are outputs: y = W x + b. H = hidden_size,
/// I = intermediate_size.
struct LayerTensors {
  TensorView q;           // [Hq*D, H]
  TensorView k;           // [Hkv*D, H]
  TensorView v;           // [Hkv*D, H]
  TensorView o;           // [H, Hq*D]
  TensorView gate;        // [I, H]
  TensorView up;          // [I, H]
  TensorView down;        // [H, I]
  TensorView input_norm;  // [H]
  TensorView post_norm;   // [H]

  // The eviction head: both or neither, alike in all layers.
  std::optional<TensorView> A;      // [Hkv]
  std::optional<TensorView> delta;  // [Hkv, Hkv*D]

  // Present exactly where attention_bias is true; delta_bias only together with `delta` (the
  // authors' model adds it inside the softplus: softplus(delta v + delta_bias)).
  std::optional<TensorView> q_bias;      // [Hq*D]
  std::optional<TensorView> k_bias;      // [Hkv*D]
  std::optional<TensorView> v_bias;      // [Hkv*D]
  std::optional<TensorView> o_bias;      // [H]
  std::optional<TensorView> delta_bias;  // [Hkv]
};

/// An open checkpoint: owns the mappings of its files. Immutable after Open, thread-safe.
///
/// Invariants: (1) every tensor exposed here exists, has the shape stated above and is aligned to
/// its element; (2) matrices (projections, embedding, LM head) and the biases of q, k, v, o have
/// the dtype config().dtype; (3) norms, A, delta and delta_bias are F32 or BF16, each on its own.
class Checkpoint final {
 public:
  /// Opens `dir`: config.json with model.safetensors, or with model.safetensors.index.json and the
  /// shards that it names. NOT_FOUND or INVALID_ARGUMENT, naming the file, the tensor, what it is
  /// and what it should be. Tensors that the model does not use are counted in one warning.
  static absl::StatusOr<std::unique_ptr<Checkpoint>> Open(const std::string& dir);
  Checkpoint(const Checkpoint&) = delete;
  Checkpoint& operator=(const Checkpoint&) = delete;

  /// dtype is that of the weights.
  const ModelConfig& config() const { return config_; }

  /// Whether the layers have A and delta; false for an InfLLM-V2 or plain Llama checkpoint.
  bool has_eviction_head() const { return has_eviction_head_; }

  const TensorView& embed_tokens() const { return embed_tokens_; }  // [vocab_size, H]
  const TensorView& final_norm() const { return final_norm_; }      // [H]
  /// [vocab_size, H]; embed_tokens() itself where the embeddings are tied.
  const TensorView& lm_head() const { return lm_head_; }

  /// Precondition: 0 <= layer < config().num_layers.
  const LayerTensors& layer(int layer) const { return layers_[layer]; }

  /// Sum of the sizes of all tensors that the model uses, tied ones once.
  uint64_t weight_bytes() const { return weight_bytes_; }

  /// 32 hexadecimal digits that tell this model from others: cached keys and values may be shared
  /// between workers exactly where it is equal. SHA-256, cut to 16 bytes, over the fields of the
  /// config that change what the model computes, the names, shapes and dtypes of the tensors that
  /// it uses, and the first and last 4 KiB of each one's data. Hashing everything would read 16 GB
  /// of an 8B model at each start; training moves all weights, so that two models of the same
  /// shape do not agree in these bytes of every tensor. An edit made by hand in the middle of a
  /// tensor is not seen.
  const std::string& fingerprint() const { return fingerprint_; }

 private:
  Checkpoint() = default;

  struct Files;  // the mapped files and which of them holds a tensor

  absl::Status LoadTensors(const Files& files);
  void ComputeFingerprint();
  std::vector<const TensorView*> AllTensors() const;

  // Constant after Open.
  ModelConfig config_;
  std::vector<std::unique_ptr<SafetensorsFile>> files_;
  bool has_eviction_head_ = false;
  TensorView embed_tokens_;
  TensorView final_norm_;
  TensorView lm_head_;
  std::vector<LayerTensors> layers_;
  uint64_t weight_bytes_ = 0;
  std::string fingerprint_;
};

}  // namespace nosara::worker
