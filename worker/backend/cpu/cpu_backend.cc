#include "worker/backend/cpu/cpu_backend.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "worker/backend/cpu/math.h"

namespace nosara::worker {
namespace {

constexpr int kBlock = kvstore::kBlockTokens;

std::vector<float> Widened(const TensorView& tensor) {
  std::vector<float> values(tensor.NumElements());
  tensor.CopyToFloat(absl::MakeSpan(values));
  return values;
}

std::vector<float> Widened(const std::optional<TensorView>& tensor) {
  return tensor.has_value() ? Widened(*tensor) : std::vector<float>();
}

void AddBias(absl::Span<float> rows, const std::vector<float>& bias) {
  if (bias.empty()) return;
  for (size_t begin = 0; begin < rows.size(); begin += bias.size()) {
    AddTo(rows.subspan(begin, bias.size()), bias);
  }
}

}  // namespace

absl::Status CpuBackendOptions::Validate(const ModelConfig& config) const {
  if (threads < 1 || threads > 1024) {
    return absl::InvalidArgumentError(absl::StrCat("threads = ", threads, ": must be 1 to 1024"));
  }
  if (slots_per_head != 0 && slots_per_head < config.nosa.topk_blocks) {
    return absl::InvalidArgumentError(
        absl::StrCat("slots_per_head = ", slots_per_head, ": must be 0 (all resident) or at least ",
                     config.nosa.topk_blocks, ", the blocks that a step of this model selects"));
  }
  if (max_unstored_blocks < 2) {
    return absl::InvalidArgumentError(
        absl::StrCat("max_unstored_blocks = ", max_unstored_blocks, ": must be at least 2"));
  }
  if (cache_bytes < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("cache_bytes = ", cache_bytes, ": must be positive"));
  }
  return absl::OkStatus();
}

absl::StatusOr<kvstore::PageLayout> CpuBackend::LayoutFor(const ModelConfig& config) {
  return kvstore::PageLayout::Create(config.num_layers, config.num_kv_heads, config.head_dim,
                                     static_cast<int>(DTypeBytes(config.dtype)));
}

absl::StatusOr<std::unique_ptr<CpuBackend>> CpuBackend::Create(
    std::shared_ptr<const Checkpoint> checkpoint, kvstore::StoreClient* store,
    CpuBackendOptions options) {
  const ModelConfig& config = checkpoint->config();
  RETURN_IF_ERROR(options.Validate(config));
  if (options.policy == AttentionPolicy::kNosa && !checkpoint->has_eviction_head()) {
    return absl::InvalidArgumentError(
        "policy = nosa: the checkpoint has no eviction head (self_attn.A, self_attn.delta); use "
        "infllmv2 or full");
  }
  ASSIGN_OR_RETURN(const kvstore::PageLayout layout, LayoutFor(config));
  if (store != nullptr && store->layout().fingerprint() != layout.fingerprint()) {
    return absl::InvalidArgumentError("the store client has another page layout than the model");
  }
  return std::unique_ptr<CpuBackend>(
      new CpuBackend(std::move(checkpoint), store, std::move(options), layout));
}

CpuBackend::CpuBackend(std::shared_ptr<const Checkpoint> checkpoint, kvstore::StoreClient* store,
                       CpuBackendOptions options, const kvstore::PageLayout& layout)
    : checkpoint_(std::move(checkpoint)),
      store_(store),
      options_(std::move(options)),
      layout_(layout),
      fingerprint_(absl::StrCat(checkpoint_->fingerprint(),
                                "/policy=", static_cast<int>(options_.policy),
                                "/bias=", static_cast<int>(options_.bias))),
      final_norm_(Widened(checkpoint_->final_norm())),
      parallel_(options_.threads),
      matmul_(&parallel_),
      // Sequences are admitted by their bytes; the pool itself is no second limit.
      pages_(layout.page_bytes(), std::numeric_limits<int>::max()),
      scratch_(options_.threads) {
  for (int i = 0; i < config().num_layers; ++i) {
    const LayerTensors& tensors = checkpoint_->layer(i);
    layers_.push_back({&tensors, Widened(tensors.input_norm), Widened(tensors.post_norm),
                       Widened(tensors.A), Widened(tensors.delta), Widened(tensors.delta_bias),
                       Widened(tensors.q_bias), Widened(tensors.k_bias), Widened(tensors.v_bias),
                       Widened(tensors.o_bias)});
  }
  const int half = config().head_dim / 2;
  for (int i = 0; i < half; ++i) {
    inverse_frequencies_.push_back(std::pow(config().rope_theta, -static_cast<double>(i) / half));
  }
}

