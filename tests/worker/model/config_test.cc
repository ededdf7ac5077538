#include "worker/model/config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "tests/status_matchers.h"
#include "tests/text/temp_dir.h"

namespace nosara::worker {
namespace {

using nosara::testing::StatusIs;
using nosara::testing::TempDir;
using ::testing::ElementsAre;

constexpr char kBase[] = R"({"architectures": ["LlamaForCausalLM"], "hidden_size": 64,
  "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96, "vocab_size": 300,
  "max_position_embeddings": 4096, "rms_norm_eps": 1e-5})";

/// kBase with more fields in front; a field that it has as well is thereby given twice, and JSON's
/// last one counts, so overrides go behind.
std::string With(const std::string& fields) {
  std::string text = kBase;
  text.pop_back();
  return absl::StrCat(text, ", ", fields, "}");
}

TEST(ConfigTest, DefaultsOfAMinimalFile) {
  ASSERT_OK_AND_ASSIGN(const ModelConfig config, ModelConfig::Parse(kBase, "config.json"));
  EXPECT_EQ(config.architecture, "LlamaForCausalLM");
  EXPECT_EQ(config.hidden_size, 64);
  EXPECT_EQ(config.num_layers, 2);
  EXPECT_EQ(config.num_kv_heads, 4);
  EXPECT_EQ(config.head_dim, 16);
  EXPECT_EQ(config.GroupSize(), 1);
  EXPECT_EQ(config.rope_theta, 10000.0);
  EXPECT_FLOAT_EQ(config.rms_norm_eps, 1e-5f);
  EXPECT_FALSE(config.tie_word_embeddings);
  EXPECT_FALSE(config.attention_bias);
  EXPECT_FALSE(config.dtype_declared);
  EXPECT_EQ(config.bos_token_id, -1);
  EXPECT_TRUE(config.eos_token_ids.empty());
  EXPECT_EQ(config.nosa, NosaConfig());
  EXPECT_EQ(config.nosa.QueryAwareBlocks(), 33);
}

TEST(ConfigTest, ReadsEveryField) {
  ASSERT_OK_AND_ASSIGN(
      const ModelConfig config,
      ModelConfig::Parse(With(R"("num_key_value_heads": 2, "head_dim": 32, "rope_theta": 5e4,
            "tie_word_embeddings": true, "attention_bias": true, "torch_dtype": "bfloat16",
            "bos_token_id": 1, "eos_token_id": [7, 2, 7], "hidden_act": "silu", "mlp_bias": false,
            "rope_scaling": {"rope_type": "default"}, "sliding_window": null, "pretraining_tp": 1,
            "scale_emb": 1, "scale_depth": null, "partial_rotary_factor": 1.0,
            "layer_types": ["full_attention", "full_attention"], "quantization_config": null,
            "nosa": {"block_size": 64, "kernel_size": 32, "kernel_stride": 16, "init_blocks": 2,
                     "window_blocks": 3, "topk_q_blocks": 4, "topk_blocks": 20})"),
                         "config.json"));
  EXPECT_EQ(config.num_kv_heads, 2);
  EXPECT_EQ(config.GroupSize(), 2);
  EXPECT_EQ(config.head_dim, 32);
  EXPECT_EQ(config.rope_theta, 50000.0);
  EXPECT_TRUE(config.tie_word_embeddings);
  EXPECT_TRUE(config.attention_bias);
  EXPECT_TRUE(config.dtype_declared);
  EXPECT_EQ(config.dtype, DType::kBf16);
  EXPECT_EQ(config.bos_token_id, 1);
  EXPECT_THAT(config.eos_token_ids, ElementsAre(2, 7));
  NosaConfig nosa;
  nosa.init_blocks = 2;
  nosa.window_blocks = 3;
  nosa.topk_q_blocks = 4;
  nosa.topk_blocks = 20;
  EXPECT_EQ(config.nosa, nosa);
}

TEST(ConfigTest, ReadsTheSpellingsOfNewerTransformers) {
  ASSERT_OK_AND_ASSIGN(const ModelConfig config,
                       ModelConfig::Parse(With(R"("dtype": "float32", "rope_parameters":
                              {"rope_type": "default", "rope_theta": 1000000.0})"),
                                          "config.json"));
  EXPECT_EQ(config.dtype, DType::kF32);
  EXPECT_TRUE(config.dtype_declared);
  EXPECT_EQ(config.rope_theta, 1000000.0);
}

TEST(ConfigTest, AcceptsWhatDoesNotChangeTheMathematics) {
  for (const char* fields :
       {R"("architectures": ["SparseLlamaForCausalLM"])", R"("rope_scaling": null)",
        R"("rope_scaling": {"type": "default"})", R"("sliding_window": 4096)",
        R"("sliding_window": 128, "use_sliding_window": false)", R"("dim_model_base": 64)",
        R"("attention_dropout": 0.1)", R"("hidden_act": "swish")"}) {
    EXPECT_OK(ModelConfig::Parse(With(fields), "config.json")) << fields;
  }
}

