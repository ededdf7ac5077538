// nosara-bench-decode: decode of a large model with random weights on one GPU, by batch, context,
// slots, hit rate and policy, with the time split by stage and the bound of the hardware.
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <deque>
#include <fstream>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/flags/flag.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/synchronization/mutex.h"
#include "base/program.h"
#include "base/status_macros.h"
#include "worker/backend/cuda/cuda_step.h"
#include "worker/model/bf16.h"

ABSL_FLAG(std::vector<std::string>, batch, {"64"}, "sequences, 1 to 512; several: one run each");
ABSL_FLAG(std::vector<std::string>, context, {"16384"}, "tokens of each sequence, multiples of 64");
ABSL_FLAG(std::vector<std::string>, slots, {"129"},
          "slots per (sequence, layer, KV head) with --residency=offload; more than topk_blocks");
ABSL_FLAG(std::vector<std::string>, hit_rate, {"0.989"},
          "share of the selected blocks that are resident, with --residency=offload; 0 to 1");
ABSL_FLAG(std::string, policy, "nosa", "nosa, infllmv2 or full");
ABSL_FLAG(
    std::vector<std::string>, residency, {"offload"},
    "resident: every block on the GPU, nothing can be missing; offload: missing records are "
    "gathered from pinned host memory; remote: the device asks the host for them, and threads "
    "of the host copy them from there into the landing memory, as a network would");
ABSL_FLAG(int32_t, copy_threads, 8, "threads that copy with --residency=remote");
ABSL_FLAG(std::vector<std::string>, prefill, {},
          "instead of decode: prefill of prompts of so many tokens, one at a time");
ABSL_FLAG(int32_t, prefill_rows, 2048, "tokens of one prefill step");
ABSL_FLAG(int32_t, steps, 64, "decode steps that are timed, after 16 that are not");
ABSL_FLAG(int32_t, layers, 32, "layers of the model; 32 is the 8B shape");
ABSL_FLAG(double, arena_gib, 8,
          "host memory for pages, GiB; where the batch has more, sequences share pages");
ABSL_FLAG(bool, stages, true, "time each stage too");
ABSL_FLAG(bool, tune, true, "time the algorithms of matrix products");
ABSL_FLAG(std::string, json, "", "file for the figures, a list; empty: none");
ABSL_FLAG(std::string, commit, "", "commit to note in the figures");