int CpuBackend::SlotsFor(int64_t max_tokens) const {
  const int blocks = static_cast<int>((max_tokens + kBlock - 1) / kBlock);
  if (options_.slots_per_head == 0) return std::max(1, blocks);
  return std::max(1, std::min(blocks, options_.slots_per_head));
}

size_t CpuBackend::BytesReserved() const {
  size_t bytes = 0;
  int held = 0;
  for (const auto& [id, cache] : sequences_) {
    bytes += SequenceCache::BytesNeeded(layout_, cache->max_tokens(), SlotsFor(cache->max_tokens()),
                                        options_.max_unstored_blocks);
    held += cache->pages_held();
  }
  // Pages of sequences that have left, still on their way to the store.
  const int orphans = std::max(0, pages_.in_use() - held);
  return bytes + orphans * layout_.page_bytes();
}

absl::Status CpuBackend::AddSequence(SequenceId id, int64_t max_tokens) {
  CHECK(!sequences_.contains(id));
  if (max_tokens < 1 || max_tokens > config().max_position_embeddings) {
    return absl::InvalidArgumentError(absl::StrCat(
        "sequence of ", max_tokens, " tokens: must be 1 to ", config().max_position_embeddings));
  }
  const int slots = SlotsFor(max_tokens);
  const size_t needed =
      SequenceCache::BytesNeeded(layout_, max_tokens, slots, options_.max_unstored_blocks);
  if (needed > static_cast<size_t>(options_.cache_bytes)) {
    return absl::InvalidArgumentError(absl::StrCat("sequence of ", max_tokens, " tokens needs ",
                                                   needed, " bytes of cache: the worker has ",
                                                   options_.cache_bytes));
  }
  const size_t reserved = BytesReserved();
  if (reserved + needed > static_cast<size_t>(options_.cache_bytes)) {
    return absl::ResourceExhaustedError(absl::StrCat("worker cache: ", reserved, " of ",
                                                     options_.cache_bytes, " bytes in use, ",
                                                     needed, " needed"));
  }
  sequences_[id] = std::make_unique<SequenceCache>(layout_, config().dtype, max_tokens, slots,
                                                   options_.max_unstored_blocks);
  return absl::OkStatus();
}

void CpuBackend::RemoveSequence(SequenceId id) { sequences_.erase(id); }

absl::Status CpuBackend::BindPages(SequenceId id, absl::Span<const BoundPage> pages) {
  SequenceCache& cache = *sequences_.at(id);
  if (static_cast<int64_t>(pages.size()) * kBlock > cache.max_tokens()) {
    return absl::InvalidArgumentError(absl::StrCat(pages.size(), " bound pages: the sequence has ",
                                                   "room for ", cache.max_tokens(), " tokens"));
  }
  cache.BindPages(pages);
  return absl::OkStatus();
}

void CpuBackend::CommitBlock(SequenceId id, int block, const kvstore::PageRef& ref,
                             absl::Span<const uint64_t> record_checksums) {
  sequences_.at(id)->CommitBlock(block, ref, record_checksums);
}

int64_t CpuBackend::Headroom(SequenceId id) const { return sequences_.at(id)->Headroom(); }

std::string CpuBackend::Describe() const {
  return absl::StrCat("CPU backend with ", options_.threads, " threads, ",
                      options_.slots_per_head == 0
                          ? std::string("all blocks resident")
                          : absl::StrCat(options_.slots_per_head, " slots per layer and KV head"));
}

void CpuBackend::CheckIntegrity() const {
  for (const auto& [id, cache] : sequences_) cache->CheckIntegrity();
}

void CpuBackend::Round(std::vector<float>& values) const {
  if (config().dtype == DType::kBf16) RoundToBf16(absl::MakeSpan(values));
}

