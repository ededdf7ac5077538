#include "worker/backend/cuda/cuda_step.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/blocking_counter.h"
#include "absl/synchronization/mutex.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "kernels/gather/gather.h"
#include "kernels/prefill/prefill.h"
#include "kernels/score/score.h"
#include "worker/backend/cuda/step_layout.h"

namespace nosara::worker {

using namespace step_layout;

namespace {

using kernels::DrawParams;
using kernels::kBlockTokens;
using kernels::Load;
using kernels::RowTile;
using kernels::StepRow;

/// What starting and merging a thread block of attention costs, in blocks of 64 tokens.
constexpr int kAttendOverheadBlocks = 3;
constexpr int kMaxSplits = 32;
/// Parts of a list that is not all resident, where they run in so many rounds: each part fetches
/// what it misses one record after the other. Measured: 2 and 3 at 128 and 64 rows of 2 KV heads.
constexpr int kFetchSplits = 3;
constexpr int kFetchRounds = 4;
/// Rows that share one reading of the compressed keys.
constexpr int kScoreTileRows = 8;
/// Sequences of one prefill step at most, which bounds the list of loads.
constexpr int kMaxChunks = 8;

/// The sizes that graphs are captured for: 1, 2, 4, 8, then in steps of at most a quarter.
int RowBucket(int rows) {
  int bucket = 1;
  while (bucket < rows) {
    bucket += bucket < 8 ? bucket : bucket < 32 ? 8 : bucket < 64 ? 16 : bucket < 128 ? 32 : 64;
  }
  return bucket;
}

int BlockBucket(int blocks, int max_blocks) {
  int bucket = 32;
  while (bucket < blocks) bucket *= 2;
  return std::min(bucket, std::max(max_blocks, 1));
}

}  // namespace

const char* StageName(Stage stage) {
  switch (stage) {
    case Stage::kInput:
      return "input";
    case Stage::kNorm:
      return "norm";
    case Stage::kMatMul:
      return "matmul";
    case Stage::kAppend:
      return "append";
    case Stage::kScore:
      return "score";
    case Stage::kSelect:
      return "select";
    case Stage::kResolve:
      return "resolve";
    case Stage::kAttend:
      return "attend";
    case Stage::kActivation:
      return "activation";
    case Stage::kOutput:
      return "output";
  }
  return "unknown";
}

CudaStep::CudaStep(const CudaWeights* weights, DeviceCache* cache, const CudaStepOptions& options,
                   cudaStream_t stream)
    : weights_(weights),
      cache_(cache),
      options_(options),
      stream_(stream),
      model_(weights->config),
      // Even, so that the pairs in the output are aligned.
      max_rows_((std::max(options.max_prefill_rows, RowBucket(options.max_decode_rows)) + 7) / 8 *
                8),
      max_selected_(options.policy == AttentionPolicy::kFull
                        ? cache->view().max_blocks
                        : std::max(weights->config.nosa.topk_blocks, 1)),
      group_(weights->config.GroupSize()) {}

CudaStep::~CudaStep() {
  cudaStreamSynchronize(stream_);
  for (auto& [key, graph] : graphs_) cudaGraphExecDestroy(graph);
}

absl::StatusOr<std::unique_ptr<CudaStep>> CudaStep::Create(const CudaWeights* weights,
                                                           DeviceCache* cache,
                                                           const CudaStepOptions& options,
                                                           cudaStream_t stream) {
  const ModelConfig& model = weights->config;
  if (model.head_dim != 64 && model.head_dim != 128) {
    return absl::InvalidArgumentError(
        absl::StrCat("head_dim = ", model.head_dim, ": the CUDA backend takes 64 and 128"));
  }
  if (model.GroupSize() > kernels::kMaxGroup) {
    return absl::InvalidArgumentError(
        absl::StrCat(model.GroupSize(),
                     " query heads for each KV head: the CUDA backend takes at "
                     "most ",
                     kernels::kMaxGroup));
  }
  if (model.hidden_size % 8 != 0 || model.intermediate_size % 8 != 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        "hidden_size = ", model.hidden_size, ", intermediate_size = ", model.intermediate_size,
        ": the CUDA backend takes multiples of 8"));
  }
  std::unique_ptr<CudaStep> step(new CudaStep(weights, cache, options, stream));
  RETURN_IF_ERROR(step->Allocate());
  return step;
}

