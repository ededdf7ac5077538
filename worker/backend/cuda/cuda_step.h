// One step of the model on the device: the kernels of all layers in order, as a CUDA graph for
// decode.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <tuple>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "kernels/append/append.h"
#include "kernels/attend/attend.h"
#include "kernels/resolve/resolve.h"
#include "kernels/sample/draw.h"
#include "kernels/select/select.h"
#include "worker/backend/cuda/device_cache.h"
#include "worker/backend/cuda/matmul.h"
#include "worker/backend/cuda/weights.h"
#include "worker/backend/selection.h"

namespace nosara::worker {

/// Parts of a step, for measurements: a mask of 1 << stage leaves the other parts out.
enum class Stage {
  kInput,
  kNorm,
  kMatMul,
  kAppend,
  kScore,
  kSelect,
  kResolve,
  kAttend,
  kActivation,
  kOutput,
};
inline constexpr int kNumStages = 10;
inline constexpr uint32_t kAllStages = (1u << kNumStages) - 1;
const char* StageName(Stage stage);

/// Where the records come from that a step selects and that have no slot.
enum class Missing {
  kNever,    // every block of every sequence is resident
  kMapped,   // CacheView::pages are addresses that the device can read: attention fetches them
  kFetched,  // as kMapped, but for what is kStoredElsewhere: that, by FetchFunction
};

/// Starts to bring the record of loads[i] to landing + i * RecordBytes(D), for all of them, and
/// returns. `arrived(i)` is called once for each, on any thread, when it is there or never will be;
/// whoever gave the function knows which.
using FetchFunction = std::function<void(absl::Span<const kernels::Load> loads, std::byte* landing,
                                         std::function<void(int i)> arrived)>;

struct CudaStepOptions {
  AttentionPolicy policy = AttentionPolicy::kNosa;
  kernels::AttendBias bias = kernels::AttendBias::kCache;
  /// Rows of a prefill step at most; rows of a decode step at most.
  int max_prefill_rows = 512;
  int max_decode_rows = 64;
  /// Device memory for the scores of one launch; more rows are scored in several.
  int64_t score_bytes = int64_t{256} << 20;
  /// Thread blocks of a gather in prefill, or from the landing ring; see kernels/gather.
  int gather_thread_blocks = 16;
  /// Records that are fetched at a time in prefill.
  int landing_records = 256;
  CudaMatMul::Tuning tuning = CudaMatMul::Tuning::kHeuristic;
  /// Not null: selections are replaced (kernels::ReplayParams); for benchmarks.
  const int32_t* replay_rings = nullptr;
  int replay_rows = 0;
  int replay_ring_blocks = 0;
  float replay_change = 0;
};

/// A token to process: row of DeviceCache, position, id, and how the one after it is drawn where
/// that is wanted.
struct StepToken {
  int32_t sequence = 0;
  int32_t position = 0;
  int32_t token = 0;
  kernels::DrawParams draw = {};
};

/// What a step leaves on the host.
struct StepOutput {
  /// The tokens drawn, one for each row that logits were asked for (decode: all).
  absl::Span<const int32_t> tokens;
  /// [rows]: records selected and loaded, layers and heads together; for a chunk at its first row.
  absl::Span<const int2> totals;
};

/// Owned by the engine thread. The cache and the weights must outlive it.
class CudaStep final {
 public:
  static absl::StatusOr<std::unique_ptr<CudaStep>> Create(const CudaWeights* weights,
                                                          DeviceCache* cache,
                                                          const CudaStepOptions& options,
                                                          cudaStream_t stream);
  ~CudaStep();

  /// One token of each of several sequences. Blocks that begin get slots; every selected block is
  /// attended to. INTERNAL when a record found no slot.
  absl::StatusOr<StepOutput> Decode(absl::Span<const StepToken> tokens, Missing missing,
                                    const FetchFunction& fetch);

  /// Chunks: tokens of one sequence lie together, at consecutive positions. Every block of the
  /// sequences needs room for a slot. `logits_rows`: rows whose next token is wanted.
  absl::StatusOr<StepOutput> Prefill(absl::Span<const StepToken> tokens, Missing missing,
                                     const FetchFunction& fetch,
                                     absl::Span<const int32_t> logits_rows);

  /// Brings all records of a stored block into slots, before the step that needs them: what begins
  /// behind a bound prefix averages keys of the block before it.
  absl::Status LoadBlock(int sequence, int block, const FetchFunction& fetch);

  /// The logits behind StepOutput::tokens, copied to the host: [n, V].
  absl::Status ReadLogits(int rows, absl::Span<float> out);

