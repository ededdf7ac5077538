#include "worker/model/checkpoint.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "tests/status_matchers.h"
#include "tests/text/temp_dir.h"
#include "tests/worker/model/safetensors_writer.h"

namespace nosara::worker {
namespace {

using nosara::testing::SafetensorsFileBytes;
using nosara::testing::StatusIs;
using nosara::testing::TempDir;
using nosara::testing::TestTensor;

// H 8, L 2, Hq 2, Hkv 1, D 4, I 6, 10 tokens.
constexpr char kConfig[] = R"({"architectures": ["LlamaForCausalLM"], "hidden_size": 8,
  "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4,
  "intermediate_size": 6, "vocab_size": 10, "max_position_embeddings": 128, "rms_norm_eps": 1e-5)";

std::string Config(const std::string& more = "") { return absl::StrCat(kConfig, more, "}"); }

/// A checkpoint in memory, by tensor name, for tests to change before it is written.
class TestCheckpoint final {
 public:
  explicit TestCheckpoint(const std::string& dtype = "BF16") : dtype_(dtype) {
    Add("model.embed_tokens.weight", {10, 8});
    Add("model.norm.weight", {8});
    Add("lm_head.weight", {10, 8});
    for (int i = 0; i < 2; ++i) {
      const std::string prefix = absl::StrCat("model.layers.", i, ".");
      Add(prefix + "self_attn.q_proj.weight", {8, 8});
      Add(prefix + "self_attn.k_proj.weight", {4, 8});
      Add(prefix + "self_attn.v_proj.weight", {4, 8});
      Add(prefix + "self_attn.o_proj.weight", {8, 8});
      Add(prefix + "mlp.gate_proj.weight", {6, 8});
      Add(prefix + "mlp.up_proj.weight", {6, 8});
      Add(prefix + "mlp.down_proj.weight", {8, 6});
      Add(prefix + "input_layernorm.weight", {8});
      Add(prefix + "post_attention_layernorm.weight", {8});
      Add(prefix + "self_attn.A", {1});
      Add(prefix + "self_attn.delta.weight", {1, 4});
    }
  }

  void Add(const std::string& name, const std::vector<int64_t>& shape, std::string dtype = "") {
    if (dtype.empty()) dtype = dtype_;
    size_t bytes = dtype == "F32" ? 4 : 2;
    for (const int64_t size : shape) bytes *= size;
    std::string data(bytes, '\0');
    for (size_t i = 0; i < bytes; ++i) data[i] = static_cast<char>(i * 7 + name.size());
    tensors_[name] = {name, dtype, shape, data};
  }
  void Remove(const std::string& name) { ASSERT_EQ(tensors_.erase(name), 1u) << name; }
  TestTensor& operator[](const std::string& name) { return tensors_.at(name); }

  std::vector<TestTensor> Tensors() const {
    std::vector<TestTensor> all;
    // Wide elements first: what follows them stays aligned.
    for (const char* dtype : {"F32", ""}) {
      for (const auto& [name, tensor] : tensors_) {
        if ((tensor.dtype == "F32") == (*dtype != '\0')) all.push_back(tensor);
      }
    }
    return all;
  }
  void Write(const TempDir& dir, const std::string& config = Config()) const {
    dir.Write("config.json", config);
    dir.Write("model.safetensors", SafetensorsFileBytes(Tensors()));
  }

 private:
  const std::string dtype_;
  std::map<std::string, TestTensor> tensors_;
};

TEST(CheckpointTest, LoadsAllTensors) {
  const TempDir dir;
  TestCheckpoint test;
  test.Write(dir);
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Checkpoint> checkpoint, Checkpoint::Open(dir.path()));
  EXPECT_EQ(checkpoint->config().dtype, DType::kBf16);  // not said in config.json
  EXPECT_TRUE(checkpoint->has_eviction_head());
  uint64_t bytes = 0;
  for (const TestTensor& tensor : test.Tensors()) bytes += tensor.data.size();
  EXPECT_EQ(checkpoint->weight_bytes(), bytes);
  const auto expect_data = [&](const TensorView& view, const std::string& name) {
    EXPECT_EQ(view.name, name);
    EXPECT_EQ(view.shape, test[name].shape);
    EXPECT_EQ(std::string(reinterpret_cast<const char*>(view.data.data()), view.data.size()),
              test[name].data);
  };
  expect_data(checkpoint->embed_tokens(), "model.embed_tokens.weight");
  expect_data(checkpoint->final_norm(), "model.norm.weight");
  expect_data(checkpoint->lm_head(), "lm_head.weight");
  const LayerTensors& layer = checkpoint->layer(1);
  expect_data(layer.q, "model.layers.1.self_attn.q_proj.weight");
  expect_data(layer.k, "model.layers.1.self_attn.k_proj.weight");
  expect_data(layer.v, "model.layers.1.self_attn.v_proj.weight");
  expect_data(layer.o, "model.layers.1.self_attn.o_proj.weight");
  expect_data(layer.gate, "model.layers.1.mlp.gate_proj.weight");
  expect_data(layer.up, "model.layers.1.mlp.up_proj.weight");
  expect_data(layer.down, "model.layers.1.mlp.down_proj.weight");
  expect_data(layer.input_norm, "model.layers.1.input_layernorm.weight");
  expect_data(layer.post_norm, "model.layers.1.post_attention_layernorm.weight");
  expect_data(*layer.A, "model.layers.1.self_attn.A");
  expect_data(*layer.delta, "model.layers.1.self_attn.delta.weight");
  EXPECT_FALSE(layer.q_bias.has_value());
}