absl::Status CudaStep::Allocate() {
  ASSIGN_OR_RETURN(matmul_, CudaMatMul::Create());
  int device_number = 0;
  RETURN_IF_ERROR(CudaStatus(cudaGetDevice(&device_number), "device"));
  RETURN_IF_ERROR(CudaStatus(
      cudaDeviceGetAttribute(&multiprocessors_, cudaDevAttrMultiProcessorCount, device_number),
      "device"));

  const size_t rows = max_rows_;
  const size_t decode_rows = RowBucket(options_.max_decode_rows);
  const size_t hidden = model_.hidden_size;
  const size_t half = model_.head_dim / 2;
  const size_t q_width = static_cast<size_t>(model_.num_heads) * model_.head_dim;
  const size_t kv_heads = model_.num_kv_heads;
  const size_t kv_width = kv_heads * model_.head_dim;
  const size_t pairs = rows * kv_heads;
  const size_t decode_pairs = decode_rows * kv_heads;
  const size_t max_blocks = cache_->view().max_blocks;
  const auto device = [](auto& array, size_t size, const char* what) -> absl::Status {
    using Array = std::remove_reference_t<decltype(array)>;
    ASSIGN_OR_RETURN(array, Array::Create(size, what));
    return absl::OkStatus();
  };
  RETURN_IF_ERROR(device(host_input_, InputBytes(max_rows_), "step input"));
  RETURN_IF_ERROR(device(input_, InputBytes(max_rows_), "step input"));
  RETURN_IF_ERROR(device(host_output_, OutputInts(max_rows_), "step output"));
  RETURN_IF_ERROR(device(output_, OutputInts(max_rows_), "step output"));
  RETURN_IF_ERROR(device(inverse_frequencies_, half, "RoPE"));
  RETURN_IF_ERROR(device(hidden_, rows * hidden, "activations"));
  RETURN_IF_ERROR(device(projected_, rows * hidden, "activations"));
  RETURN_IF_ERROR(device(normed_, rows * hidden, "activations"));
  RETURN_IF_ERROR(device(cosine_, rows * half, "activations"));
  RETURN_IF_ERROR(device(sine_, rows * half, "activations"));
  RETURN_IF_ERROR(device(qkv_, rows * (q_width + 2 * kv_width), "activations"));
  RETURN_IF_ERROR(device(q_, rows * q_width, "activations"));
  RETURN_IF_ERROR(device(attended_, rows * q_width, "activations"));
  RETURN_IF_ERROR(device(gate_up_, rows * 2 * model_.intermediate_size, "activations"));
  RETURN_IF_ERROR(device(activated_, rows * model_.intermediate_size, "activations"));
  RETURN_IF_ERROR(
      device(logits_, std::max<size_t>(decode_rows, kMaxChunks) * model_.vocab_size, "logits"));
  RETURN_IF_ERROR(device(selected_, pairs * max_selected_, "selections"));
  RETURN_IF_ERROR(device(selected_count_, pairs, "selections"));
  RETURN_IF_ERROR(device(attend_slots_, decode_pairs * max_selected_, "selections"));
  RETURN_IF_ERROR(device(attend_blocks_, decode_pairs * max_selected_, "selections"));
  RETURN_IF_ERROR(device(ranges_, decode_pairs, "selections"));
  RETURN_IF_ERROR(device(num_loads_, model_.num_layers + 1, "loads"));
  // Of a decode step, of the chunks of a prefill step, of one block of all layers.
  const size_t loads = std::max({decode_pairs * max_selected_, kMaxChunks * kv_heads * max_blocks,
                                 static_cast<size_t>(cache_->view().records)});
  RETURN_IF_ERROR(device(loads_, loads, "loads"));
  RETURN_IF_ERROR(device(host_loads_, loads, "loads"));
  RETURN_IF_ERROR(
      device(landing_,
             static_cast<size_t>(options_.landing_records) * kernels::RecordBytes(model_.head_dim),
             "landing ring"));
  if (!Full()) {
    const size_t padded = kernels::PaddedGroup(group_);
    const size_t most_windows = WindowsFor(static_cast<int>(max_blocks));
    // As many rows as the budget allows, at least one tile's, at most all.
    const size_t score_rows = std::min<size_t>(rows, ScoreRows(static_cast<int>(max_blocks)));
    const size_t floats =
        std::max<size_t>(score_rows * kv_heads * most_windows * padded,
                         std::min<size_t>(options_.score_bytes / sizeof(float),
                                          rows * kv_heads * most_windows * padded));
    RETURN_IF_ERROR(device(scores_, floats, "scores"));
    RETURN_IF_ERROR(
        device(score_partials_, floats / kernels::kIndexWindows + pairs * padded, "scores"));
  }
  size_t partials = 0;
  for (size_t bucket = 1; bucket <= decode_rows; bucket = RowBucket(static_cast<int>(bucket) + 1)) {
    for (const Missing missing : {Missing::kNever, Missing::kMapped, Missing::kFetched}) {
      partials = std::max(partials, bucket * Splits(static_cast<int>(bucket), missing));
    }
  }
  RETURN_IF_ERROR(device(partial_o_, partials * q_width, "partial attention"));
  RETURN_IF_ERROR(
      device(attend_finished_, decode_pairs * ((group_ + 15) / 16), "partial attention"));
  RETURN_IF_ERROR(device(partial_mz_, partials * model_.num_heads, "partial attention"));

  std::vector<double> inverse(half);
  for (size_t i = 0; i < half; ++i) {
    inverse[i] = std::pow(model_.rope_theta, -static_cast<double>(i) / half);
  }
  return CopyToDevice(inverse_frequencies_.data(), inverse.data(), half * sizeof(double), "RoPE");
}