std::vector<StepItemResult> CpuBackend::Forward(absl::Span<const StepItem> items,
                                                std::vector<std::vector<float>>* logits) {
  const ModelConfig& model = config();
  const int hidden = model.hidden_size;
  ++step_;
  active_.clear();
  position_.clear();
  int rows = 0;
  for (const StepItem& item : items) {
    Active active;
    active.id = item.sequence;
    active.cache = sequences_.at(item.sequence).get();
    active.start = active.cache->tokens();
    active.first_row = rows;
    active.tokens = static_cast<int>(item.tokens.size());
    CHECK(active.tokens >= 1);
    active.status = active.cache->PrepareAppend(active.tokens, pages_);
    for (int i = 0; i < active.tokens; ++i) position_.push_back(active.start + i);
    rows += active.tokens;
    active_.push_back(std::move(active));
  }

  hidden_.resize(static_cast<size_t>(rows) * hidden);
  const TensorView& embedding = checkpoint_->embed_tokens();
  for (size_t i = 0; i < items.size(); ++i) {
    for (int j = 0; j < active_[i].tokens; ++j) {
      TensorView row = embedding;
      const size_t row_bytes = hidden * DTypeBytes(model.dtype);
      row.data = embedding.data.subspan(items[i].tokens[j] * row_bytes, row_bytes);
      row.shape = {hidden};
      row.CopyToFloat(absl::MakeSpan(hidden_).subspan(
          static_cast<size_t>(active_[i].first_row + j) * hidden, hidden));
    }
  }
  PrepareRope();
  for (int layer = 0; layer < model.num_layers; ++layer) RunLayer(layer);

  // Logits of the rows that are asked for, all in one product.
  std::vector<int> wanted;
  for (size_t i = 0; i < items.size(); ++i) {
    if (active_[i].status.ok() && (items[i].sample.has_value() || logits != nullptr)) {
      wanted.push_back(static_cast<int>(i));
    }
  }
  normed_.resize(wanted.size() * hidden);
  for (size_t i = 0; i < wanted.size(); ++i) {
    const Active& active = active_[wanted[i]];
    const size_t last = active.first_row + active.tokens - 1;
    RmsNorm(absl::MakeConstSpan(hidden_).subspan(last * hidden, hidden), final_norm_,
            model.rms_norm_eps, absl::MakeSpan(normed_).subspan(i * hidden, hidden));
  }
  Round(normed_);
  std::vector<float> all_logits(wanted.size() * model.vocab_size);
  if (!wanted.empty()) {
    matmul_.Run(normed_, checkpoint_->lm_head(), absl::MakeSpan(all_logits));
  }

  std::vector<StepItemResult> results(items.size());
  if (logits != nullptr) logits->assign(items.size(), {});
  for (size_t i = 0; i < wanted.size(); ++i) {
    const StepItem& item = items[wanted[i]];
    const absl::Span<float> own =
        absl::MakeSpan(all_logits).subspan(i * model.vocab_size, model.vocab_size);
    if (logits != nullptr) (*logits)[wanted[i]].assign(own.begin(), own.end());
    if (!item.sample.has_value()) continue;
    results[wanted[i]].token =
        Sample(own, item.sample->params, item.sample->history, item.sample->prompt_tokens,
               active_[wanted[i]].cache->tokens());
  }
  for (size_t i = 0; i < items.size(); ++i) {
    results[i].status = active_[i].status;
    results[i].counters = active_[i].counters;
    if (active_[i].status.ok()) results[i].finished = active_[i].cache->TakeFinished();
  }
  return results;
}

void CpuBackend::PrepareRope() {
  const size_t half = inverse_frequencies_.size();
  cosine_.resize(position_.size() * half);
  sine_.resize(position_.size() * half);
  parallel_.Run(static_cast<int>(position_.size()), [&](int row, int) {
    for (size_t i = 0; i < half; ++i) {
      const double angle = static_cast<double>(position_[row]) * inverse_frequencies_[i];
      cosine_[row * half + i] = static_cast<float>(std::cos(angle));
      sine_[row * half + i] = static_cast<float>(std::sin(angle));
    }
  });
}