TEST(CheckpointTest, TiedEmbeddingsServeAsTheHead) {
  const TempDir dir;
  TestCheckpoint test;
  test.Remove("lm_head.weight");
  test.Write(dir, Config(R"(, "tie_word_embeddings": true)"));
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Checkpoint> checkpoint, Checkpoint::Open(dir.path()));
  EXPECT_EQ(checkpoint->lm_head().data.data(), checkpoint->embed_tokens().data.data());
}

TEST(CheckpointTest, SmallTensorsMayBeF32InABf16Model) {
  const TempDir dir;
  TestCheckpoint test;
  test.Add("model.norm.weight", {8}, "F32");
  test.Add("model.layers.0.self_attn.A", {1}, "F32");
  test.Add("model.layers.1.self_attn.delta.weight", {1, 4}, "F32");
  test.Add("model.layers.1.input_layernorm.weight", {8}, "F32");
  test.Write(dir, Config(R"(, "torch_dtype": "bfloat16")"));
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Checkpoint> checkpoint, Checkpoint::Open(dir.path()));
  EXPECT_EQ(checkpoint->config().dtype, DType::kBf16);
  EXPECT_EQ(checkpoint->final_norm().dtype, TensorDType::kF32);
}

TEST(CheckpointTest, BiasesExistExactlyWithAttentionBias) {
  const TempDir dir;
  TestCheckpoint test;
  for (int i = 0; i < 2; ++i) {
    const std::string prefix = absl::StrCat("model.layers.", i, ".self_attn.");
    test.Add(prefix + "q_proj.bias", {8});
    test.Add(prefix + "k_proj.bias", {4});
    test.Add(prefix + "v_proj.bias", {4});
    test.Add(prefix + "o_proj.bias", {8});
    test.Add(prefix + "delta.bias", {1});
  }
  const std::string biased = Config(R"(, "attention_bias": true)");
  test.Write(dir, biased);
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Checkpoint> checkpoint, Checkpoint::Open(dir.path()));
  EXPECT_TRUE(checkpoint->layer(0).o_bias.has_value());
  EXPECT_TRUE(checkpoint->layer(1).delta_bias.has_value());
  test.Write(dir);
  EXPECT_THAT(Checkpoint::Open(dir.path()),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       "q_proj.bias\", but config.json has attention_bias false"));
  test.Remove("model.layers.1.self_attn.k_proj.bias");
  test.Write(dir, biased);
  EXPECT_THAT(Checkpoint::Open(dir.path()),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       "\"model.layers.1.self_attn.k_proj.bias\" is missing"));
}

TEST(CheckpointTest, WithoutTheEvictionHeadItIsAPlainModel) {
  const TempDir dir;
  TestCheckpoint test("F32");
  for (int i = 0; i < 2; ++i) {
    test.Remove(absl::StrCat("model.layers.", i, ".self_attn.A"));
    test.Remove(absl::StrCat("model.layers.", i, ".self_attn.delta.weight"));
  }
  test.Write(dir);
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Checkpoint> checkpoint, Checkpoint::Open(dir.path()));
  EXPECT_FALSE(checkpoint->has_eviction_head());
  EXPECT_FALSE(checkpoint->layer(0).A.has_value());
  EXPECT_EQ(checkpoint->config().dtype, DType::kF32);
}