int CudaStep::ScoreRows(int blocks) const {
  const int64_t row_bytes =
      int64_t{4} * model_.num_kv_heads * WindowsFor(blocks) * kernels::PaddedGroup(group_);
  const int64_t rows = options_.score_bytes / row_bytes / kScoreTileRows * kScoreTileRows;
  return static_cast<int>(std::clamp<int64_t>(rows, kScoreTileRows, max_rows_));
}

int CudaStep::Splits(int rows, Missing missing) const {
  // The fewest rounds of thread blocks over the SMs, weighted by the work of each. Two fit on an
  // SM, but one alone keeps its share of the memory bandwidth busy.
  const int lists = rows * model_.num_kv_heads * ((group_ + 15) / 16);
  const int blocks = Full() ? cache_->view().max_blocks : model_.nosa.topk_blocks;
  int least = 1;
  if (missing != Missing::kNever) {
    least = std::clamp(kFetchRounds * multiprocessors_ / lists, 1, std::min(kFetchSplits, blocks));
  }
  int best = least;
  int64_t best_cost = std::numeric_limits<int64_t>::max();
  for (int splits = least; splits <= std::min(kMaxSplits, blocks); ++splits) {
    const int64_t rounds = (int64_t{lists} * splits + multiprocessors_ - 1) / multiprocessors_;
    const int64_t cost = rounds * ((blocks + splits - 1) / splits + kAttendOverheadBlocks);
    if (cost < best_cost) {
      best_cost = cost;
      best = splits;
    }
  }
  return best;
}

void CudaStep::FillInput(absl::Span<const StepToken> tokens, int rows) {
  *In<uint32_t>(0, false) = step_;
  StepRow* info = In<StepRow>(RowsOffset(max_rows_), false);
  int32_t* ids = In<int32_t>(TokensOffset(max_rows_), false);
  for (int i = 0; i < rows; ++i) {
    if (i < static_cast<int>(tokens.size())) {
      info[i] = {tokens[i].sequence, tokens[i].position};
      ids[i] = tokens[i].token;
    } else {
      info[i] = {-1, 0};
      ids[i] = 0;
    }
  }
}