  /// For measurements: the decode step of the last Decode() again, only `stages` of it, as a graph
  /// of its own; the time of one replay in microseconds, the median of `repeats`.
  absl::StatusOr<double> TimeStages(uint32_t stages, int repeats);

 private:
  /// Rows that are scored in one launch, and their tiles (of rows counted from first_row).
  struct ScoreBatch {
    int first_row = 0;
    int rows = 0;
    int first_tile = 0;
    int tiles = 0;
  };
  /// What a decode graph was captured for.
  struct Shape {
    int rows = 0;    // bucket
    int blocks = 0;  // bucket, of the longest sequence
    Missing missing = Missing::kNever;
    auto Key() const { return std::tuple(rows, blocks, missing); }
  };

  CudaStep(const CudaWeights* weights, DeviceCache* cache, const CudaStepOptions& options,
           cudaStream_t stream);
  absl::Status Allocate();
  void FillInput(absl::Span<const StepToken> tokens, int rows);
  absl::Status LaunchDecode(const Shape& shape, uint32_t stages);
  absl::StatusOr<cudaGraphExec_t> Capture(const Shape& shape, uint32_t stages);
  absl::Status CheckFailures();

  // The parts of a step, in order.
  absl::Status Begin(int rows, uint32_t stages);
  absl::Status BeginLayer(int layer, int rows, kernels::AppendWindows update, uint32_t stages);
  absl::Status Select(int layer, const ScoreBatch& batch, const kernels::RowTile* tiles, int blocks,
                      uint32_t stages);
  absl::Status AttendDecode(int layer, const Shape& shape, uint32_t stages);
  absl::Status AttendPrefill(int layer, int rows, int tiles, int blocks, Missing missing,
                             const FetchFunction& fetch);
  absl::Status Gather(int layer);
  absl::Status FetchLoads(int layer, const FetchFunction& fetch);
  absl::Status PrepareArrivals();
  absl::Status ServeArrivals(const FetchFunction& fetch);
  absl::Status FetchListed(int count, const FetchFunction& fetch);
  absl::Status EndLayer(int layer, int rows, uint32_t stages);
  absl::Status Output(int logits_rows, const int32_t* source, uint32_t stages);
  StepOutput Results(int tokens, int rows) const;
  absl::Status PrepareProducts(int rows, int logits_rows);
  bool Full() const { return options_.policy == AttentionPolicy::kFull; }
  int ScoreRows(int blocks) const;
  int Splits(int rows, Missing missing) const;

  // Where things lie in input_ and host_input_.
  template <typename T>
  T* In(size_t offset, bool device) const {
    return reinterpret_cast<T*>((device ? input_.data() : host_input_.data()) + offset);
  }

  // Constant after construction.
  const CudaWeights* const weights_;
  DeviceCache* const cache_;
  const CudaStepOptions options_;
  const cudaStream_t stream_;
  const ModelConfig& model_;
  const int max_rows_;
  const int max_selected_;  // row length of selections
  const int group_;         // G

  std::unique_ptr<CudaMatMul> matmul_;
  int multiprocessors_ = 1;

  // One copy each way a step. Layouts: see the source.
  PinnedArray<std::byte> host_input_;
  DeviceArray<std::byte> input_;
  PinnedArray<int32_t> host_output_;
  DeviceArray<int32_t> output_;
  uint32_t step_ = 1;

  DeviceArray<double> inverse_frequencies_;
  DeviceArray<float> hidden_, cosine_, sine_, qkv_, projected_, gate_up_, logits_;
  DeviceArray<__nv_bfloat16> normed_, q_, attended_, activated_;
  DeviceArray<float> scores_;
  DeviceArray<float2> score_partials_;
  DeviceArray<int32_t> selected_, selected_count_, attend_slots_, attend_blocks_, num_loads_;
  DeviceArray<int2> ranges_;
  DeviceArray<int32_t> attend_finished_;
  DeviceArray<kernels::Load> loads_;
  DeviceArray<float> partial_o_;
  DeviceArray<float2> partial_mz_;
  PinnedArray<kernels::Load> host_loads_;
  PinnedArray<std::byte> landing_;
  // Of Missing::kFetched in decode; there once they are needed. In mapped memory: what the device
  // asks for, a bell for each layer, what arrived and where.
  PinnedArray<kernels::Load> asked_;
  PinnedArray<uint32_t> bells_;
  PinnedArray<uint64_t> arrived_;
  PinnedArray<std::byte> arrivals_;
  DeviceArray<int32_t> sources_;

  std::vector<std::tuple<std::tuple<int, int, Missing>, cudaGraphExec_t>> graphs_;
  Shape last_shape_;
};

}  // namespace nosara::worker
