// The launches of one step, in order.
#include <algorithm>

#include "base/status_macros.h"
#include "kernels/append/append.h"
#include "kernels/embed/embed.h"
#include "kernels/gather/gather.h"
#include "kernels/prefill/prefill.h"
#include "kernels/rms_norm/rms_norm.h"
#include "kernels/sample/sample.h"
#include "kernels/score/score.h"
#include "kernels/score_select/score_select.h"
#include "kernels/swiglu/swiglu.h"
#include "kernels/windows/windows.h"
#include "worker/backend/cuda/cuda_step.h"
#include "worker/backend/cuda/step_layout.h"

namespace nosara::worker {

using namespace step_layout;
using kernels::RowTile;
using kernels::StepRow;

#define NOSARA_STAGE(stage, what, launch)              \
  if ((stages >> static_cast<int>(stage) & 1u) != 0) { \
    RETURN_IF_ERROR(CudaStatus((launch), what));       \
  }

namespace {

/// The same selection, to be made in one launch.
kernels::ScoreSelectParams ScoreSelect(const kernels::SelectParams& select,
                                       const __nv_bfloat16* q) {
  kernels::ScoreSelectParams both;
  both.q = q;
  both.rows_info = select.rows_info;
  both.cache = select.cache;
  both.selected = select.selected;
  both.count = select.count;
  both.numbers = select.numbers;
  both.rows = select.rows;
  both.num_heads = select.num_heads;
  both.num_kv_heads = select.num_kv_heads;
  both.layer = select.layer;
  both.max_selected = select.max_selected;
  both.max_blocks = select.max_blocks;
  return both;
}

}  // namespace

absl::Status CudaStep::Begin(int rows, uint32_t stages) {
  NOSARA_STAGE(Stage::kInput, "step input",
               cudaMemcpyAsync(input_.data(), host_input_.data(), InputBytes(max_rows_),
                               cudaMemcpyHostToDevice, stream_));
  NOSARA_STAGE(Stage::kInput, "step output",
               cudaMemsetAsync(output_.data(), 0, output_.bytes(), stream_));
  NOSARA_STAGE(Stage::kInput, "loads",
               cudaMemsetAsync(num_loads_.data(), 0, num_loads_.bytes(), stream_));
  kernels::OpenBlocksParams open;
  open.rows_info = In<StepRow>(RowsOffset(max_rows_), true);
  open.cache = cache_->view();
  open.step = In<uint32_t>(0, true);
  open.failures = output_.data() + FailuresOffset(max_rows_);
  open.rows = rows;
  NOSARA_STAGE(Stage::kInput, "open blocks", kernels::LaunchOpenBlocks(open, stream_));
  kernels::EmbedParams embed;
  embed.table = weights_->embedding.data();
  embed.tokens = In<int32_t>(TokensOffset(max_rows_), true);
  embed.rows_info = In<StepRow>(RowsOffset(max_rows_), true);
  embed.inverse_frequencies = inverse_frequencies_.data();
  embed.hidden = hidden_.data();
  embed.cosine = cosine_.data();
  embed.sine = sine_.data();
  embed.rows = rows;
  embed.width = model_.hidden_size;
  embed.half = model_.head_dim / 2;
  NOSARA_STAGE(Stage::kInput, "embedding", kernels::LaunchEmbed(embed, stream_));
  return absl::OkStatus();
}

absl::Status CudaStep::BeginLayer(int index, int rows, kernels::AppendWindows update,
                                  uint32_t stages) {
  const CudaWeights::Layer& layer = weights_->layers[index];
  const int hidden = model_.hidden_size;
  const int qkv_width = (model_.num_heads + 2 * model_.num_kv_heads) * model_.head_dim;
  kernels::RmsNormParams norm;
  norm.hidden = hidden_.data();
  norm.addend = index > 0 ? projected_.data() : nullptr;
  norm.weight = layer.input_norm.data();
  norm.out = normed_.data();
  norm.rows = rows;
  norm.width = hidden;
  norm.eps = model_.rms_norm_eps;
  NOSARA_STAGE(Stage::kNorm, "norm", kernels::LaunchRmsNorm(norm, stream_));
  if ((stages >> static_cast<int>(Stage::kMatMul) & 1u) != 0) {
    RETURN_IF_ERROR(matmul_->Run(normed_.data(), layer.qkv.data(), nullptr, qkv_.data(), rows,
                                 hidden, qkv_width, stream_));
  }
  kernels::AppendParams append;
  append.qkv = qkv_.data();
  append.bias = layer.qkv_bias.data();
  append.A = layer.A.data();
  append.delta = layer.delta.data();
  append.delta_bias = layer.delta_bias.data();
  append.cosine = cosine_.data();
  append.sine = sine_.data();
  append.rows_info = In<StepRow>(RowsOffset(max_rows_), true);
  append.q = q_.data();
  append.cache = cache_->view();
  append.rows = rows;
  append.num_heads = model_.num_heads;
  append.num_kv_heads = model_.num_kv_heads;
  append.layer = index;
  append.windows = update;
  NOSARA_STAGE(Stage::kAppend, "append", kernels::LaunchAppend(append, stream_));
  if (update == kernels::AppendWindows::kUpdate) return absl::OkStatus();
  kernels::WindowsParams windows;
  windows.rows_info = append.rows_info;
  windows.cache = append.cache;
  windows.rows = rows;
  windows.num_kv_heads = model_.num_kv_heads;
  windows.layer = index;
  NOSARA_STAGE(Stage::kAppend, "windows", kernels::LaunchWindows(windows, stream_));
  return absl::OkStatus();
}

absl::Status CudaStep::Select(int layer, const ScoreBatch& batch, const RowTile* tiles, int blocks,
                              uint32_t stages) {
  const NosaConfig& nosa = model_.nosa;
  const int64_t first_pair = int64_t{batch.first_row} * model_.num_kv_heads;
  kernels::SelectParams select;
  select.rows_info = In<StepRow>(RowsOffset(max_rows_), true) + batch.first_row;
  select.cache = cache_->view();
  select.logits = scores_.data();
  select.partials = score_partials_.data();
  select.selected = selected_.data() + first_pair * max_selected_;
  select.count = selected_count_.data() + first_pair;
  select.numbers.init_blocks = nosa.init_blocks;
  select.numbers.window_blocks = nosa.window_blocks;
  select.numbers.query_blocks =
      options_.policy == AttentionPolicy::kNosa ? nosa.QueryAwareBlocks() : nosa.topk_blocks;
  select.numbers.topk_blocks = nosa.topk_blocks;
  select.rows = batch.rows;
  select.num_heads = model_.num_heads;
  select.num_kv_heads = model_.num_kv_heads;
  select.layer = layer;
  select.max_windows = WindowsFor(blocks);
  select.max_selected = max_selected_;
  select.max_blocks = blocks;
  if (Full() || blocks <= nosa.topk_blocks) {
    NOSARA_STAGE(Stage::kSelect, "selection", kernels::LaunchSelectAll(select, stream_));
    return absl::OkStatus();
  }
  const __nv_bfloat16* q =
      q_.data() + int64_t{batch.first_row} * model_.num_heads * model_.head_dim;
  const kernels::ScoreSelectParams both = ScoreSelect(select, q);
  if (tiles == nullptr && kernels::CanScoreSelect(both)) {
    NOSARA_STAGE(Stage::kScore, "scores and selection", kernels::LaunchScoreSelect(both, stream_));
  } else {
    kernels::ScoreParams score;
    score.q = q;
    score.rows_info = select.rows_info;
    score.tiles = tiles;
    score.cache = select.cache;
    score.logits = scores_.data();
    score.partials = score_partials_.data();
    score.num_tiles = batch.tiles;
    score.num_heads = model_.num_heads;
    score.num_kv_heads = model_.num_kv_heads;
    score.layer = layer;
    score.max_windows = select.max_windows;
    score.dense_blocks = nosa.topk_blocks;
    NOSARA_STAGE(Stage::kScore, "scores", kernels::LaunchScore(score, stream_));
    NOSARA_STAGE(Stage::kSelect, "selection", kernels::LaunchSelect(select, stream_));
  }
  if (options_.replay_rings != nullptr) {
    kernels::ReplayParams replay;
    replay.rows_info = select.rows_info;
    replay.rings = options_.replay_rings;
    replay.step = In<uint32_t>(0, true);
    replay.selected = select.selected;
    replay.count = select.count;
    replay.numbers = select.numbers;
    replay.change = options_.replay_change;
    replay.ring_rows = options_.replay_rows;
    replay.ring_blocks = options_.replay_ring_blocks;
    replay.records = select.cache.records;
    replay.rows = batch.rows;
    replay.num_kv_heads = model_.num_kv_heads;
    replay.layer = layer;
    replay.max_selected = max_selected_;
    NOSARA_STAGE(Stage::kSelect, "replay", kernels::LaunchReplay(replay, stream_));
  }
  return absl::OkStatus();
}

absl::Status CudaStep::Gather(int layer) {
  kernels::GatherParams gather;
  gather.loads = loads_.data();
  gather.num_loads = num_loads_.data() + layer;
  gather.cache = cache_->view();
  gather.thread_blocks = options_.gather_thread_blocks;
  return CudaStatus(kernels::LaunchGather(gather, stream_), "gather");
}

absl::Status CudaStep::AttendDecode(int layer, const Shape& shape, uint32_t stages) {
  kernels::ResolveParams resolve;
  resolve.rows_info = In<StepRow>(RowsOffset(max_rows_), true);
  resolve.selected = selected_.data();
  resolve.count = selected_count_.data();
  resolve.cache = cache_->view();
  resolve.step = In<uint32_t>(0, true);
  resolve.slots = attend_slots_.data();
  resolve.blocks = attend_blocks_.data();
  resolve.ranges = ranges_.data();
  resolve.loads = loads_.data();
  resolve.num_loads = num_loads_.data() + layer;
  resolve.failures = output_.data() + FailuresOffset(max_rows_);
  resolve.totals = reinterpret_cast<int2*>(output_.data() + TotalsOffset(max_rows_));
  resolve.rows = shape.rows;
  resolve.num_kv_heads = model_.num_kv_heads;
  resolve.layer = layer;
  resolve.max_selected = max_selected_;
  const bool arriving = shape.missing == Missing::kFetched;
  if (arriving) resolve.sources = sources_.data();
  NOSARA_STAGE(Stage::kResolve, "resolve", kernels::LaunchResolve(resolve, stream_));
  if (arriving) {
    kernels::PublishLoadsParams publish;
    publish.loads = loads_.data();
    publish.num_loads = resolve.num_loads;
    publish.host_loads = asked_.data();
    publish.bell = bells_.data() + layer;
    NOSARA_STAGE(Stage::kResolve, "loads", kernels::LaunchPublishLoads(publish, stream_));
  }
  kernels::AttendParams attend;
  attend.q = q_.data();
  attend.rows_info = resolve.rows_info;
  attend.slots = attend_slots_.data();
  attend.blocks = attend_blocks_.data();
  attend.ranges = ranges_.data();
  attend.cache = resolve.cache;
  attend.partial_o = partial_o_.data();
  attend.partial_mz = partial_mz_.data();
  attend.finished = attend_finished_.data();
  attend.out = attended_.data();
  attend.rows = shape.rows;
  attend.num_heads = model_.num_heads;
  attend.num_kv_heads = model_.num_kv_heads;
  attend.layer = layer;
  attend.max_selected = max_selected_;
  attend.num_splits = Splits(shape.rows, shape.missing);
  switch (shape.missing) {
    case Missing::kNever:
      attend.missing = kernels::AttendMissing::kInSlots;
      break;
    case Missing::kMapped:
      attend.missing = kernels::AttendMissing::kInPages;
      break;
    case Missing::kFetched:
      attend.missing = kernels::AttendMissing::kArriving;
      attend.arrivals = {sources_.data(), arrivals_.data(), arrived_.data(), In<uint32_t>(0, true)};
      break;
  }
  attend.bias = options_.bias;
  NOSARA_STAGE(Stage::kAttend, "attention", kernels::LaunchAttend(attend, stream_));
  return absl::OkStatus();
}

absl::Status CudaStep::AttendPrefill(int layer, int rows, int tiles, int blocks, Missing missing,
                                     const FetchFunction& fetch) {
  kernels::ResolveParams resolve;
  resolve.rows_info = In<StepRow>(RowsOffset(max_rows_), true);
  resolve.selected = selected_.data();
  resolve.count = selected_count_.data();
  resolve.cache = cache_->view();
  resolve.step = In<uint32_t>(0, true);
  resolve.loads = loads_.data();
  resolve.num_loads = num_loads_.data() + layer;
  resolve.failures = output_.data() + FailuresOffset(max_rows_);
  resolve.totals = reinterpret_cast<int2*>(output_.data() + TotalsOffset(max_rows_));
  resolve.rows = rows;
  resolve.num_kv_heads = model_.num_kv_heads;
  resolve.layer = layer;
  resolve.max_selected = max_selected_;
  resolve.max_blocks = blocks;
  RETURN_IF_ERROR(CudaStatus(kernels::LaunchResolveChunks(resolve, stream_), "resolve"));
  if (missing == Missing::kMapped) RETURN_IF_ERROR(Gather(layer));
  if (missing == Missing::kFetched) RETURN_IF_ERROR(FetchLoads(layer, fetch));

  kernels::PrefillParams prefill;
  prefill.q = q_.data();
  prefill.rows_info = resolve.rows_info;
  prefill.tiles = In<RowTile>(TilesOffset(max_rows_), true);
  prefill.selected = selected_.data();
  prefill.count = selected_count_.data();
  prefill.cache = resolve.cache;
  prefill.out = attended_.data();
  prefill.num_tiles = tiles;
  prefill.num_heads = model_.num_heads;
  prefill.num_kv_heads = model_.num_kv_heads;
  prefill.layer = layer;
  prefill.max_selected = max_selected_;
  prefill.max_blocks = blocks;
  prefill.bias = options_.bias;
  return CudaStatus(kernels::LaunchPrefill(prefill, stream_), "attention");
}

absl::Status CudaStep::EndLayer(int index, int rows, uint32_t stages) {
  const CudaWeights::Layer& layer = weights_->layers[index];
  const int hidden = model_.hidden_size;
  const int q_width = model_.num_heads * model_.head_dim;
  const bool products = (stages >> static_cast<int>(Stage::kMatMul) & 1u) != 0;
  if (products) {
    RETURN_IF_ERROR(matmul_->Run(attended_.data(), layer.o.data(), layer.o_bias.data(),
                                 projected_.data(), rows, q_width, hidden, stream_));
  }
  kernels::RmsNormParams norm;
  norm.hidden = hidden_.data();
  norm.addend = projected_.data();
  norm.weight = layer.post_norm.data();
  norm.out = normed_.data();
  norm.rows = rows;
  norm.width = hidden;
  norm.eps = model_.rms_norm_eps;
  NOSARA_STAGE(Stage::kNorm, "norm", kernels::LaunchRmsNorm(norm, stream_));
  if (products) {
    RETURN_IF_ERROR(matmul_->Run(normed_.data(), layer.gate_up.data(), nullptr, gate_up_.data(),
                                 rows, hidden, 2 * model_.intermediate_size, stream_));
  }
  kernels::SwiGluParams swiglu;
  swiglu.gate_up = gate_up_.data();
  swiglu.out = activated_.data();
  swiglu.rows = rows;
  swiglu.width = model_.intermediate_size;
  NOSARA_STAGE(Stage::kActivation, "activation", kernels::LaunchSwiGlu(swiglu, stream_));
  if (products) {
    RETURN_IF_ERROR(matmul_->Run(activated_.data(), layer.down.data(), nullptr, projected_.data(),
                                 rows, model_.intermediate_size, hidden, stream_));
  }
  return absl::OkStatus();
}

absl::Status CudaStep::Output(int rows, const int32_t* source, uint32_t stages) {
  if (rows > 0) {
    kernels::RmsNormParams norm;
    norm.hidden = hidden_.data();
    norm.addend = projected_.data();
    norm.weight = weights_->final_norm.data();
    norm.out = normed_.data();
    norm.source = source;
    norm.rows = rows;
    norm.width = model_.hidden_size;
    norm.eps = model_.rms_norm_eps;
    NOSARA_STAGE(Stage::kNorm, "norm", kernels::LaunchRmsNorm(norm, stream_));
    if ((stages >> static_cast<int>(Stage::kMatMul) & 1u) != 0) {
      RETURN_IF_ERROR(matmul_->Run(normed_.data(), weights_->output_matrix(), nullptr,
                                   logits_.data(), rows, model_.hidden_size, model_.vocab_size,
                                   stream_));
    }
    kernels::SampleParams sample;
    sample.logits = logits_.data();
    sample.draw = In<kernels::DrawParams>(kDrawsOffset, true);
    sample.token = output_.data();
    sample.rows = rows;
    sample.vocab = model_.vocab_size;
    NOSARA_STAGE(Stage::kOutput, "sampling", kernels::LaunchSample(sample, stream_));
  }
  NOSARA_STAGE(Stage::kOutput, "step output",
               cudaMemcpyAsync(host_output_.data(), output_.data(), output_.bytes(),
                               cudaMemcpyDeviceToHost, stream_));
  return absl::OkStatus();
}

#undef NOSARA_STAGE

}  // namespace nosara::worker