absl::Status CudaStep::PrepareProducts(int rows, int logits_rows) {
  const int hidden = model_.hidden_size;
  const int q_width = model_.num_heads * model_.head_dim;
  const int qkv_width = q_width + 2 * model_.num_kv_heads * model_.head_dim;
  const bool o_bias = weights_->layers[0].o_bias.size() > 0;
  const auto prepare = [&](int n, int in, int out, bool bias) {
    return matmul_->Prepare(n, in, out, bias, options_.tuning, stream_);
  };
  RETURN_IF_ERROR(prepare(rows, hidden, qkv_width, false));
  RETURN_IF_ERROR(prepare(rows, q_width, hidden, o_bias));
  RETURN_IF_ERROR(prepare(rows, hidden, 2 * model_.intermediate_size, false));
  RETURN_IF_ERROR(prepare(rows, model_.intermediate_size, hidden, false));
  if (logits_rows > 0) RETURN_IF_ERROR(prepare(logits_rows, hidden, model_.vocab_size, false));
  return absl::OkStatus();
}

absl::Status CudaStep::FetchLoads(int layer, const FetchFunction& fetch) {
  int32_t count = 0;
  RETURN_IF_ERROR(CudaStatus(cudaMemcpyAsync(host_output_.data(), num_loads_.data() + layer,
                                             sizeof(count), cudaMemcpyDeviceToHost, stream_),
                             "loads"));
  RETURN_IF_ERROR(CudaStatus(cudaStreamSynchronize(stream_), "resolve"));
  count = host_output_[0];
  if (count == 0) return absl::OkStatus();
  RETURN_IF_ERROR(CudaStatus(cudaMemcpyAsync(host_loads_.data(), loads_.data(),
                                             count * sizeof(Load), cudaMemcpyDeviceToHost, stream_),
                             "loads"));
  return FetchListed(count, fetch);
}

absl::Status CudaStep::FetchListed(int count, const FetchFunction& fetch) {
  for (int first = 0; first < count; first += options_.landing_records) {
    // Also: the last gather has read the landing ring.
    RETURN_IF_ERROR(CudaStatus(cudaStreamSynchronize(stream_), "gather"));
    const int here = std::min(options_.landing_records, count - first);
    absl::BlockingCounter missing(here);
    fetch(absl::MakeConstSpan(host_loads_.data() + first, here), landing_.data(),
          [&missing](int) { missing.DecrementCount(); });
    missing.Wait();
    RETURN_IF_ERROR(CudaStatus(cudaMemcpyAsync(num_loads_.data() + model_.num_layers, &here,
                                               sizeof(here), cudaMemcpyHostToDevice, stream_),
                               "loads"));
    kernels::GatherParams gather;
    gather.loads = loads_.data() + first;
    gather.num_loads = num_loads_.data() + model_.num_layers;
    gather.cache = cache_->view();
    gather.landing = landing_.data();
    gather.thread_blocks = options_.gather_thread_blocks;
    RETURN_IF_ERROR(CudaStatus(kernels::LaunchGather(gather, stream_), "gather"));
  }
  return absl::OkStatus();
}

absl::Status CudaStep::PrepareArrivals() {
  if (bells_.size() == 0) {
    const auto create = [](auto& array, size_t size, const char* what) -> absl::Status {
      using Array = std::remove_reference_t<decltype(array)>;
      ASSIGN_OR_RETURN(array, Array::Create(size, what));
      return absl::OkStatus();
    };
    // All that a layer can ask for.
    const size_t loads = size_t{static_cast<unsigned>(options_.max_decode_rows)} *
                         model_.num_kv_heads * max_selected_;
    RETURN_IF_ERROR(create(asked_, loads, "loads"));
    RETURN_IF_ERROR(create(arrived_, loads, "arrivals"));
    RETURN_IF_ERROR(
        create(arrivals_, loads * kernels::RecordBytes(model_.head_dim), "records that arrive"));
    RETURN_IF_ERROR(create(sources_, loads, "sources"));
    RETURN_IF_ERROR(create(bells_, model_.num_layers, "bells"));
  }
  std::fill_n(bells_.data(), bells_.size(), 0);
  return absl::OkStatus();
}