TEST(CheckpointTest, EachMissingTensorIsNamed) {
  const TempDir dir;
  for (const TestTensor& tensor : TestCheckpoint().Tensors()) {
    TestCheckpoint test;
    test.Remove(tensor.name);
    test.Write(dir);
    EXPECT_THAT(Checkpoint::Open(dir.path()),
                StatusIs(absl::StatusCode::kInvalidArgument, tensor.name));
  }
}

TEST(CheckpointTest, EachWrongShapeIsNamedWithBothShapes) {
  const TempDir dir;
  for (const TestTensor& tensor : TestCheckpoint().Tensors()) {
    TestCheckpoint test;
    std::vector<int64_t> shape = tensor.shape;
    shape.back() += 1;
    test.Add(tensor.name, shape);
    test.Write(dir);
    EXPECT_THAT(Checkpoint::Open(dir.path()),
                StatusIs(absl::StatusCode::kInvalidArgument,
                         absl::StrCat("tensor \"", tensor.name, "\": shape is ", ShapeString(shape),
                                      "; config.json asks for ", ShapeString(tensor.shape))));
  }
}

TEST(CheckpointTest, DTypesOutsideTheRuleAreNamed) {
  const TempDir dir;
  const auto expect = [&](const std::function<void(TestCheckpoint&)>& change,
                          const std::string& config, const std::string& message) {
    TestCheckpoint test;
    change(test);
    test.Write(dir, config);
    EXPECT_THAT(Checkpoint::Open(dir.path()),
                StatusIs(absl::StatusCode::kInvalidArgument, message));
  };
  expect([](TestCheckpoint& test) { test["model.embed_tokens.weight"].dtype = "F16"; }, Config(),
         "embed_tokens.weight\": dtype is F16; allowed: F32, BF16");
  expect([](TestCheckpoint& test) { test["model.norm.weight"].dtype = "I16"; }, Config(),
         "model.norm.weight\": dtype is I16");
  expect(
      [](TestCheckpoint& test) {
        test.Add("model.layers.1.mlp.up_proj.weight", {6, 8}, "F32");
      },
      Config(), "up_proj.weight\": dtype is F32, that of the embedding is BF16");
  expect([](TestCheckpoint& test) {}, Config(R"(, "torch_dtype": "float32")"),
         "dtype is BF16, config.json says F32");
}

TEST(CheckpointTest, TheEvictionHeadIsAlikeInAllLayers) {
  const TempDir dir;
  TestCheckpoint missing;
  missing.Remove("model.layers.1.self_attn.A");
  missing.Write(dir);
  EXPECT_THAT(Checkpoint::Open(dir.path()),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       "layer 0 has an eviction head: all layers need"));
  TestCheckpoint extra;
  extra.Remove("model.layers.0.self_attn.A");
  extra.Remove("model.layers.0.self_attn.delta.weight");
  extra.Write(dir);
  EXPECT_THAT(Checkpoint::Open(dir.path()),
              StatusIs(absl::StatusCode::kInvalidArgument, "no layer may have one"));
  TestCheckpoint half;
  half.Remove("model.layers.0.self_attn.A");
  half.Write(dir);
  EXPECT_THAT(Checkpoint::Open(dir.path()), StatusIs(absl::StatusCode::kInvalidArgument,
                                                     "\"model.layers.0.self_attn.A\" is missing"));
}

TEST(CheckpointTest, UnusedTensorsAreIgnored) {
  const TempDir dir;
  TestCheckpoint test;
  test.Write(dir);
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Checkpoint> plain, Checkpoint::Open(dir.path()));
  test.Add("model.layers.0.self_attn.rotary_emb.inv_freq", {2}, "F32");
  test.Add("some.other", {3});
  test.Write(dir);
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Checkpoint> more, Checkpoint::Open(dir.path()));
  EXPECT_EQ(more->weight_bytes(), plain->weight_bytes());
  EXPECT_EQ(more->fingerprint(), plain->fingerprint());
}

TEST(CheckpointTest, MisalignedDataIsRefused) {
  const TempDir dir;
  TestCheckpoint test;
  std::vector<TestTensor> tensors = {{"odd", "U8", {1}, "x"}};
  for (const TestTensor& tensor : test.Tensors()) tensors.push_back(tensor);
  dir.Write("config.json", Config());
  dir.Write("model.safetensors", SafetensorsFileBytes(tensors));
  EXPECT_THAT(Checkpoint::Open(dir.path()),
              StatusIs(absl::StatusCode::kInvalidArgument, "not aligned"));
}

