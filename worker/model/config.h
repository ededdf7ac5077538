// What a checkpoint's config.json says about the model, checked against what the engine computes.
//
// A Hugging Face Llama configuration plus an optional object "nosa" with the budget of the sparse
// attention. Every field that would change the mathematics and that the engine does not implement
// is refused by name: a checkpoint either gives its own results or does not load.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "worker/model/dtype.h"

namespace nosara::worker {

/// The numbers of the block selection. The defaults are those of the released models, whose
/// config.json has no "nosa" object.
///
/// Invariants of a validated value (c = init_blocks + window_blocks + topk_q_blocks):
/// block_size = 64, kernel_size = 32, kernel_stride = 16 (the page layout and the kernels are built
/// for them); init_blocks >= 0; window_blocks >= 1; topk_q_blocks >= 1, which gives the query's own
/// block its place among the forced ones; c <= topk_blocks <= 128.
struct NosaConfig {
  int block_size = 64;     // tokens per block
  int kernel_size = 32;    // tokens averaged into one compressed key
  int kernel_stride = 16;  // tokens from one compressed key to the next
  int init_blocks = 1;     // first blocks, always selected
  int window_blocks = 16;  // blocks before the query's own block, always selected with it
  int topk_q_blocks = 16;  // further blocks selected by the query's scores
  int topk_blocks = 64;    // all selected blocks; the rest by the query-agnostic score

  /// The size of the query-aware part of a selection, forced blocks included.
  int QueryAwareBlocks() const { return init_blocks + window_blocks + topk_q_blocks; }

  friend bool operator==(const NosaConfig&, const NosaConfig&) = default;
};

/// A model's shape and constants. A plain value; immutable after loading, thus thread-safe.
///
/// Invariants of a validated value: all sizes positive; num_heads is a multiple of num_kv_heads;
/// head_dim is even; token ids lie in [0, vocab_size).
struct ModelConfig {
  std::string architecture;  // as in config.json, e.g. "LlamaForCausalLM"
  int hidden_size = 0;
  int num_layers = 0;    // L
  int num_heads = 0;     // Hq
  int num_kv_heads = 0;  // Hkv
  int head_dim = 0;      // D; hidden_size / num_heads where config.json does not say
  int intermediate_size = 0;
  int vocab_size = 0;               // rows of the embedding; at least the tokenizer's
  int max_position_embeddings = 0;  // the longest context, prompt and output, in tokens
  float rms_norm_eps = 0;
  double rope_theta = 10000.0;
  bool tie_word_embeddings = false;
  bool attention_bias = false;
  DType dtype = DType::kF32;
  /// Whether config.json names the dtype. Where it does not, Checkpoint takes the weights' own.
  bool dtype_declared = false;
  NosaConfig nosa;
  int32_t bos_token_id = -1;           // -1: none
  std::vector<int32_t> eos_token_ids;  // ascending, unique; may be empty

  /// Query heads per KV head (G).
  int GroupSize() const { return num_heads / num_kv_heads; }

  /// Reads `dir`/config.json and, for the end-of-sequence ids, `dir`/generation_config.json where
  /// there is one (the union of both counts). NOT_FOUND without config.json; INVALID_ARGUMENT for
  /// anything that Parse or Validate refuses.
  static absl::StatusOr<ModelConfig> Load(const std::string& dir);

  /// Parses the text of a config.json and validates it. `name` is the file's name in messages.
  /// INVALID_ARGUMENT names file, field, value and what is allowed. Never throws, whatever the
  /// input.
  static absl::StatusOr<ModelConfig> Parse(absl::string_view json, absl::string_view name);

  /// Checks the invariants above and those of NosaConfig.
  absl::Status Validate() const;
};

}  // namespace nosara::worker