absl::Status CudaStep::ServeArrivals(const FetchFunction& fetch) {
  absl::Mutex mutex;
  int under_way = 0;
  absl::Status status;
  for (int layer = 0; layer < model_.num_layers && status.ok(); ++layer) {
    // The bell rings within microseconds to a few milliseconds, and each counts.
    uint32_t bell = 0;
    for (int64_t spins = 1; bell == 0; ++spins) {
      bell = std::atomic_ref<uint32_t>(bells_[layer]).load(std::memory_order_acquire);
      if (bell != 0 || spins % 4096 != 0) continue;
      // A failed kernel rings no bell.
      const cudaError_t error = cudaStreamQuery(stream_);
      if (error != cudaErrorNotReady && error != cudaSuccess) {
        status = CudaStatus(error, "decode step");
        break;
      }
    }
    if (bell <= 1) continue;
    const int count = static_cast<int>(bell) - 1;
    {
      absl::MutexLock lock(&mutex);
      under_way += count;
    }
    fetch(absl::MakeConstSpan(asked_.data(), count), arrivals_.data(),
          [this, &mutex, &under_way, tag = kernels::ArrivalTag(step_, layer)](int i) {
            std::atomic_ref<uint64_t>(arrived_[i]).store(tag, std::memory_order_release);
            absl::MutexLock lock(&mutex);
            --under_way;
          });
  }
  // The device waits for all of them anyhow; the calls that say so end a little later.
  absl::MutexLock lock(&mutex);
  mutex.Await(absl::Condition(
      +[](int* left) { return *left == 0; }, &under_way));
  return status;
}

absl::Status CudaStep::LaunchDecode(const Shape& shape, uint32_t stages) {
  RETURN_IF_ERROR(Begin(shape.rows, stages));
  const int score_rows = Full() ? shape.rows : ScoreRows(shape.blocks);
  for (int layer = 0; layer < model_.num_layers; ++layer) {
    RETURN_IF_ERROR(BeginLayer(layer, shape.rows, kernels::AppendWindows::kUpdate, stages));
    for (int first = 0; first < shape.rows; first += score_rows) {
      const int rows = std::min(score_rows, shape.rows - first);
      RETURN_IF_ERROR(Select(layer, {first, rows, 0, rows}, nullptr, shape.blocks, stages));
    }
    RETURN_IF_ERROR(AttendDecode(layer, shape, stages));
    RETURN_IF_ERROR(EndLayer(layer, shape.rows, stages));
  }
  return Output(shape.rows, nullptr, stages);
}

absl::StatusOr<cudaGraphExec_t> CudaStep::Capture(const Shape& shape, uint32_t stages) {
  RETURN_IF_ERROR(PrepareProducts(shape.rows, shape.rows));
  RETURN_IF_ERROR(
      CudaStatus(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "capture"));
  const absl::Status launched = LaunchDecode(shape, stages);
  cudaGraph_t graph = nullptr;
  const absl::Status ended = CudaStatus(cudaStreamEndCapture(stream_, &graph), "capture");
  RETURN_IF_ERROR(launched);
  RETURN_IF_ERROR(ended);
  cudaGraphExec_t exec = nullptr;
  const absl::Status made = CudaStatus(cudaGraphInstantiate(&exec, graph, 0), "graph");
  cudaGraphDestroy(graph);
  RETURN_IF_ERROR(made);
  return exec;
}

StepOutput CudaStep::Results(int tokens, int rows) const {
  return {absl::MakeConstSpan(host_output_.data(), tokens),
          absl::MakeConstSpan(
              reinterpret_cast<const int2*>(host_output_.data() + TotalsOffset(max_rows_)), rows)};
}

absl::Status CudaStep::CheckFailures() {
  const int failures = host_output_[FailuresOffset(max_rows_)];
  if (failures == 0) return absl::OkStatus();
  return absl::InternalError(
      absl::StrCat(failures, " selected records found no slot: a sequence has too few frames"));
}