void CpuBackend::RunLayer(int index) {
  const ModelConfig& model = config();
  const Layer& layer = layers_[index];
  const size_t rows = position_.size();
  const int hidden = model.hidden_size;
  const auto norm = [&](const std::vector<float>& weight) {
    normed_.resize(rows * hidden);
    for (size_t row = 0; row < rows; ++row) {
      RmsNorm(absl::MakeConstSpan(hidden_).subspan(row * hidden, hidden), weight,
              model.rms_norm_eps, absl::MakeSpan(normed_).subspan(row * hidden, hidden));
    }
    Round(normed_);
  };

  norm(layer.input_norm);
  q_.resize(rows * model.num_heads * model.head_dim);
  k_.resize(rows * model.num_kv_heads * model.head_dim);
  v_.resize(k_.size());
  matmul_.Run(normed_, layer.tensors->q, absl::MakeSpan(q_));
  matmul_.Run(normed_, layer.tensors->k, absl::MakeSpan(k_));
  matmul_.Run(normed_, layer.tensors->v, absl::MakeSpan(v_));
  AddBias(absl::MakeSpan(q_), layer.q_bias);
  AddBias(absl::MakeSpan(k_), layer.k_bias);
  AddBias(absl::MakeSpan(v_), layer.v_bias);

  AppendKeysAndValues(index);
  FetchWindowBlocks(index);
  UpdateWindows(index);
  SelectBlocks(index);
  ResolveRecords(index);
  Attend(index);
  KeepFetched(index);

  projected_.resize(rows * hidden);
  matmul_.Run(attended_, layer.tensors->o, absl::MakeSpan(projected_));
  AddBias(absl::MakeSpan(projected_), layer.o_bias);
  AddTo(absl::MakeSpan(hidden_), projected_);

  norm(layer.post_norm);
  gate_.resize(rows * model.intermediate_size);
  up_.resize(gate_.size());
  matmul_.Run(normed_, layer.tensors->gate, absl::MakeSpan(gate_));
  matmul_.Run(normed_, layer.tensors->up, absl::MakeSpan(up_));
  SwiGlu(absl::MakeSpan(gate_), up_);
  Round(gate_);
  matmul_.Run(gate_, layer.tensors->down, absl::MakeSpan(projected_));
  AddTo(absl::MakeSpan(hidden_), projected_);
}

void CpuBackend::AppendKeysAndValues(int index) {
  const ModelConfig& model = config();
  const Layer& layer = layers_[index];
  const int dim = model.head_dim;
  const int kv_width = model.num_kv_heads * dim;
  const size_t half = inverse_frequencies_.size();
  const bool bf16 = model.dtype == DType::kBf16;
  for (Active& active : active_) {
    if (!active.status.ok()) continue;
    parallel_.Run(active.tokens, [&](int i, int) {
      const size_t row = active.first_row + i;
      const int64_t t = active.start + i;
      const int block = static_cast<int>(t / kBlock);
      const int in_block = static_cast<int>(t % kBlock);
      const auto cosine = absl::MakeConstSpan(cosine_).subspan(row * half, half);
      const auto sine = absl::MakeConstSpan(sine_).subspan(row * half, half);
      const auto v = absl::MakeSpan(v_).subspan(row * kv_width, kv_width);
      for (int head = 0; head < model.num_kv_heads; ++head) {
        std::byte* record = active.cache->Writable(layout_.record_index(index, head), block);
        // c from the value projection as it is, before the cache's rounding.
        float c = 0;
        if (!layer.A.empty()) {
          float x = Dot(absl::MakeConstSpan(layer.delta)
                            .subspan(static_cast<size_t>(head) * kv_width, kv_width),
                        v);
          if (!layer.delta_bias.empty()) x += layer.delta_bias[head];
          c = layer.A[head] * Softplus(x);
        }
        std::memcpy(record + layout_.c_offset() + in_block * sizeof(float), &c, sizeof(c));

        const auto k = absl::MakeSpan(k_).subspan(row * kv_width + head * dim, dim);
        Rope(k, cosine, sine);
        std::byte* k_row = record + layout_.k_offset() + in_block * layout_.row_bytes();
        std::byte* v_row = record + layout_.v_offset() + in_block * layout_.row_bytes();
        const auto v_head = v.subspan(head * dim, dim);
        if (bf16) {
          FromFloat(k, absl::MakeSpan(reinterpret_cast<Bf16*>(k_row), dim));
          FromFloat(v_head, absl::MakeSpan(reinterpret_cast<Bf16*>(v_row), dim));
        } else {
          std::memcpy(k_row, k.data(), layout_.row_bytes());
          std::memcpy(v_row, v_head.data(), layout_.row_bytes());
        }
      }
      for (int head = 0; head < model.num_heads; ++head) {
        const auto q = absl::MakeSpan(q_).subspan(
            (row * model.num_heads + head) * static_cast<size_t>(dim), dim);
        Rope(q, cosine, sine);
        if (bf16) RoundToBf16(q);
      }
    });
  }
}