namespace nosara::worker {
namespace {

using kernels::kBlockTokens;

constexpr int kWarmUpSteps = 16;
/// Of the measured copy rates, what a stream of many kernels is taken to reach: the ratio of the
/// 2.8 TB/s and 50 GB/s that the bound is defined with to the copies measured beside them.
constexpr double kHbmShare = 2.8 / 3.025;
constexpr double kPcieShare = 50.0 / 54.8;
constexpr double kFixedSeconds = 0.6e-3;

struct Case {
  int batch = 0;
  int context = 0;
  int slots = 0;
  double hit_rate = 1;
  Missing missing = Missing::kNever;
};

struct Limits {
  double hbm = 0;   // bytes/s, device-to-device copy, read + written
  double pcie = 0;  // bytes/s, pinned host to device
};

ModelConfig EightBillion(int layers) {
  ModelConfig config;
  config.architecture = "LlamaForCausalLM";
  config.hidden_size = 4096;
  config.num_layers = layers;
  config.num_heads = 32;
  config.num_kv_heads = 2;
  config.head_dim = 128;
  config.intermediate_size = 16384;
  config.vocab_size = 73448;
  config.max_position_embeddings = 1 << 20;
  config.rms_norm_eps = 1e-5f;
  config.dtype = DType::kBf16;
  return config;
}

double SecondsSince(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

/// Random bf16 values; read as f32 they are random too, of the same magnitude.
std::vector<Bf16> Pattern(size_t size, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal;
  std::vector<Bf16> values(size);
  for (Bf16& x : values) x = FromFloat(normal(random));
  return values;
}

absl::StatusOr<double> Seconds(cudaStream_t stream, const std::function<cudaError_t()>& run) {
  cudaEvent_t begin, end;
  RETURN_IF_ERROR(CudaStatus(cudaEventCreate(&begin), "event"));
  RETURN_IF_ERROR(CudaStatus(cudaEventCreate(&end), "event"));
  std::vector<float> times;
  for (int i = 0; i < 7; ++i) {
    RETURN_IF_ERROR(CudaStatus(cudaEventRecord(begin, stream), "event"));
    RETURN_IF_ERROR(CudaStatus(run(), "copy"));
    RETURN_IF_ERROR(CudaStatus(cudaEventRecord(end, stream), "event"));
    RETURN_IF_ERROR(CudaStatus(cudaEventSynchronize(end), "copy"));
    float ms = 0;
    RETURN_IF_ERROR(CudaStatus(cudaEventElapsedTime(&ms, begin, end), "event"));
    times.push_back(ms);
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  std::sort(times.begin(), times.end());
  return times[times.size() / 2] / 1e3;
}

absl::StatusOr<Limits> MeasureLimits(cudaStream_t stream, const PinnedArray<std::byte>& host) {
  constexpr size_t kBytes = size_t{2} << 30;
  ASSIGN_OR_RETURN(const auto from, DeviceArray<std::byte>::Create(kBytes, "limits"));
  ASSIGN_OR_RETURN(const auto to, DeviceArray<std::byte>::Create(kBytes, "limits"));
  Limits limits;
  ASSIGN_OR_RETURN(double seconds, Seconds(stream, [&] {
                     return cudaMemcpyAsync(to.data(), from.data(), kBytes,
                                            cudaMemcpyDeviceToDevice, stream);
                   }));
  limits.hbm = 2 * kBytes / seconds;
  const size_t pinned = std::min(host.size(), size_t{1} << 30);
  ASSIGN_OR_RETURN(seconds, Seconds(stream, [&] {
                     return cudaMemcpyAsync(to.data(), host.data(), pinned, cudaMemcpyHostToDevice,
                                            stream);
                   }));
  limits.pcie = pinned / seconds;
  return limits;
}

/// Permutations of the blocks that are not forced in the last block: [rows, blocks not forced].
std::vector<int32_t> MakeRings(const NosaConfig& nosa, int rows, int blocks) {
  std::mt19937_64 random(11);
  std::vector<int32_t> free;
  for (int n = nosa.init_blocks; n < blocks - 1 - nosa.window_blocks; ++n) free.push_back(n);
  std::vector<int32_t> rings;
  for (int row = 0; row < rows; ++row) {
    std::shuffle(free.begin(), free.end(), random);
    rings.insert(rings.end(), free.begin(), free.end());
  }
  return rings;
}

/// Threads that bring records: what a transfer thread and a network do, at the speed of memory.
class Couriers {
 public:
  explicit Couriers(int threads) {
    for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { Work(); });
  }
  ~Couriers() {
    {
      absl::MutexLock lock(&mutex_);
      stopped_ = true;
    }
    for (std::thread& thread : threads_) thread.join();
  }

  struct Errand {
    const std::byte* from;
    std::byte* to;
    size_t bytes;
    int index;
    std::shared_ptr<std::function<void(int)>> arrived;
  };
  void Send(const std::vector<Errand>& errands) {
    absl::MutexLock lock(&mutex_);
    errands_.insert(errands_.end(), errands.begin(), errands.end());
  }

 private:
  void Work() {
    const auto ready = [this] {
      mutex_.AssertReaderHeld();
      return stopped_ || !errands_.empty();
    };
    while (true) {
      Errand errand;
      {
        absl::MutexLock lock(&mutex_);
        mutex_.Await(absl::Condition(&ready));
        if (errands_.empty()) return;
        errand = std::move(errands_.front());
        errands_.pop_front();
      }
      std::memcpy(errand.to, errand.from, errand.bytes);
      (*errand.arrived)(errand.index);
    }
  }

  absl::Mutex mutex_;
  std::deque<Errand> errands_ ABSL_GUARDED_BY(mutex_);
  bool stopped_ ABSL_GUARDED_BY(mutex_) = false;
  std::vector<std::thread> threads_;
};

/// One model with a cache full of random contents.
class Bench {
 public:
  Bench(const CudaWeights* weights, const PinnedArray<std::byte>* arena, AttentionPolicy policy,
        cudaStream_t stream)
      : weights_(*weights), arena_(*arena), policy_(policy), stream_(stream) {}

  /// `trace`: selections by a trace of the case's hit rate; else the model's own.
  absl::Status Prepare(const Case& one, int frames, bool trace) {
    case_ = one;
    const ModelConfig& model = weights_.config;
    blocks_ = one.context / kBlockTokens;
    DeviceCacheOptions options;
    options.layers = model.num_layers;
    options.kv_heads = model.num_kv_heads;
    options.head_dim = model.head_dim;
    options.max_sequences = one.batch;
    options.max_blocks = blocks_;
    const int index_frames = DeviceCache::IndexFramesFor(one.context);
    options.frames = one.batch * (frames + index_frames);
    ASSIGN_OR_RETURN(cache_, DeviceCache::Create(options, stream_));
    const kernels::CacheView& view = cache_->view();
    RETURN_IF_ERROR(FillSlots(options));

    CudaStepOptions step;
    step.policy = policy_;
    step.bias = policy_ == AttentionPolicy::kInfLlmV2 ? kernels::AttendBias::kNone
                                                      : kernels::AttendBias::kCache;
    step.max_prefill_rows = 8;
    step.max_decode_rows = one.batch;
    step.tuning =
        absl::GetFlag(FLAGS_tune) ? CudaMatMul::Tuning::kTimed : CudaMatMul::Tuning::kHeuristic;
    const bool sparse = policy_ != AttentionPolicy::kFull && blocks_ > model.nosa.topk_blocks;
    if (trace && sparse) {
      const int pairs = one.batch * view.records;
      const std::vector<int32_t> rings = MakeRings(model.nosa, pairs, blocks_);
      ASSIGN_OR_RETURN(rings_, DeviceArray<int32_t>::Create(rings.size(), "trace"));
      RETURN_IF_ERROR(CopyToDevice(rings_.data(), rings.data(), rings_.bytes(), "trace"));
      step.replay_rings = rings_.data();
      step.replay_rows = one.batch;
      step.replay_ring_blocks = static_cast<int>(rings.size()) / pairs;
      step.replay_change = static_cast<float>(model.nosa.topk_blocks * (1 - one.hit_rate));
    }
    for (int s = 0; s < one.batch; ++s) {
      ASSIGN_OR_RETURN(const int sequence, cache_->AddSequence(frames, index_frames));
      RETURN_IF_ERROR(FillSequence(sequence, frames));
    }
    ASSIGN_OR_RETURN(step_, CudaStep::Create(&weights_, cache_.get(), step, stream_));
    std::mt19937 random(3);
    tokens_.clear();
    for (int s = 0; s < one.batch; ++s) {
      tokens_.push_back({s, 0, static_cast<int32_t>(random() % model.vocab_size)});
    }
    steps_done_ = 0;
    loaded_ = selected_ = 0;
    return absl::OkStatus();
  }

  /// The last block is written anew, position by position, over and over.
  absl::Status Step() {
    const int position = (blocks_ - 1) * kBlockTokens + steps_done_++ % kBlockTokens;
    for (StepToken& token : tokens_) token.position = position;
    fed_ = tokens_;
    const FetchFunction fetch = [this](absl::Span<const kernels::Load> loads, std::byte* landing,
                                       std::function<void(int)> arrived) {
      const size_t bytes = kernels::RecordBytes(cache_->view().head_dim);
      const auto shared = std::make_shared<std::function<void(int)>>(std::move(arrived));
      std::vector<Couriers::Errand> errands;
      for (size_t i = 0; i < loads.size(); ++i) {
        const kernels::Load& load = loads[i];
        errands.push_back({Page(load.sequence, load.block) + load.record * bytes,
                           landing + i * bytes, bytes, static_cast<int>(i), shared});
      }
      couriers_.Send(errands);
    };
    ASSIGN_OR_RETURN(const StepOutput output, step_->Decode(tokens_, case_.missing, fetch));
    for (size_t i = 0; i < tokens_.size(); ++i) {
      tokens_[i].token = output.tokens[i];
      selected_ += output.totals[i].x;
      loaded_ += output.totals[i].y;
    }
    return absl::OkStatus();
  }

  CudaStep& step() { return *step_; }
  const DeviceCache& cache() const { return *cache_; }
  /// What the last step was given.
  const std::vector<StepToken>& fed() const { return fed_; }
  void SetTokens(const std::vector<int32_t>& ids) {
    for (size_t i = 0; i < ids.size(); ++i) tokens_[i].token = ids[i];
  }
  void ResetCounts() { selected_ = loaded_ = 0; }
  double hit_rate() const { return selected_ == 0 ? 1 : 1 - double(loaded_) / selected_; }
  int64_t loaded() const { return loaded_; }

 private:
  absl::Status FillSlots(const DeviceCacheOptions& options) {
    // Keys, values, biases, compressed keys and scores, all of it.
    const size_t bytes =
        static_cast<size_t>(options.frames) *
        DeviceCache::FrameBytes(options.layers, options.kv_heads, options.head_dim);
    pattern_ = Pattern((size_t{8} << 20) + 1021, 5);
    const size_t pattern_bytes = pattern_.size() * sizeof(Bf16);
    for (size_t begin = 0; begin < bytes; begin += pattern_bytes) {
      RETURN_IF_ERROR(CopyToDevice(cache_->view().slots + begin, pattern_.data(),
                                   std::min(pattern_bytes, bytes - begin), "filling the cache"));
    }
    return absl::OkStatus();
  }

  /// The same index for a sequence, whichever frames it got.
  absl::Status FillIndex(int sequence) {
    const kernels::CacheView& view = cache_->view();
    const size_t frame_bytes = view.records * kernels::SlotBytes(view.head_dim);
    std::vector<int32_t> frames(cache_->index_frames_of(sequence));
    RETURN_IF_ERROR(CudaStatus(
        cudaMemcpyAsync(frames.data(),
                        view.index_frames + static_cast<size_t>(sequence) * view.max_index_frames,
                        frames.size() * sizeof(int32_t), cudaMemcpyDeviceToHost, stream_),
        "index frames"));
    RETURN_IF_ERROR(CudaStatus(cudaStreamSynchronize(stream_), "index frames"));
    const size_t offsets = pattern_.size() - frame_bytes / sizeof(Bf16);
    for (size_t i = 0; i < frames.size(); ++i) {
      const size_t offset = (sequence * 7919 + i * 104729) % offsets;
      RETURN_IF_ERROR(CopyToDevice(view.slots + frames[i] * frame_bytes, pattern_.data() + offset,
                                   frame_bytes, "index frames"));
    }
    return absl::OkStatus();
  }

  std::byte* Page(int sequence, int block) const {
    const kernels::CacheView& view = cache_->view();
    const size_t page_bytes =
        static_cast<size_t>(view.records) * kernels::RecordBytes(view.head_dim);
    const size_t page = static_cast<size_t>(sequence) * blocks_ + block;
    return arena_.data() + page % (arena_.size() / page_bytes) * page_bytes;
  }

  /// All blocks but the last are stored; where nothing can be missing, all have slots.
  absl::Status FillSequence(int sequence, int frames) {
    const kernels::CacheView& view = cache_->view();
    std::vector<uint64_t> pages(blocks_, 0);
    for (int b = 0; b + 1 < blocks_; ++b) {
      pages[b] = case_.missing == Missing::kFetched ? kernels::kStoredElsewhere
                                                    : reinterpret_cast<uint64_t>(Page(sequence, b));
    }
    RETURN_IF_ERROR(cache_->SetPages(sequence, 0, pages));
    RETURN_IF_ERROR(FillIndex(sequence));
    if (case_.missing != Missing::kNever) return absl::OkStatus();
    std::vector<int32_t> slot_of(static_cast<size_t>(view.records) * view.max_blocks, -1);
    std::vector<int32_t> block_of(static_cast<size_t>(view.records) * view.max_frames, -1);
    for (int r = 0; r < view.records; ++r) {
      for (int b = 0; b < std::min(frames, blocks_); ++b) {
        slot_of[static_cast<size_t>(r) * view.max_blocks + b] = b;
        block_of[static_cast<size_t>(r) * view.max_frames + b] = b;
      }
    }
    const auto put = [&](int32_t* table, const std::vector<int32_t>& values) {
      return CudaStatus(
          cudaMemcpyAsync(table + sequence * values.size(), values.data(),
                          values.size() * sizeof(int32_t), cudaMemcpyHostToDevice, stream_),
          "tables");
    };
    RETURN_IF_ERROR(put(view.slot_of, slot_of));
    RETURN_IF_ERROR(put(view.block_of, block_of));
    return CudaStatus(cudaStreamSynchronize(stream_), "tables");
  }

  const CudaWeights& weights_;
  const PinnedArray<std::byte>& arena_;
  const AttentionPolicy policy_;
  const cudaStream_t stream_;
  Case case_;
  int blocks_ = 0;
  int64_t steps_done_ = 0;
  int64_t selected_ = 0;
  int64_t loaded_ = 0;
  std::vector<Bf16> pattern_;
  std::unique_ptr<DeviceCache> cache_;
  DeviceArray<int32_t> rings_;
  std::unique_ptr<CudaStep> step_;
  std::vector<StepToken> tokens_;
  std::vector<StepToken> fed_;
  Couriers couriers_{absl::GetFlag(FLAGS_copy_threads)};
};

/// Figures of a wrong result are worth nothing: a small model whose sequences have room for all
/// their blocks must give the same logits as one whose sequences have the fewest slots, the same
/// tokens going in. Random weights amplify the order of additions, hence the bound on the
/// difference of whole vectors: 0.013 to 0.027 were seen; a record in the wrong place gives some
/// near 1.
absl::Status Check(const PinnedArray<std::byte>& arena, AttentionPolicy policy, Missing missing,
                   cudaStream_t stream) {
  if (policy == AttentionPolicy::kFull) return absl::OkStatus();  // has no fewest slots
  ModelConfig config = EightBillion(2);
  config.vocab_size = 8192;
  ASSIGN_OR_RETURN(const auto weights, CudaWeights::Random(config, 17));
  Case one;
  one.batch = 5;
  one.context = 8192;
  one.missing = missing;
  constexpr int kSteps = 20;
  std::vector<std::vector<int32_t>> fed;
  std::vector<std::vector<float>> logits;
  std::vector<int64_t> loaded;
  double worst = 0;
  for (const int frames : {one.context / kBlockTokens, config.nosa.topk_blocks + 1}) {
    Bench bench(weights.get(), &arena, policy, stream);
    RETURN_IF_ERROR(bench.Prepare(one, frames, false));
    std::vector<float> now(static_cast<size_t>(one.batch) * config.vocab_size);
    const bool first = logits.empty();
    for (int step = 0; step < kSteps; ++step) {
      if (!first) bench.SetTokens(fed[step]);
      RETURN_IF_ERROR(bench.Step());
      RETURN_IF_ERROR(bench.step().ReadLogits(one.batch, absl::MakeSpan(now)));
      if (first) {
        std::vector<int32_t> ids;
        for (const StepToken& token : bench.fed()) ids.push_back(token.token);
        fed.push_back(std::move(ids));
        logits.push_back(now);
        continue;
      }
      for (int row = 0; row < one.batch; ++row) {
        double difference = 0, size = 0;
        for (int i = row * config.vocab_size; i < (row + 1) * config.vocab_size; ++i) {
          difference += std::pow(double{now[i]} - logits[step][i], 2);
          size += std::pow(double{now[i]}, 2);
        }
        worst = std::max(worst, std::sqrt(difference / size));
      }
    }
    bench.cache().CheckIntegrity();
    loaded.push_back(bench.loaded());
  }
  if (!(worst < 0.06) || loaded[1] <= loaded[0]) {
    return absl::InternalError(absl::StrCat(
        "wrong result: logits with all blocks resident and with ", config.nosa.topk_blocks + 1,
        " slots differ by ", worst, ", after ", loaded[0], " and ", loaded[1], " loads"));
  }
  std::printf(
      "checked: logits with all blocks resident (%d loads) and with %d slots (%d loads) "
      "differ by %.1e\n",
      static_cast<int>(loaded[0]), config.nosa.topk_blocks + 1, static_cast<int>(loaded[1]), worst);
  return absl::OkStatus();
}

/// bf16 multiply-adds, in operations a second, of a product as large as those of a prefill step.
absl::StatusOr<double> MeasureMatrixRate(cudaStream_t stream) {
  constexpr int kSize = 8192;
  ASSIGN_OR_RETURN(const auto matmul, CudaMatMul::Create());
  const std::vector<Bf16> pattern = Pattern(size_t{kSize} * kSize, 21);
  ASSIGN_OR_RETURN(const auto x, DeviceArray<__nv_bfloat16>::Create(pattern.size(), "limits"));
  ASSIGN_OR_RETURN(const auto y, DeviceArray<float>::Create(pattern.size(), "limits"));
  RETURN_IF_ERROR(CopyToDevice(x.data(), pattern.data(), pattern.size() * sizeof(Bf16), "limits"));
  RETURN_IF_ERROR(matmul->Prepare(kSize, kSize, kSize, false, CudaMatMul::Tuning::kTimed, stream));
  absl::Status status;
  ASSIGN_OR_RETURN(const double seconds, Seconds(stream, [&] {
                     for (int i = 0; i < 4; ++i) {
                       status.Update(matmul->Run(x.data(), x.data(), nullptr, y.data(), kSize,
                                                 kSize, kSize, stream));
                     }
                     return cudaSuccess;
                   }));
  RETURN_IF_ERROR(status);
  return 4 * 2.0 * kSize * kSize * kSize / seconds;
}

/// Prefill of single prompts of random tokens, everything resident.
absl::Status RunPrefill(const CudaWeights& weights, AttentionPolicy policy,
                        const std::string& policy_name, const char* device, cudaStream_t stream,
                        const std::string& command, std::vector<std::string>& results) {
  ASSIGN_OR_RETURN(const double matrix_rate, MeasureMatrixRate(stream));
  std::printf("matrix products of bf16: %.0f TFLOP/s\n", matrix_rate / 1e12);
  std::printf("%8s %6s | %10s %9s | %14s\n", "prompt", "rows", "tokens/s", "seconds",
              "of matrix rate");
  const ModelConfig& model = weights.config;
  const int rows = absl::GetFlag(FLAGS_prefill_rows);
  if (rows < 1 || rows > 65536) {
    return absl::InvalidArgumentError(
        absl::StrCat("prefill_rows = ", rows, ": must be 1 to 65536"));
  }
  for (const std::string& text : absl::GetFlag(FLAGS_prefill)) {
    int tokens = 0;
    if (!absl::SimpleAtoi(text, &tokens) || tokens < 1 || tokens > (1 << 20)) {
      return absl::InvalidArgumentError(
          absl::StrCat("prefill = '", text, "': must be 1 to ", 1 << 20));
    }
    DeviceCacheOptions options;
    options.layers = model.num_layers;
    options.kv_heads = model.num_kv_heads;
    options.head_dim = model.head_dim;
    options.max_sequences = 1;
    options.max_blocks = (tokens + kBlockTokens - 1) / kBlockTokens;
    const int index_frames = DeviceCache::IndexFramesFor(tokens);
    options.frames = options.max_blocks + index_frames;
    ASSIGN_OR_RETURN(const auto cache, DeviceCache::Create(options, stream));
    CudaStepOptions step_options;
    step_options.policy = policy;
    step_options.bias = policy == AttentionPolicy::kInfLlmV2 ? kernels::AttendBias::kNone
                                                             : kernels::AttendBias::kCache;
    step_options.max_prefill_rows = rows;
    step_options.max_decode_rows = 1;
    ASSIGN_OR_RETURN(const auto step,
                     CudaStep::Create(&weights, cache.get(), step_options, stream));
    std::mt19937 random(13);
    double seconds = 0;
    // The first round finds the algorithms of the products.
    for (int round = 0; round < 2; ++round) {
      ASSIGN_OR_RETURN(const int sequence, cache->AddSequence(options.max_blocks, index_frames));
      const auto start = std::chrono::steady_clock::now();
      for (int first = 0; first < tokens; first += rows) {
        std::vector<StepToken> chunk;
        for (int i = first; i < std::min(tokens, first + rows); ++i) {
          chunk.push_back({sequence, i, static_cast<int32_t>(random() % model.vocab_size)});
        }
        const int32_t last = static_cast<int32_t>(chunk.size()) - 1;
        RETURN_IF_ERROR(step->Prefill(chunk, Missing::kNever, nullptr, {last}).status());
      }
      seconds = SecondsSince(start);
      cache->RemoveSequence(sequence);
    }
    // Every weight of the layers once for each token; the output matrix only at the end of a chunk.
    const double layer_weights =
        weights.matrix_bytes() / 2.0 - double{1} * model.vocab_size * model.hidden_size;
    const double share = 2 * layer_weights * tokens / matrix_rate / seconds;
    std::printf("%8d %6d | %10.0f %9.3f | %13.1f%%\n", tokens, rows, tokens / seconds, seconds,
                100 * share);
    std::fflush(stdout);
    results.push_back(absl::StrFormat(
        "{\"prefill_tokens\": %d, \"rows\": %d, \"policy\": \"%s\", \"tokens_per_s\": %.0f, "
        "\"seconds\": %.4f, \"fraction_of_matrix_rate\": %.4f, \"matrix_tflop_per_s\": %.0f, "
        "\"layers\": %d, \"gpu\": \"%s\", \"commit\": \"%s\", \"command\": \"%s\"}",
        tokens, rows, policy_name, tokens / seconds, seconds, share, matrix_rate / 1e12,
        model.num_layers, device, absl::GetFlag(FLAGS_commit), command));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<Case>> Cases() {
  std::vector<Case> cases;
  const auto number = [](const char* flag, const std::string& text, double low,
                         double high) -> absl::StatusOr<double> {
    double value = 0;
    if (!absl::SimpleAtod(text, &value) || value < low || value > high) {
      return absl::InvalidArgumentError(
          absl::StrCat(flag, " = '", text, "': must be ", low, " to ", high));
    }
    return value;
  };
  const auto slots = absl::GetFlag(FLAGS_slots);
  const auto rates = absl::GetFlag(FLAGS_hit_rate);
  if (slots.size() != rates.size()) {
    return absl::InvalidArgumentError(
        absl::StrCat("slots has ", slots.size(), " values and hit_rate ", rates.size(),
                     ": they go together, one hit rate for each number of slots"));
  }
  for (const std::string& context : absl::GetFlag(FLAGS_context)) {
    for (const std::string& batch : absl::GetFlag(FLAGS_batch)) {
      for (const std::string& residency : absl::GetFlag(FLAGS_residency)) {
        for (size_t i = 0; i < slots.size(); ++i) {
          Case one;
          ASSIGN_OR_RETURN(const double tokens, number("context", context, 128, 1 << 20));
          ASSIGN_OR_RETURN(const double sequences, number("batch", batch, 1, 512));
          one.context = static_cast<int>(tokens) / kBlockTokens * kBlockTokens;
          one.batch = static_cast<int>(sequences);
          if (residency == "resident") {
            if (i > 0) continue;
            one.slots = one.context / kBlockTokens;
          } else if (residency == "offload" || residency == "remote") {
            ASSIGN_OR_RETURN(const double count, number("slots", slots[i], 65, 16384));
            ASSIGN_OR_RETURN(one.hit_rate, number("hit_rate", rates[i], 0, 1));
            one.slots = static_cast<int>(count);
            one.missing = residency == "remote" ? Missing::kFetched : Missing::kMapped;
          } else {
            return absl::InvalidArgumentError(
                absl::StrCat("residency = '", residency, "': must be resident, offload or remote"));
          }
          cases.push_back(one);
        }
      }
    }
  }
  return cases;
}

absl::Status Run(const std::string& command) {
  AttentionPolicy policy = AttentionPolicy::kNosa;
  const std::string policy_name = absl::GetFlag(FLAGS_policy);
  if (policy_name == "infllmv2") {
    policy = AttentionPolicy::kInfLlmV2;
  } else if (policy_name == "full") {
    policy = AttentionPolicy::kFull;
  } else if (policy_name != "nosa") {
    return absl::InvalidArgumentError(
        absl::StrCat("policy = '", policy_name, "': must be nosa, infllmv2 or full"));
  }
  ASSIGN_OR_RETURN(const std::vector<Case> cases, Cases());
  const int copy_threads = absl::GetFlag(FLAGS_copy_threads);
  if (copy_threads < 1 || copy_threads > 256) {
    return absl::InvalidArgumentError(
        absl::StrCat("copy_threads = ", copy_threads, ": must be 1 to 256"));
  }
  cudaDeviceProp device;
  RETURN_IF_ERROR(CudaStatus(cudaGetDeviceProperties(&device, 0), "no CUDA device"));
  cudaStream_t stream;
  RETURN_IF_ERROR(CudaStatus(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream"));

  std::fprintf(stderr, "pinning %.1f GiB\n", absl::GetFlag(FLAGS_arena_gib));
  ASSIGN_OR_RETURN(const auto arena,
                   PinnedArray<std::byte>::Create(
                       static_cast<size_t>(absl::GetFlag(FLAGS_arena_gib) * (1 << 30)), "pages"));
  const std::vector<Bf16> pattern = Pattern((size_t{8} << 20) + 1021, 9);
  for (size_t begin = 0; begin < arena.size(); begin += pattern.size() * sizeof(Bf16)) {
    std::memcpy(arena.data() + begin, pattern.data(),
                std::min(pattern.size() * sizeof(Bf16), arena.size() - begin));
  }
  ASSIGN_OR_RETURN(const Limits limits, MeasureLimits(stream, arena));
  std::printf("%s: copy on the device %.0f GB/s (read + written), host to device %.1f GB/s\n",
              device.name, limits.hbm / 1e9, limits.pcie / 1e9);
  std::fprintf(stderr, "checking\n");
  RETURN_IF_ERROR(Check(arena, policy, Missing::kMapped, stream));
  if (std::any_of(cases.begin(), cases.end(),
                  [](const Case& one) { return one.missing == Missing::kFetched; })) {
    RETURN_IF_ERROR(Check(arena, policy, Missing::kFetched, stream));
  }

  std::fprintf(stderr, "random weights\n");
  const ModelConfig config = EightBillion(absl::GetFlag(FLAGS_layers));
  ASSIGN_OR_RETURN(const auto weights, CudaWeights::Random(config, 1));
  std::vector<std::string> results;
  const auto write = [&]() -> absl::Status {
    if (absl::GetFlag(FLAGS_json).empty()) return absl::OkStatus();
    std::ofstream file(absl::GetFlag(FLAGS_json));
    file << "[\n  " << absl::StrJoin(results, ",\n  ") << "\n]\n";
    file.close();
    if (file) return absl::OkStatus();
    return absl::UnavailableError(
        absl::StrCat("json: cannot write '", absl::GetFlag(FLAGS_json), "'"));
  };
  if (!absl::GetFlag(FLAGS_prefill).empty()) {
    RETURN_IF_ERROR(
        RunPrefill(*weights, policy, policy_name, device.name, stream, command, results));
    return write();
  }
  std::printf("%8s %6s %6s %6s %9s | %10s %10s %6s | %9s | stages, ms\n", "context", "batch",
              "slots", "hits", "residency", "tokens/s", "bound", "of it", "step ms");
  for (const Case& one : cases) {
    Bench bench(weights.get(), &arena, policy, stream);
    const char* residency = one.missing == Missing::kNever    ? "resident"
                            : one.missing == Missing::kMapped ? "offload"
                                                              : "remote";
    const absl::Status prepared = bench.Prepare(one, one.slots, one.missing != Missing::kNever);
    if (absl::IsResourceExhausted(prepared)) {
      cudaGetLastError();
      std::printf("%8d %6d %6d %6s %9s | does not fit: %s\n", one.context, one.batch, one.slots, "",
                  residency, std::string(prepared.message()).c_str());
      continue;
    }
    RETURN_IF_ERROR(prepared);
    for (int i = 0; i < kWarmUpSteps; ++i) RETURN_IF_ERROR(bench.Step());
    bench.ResetCounts();
    const int steps = absl::GetFlag(FLAGS_steps);
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < steps; ++i) RETURN_IF_ERROR(bench.Step());
    const double step_s = SecondsSince(start) / steps;

    // The bound of docs/benchmarks/README.md, for this shape and the limits of this run.
    const double B = one.batch;
    const int topk = policy == AttentionPolicy::kFull
                         ? one.context / kBlockTokens
                         : std::min(config.nosa.topk_blocks, one.context / kBlockTokens);
    const double records = static_cast<double>(config.num_layers) * config.num_kv_heads;
    const double record_bytes = kernels::RecordBytes(config.head_dim);
    const double index_bytes = policy == AttentionPolicy::kFull
                                   ? 0
                                   : records * one.context / 16 * (2.0 * config.head_dim + 4);
    const double hbm_bytes =
        weights->matrix_bytes() + B * (records * topk * record_bytes + index_bytes);
    const double loads = static_cast<double>(bench.loaded()) / steps;
    const double t_hbm = hbm_bytes / (limits.hbm * kHbmShare);
    const double t_pcie = loads * record_bytes / (limits.pcie * kPcieShare);
    const double bound = B / (std::max(t_hbm, t_pcie) + kFixedSeconds);
    const double rate = B / step_s;

    std::string stages_json;
    std::string stages_text;
    if (absl::GetFlag(FLAGS_stages)) {
      // The whole step on the device, without the host's part; it repeats the last one, so that
      // nothing is missing.
      ASSIGN_OR_RETURN(const double whole_us, bench.step().TimeStages(kAllStages, 5));
      absl::StrAppend(&stages_json, absl::StrFormat("\"all_on_device\": %.1f", whole_us));
      absl::StrAppend(&stages_text, absl::StrFormat(" all %.2f:", whole_us / 1e3));
      // Resolving comes last: with the inputs of one layer it would load for the others.
      const std::vector<Stage> order = {Stage::kMatMul, Stage::kAttend,     Stage::kScore,
                                        Stage::kSelect, Stage::kAppend,     Stage::kNorm,
                                        Stage::kOutput, Stage::kActivation, Stage::kResolve};
      for (const Stage stage : order) {
        ASSIGN_OR_RETURN(const double us,
                         bench.step().TimeStages(1u << static_cast<int>(stage), 5));
        absl::StrAppend(&stages_json, stages_json.empty() ? "" : ", ",
                        absl::StrFormat("\"%s\": %.1f", StageName(stage), us));
        absl::StrAppend(&stages_text, absl::StrFormat(" %s %.2f", StageName(stage), us / 1e3));
      }
    }
    std::printf("%8d %6d %6d %6.4f %9s | %10.0f %10.0f %5.1f%% | %9.3f |%s\n", one.context,
                one.batch, one.slots, bench.hit_rate(), residency, rate, bound, 100 * rate / bound,
                step_s * 1e3, stages_text.c_str());
    std::fflush(stdout);
    const double page_bytes = records * record_bytes;
    const bool shared = one.missing != Missing::kNever &&
                        B * one.context / kBlockTokens * page_bytes > arena.size();
    results.push_back(absl::StrFormat(
        "{\"batch\": %d, \"context\": %d, \"slots\": %d, \"hit_rate\": %.4f, \"policy\": \"%s\", "
        "\"residency\": \"%s\", \"tokens_per_s\": %.1f, \"bound_tokens_per_s\": %.1f, "
        "\"step_us\": %.1f, \"pcie_bytes_per_step\": %.0f, \"stages_us\": {%s}, "
        "\"shared_pages\": %s, \"layers\": %d, \"hbm_copy_gb_per_s\": %.0f, "
        "\"h2d_copy_gb_per_s\": %.1f, \"gpu\": \"%s\", \"commit\": \"%s\", \"command\": \"%s\"}",
        one.batch, one.context, one.slots, bench.hit_rate(), policy_name, residency, rate, bound,
        step_s * 1e6, loads * record_bytes, stages_json, shared ? "true" : "false",
        config.num_layers, limits.hbm / 1e9, limits.pcie / 1e9, device.name,
        absl::GetFlag(FLAGS_commit), command));
    RETURN_IF_ERROR(write());
  }
  return write();
}

}  // namespace
}  // namespace nosara::worker

int main(int argc, char** argv) {
  const std::string command =
      absl::StrCat("nosara-bench-decode ", absl::StrJoin(argv + 1, argv + argc, " "));
  return nosara::RunProgram(
      argc, argv,
      {"nosara-bench-decode",
       "Decode speed of the 8B shape with random weights on one GPU. Selections follow a "
       "synthetic\n"
       "trace of the given hit rate where records are offloaded; scoring and selection run all "
       "the\n"
       "same.\n"
       "  nosara-bench-decode --context=16384,65536 --batch=64,128 --slots=129,65 "
       "--hit_rate=0.989,0.944",
       "worker/bench_decode_main.cc"},
      [&command] { return nosara::worker::Run(command); });
}