TEST(ConfigTest, RefusesByNameAndValue) {
  const std::pair<const char*, const char*> cases[] = {
      {R"("architectures": ["MixtralForCausalLM"])",
       "architectures[0] is \"MixtralForCausalLM\"; allowed: one of LlamaForCausalLM"},
      {R"("architectures": [])", "architectures is an array"},
      {R"("architectures": "LlamaForCausalLM")", "architectures is \"LlamaForCausalLM\""},
      {R"("architectures": [7])", "architectures[0] is 7"},
      {R"("architectures": null)", "architectures is missing"},
      {R"("hidden_size": "64")", "hidden_size is \"64\"; allowed: an integer from 1"},
      {R"("hidden_size": 64.0)", "hidden_size is 64.0"},
      {R"("hidden_size": 0)", "hidden_size is 0"},
      {R"("hidden_size": -64)", "hidden_size is -64"},
      {R"("hidden_size": 18446744073709551615)", "hidden_size is 18446744073709551615"},
      {R"("hidden_size": 99999999999999999999999)", "hidden_size is 9.99"},
      {R"("hidden_size": true)", "hidden_size is true"},
      {R"("hidden_size": null)", "hidden_size is missing"},
      {R"("hidden_size": 66)", "hidden_size 66 is not a multiple"},
      {R"("num_hidden_layers": 100000)", "num_hidden_layers is 100000"},
      {R"("num_key_value_heads": 3)", "num_key_value_heads is 3; allowed: a divisor of"},
      {R"("head_dim": 15)", "head_dim is 15; allowed: an even number"},
      {R"("head_dim": 1000000)", "num_attention_heads * head_dim is 4000000"},
      {R"("vocab_size": 0)", "vocab_size is 0"},
      {R"("rms_norm_eps": 0)", "rms_norm_eps is 0"},
      {R"("rms_norm_eps": 1e-60)", "rms_norm_eps is 0"},
      {R"("rms_norm_eps": "small")", "rms_norm_eps is \"small\""},
      {R"("rms_norm_eps": null)", "rms_norm_eps is missing"},
      {R"("rope_theta": -1)", "rope_theta is -1"},
      {R"("tie_word_embeddings": 1)", "tie_word_embeddings is 1; allowed: true or false"},
      {R"("torch_dtype": "float16")", "torch_dtype is \"float16\"; allowed: \"bfloat16\""},
      {R"("torch_dtype": 16)", "torch_dtype is 16"},
      {R"("rope_scaling": {"rope_type": "llama3", "factor": 8})",
       "rope_scaling.rope_type is \"llama3\""},
      {R"("rope_scaling": {"type": "linear", "factor": 2})", "rope_scaling.type is \"linear\""},
      {R"("rope_scaling": {"factor": 2.0})", "rope_scaling.factor is 2.0"},
      {R"("rope_scaling": "yarn")", "rope_scaling is \"yarn\""},
      {R"("rope_parameters": {"rope_type": "yarn"})", "rope_parameters.rope_type is \"yarn\""},
      {R"("hidden_act": "gelu")", "hidden_act is \"gelu\""},
      {R"("mlp_bias": true)", "mlp_bias is true"},
      {R"("scale_emb": 12)", "scale_emb is 12"},
      {R"("scale_depth": 1.4)", "scale_depth is 1.4"},
      {R"("dim_model_base": 256)", "dim_model_base is 256; allowed: hidden_size = 64"},
      {R"("partial_rotary_factor": 0.5)", "partial_rotary_factor is 0.5"},
      {R"("attn_logit_softcapping": 50.0)", "attn_logit_softcapping is 50.0"},
      {R"("final_logit_softcapping": 30.0)", "final_logit_softcapping is 30.0"},
      {R"("sliding_window": 128)", "sliding_window is 128"},
      {R"("layer_types": ["full_attention", "sliding_attention"])", "layer_types is an array"},
      {R"("quantization_config": {"bits": 4})", "quantization_config is an object"},
      {R"("num_local_experts": 8)", "num_local_experts is 8"},
      {R"("sparse_config": {})", "sparse_config is an object"},
      {R"("use_qk_norm": true)", "use_qk_norm is true"},
      {R"("bos_token_id": 300)", "bos_token_id is 300; allowed: an integer from 0 to 299"},
      {R"("eos_token_id": -1)", "eos_token_id is -1"},
      {R"("eos_token_id": [2, "x"])", "eos_token_id is \"x\""},
      {R"("nosa": [])", "nosa is an array"},
      {R"("nosa": {"block_size": 128})", "nosa.block_size is 128; allowed: 64"},
      {R"("nosa": {"kernel_size": 64})", "nosa.kernel_size is 64; allowed: 32"},
      {R"("nosa": {"kernel_stride": 32})", "nosa.kernel_stride is 32; allowed: 16"},
      {R"("nosa": {"window_blocks": 0})", "nosa.window_blocks is 0; allowed: 1 to"},
      {R"("nosa": {"init_blocks": -1})", "nosa.init_blocks is -1"},
      {R"("nosa": {"topk_q_blocks": 0})", "nosa.topk_q_blocks is 0; allowed: 1 to"},
      {R"("nosa": {"topk_blocks": 32})",
       "nosa.init_blocks + window_blocks + topk_q_blocks is 33; allowed: up to topk_blocks = 32"},
      {R"("nosa": {"topk_blocks": 129})", "nosa.topk_blocks is 129; allowed: 1 to 128"},
      {R"("nosa": {"topk": 16})", "nosa.topk is not known; allowed: block_size"},
      {R"("nosa": {"window_blocks": 4.5})", "nosa.window_blocks is 4.5"}};
  for (const auto& [fields, message] : cases) {
    const absl::StatusOr<ModelConfig> config = ModelConfig::Parse(With(fields), "some/config.json");
    EXPECT_THAT(config, StatusIs(absl::StatusCode::kInvalidArgument, message)) << fields;
    EXPECT_THAT(config, StatusIs(absl::StatusCode::kInvalidArgument, "some/config.json: "));
  }
}