absl::StatusOr<StepOutput> CudaStep::Decode(absl::Span<const StepToken> tokens, Missing missing,
                                            const FetchFunction& fetch) {
  CHECK(!tokens.empty() && static_cast<int>(tokens.size()) <= options_.max_decode_rows);
  Shape shape;
  shape.rows = RowBucket(static_cast<int>(tokens.size()));
  int blocks = 0;
  for (const StepToken& token : tokens) {
    blocks = std::max(blocks, token.position / kBlockTokens + 1);
  }
  shape.blocks = BlockBucket(blocks, cache_->view().max_blocks);
  shape.missing = missing;
  step_ += 2;
  FillInput(tokens, shape.rows);
  DrawParams* draws = In<DrawParams>(kDrawsOffset, false);
  for (int i = 0; i < shape.rows; ++i) {
    draws[i] = i < static_cast<int>(tokens.size()) ? tokens[i].draw : DrawParams();
  }
  last_shape_ = shape;
  if (missing == Missing::kFetched) RETURN_IF_ERROR(PrepareArrivals());
  auto graph = std::find_if(graphs_.begin(), graphs_.end(),
                            [&](const auto& entry) { return std::get<0>(entry) == shape.Key(); });
  if (graph == graphs_.end()) {
    ASSIGN_OR_RETURN(const cudaGraphExec_t exec, Capture(shape, kAllStages));
    graphs_.emplace_back(shape.Key(), exec);
    graph = graphs_.end() - 1;
  }
  RETURN_IF_ERROR(CudaStatus(cudaGraphLaunch(std::get<1>(*graph), stream_), "decode step"));
  if (missing == Missing::kFetched) RETURN_IF_ERROR(ServeArrivals(fetch));
  RETURN_IF_ERROR(CudaStatus(cudaStreamSynchronize(stream_), "decode step"));
  RETURN_IF_ERROR(CheckFailures());
  return Results(static_cast<int>(tokens.size()), static_cast<int>(tokens.size()));
}

absl::StatusOr<StepOutput> CudaStep::Prefill(absl::Span<const StepToken> tokens, Missing missing,
                                             const FetchFunction& fetch,
                                             absl::Span<const int32_t> logits_rows) {
  const int rows = static_cast<int>(tokens.size());
  CHECK(rows > 0 && rows <= options_.max_prefill_rows);
  CHECK(logits_rows.size() <= kMaxChunks);
  int longest = 0;
  int chunks = 0;
  for (int i = 0; i < rows; ++i) {
    longest = std::max(longest, tokens[i].position / kBlockTokens + 1);
    chunks += i == 0 || tokens[i].sequence != tokens[i - 1].sequence ? 1 : 0;
  }
  CHECK(chunks <= kMaxChunks);
  const int blocks = BlockBucket(longest, cache_->view().max_blocks);
  step_ += 2;
  FillInput(tokens, rows);
  DrawParams* draws = In<DrawParams>(kDrawsOffset, false);
  int32_t* source = In<int32_t>(SourceOffset(max_rows_), false);
  for (const int32_t row : logits_rows) {
    *source++ = row;
    *draws++ = tokens[row].draw;
  }

  // Tiles of rows of one sequence: for attention over the whole step, for scores within each batch.
  const auto tile = [&](int begin, int end, int most, auto&& emit) {
    for (int first = begin; first < end;) {
      int last = first + 1;
      while (last < end && last - first < most && tokens[last].sequence == tokens[first].sequence) {
        ++last;
      }
      emit(first, last - first);
      first = last;
    }
  };
  int attend_tiles = 0;
  RowTile* attend = In<RowTile>(TilesOffset(max_rows_), false);
  tile(0, rows, kernels::kPrefillTileRows, [&](int first, int count) {
    attend[attend_tiles++] = {first, count};
  });
  std::vector<ScoreBatch> batches;
  int score_tiles = 0;
  RowTile* score = In<RowTile>(ScoreTilesOffset(max_rows_), false);
  const int score_rows = Full() ? rows : ScoreRows(blocks);
  for (int first = 0; first < rows; first += score_rows) {
    ScoreBatch batch;
    batch.first_row = first;
    batch.rows = std::min(score_rows, rows - first);
    batch.first_tile = score_tiles;
    tile(first, first + batch.rows, kScoreTileRows, [&](int begin, int count) {
      score[score_tiles++] = {begin - first, count};
    });
    batch.tiles = score_tiles - batch.first_tile;
    batches.push_back(batch);
  }

  RETURN_IF_ERROR(Begin(rows, kAllStages));
  for (int layer = 0; layer < model_.num_layers; ++layer) {
    RETURN_IF_ERROR(BeginLayer(layer, rows, kernels::AppendWindows::kLeave, kAllStages));
    for (const ScoreBatch& batch : batches) {
      RETURN_IF_ERROR(Select(layer, batch,
                             In<RowTile>(ScoreTilesOffset(max_rows_), true) + batch.first_tile,
                             blocks, kAllStages));
    }
    RETURN_IF_ERROR(AttendPrefill(layer, rows, attend_tiles, blocks, missing, fetch));
    RETURN_IF_ERROR(EndLayer(layer, rows, kAllStages));
  }
  RETURN_IF_ERROR(Output(static_cast<int>(logits_rows.size()),
                         In<int32_t>(SourceOffset(max_rows_), true), kAllStages));
  RETURN_IF_ERROR(CudaStatus(cudaStreamSynchronize(stream_), "prefill step"));
  RETURN_IF_ERROR(CheckFailures());
  return Results(static_cast<int>(logits_rows.size()), rows);
}