TEST(CheckpointTest, MissingFilesAreNamed) {
  const TempDir dir;
  EXPECT_THAT(Checkpoint::Open(dir.path()), StatusIs(absl::StatusCode::kNotFound, "config.json"));
  dir.Write("config.json", Config());
  EXPECT_THAT(Checkpoint::Open(dir.path()),
              StatusIs(absl::StatusCode::kNotFound,
                       "has neither model.safetensors nor model.safetensors.index.json"));
}

TEST(CheckpointTest, ATruncatedFileIsRefusedAtEveryLength) {
  const TempDir dir;
  TestCheckpoint test;
  test.Write(dir);
  const std::string whole = SafetensorsFileBytes(test.Tensors());
  for (size_t length = 0; length < whole.size(); length += 13) {
    const std::string path = dir.Write("model.safetensors", whole.substr(0, length));
    ASSERT_THAT(Checkpoint::Open(dir.path()), StatusIs(absl::StatusCode::kInvalidArgument, path));
  }
}

// --- Shards ---

struct Shards {
  std::map<std::string, std::vector<TestTensor>> files;
  std::map<std::string, std::string> weight_map;

  explicit Shards(const TestCheckpoint& test) {
    int count = 0;
    for (const TestTensor& tensor : test.Tensors()) {
      const std::string file = absl::StrCat("shard-", count++ % 3, ".safetensors");
      files[file].push_back(tensor);
      weight_map[tensor.name] = file;
    }
  }
  void Write(const TempDir& dir) const {
    dir.Write("config.json", Config());
    std::vector<std::string> entries;
    for (const auto& [name, file] : weight_map) {
      entries.push_back(absl::StrCat("\"", name, "\": \"", file, "\""));
    }
    dir.Write("model.safetensors.index.json",
              absl::StrCat(R"({"metadata": {"total_size": 1}, "weight_map": {)",
                           absl::StrJoin(entries, ", "), "}}"));
    for (const auto& [name, tensors] : files) dir.Write(name, SafetensorsFileBytes(tensors));
  }
};

TEST(ShardedCheckpointTest, EqualsTheSingleFile) {
  const TempDir single_dir;
  const TempDir sharded_dir;
  TestCheckpoint test;
  test.Write(single_dir);
  Shards(test).Write(sharded_dir);
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Checkpoint> single,
                       Checkpoint::Open(single_dir.path()));
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Checkpoint> sharded,
                       Checkpoint::Open(sharded_dir.path()));
  EXPECT_EQ(sharded->fingerprint(), single->fingerprint());
  EXPECT_EQ(sharded->weight_bytes(), single->weight_bytes());
}

TEST(ShardedCheckpointTest, MissingShardMissingTensorWrongShard) {
  const TempDir dir;
  const TestCheckpoint test;
  const std::string name = "model.layers.1.mlp.up_proj.weight";
  Shards shards(test);
  shards.Write(dir);
  dir.Remove("shard-1.safetensors");
  EXPECT_THAT(Checkpoint::Open(dir.path()),
              StatusIs(absl::StatusCode::kNotFound, "shard-1.safetensors"));

  Shards wrong(test);
  const std::string right_file = wrong.weight_map[name];
  wrong.weight_map[name] =
      right_file == "shard-0.safetensors" ? "shard-1.safetensors" : "shard-0.safetensors";
  wrong.Write(dir);
  EXPECT_THAT(Checkpoint::Open(dir.path()),
              StatusIs(absl::StatusCode::kInvalidArgument, "but is in " + right_file));

  Shards nowhere(test);
  nowhere.weight_map["model.extra"] = "shard-0.safetensors";
  nowhere.Write(dir);
  EXPECT_THAT(Checkpoint::Open(dir.path()),
              StatusIs(absl::StatusCode::kInvalidArgument, "\"model.extra\" is said to be in"));

  Shards unlisted(test);
  unlisted.weight_map.erase(name);
  unlisted.Write(dir);
  EXPECT_THAT(Checkpoint::Open(dir.path()), StatusIs(absl::StatusCode::kInvalidArgument, name));
}