void CpuBackend::FetchWindowBlocks(int index) {
  // A window that the new tokens complete may begin in the block before theirs, which a sequence
  // bound to stored pages need not hold. That block is selected by every query anyway.
  std::vector<Missing> missing;
  for (size_t i = 0; i < active_.size(); ++i) {
    Active& active = active_[i];
    if (!active.status.ok() || active.start == 0 || active.start % kBlock >= kBlock / 2) continue;
    const int block = static_cast<int>((active.start - 1) / kBlock);
    for (int head = 0; head < config().num_kv_heads; ++head) {
      const int record = layout_.record_index(index, head);
      SlotTable& table = active.cache->table(record);
      if (active.cache->Resident(record, block) != nullptr) continue;
      const SlotId slot = table.Acquire(block, step_);
      CHECK(slot != kNoSlot);  // the first of this step
      table.Touch(block, step_);
      missing.push_back(
          {static_cast<int>(i), record, block, active.cache->slot_data(record, slot)});
      // The selection will find it resident, and count it so: it has been fetched all the same.
      ++active.fetched_early;
    }
  }
  FetchMissing(missing);
}

void CpuBackend::UpdateWindows(int index) {
  const ModelConfig& model = config();
  const int dim = model.head_dim;
  const int heads = model.num_kv_heads;
  const bool bf16 = model.dtype == DType::kBf16;
  parallel_.Run(static_cast<int>(active_.size()) * heads, [&](int task, int) {
    Active& active = active_[task / heads];
    const int head = task % heads;
    if (!active.status.ok()) return;
    const int record = layout_.record_index(index, head);
    WindowIndex& windows = active.cache->windows(record);
    const int64_t end = VisibleWindows(active.start + active.tokens - 1);
    std::vector<float> row(dim);
    for (int64_t w = windows.scores.size(); w < end; ++w) {
      windows.keys.resize((w + 1) * dim);
      float* mean = windows.keys.data() + w * dim;
      std::fill(mean, mean + dim, 0.0f);
      float score = 0;
      for (int64_t t = 16 * w; t < 16 * w + 32; ++t) {
        const std::byte* bytes = active.cache->Resident(record, static_cast<int>(t / kBlock));
        CHECK(bytes != nullptr);
        const std::byte* k_row = bytes + layout_.k_offset() + t % kBlock * layout_.row_bytes();
        if (bf16) {
          ToFloat(absl::MakeConstSpan(reinterpret_cast<const Bf16*>(k_row), dim),
                  absl::MakeSpan(row));
        } else {
          std::memcpy(row.data(), k_row, layout_.row_bytes());
        }
        AddTo(absl::MakeSpan(mean, dim), row);
        float c;
        std::memcpy(&c, bytes + layout_.c_offset() + t % kBlock * sizeof(float), sizeof(c));
        score += c;
      }
      Scale(absl::MakeSpan(mean, dim), 1.0f / 32);
      if (bf16) RoundToBf16(absl::MakeSpan(mean, dim));
      score *= 1.0f / 32;
      windows.scores.push_back(score);

      // Into the index part of the page of the block in which the window ends.
      const int block = static_cast<int>((16 * w + 31) / kBlock);
      const int64_t place = w - (4 * int64_t{block} - 1);
      std::byte* page = active.cache->WritablePage(block);
      std::byte* kc = page + layout_.kc_offset(index, head) + place * layout_.row_bytes();
      if (bf16) {
        FromFloat(absl::MakeConstSpan(mean, dim), absl::MakeSpan(reinterpret_cast<Bf16*>(kc), dim));
      } else {
        std::memcpy(kc, mean, layout_.row_bytes());
      }
      std::memcpy(page + layout_.e_offset(index, head) + place * sizeof(float), &score,
                  sizeof(score));
    }
  });
}