absl::Status CudaStep::LoadBlock(int sequence, int block, const FetchFunction& fetch) {
  const kernels::CacheView& view = cache_->view();
  step_ += 2;
  FillInput({{sequence, block * kBlockTokens, 0}}, 1);
  RETURN_IF_ERROR(Begin(1, 1u << static_cast<int>(Stage::kInput)));
  std::vector<int32_t> slots(view.records);
  RETURN_IF_ERROR(CudaStatus(
      cudaMemcpy2DAsync(slots.data(), sizeof(int32_t),
                        view.slot_of + view.TableRow(sequence, 0) * view.max_blocks + block,
                        view.max_blocks * sizeof(int32_t), sizeof(int32_t), view.records,
                        cudaMemcpyDeviceToHost, stream_),
      "slots"));
  RETURN_IF_ERROR(CudaStatus(cudaStreamSynchronize(stream_), "slots"));
  CHECK(host_loads_.size() >= slots.size());
  for (int r = 0; r < view.records; ++r) {
    if (slots[r] < 0) {
      return absl::InternalError("a bound block found no slot: its sequence has too few frames");
    }
    host_loads_[r] = {sequence, r, block, slots[r]};
  }
  RETURN_IF_ERROR(
      CudaStatus(cudaMemcpyAsync(loads_.data(), host_loads_.data(), slots.size() * sizeof(Load),
                                 cudaMemcpyHostToDevice, stream_),
                 "loads"));
  RETURN_IF_ERROR(FetchListed(view.records, fetch));
  return CudaStatus(cudaStreamSynchronize(stream_), "gather");
}

absl::Status CudaStep::ReadLogits(int rows, absl::Span<float> out) {
  CHECK(out.size() == static_cast<size_t>(rows) * model_.vocab_size);
  RETURN_IF_ERROR(CudaStatus(cudaMemcpyAsync(out.data(), logits_.data(), out.size() * sizeof(float),
                                             cudaMemcpyDeviceToHost, stream_),
                             "logits"));
  return CudaStatus(cudaStreamSynchronize(stream_), "logits");
}

absl::StatusOr<double> CudaStep::TimeStages(uint32_t stages, int repeats) {
  ASSIGN_OR_RETURN(const cudaGraphExec_t graph, Capture(last_shape_, stages));
  cudaEvent_t begin, end;
  RETURN_IF_ERROR(CudaStatus(cudaEventCreate(&begin), "event"));
  RETURN_IF_ERROR(CudaStatus(cudaEventCreate(&end), "event"));
  std::vector<float> times;
  absl::Status status;
  for (int i = 0; i < repeats + 2 && status.ok(); ++i) {
    status.Update(CudaStatus(cudaEventRecord(begin, stream_), "event"));
    status.Update(CudaStatus(cudaGraphLaunch(graph, stream_), "graph"));
    status.Update(CudaStatus(cudaEventRecord(end, stream_), "event"));
    status.Update(CudaStatus(cudaEventSynchronize(end), "graph"));
    float ms = 0;
    status.Update(CudaStatus(cudaEventElapsedTime(&ms, begin, end), "event"));
    if (i >= 2) times.push_back(ms);
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  cudaGraphExecDestroy(graph);
  RETURN_IF_ERROR(status);
  std::sort(times.begin(), times.end());
  return times[times.size() / 2] * 1e3;
}

}  // namespace nosara::worker