TEST(ConfigTest, RefusesWhatIsNoObject) {
  for (const std::string& text :
       {std::string(), std::string("{"), std::string("null"), std::string("[1]"),
        std::string("{\"a\": \"\xff\"}"), std::string(200000, '[')}) {
    EXPECT_THAT(ModelConfig::Parse(text, "config.json"),
                StatusIs(absl::StatusCode::kInvalidArgument, "config.json: not a JSON object"));
  }
}

TEST(ConfigTest, TruncationIsAlwaysRefused) {
  const std::string text = kBase;
  for (size_t length = 0; length < text.size(); ++length) {
    ASSERT_THAT(ModelConfig::Parse(text.substr(0, length), "config.json"),
                StatusIs(absl::StatusCode::kInvalidArgument, "not a JSON object"));
  }
}

TEST(ConfigTest, EachRequiredFieldIsMissed) {
  for (const char* field :
       {"architectures", "hidden_size", "num_hidden_layers", "num_attention_heads",
        "intermediate_size", "vocab_size", "max_position_embeddings", "rms_norm_eps"}) {
    const std::string text =
        absl::StrReplaceAll(kBase, {{absl::StrCat("\"", field, "\""), "\"renamed\""}});
    EXPECT_THAT(ModelConfig::Parse(text, "c"), StatusIs(absl::StatusCode::kInvalidArgument,
                                                        absl::StrCat("c: ", field, " is missing")));
  }
}

TEST(ConfigTest, LoadJoinsTheGenerationConfig) {
  const TempDir dir;
  EXPECT_THAT(ModelConfig::Load(dir.path()),
              StatusIs(absl::StatusCode::kNotFound, dir.path() + "/config.json"));
  dir.Write("config.json", With(R"("eos_token_id": 2)"));
  ASSERT_OK_AND_ASSIGN(const ModelConfig alone, ModelConfig::Load(dir.path()));
  EXPECT_THAT(alone.eos_token_ids, ElementsAre(2));
  const std::string path = dir.Write("generation_config.json", R"({"eos_token_id": [9, 2, 5]})");
  ASSERT_OK_AND_ASSIGN(const ModelConfig joined, ModelConfig::Load(dir.path()));
  EXPECT_THAT(joined.eos_token_ids, ElementsAre(2, 5, 9));
  dir.Write("generation_config.json", R"({"eos_token_id": 300})");
  EXPECT_THAT(ModelConfig::Load(dir.path()),
              StatusIs(absl::StatusCode::kInvalidArgument, path + ": eos_token_id is 300"));
  dir.Write("generation_config.json", "nonsense");
  EXPECT_THAT(ModelConfig::Load(dir.path()), StatusIs(absl::StatusCode::kInvalidArgument, path));
}

TEST(ConfigTest, ValidateChecksValuesMadeInCode) {
  ASSERT_OK_AND_ASSIGN(ModelConfig config, ModelConfig::Parse(kBase, "c"));
  EXPECT_OK(config.Validate());
  config.num_kv_heads = 0;
  EXPECT_THAT(config.Validate(),
              StatusIs(absl::StatusCode::kInvalidArgument, "num_key_value_heads is 0"));
  config.num_kv_heads = 4;
  config.eos_token_ids = {300};
  EXPECT_THAT(config.Validate(),
              StatusIs(absl::StatusCode::kInvalidArgument, "eos_token_id is 300"));
}

}  // namespace
}  // namespace nosara::worker