void CpuBackend::SelectBlocks(int index) {
  const ModelConfig& model = config();
  tiles_.clear();
  for (size_t i = 0; i < active_.size(); ++i) {
    if (!active_[i].status.ok()) continue;
    for (int head = 0; head < model.num_kv_heads; ++head) {
      for (int first = 0; first < active_[i].tokens; first += kTileTokens) {
        AttentionTile tile;
        tile.active = static_cast<int>(i);
        tile.kv_head = head;
        tile.first_row = active_[i].first_row + first;
        tile.tokens = std::min(kTileTokens, active_[i].tokens - first);
        tile.position = active_[i].start + first;
        tiles_.push_back(std::move(tile));
      }
    }
  }
  const AttentionShape shape = {model.GroupSize(), model.head_dim, model.num_heads * model.head_dim,
                                model.dtype, UsesBias()};
  const bool observe = options_.observer != nullptr;
  parallel_.Run(static_cast<int>(tiles_.size()), [&](int i, int thread) {
    AttentionTile& tile = tiles_[i];
    SelectTile(model.nosa, options_.policy, shape, q_,
               active_[tile.active].cache->windows(layout_.record_index(index, tile.kv_head)),
               observe, scratch_[thread], tile);
  });
  if (!observe) return;
  for (const AttentionTile& tile : tiles_) {
    for (size_t i = 0; i < tile.selected.size(); ++i) {
      const int64_t position = tile.position + tile.tokens - tile.selected.size() + i;
      options_.observer(active_[tile.active].id, index, tile.kv_head, position, tile.selected[i],
                        tile.margins[i]);
    }
  }
}

void CpuBackend::ResolveRecords(int index) {
  // Tiles of one (item, KV head) are neighbours: together they need the union of their blocks.
  std::vector<Missing> missing;
  size_t landing_records = 0;
  struct Group {
    size_t begin, end;  // tiles
    size_t first_missing, end_missing;
  };
  std::vector<Group> groups;
  for (size_t begin = 0; begin < tiles_.size();) {
    size_t end = begin + 1;
    while (end < tiles_.size() && tiles_[end].active == tiles_[begin].active &&
           tiles_[end].kv_head == tiles_[begin].kv_head) {
      ++end;
    }
    Active& active = active_[tiles_[begin].active];
    const int record = layout_.record_index(index, tiles_[begin].kv_head);
    SlotTable& table = active.cache->table(record);
    std::vector<int32_t> needed;
    for (size_t i = begin; i < end; ++i) {
      for (const TileBlock& block : tiles_[i].blocks) needed.push_back(block.block);
    }
    std::sort(needed.begin(), needed.end());
    needed.erase(std::unique(needed.begin(), needed.end()), needed.end());

    // What the last query selects is what the next step most likely selects: only that counts as
    // used, so that a long chunk does not flush the slots.
    for (int32_t block : tiles_[end - 1].last_selected) table.Touch(block, step_);
    int stored = 0;
    std::vector<int32_t> absent;
    for (int32_t block : needed) {
      stored += active.cache->block(block).ref.has_value() ? 1 : 0;
      if (active.cache->Resident(record, block) == nullptr) absent.push_back(block);
    }
    active.counters.records_selected += needed.size();
    active.counters.records_resident += needed.size() - absent.size() - active.fetched_early;
    active.fetched_early = 0;
    const size_t first_missing = missing.size();
    const bool fits = stored <= table.slots();
    if (fits) {
      for (int32_t block : needed) table.Touch(block, step_);
    }
    for (int32_t block : absent) {
      std::byte* landing = nullptr;
      if (fits) {
        const SlotId slot = table.Acquire(block, step_);
        CHECK(slot != kNoSlot);  // at most `slots` blocks carry this step's stamp
        landing = active.cache->slot_data(record, slot);
      } else {
        ++landing_records;
      }
      missing.push_back({tiles_[begin].active, record, block, landing});
    }
    groups.push_back({begin, end, first_missing, missing.size()});
    begin = end;
  }

  if (landing_.size() < landing_records * layout_.record_bytes()) {
    landing_ = AlignedBytes(landing_records * layout_.record_bytes());
  }
  size_t next = 0;
  for (Missing& one : missing) {
    if (one.landing == nullptr) one.landing = landing_.data() + next++ * layout_.record_bytes();
  }
  FetchMissing(missing);

  for (const Group& group : groups) {
    const Active& active = active_[tiles_[group.begin].active];
    const int record = layout_.record_index(index, tiles_[group.begin].kv_head);
    for (size_t i = group.begin; i < group.end; ++i) {
      for (TileBlock& block : tiles_[i].blocks) {
        block.record = active.cache->Resident(record, block.block);
        for (size_t j = group.first_missing; block.record == nullptr && j < group.end_missing;
             ++j) {
          if (missing[j].block == block.block) block.record = missing[j].landing;
        }
      }
    }
  }
}