TEST(ShardedCheckpointTest, BadIndexesAreRefused) {
  const TempDir dir;
  dir.Write("config.json", Config());
  const std::pair<const char*, const char*> cases[] = {
      {"", "not a JSON object"},
      {"{}", "weight_map is not an object"},
      {R"({"weight_map": []})", "weight_map is not an object"},
      {R"({"weight_map": {"a": 5}})", "weight_map[\"a\"] is not the name of a file"},
      {R"({"weight_map": {"a": "../x"}})", "weight_map[\"a\"] is not the name of a file"},
      {R"({"weight_map": {"a": "/etc/passwd"}})", "weight_map[\"a\"] is not the name of a file"},
      {R"({"weight_map": {"a": ".."}})", "weight_map[\"a\"] is not the name of a file"},
      {R"({"weight_map": {"a": ""}})", "weight_map[\"a\"] is not the name of a file"},
      {R"({"weight_map": {"a": "x\u0000"}})", "weight_map[\"a\"] is not the name of a file"},
      {R"({"weight_map": {}})", "\"model.embed_tokens.weight\" is missing"}};
  for (const auto& [index, message] : cases) {
    const std::string path = dir.Write("model.safetensors.index.json", index);
    const absl::StatusOr<std::unique_ptr<Checkpoint>> checkpoint = Checkpoint::Open(dir.path());
    EXPECT_THAT(checkpoint, StatusIs(absl::StatusCode::kInvalidArgument, message)) << index;
    EXPECT_THAT(checkpoint, StatusIs(absl::StatusCode::kInvalidArgument, path)) << index;
  }
}

// --- Fingerprint ---

TEST(FingerprintTest, ChangesWithEverythingThatMatters) {
  const TempDir dir;
  std::set<std::string> seen;
  const auto fingerprint = [&](const TestCheckpoint& test, const std::string& config) {
    test.Write(dir, config);
    absl::StatusOr<std::unique_ptr<Checkpoint>> checkpoint = Checkpoint::Open(dir.path());
    EXPECT_OK(checkpoint);
    return checkpoint.ok() ? (*checkpoint)->fingerprint() : std::string();
  };
  const std::string base = fingerprint(TestCheckpoint(), Config());
  EXPECT_EQ(base.size(), 32u);
  EXPECT_EQ(base.find_first_not_of("0123456789abcdef"), std::string::npos);
  EXPECT_EQ(fingerprint(TestCheckpoint(), Config()), base);
  // What does not change a result does not count.
  EXPECT_EQ(fingerprint(TestCheckpoint(), Config(R"(, "eos_token_id": 3, "bos_token_id": 1)")),
            base);
  seen.insert(base);
  for (const char* fields :
       {R"(, "rope_theta": 20000)", R"(, "rms_norm_eps": 1e-6)", R"(, "nosa": {"topk_blocks": 65})",
        R"(, "nosa": {"init_blocks": 2})", R"(, "tie_word_embeddings": true)"}) {
    EXPECT_TRUE(seen.insert(fingerprint(TestCheckpoint(), Config(fields))).second) << fields;
  }
  EXPECT_TRUE(seen.insert(fingerprint(TestCheckpoint("F32"), Config())).second);
  for (const TestTensor& tensor : TestCheckpoint().Tensors()) {
    TestCheckpoint first;
    first[tensor.name].data.front() ^= 1;
    EXPECT_TRUE(seen.insert(fingerprint(first, Config())).second) << tensor.name;
    TestCheckpoint last;
    last[tensor.name].data.back() ^= 1;
    EXPECT_TRUE(seen.insert(fingerprint(last, Config())).second) << tensor.name;
  }
}

// --- The files of tests/testdata, written by another implementation of the format ---

TEST(TestdataTest, EveryCheckpointLoads) {
  int checkpoints = 0;
  for (const auto& entry : std::filesystem::directory_iterator("tests/testdata")) {
    const std::string dir = entry.path().string();
    if (!absl::StartsWith(entry.path().filename().string(), "tiny-") || !entry.is_directory()) {
      continue;
    }
    SCOPED_TRACE(dir);
    ++checkpoints;
    ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Checkpoint> checkpoint, Checkpoint::Open(dir));
    EXPECT_EQ(checkpoint->has_eviction_head(), !absl::StrContains(dir, "llama"));
  }
  EXPECT_GE(checkpoints, 4);
}

TEST(TestdataTest, ShardsHoldTheSameModel) {
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Checkpoint> single,
                       Checkpoint::Open("tests/testdata/tiny-f32"));
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Checkpoint> sharded,
                       Checkpoint::Open("tests/testdata/tiny-f32-sharded"));
  EXPECT_EQ(single->fingerprint(), sharded->fingerprint());
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Checkpoint> bf16,
                       Checkpoint::Open("tests/testdata/tiny-bf16"));
  EXPECT_EQ(bf16->config().dtype, DType::kBf16);
  EXPECT_NE(bf16->fingerprint(), single->fingerprint());
}

}  // namespace
}  // namespace nosara::worker
