#include "worker/backend/cuda/weights.h"

#include <algorithm>
#include <cmath>
#include <random>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "worker/model/bf16.h"

namespace nosara::worker {
namespace {

template <typename T>
absl::Span<const std::byte> BytesOf(const std::vector<T>& values) {
  return absl::MakeConstSpan(reinterpret_cast<const std::byte*>(values.data()),
                             values.size() * sizeof(T));
}

template <typename T>
absl::Status Upload(DeviceArray<T>& to, size_t offset, absl::Span<const std::byte> from) {
  return CopyToDevice(reinterpret_cast<std::byte*>(to.data()) + offset, from.data(), from.size(),
                      "copying weights to the device");
}

/// Matrices stacked by rows.
absl::StatusOr<DeviceArray<__nv_bfloat16>> Stacked(
    std::initializer_list<const TensorView*> tensors) {
  size_t size = 0;
  for (const TensorView* tensor : tensors) size += tensor->NumElements();
  ASSIGN_OR_RETURN(auto array, DeviceArray<__nv_bfloat16>::Create(size, "weights"));
  size_t offset = 0;
  for (const TensorView* tensor : tensors) {
    RETURN_IF_ERROR(Upload(array, offset, tensor->data));
    offset += tensor->data.size();
  }
  return array;
}

absl::StatusOr<DeviceArray<float>> Widened(
    std::initializer_list<const std::optional<TensorView>*> tensors) {
  std::vector<float> values;
  for (const std::optional<TensorView>* tensor : tensors) {
    if (!tensor->has_value()) return DeviceArray<float>();
    const size_t begin = values.size();
    values.resize(begin + (*tensor)->NumElements());
    (*tensor)->CopyToFloat(absl::MakeSpan(values).subspan(begin));
  }
  ASSIGN_OR_RETURN(auto array, DeviceArray<float>::Create(values.size(), "weights"));
  RETURN_IF_ERROR(Upload(array, 0, BytesOf(values)));
  return array;
}

absl::StatusOr<DeviceArray<float>> Widened(const TensorView& tensor) {
  const std::optional<TensorView> one = tensor;
  return Widened({&one});
}

}  // namespace

int64_t CudaWeights::matrix_bytes() const {
  int64_t bytes = int64_t{2} * config.vocab_size * config.hidden_size;
  for (const Layer& layer : layers) {
    bytes += layer.qkv.bytes() + layer.o.bytes() + layer.gate_up.bytes() + layer.down.bytes();
  }
  return bytes;
}

absl::StatusOr<std::unique_ptr<CudaWeights>> CudaWeights::Load(const Checkpoint& checkpoint) {
  const ModelConfig& config = checkpoint.config();
  if (config.dtype != DType::kBf16) {
    return absl::InvalidArgumentError(
        absl::StrCat("the model's weights are ", DTypeName(config.dtype),
                     ": the CUDA backend takes bf16 (the CPU backend takes both)"));
  }
  auto weights = std::make_unique<CudaWeights>();
  weights->config = config;
  ASSIGN_OR_RETURN(weights->embedding, Stacked({&checkpoint.embed_tokens()}));
  if (checkpoint.lm_head().data.data() != checkpoint.embed_tokens().data.data()) {
    ASSIGN_OR_RETURN(weights->lm_head, Stacked({&checkpoint.lm_head()}));
  }
  ASSIGN_OR_RETURN(weights->final_norm, Widened(checkpoint.final_norm()));
  for (int i = 0; i < config.num_layers; ++i) {
    const LayerTensors& from = checkpoint.layer(i);
    Layer layer;
    ASSIGN_OR_RETURN(layer.input_norm, Widened(from.input_norm));
    ASSIGN_OR_RETURN(layer.post_norm, Widened(from.post_norm));
    ASSIGN_OR_RETURN(layer.qkv, Stacked({&from.q, &from.k, &from.v}));
    ASSIGN_OR_RETURN(layer.o, Stacked({&from.o}));
    ASSIGN_OR_RETURN(layer.gate_up, Stacked({&from.gate, &from.up}));
    ASSIGN_OR_RETURN(layer.down, Stacked({&from.down}));
    ASSIGN_OR_RETURN(layer.qkv_bias, Widened({&from.q_bias, &from.k_bias, &from.v_bias}));
    ASSIGN_OR_RETURN(layer.o_bias, Widened({&from.o_bias}));
    ASSIGN_OR_RETURN(layer.A, Widened({&from.A}));
    ASSIGN_OR_RETURN(layer.delta, Widened({&from.delta}));
    ASSIGN_OR_RETURN(layer.delta_bias, Widened({&from.delta_bias}));
    weights->layers.push_back(std::move(layer));
  }
  return weights;
}

absl::StatusOr<std::unique_ptr<CudaWeights>> CudaWeights::Random(const ModelConfig& config,
                                                                 uint64_t seed) {
  // One block of random numbers, repeated from ever other offsets: no two rows are alike, and a
  // model of 16 GB is there within seconds.
  constexpr size_t kPattern = (size_t{8} << 20) + 1021;
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> pattern(kPattern);
  for (float& x : pattern) x = normal(random);

  std::vector<Bf16> scaled(kPattern);
  const auto matrix = [&](size_t out, size_t in) -> absl::StatusOr<DeviceArray<__nv_bfloat16>> {
    const float scale = 1.0f / std::sqrt(static_cast<float>(in));
    const size_t offset = random() % kPattern;
    for (size_t i = 0; i < kPattern; ++i) {
      scaled[i] = FromFloat(pattern[(i + offset) % kPattern] * scale);
    }
    ASSIGN_OR_RETURN(auto array, DeviceArray<__nv_bfloat16>::Create(out * in, "weights"));
    for (size_t begin = 0; begin < array.bytes(); begin += kPattern * sizeof(Bf16)) {
      const auto bytes = BytesOf(scaled);
      RETURN_IF_ERROR(
          Upload(array, begin, bytes.subspan(0, std::min(bytes.size(), array.bytes() - begin))));
    }
    return array;
  };
  const auto vector = [&](size_t size, float mean,
                          float deviation) -> absl::StatusOr<DeviceArray<float>> {
    std::vector<float> values(size);
    for (float& x : values) x = mean + deviation * normal(random);
    ASSIGN_OR_RETURN(auto array, DeviceArray<float>::Create(size, "weights"));
    RETURN_IF_ERROR(Upload(array, 0, BytesOf(values)));
    return array;
  };

  auto weights = std::make_unique<CudaWeights>();
  weights->config = config;
  const size_t hidden = config.hidden_size;
  const size_t wide = config.intermediate_size;
  const size_t q_width = static_cast<size_t>(config.num_heads) * config.head_dim;
  const size_t kv_width = static_cast<size_t>(config.num_kv_heads) * config.head_dim;
  ASSIGN_OR_RETURN(weights->embedding, matrix(config.vocab_size, hidden));
  if (!config.tie_word_embeddings) {
    ASSIGN_OR_RETURN(weights->lm_head, matrix(config.vocab_size, hidden));
  }
  ASSIGN_OR_RETURN(weights->final_norm, vector(hidden, 1, 0.02f));
  for (int i = 0; i < config.num_layers; ++i) {
    Layer layer;
    ASSIGN_OR_RETURN(layer.input_norm, vector(hidden, 1, 0.02f));
    ASSIGN_OR_RETURN(layer.post_norm, vector(hidden, 1, 0.02f));
    ASSIGN_OR_RETURN(layer.qkv, matrix(q_width + 2 * kv_width, hidden));
    ASSIGN_OR_RETURN(layer.o, matrix(hidden, q_width));
    ASSIGN_OR_RETURN(layer.gate_up, matrix(2 * wide, hidden));
    ASSIGN_OR_RETURN(layer.down, matrix(hidden, wide));
    ASSIGN_OR_RETURN(layer.A, vector(config.num_kv_heads, -0.5f, 0.1f));
    ASSIGN_OR_RETURN(layer.delta, vector(config.num_kv_heads * kv_width, 0,
                                         1.0f / std::sqrt(static_cast<float>(kv_width))));
    weights->layers.push_back(std::move(layer));
  }
  return weights;
}

}  // namespace nosara::worker