void CpuBackend::FetchMissing(std::vector<Missing>& missing) {
  if (missing.empty()) return;
  // One list of reads per item, all in flight together: a failure is that of its item alone.
  struct Fetch {
    std::vector<kvstore::RecordRead> reads;
    absl::Notification done;
    absl::Status status;
  };
  std::vector<Fetch> fetches(active_.size());
  for (const Missing& one : missing) {
    const SequenceCache::Block& block = active_[one.active].cache->block(one.block);
    fetches[one.active].reads.push_back({*block.ref, one.record, block.record_checksums[one.record],
                                         absl::MakeSpan(one.landing, layout_.record_bytes())});
  }
  for (size_t i = 0; i < fetches.size(); ++i) {
    Fetch& fetch = fetches[i];
    if (fetch.reads.empty()) {
      fetch.done.Notify();
      continue;
    }
    for (const kvstore::RecordRead& read : fetch.reads) {
      active_[i].counters.CountFetched(store_->PathTo(read.page.store), 1, layout_.record_bytes());
    }
    store_->ReadRecords(std::move(fetch.reads), [&fetch](absl::Status status) {
      fetch.status = std::move(status);
      fetch.done.Notify();
    });
  }
  // The landing slots are the client's until each completion has run.
  for (size_t i = 0; i < fetches.size(); ++i) {
    fetches[i].done.WaitForNotification();
    if (active_[i].status.ok()) {
      active_[i].status = Annotate(fetches[i].status, "reading the KV cache");
    }
  }
}

void CpuBackend::Attend(int index) {
  const ModelConfig& model = config();
  const AttentionShape shape = {model.GroupSize(), model.head_dim, model.num_heads * model.head_dim,
                                model.dtype, UsesBias()};
  attended_.assign(position_.size() * model.num_heads * model.head_dim, 0.0f);
  parallel_.Run(static_cast<int>(tiles_.size()), [&](int i, int thread) {
    if (!active_[tiles_[i].active].status.ok()) return;
    AttendTile(layout_, shape, q_, tiles_[i], scratch_[thread], absl::MakeSpan(attended_));
  });
  Round(attended_);
}

void CpuBackend::KeepFetched(int index) {
  // A chunk that needed more blocks than there are slots read them into landing memory; those that
  // its last query selected get slots now, so that the next step finds them.
  for (size_t i = 0; i < tiles_.size(); ++i) {
    const AttentionTile& tile = tiles_[i];
    Active& active = active_[tile.active];
    const bool last = i + 1 == tiles_.size() || tiles_[i + 1].active != tile.active ||
                      tiles_[i + 1].kv_head != tile.kv_head;
    if (!last || !active.status.ok()) continue;
    const int record = layout_.record_index(index, tile.kv_head);
    SlotTable& table = active.cache->table(record);
    for (const TileBlock& block : tile.blocks) {
      if (active.cache->Resident(record, block.block) != nullptr) continue;
      if (table.last_used(block.block) != step_) continue;
      const SlotId slot = table.Acquire(block.block, step_);
      if (slot == kNoSlot) continue;
      std::memcpy(active.cache->slot_data(record, slot), block.record, layout_.record_bytes());
    }
  }
}

}  // namespace nosara::worker
