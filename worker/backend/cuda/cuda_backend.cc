#include "worker/backend/cuda/cuda_backend.h"

#include <algorithm>
#include <cstring>
#include <thread>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/log.h"
#include "base/status_macros.h"
#include "kernels/pages/pages.h"

namespace nosara::worker {
namespace {

constexpr int kBlock = kvstore::kBlockTokens;
static_assert(kBlock == kernels::kBlockTokens);
constexpr int kMaxChunks = 8;         // sequences of one prefill launch
constexpr int kPrefixesAtATime = 64;  // pages whose index parts are imported together

int BlocksFor(int64_t tokens) { return static_cast<int>((tokens + kBlock - 1) / kBlock); }

}  // namespace

absl::Status CudaBackendOptions::Validate(const ModelConfig& config) const {
  const auto at_least = [](const char* name, int64_t value, int64_t least) {
    return value >= least ? absl::OkStatus()
                          : absl::InvalidArgumentError(
                                absl::StrCat(name, " = ", value, ": must be at least ", least));
  };
  RETURN_IF_ERROR(at_least("device", device, 0));
  RETURN_IF_ERROR(at_least("max_unstored_blocks", max_unstored_blocks, 2));
  RETURN_IF_ERROR(at_least("max_sequences", max_sequences, 1));
  RETURN_IF_ERROR(at_least("max_prefill_rows", max_prefill_rows, 1));
  RETURN_IF_ERROR(at_least("cache_bytes", cache_bytes, 0));
  RETURN_IF_ERROR(at_least("threads", threads, 1));
  if (slots_per_head != 0 && slots_per_head < config.nosa.topk_blocks) {
    return absl::InvalidArgumentError(
        absl::StrCat("slots_per_head = ", slots_per_head, ": must be 0 (all resident) or at least ",
                     config.nosa.topk_blocks, ", the blocks that a step of this model selects"));
  }
  if (slots_per_head != 0 && policy == AttentionPolicy::kFull) {
    return absl::InvalidArgumentError(
        absl::StrCat("slots_per_head = ", slots_per_head,
                     ": full attention reads every block at each step; it must be 0"));
  }
  return absl::OkStatus();
}

bool CudaUsable(int device) {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || device < 0 || device >= devices) return false;
  int major = 0;
  return cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         major >= 8;
}

absl::StatusOr<std::unique_ptr<Backend>> MakeCudaBackend(
    std::shared_ptr<const Checkpoint> checkpoint, kvstore::StoreClient* store,
    const CudaBackendOptions& options) {
  return CudaBackend::Create(std::move(checkpoint), store, options);
}

absl::StatusOr<std::unique_ptr<CudaBackend>> CudaBackend::Create(
    std::shared_ptr<const Checkpoint> checkpoint, kvstore::StoreClient* store,
    const CudaBackendOptions& options) {
  const ModelConfig& config = checkpoint->config();
  RETURN_IF_ERROR(options.Validate(config));
  if (options.policy == AttentionPolicy::kNosa && !checkpoint->has_eviction_head()) {
    return absl::InvalidArgumentError(
        "policy = nosa: the checkpoint has no eviction head (self_attn.A, self_attn.delta); use "
        "infllmv2 or full");
  }
  ASSIGN_OR_RETURN(
      const kvstore::PageLayout layout,
      kvstore::PageLayout::Create(config.num_layers, config.num_kv_heads, config.head_dim,
                                  static_cast<int>(DTypeBytes(config.dtype))));
  if (store != nullptr && store->layout().fingerprint() != layout.fingerprint()) {
    return absl::InvalidArgumentError("the store client has another page layout than the model");
  }
  std::unique_ptr<CudaBackend> backend(
      new CudaBackend(std::move(checkpoint), store, options, layout));
  RETURN_IF_ERROR(backend->Start());
  return backend;
}

CudaBackend::CudaBackend(std::shared_ptr<const Checkpoint> checkpoint, kvstore::StoreClient* store,
                         const CudaBackendOptions& options, const kvstore::PageLayout& layout)
    : checkpoint_(std::move(checkpoint)),
      store_(store),
      options_(options),
      layout_(layout),
      // That of every backend: pages of one are pages of the others.
      fingerprint_(absl::StrCat(checkpoint_->fingerprint(),
                                "/policy=", static_cast<int>(options_.policy),
                                "/bias=", static_cast<int>(options_.bias))) {}

CudaBackend::~CudaBackend() {
  step_ = nullptr;
  cache_ = nullptr;
  for (const auto& arena : arenas_) {
    if (arena->device_address != nullptr) cudaHostUnregister(arena->memory->bytes.data());
  }
  if (stream_ != nullptr) cudaStreamDestroy(stream_);
}

bool CudaBackend::UsesBias() const {
  return checkpoint_->has_eviction_head() && options_.policy != AttentionPolicy::kInfLlmV2 &&
         options_.bias == BiasMode::kAuto;
}

void CudaBackend::UseDevice() const { CHECK(cudaSetDevice(options_.device) == cudaSuccess); }

absl::Status CudaBackend::Start() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || options_.device >= devices) {
    return absl::UnavailableError(absl::StrCat("device = ", options_.device, ": this machine has ",
                                               devices, " usable CUDA devices"));
  }
  RETURN_IF_ERROR(CudaStatus(cudaSetDevice(options_.device), "choosing the device"));
  cudaDeviceProp properties;
  RETURN_IF_ERROR(CudaStatus(cudaGetDeviceProperties(&properties, options_.device), "device"));
  if (properties.major < 8) {
    return absl::UnavailableError(absl::StrCat(properties.name, " has compute capability ",
                                               properties.major, ".", properties.minor,
                                               ": 8.0 or higher is needed"));
  }
  device_name_ = properties.name;
  RETURN_IF_ERROR(CudaStatus(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "stream"));
  ASSIGN_OR_RETURN(weights_, CudaWeights::Load(*checkpoint_));

  const ModelConfig& model = config();
  DeviceCacheOptions cache;
  cache.layers = model.num_layers;
  cache.kv_heads = model.num_kv_heads;
  cache.head_dim = model.head_dim;
  cache.max_sequences = options_.max_sequences;
  cache.max_blocks = BlocksFor(model.max_position_embeddings);
  size_t bytes = options_.cache_bytes;
  if (bytes == 0) {
    size_t free = 0, total = 0;
    RETURN_IF_ERROR(CudaStatus(cudaMemGetInfo(&free, &total), "device memory"));
    bytes = free / 10 * 9;
  }
  const int64_t frame_bytes =
      DeviceCache::FrameBytes(model.num_layers, model.num_kv_heads, model.head_dim);
  cache.frames = static_cast<int>(std::min<int64_t>(bytes / frame_bytes, 1 << 30));
  if (cache.frames < 2) {
    return absl::InvalidArgumentError(absl::StrCat("cache_bytes = ", bytes,
                                                   ": not enough for two blocks of ", frame_bytes,
                                                   " bytes, all layers together"));
  }
  CudaStepOptions step;
  step.policy = options_.policy;
  step.bias = UsesBias() ? kernels::AttendBias::kCache : kernels::AttendBias::kNone;
  step.max_prefill_rows = options_.max_prefill_rows;
  step.max_decode_rows = options_.max_sequences;
  ASSIGN_OR_RETURN(cache_, DeviceCache::Create(cache, stream_));
  ASSIGN_OR_RETURN(step_, CudaStep::Create(weights_.get(), cache_.get(), step, stream_));

  const size_t page_bytes = PagePool::RoundedPage(layout_.page_bytes());
  const size_t pages = static_cast<size_t>(options_.max_sequences) * options_.max_unstored_blocks;
  ASSIGN_OR_RETURN(auto memory, PinnedArray<std::byte>::Create(pages * page_bytes, "pages"));
  auto owner = std::make_shared<PinnedArray<std::byte>>(std::move(memory));
  pages_ = std::make_unique<PagePool>(layout_.page_bytes(), owner->span(), owner);
  ASSIGN_OR_RETURN(page_list_, PinnedArray<kernels::PageOfBlock>::Create(
                                   std::max<size_t>(pages, kPrefixesAtATime), "pages"));
  for (int i = 0; i < options_.num_stores; ++i) ArenaOf({static_cast<uint32_t>(i)});
  ASSIGN_OR_RETURN(prefixes_, PinnedArray<std::byte>::Create(
                                  kPrefixesAtATime * layout_.prefix_bytes(), "index parts"));
  return absl::OkStatus();
}

std::string CudaBackend::Describe() const {
  const int64_t frame_bytes =
      DeviceCache::FrameBytes(config().num_layers, config().num_kv_heads, config().head_dim);
  return absl::StrCat("CUDA backend on ", device_name_, ", KV cache of ",
                      cache_->options().frames * frame_bytes >> 20, " MiB, ",
                      options_.slots_per_head == 0
                          ? std::string("blocks resident while they fit")
                          : absl::StrCat(options_.slots_per_head, " slots per layer and KV head"));
}

const CudaBackend::Arena* CudaBackend::ArenaOf(kvstore::StoreId store) {
  const auto memory = store_ == nullptr ? nullptr : store_->Map(store);
  if (memory == nullptr || memory->bytes.empty()) return nullptr;
  for (const auto& known : arenas_) {
    if (known->memory == memory) return known.get();
  }
  auto arena = std::make_unique<Arena>();
  arena->memory = memory;
  // Slow, some tenths of a second per GiB; once for each incarnation of a store.
  void* address = nullptr;
  cudaError_t error = cudaHostRegister(memory->bytes.data(), memory->bytes.size(),
                                       cudaHostRegisterMapped | cudaHostRegisterPortable);
  if (error == cudaSuccess) {
    error = cudaHostGetDevicePointer(&address, memory->bytes.data(), 0);
    arena->device_address = static_cast<std::byte*>(address);
  }
  if (error == cudaSuccess) {
    LogInfo("arena of store {}: the GPU reads its {} MiB", store.value, memory->bytes.size() >> 20);
  } else {
    (void)cudaGetLastError();
    LogWarning("arena of store {}: records are fetched by the CPU: {}", store.value,
               cudaGetErrorString(error));
  }
  arenas_.push_back(std::move(arena));
  return arenas_.back().get();
}

uint64_t CudaBackend::RecordsOf(const kvstore::PageRef& ref) {
  const Arena* arena = ArenaOf(ref.store);
  if (arena == nullptr || arena->device_address == nullptr) return kernels::kStoredElsewhere;
  const uint64_t offset = ref.slot * layout_.page_bytes();
  if (offset + layout_.page_bytes() > arena->memory->bytes.size()) return kernels::kStoredElsewhere;
  // A reference of another incarnation of the store has nothing to do with this memory.
  kvstore::PageHeader header;
  std::memcpy(&header, arena->memory->bytes.data() + offset, sizeof(header));
  if (header.key != ref.key || header.generation != ref.generation)
    return kernels::kStoredElsewhere;
  return reinterpret_cast<uint64_t>(arena->device_address + offset + layout_.record_offset(0));
}

int CudaBackend::FloorFrames(const Sequence& sequence) const {
  const int all = BlocksFor(sequence.max_tokens);
  if (!sequence.decoding || options_.policy == AttentionPolicy::kFull) return all;
  const int slots =
      options_.slots_per_head > 0 ? options_.slots_per_head : config().nosa.topk_blocks;
  // What a step selects, what cannot be given up because it is not stored, and the block to come.
  return std::min(all, slots + options_.max_unstored_blocks + 1);
}

absl::Status CudaBackend::MakeRoom(int frames) {
  // The sequence with the most to give gives first.
  std::vector<std::pair<int, Sequence*>> spare;
  for (auto& [id, sequence] : sequences_) {
    const int more = cache_->frames_of(sequence->row) - FloorFrames(*sequence);
    if (more > 0) spare.emplace_back(more, sequence.get());
  }
  std::sort(spare.begin(), spare.end(), [](const auto& a, const auto& b) {
    return a.first != b.first ? a.first > b.first : a.second->row < b.second->row;
  });
  for (auto& [more, sequence] : spare) {
    if (cache_->free_frames() >= frames) break;
    RETURN_IF_ERROR(cache_->Shrink(sequence->row, FloorFrames(*sequence)));
    sequence->partial = true;
  }
  return absl::OkStatus();
}

absl::Status CudaBackend::AddSequence(SequenceId id, int64_t max_tokens) {
  UseDevice();
  CHECK(!sequences_.contains(id));
  if (max_tokens < 1 || max_tokens > config().max_position_embeddings) {
    return absl::InvalidArgumentError(absl::StrCat(
        "sequence of ", max_tokens, " tokens: must be 1 to ", config().max_position_embeddings));
  }
  const int frames = BlocksFor(max_tokens);
  const int index_frames = DeviceCache::IndexFramesFor(max_tokens);
  if (frames + index_frames > cache_->options().frames) {
    return absl::InvalidArgumentError(
        absl::StrCat("sequence of ", max_tokens, " tokens needs ", frames + index_frames,
                     " frames of the GPU's KV cache: it has ", cache_->options().frames));
  }
  // Pages of sequences that have left may still be on their way to the store.
  int reserved = 0;
  int held = 0;
  for (const auto& [other, sequence] : sequences_) {
    reserved += options_.max_unstored_blocks;
    held += sequence->unstored;
  }
  const int orphans = std::max(0, pages_->in_use() - held);
  if (reserved + orphans + options_.max_unstored_blocks > pages_->max_pages()) {
    return absl::ResourceExhaustedError(absl::StrCat("pages on their way to the store: ", orphans,
                                                     " of ", pages_->max_pages(), " buffers"));
  }
  if (cache_->free_frames() < frames + index_frames) {
    RETURN_IF_ERROR(MakeRoom(frames + index_frames));
  }
  ASSIGN_OR_RETURN(const int row, cache_->AddSequence(frames, index_frames));
  auto sequence = std::make_unique<Sequence>();
  sequence->row = row;
  sequence->max_tokens = max_tokens;
  sequences_[id] = std::move(sequence);
  return absl::OkStatus();
}

void CudaBackend::RemoveSequence(SequenceId id) {
  cache_->RemoveSequence(At(id).row);
  sequences_.erase(id);
}

absl::Status CudaBackend::BindPages(SequenceId id, absl::Span<const BoundPage> pages) {
  UseDevice();
  Sequence& sequence = At(id);
  CHECK(sequence.tokens == 0);
  if (static_cast<int64_t>(pages.size()) * kBlock > sequence.max_tokens) {
    return absl::InvalidArgumentError(absl::StrCat(pages.size(), " bound pages: the sequence has ",
                                                   "room for ", sequence.max_tokens, " tokens"));
  }
  if (pages.empty()) return absl::OkStatus();
  kernels::ExportParams import;
  import.blocks = page_list_.data();
  import.cache = cache_->view();
  import.offsets.index = static_cast<int64_t>(layout_.index_offset());
  for (size_t first = 0; first < pages.size(); first += kPrefixesAtATime) {
    const size_t count = std::min<size_t>(kPrefixesAtATime, pages.size() - first);
    for (size_t i = 0; i < count; ++i) {
      const BoundPage& page = pages[first + i];
      std::byte* to = prefixes_.data() + i * layout_.prefix_bytes();
      std::memcpy(to, page.prefix.data(), layout_.prefix_bytes());
      page_list_[i] = {sequence.row, static_cast<int32_t>(first + i), to};
      Block block;
      block.ref = page.ref;
      for (int record = 0; record < layout_.num_records(); ++record) {
        block.record_checksums.push_back(kvstore::RecordChecksum(layout_, page.prefix, record));
      }
      sequence.blocks.push_back(std::move(block));
    }
    import.num_blocks = static_cast<int>(count);
    RETURN_IF_ERROR(CudaStatus(kernels::LaunchImportIndex(import, stream_), "index parts"));
    RETURN_IF_ERROR(CudaStatus(cudaStreamSynchronize(stream_), "index parts"));
  }
  std::vector<uint64_t> stored;
  for (const BoundPage& page : pages) stored.push_back(RecordsOf(page.ref));
  sequence.elsewhere =
      static_cast<int>(std::count(stored.begin(), stored.end(), kernels::kStoredElsewhere));
  RETURN_IF_ERROR(cache_->SetPages(sequence.row, 0, stored));
  sequence.tokens = static_cast<int64_t>(pages.size()) * kBlock;
  sequence.unreported_from = static_cast<int64_t>(pages.size());
  sequence.partial = true;
  sequence.load_first = static_cast<int>(pages.size()) - 1;
  return absl::OkStatus();
}

void CudaBackend::CommitBlock(SequenceId id, int block, const kvstore::PageRef& ref,
                              absl::Span<const uint64_t> record_checksums) {
  UseDevice();
  Sequence& sequence = At(id);
  Block& entry = sequence.blocks[block];
  CHECK(!entry.ref.has_value());
  CHECK(static_cast<int>(record_checksums.size()) == layout_.num_records());
  entry.ref = ref;
  entry.record_checksums.assign(record_checksums.begin(), record_checksums.end());
  --sequence.unstored;
  const uint64_t records = RecordsOf(ref);
  sequence.elsewhere += records == kernels::kStoredElsewhere ? 1 : 0;
  const absl::Status status = cache_->SetPages(sequence.row, block, {records});
  CHECK(status.ok());  // a broken device: nothing can go on
}

int64_t CudaBackend::Headroom(SequenceId id) const {
  const Sequence& sequence = *sequences_.at(id);
  const int64_t in_open_block =
      static_cast<int64_t>(sequence.blocks.size()) * kBlock - sequence.tokens;
  const int64_t in_new_blocks = int64_t{options_.max_unstored_blocks - sequence.unstored} * kBlock;
  return std::min(sequence.max_tokens - sequence.tokens, in_open_block + in_new_blocks);
}

absl::Status CudaBackend::BecomeDecoding(Sequence& sequence) {
  sequence.decoding = true;
  if (options_.slots_per_head == 0) return absl::OkStatus();
  const int frames = FloorFrames(sequence);
  if (cache_->frames_of(sequence.row) <= frames) return absl::OkStatus();
  sequence.partial = true;
  return cache_->Shrink(sequence.row, frames);
}

absl::Status CudaBackend::Prepare(const StepItem& item, bool decode) {
  Sequence& sequence = At(item.sequence);
  CHECK(!item.tokens.empty());
  CHECK(static_cast<int64_t>(item.tokens.size()) <= Headroom(item.sequence));
  if (decode && !sequence.decoding) RETURN_IF_ERROR(BecomeDecoding(sequence));
  if (sequence.load_first >= 0) {
    std::vector<StepItemResult> results(1);
    std::vector<std::unique_ptr<RecordReads>> started;
    const absl::Status status =
        step_->LoadBlock(sequence.row, sequence.load_first,
                         [&](absl::Span<const kernels::Load> loads, std::byte* landing,
                             const std::function<void(int)>& arrived) {
                           StartReads(loads, landing, arrived, {item}, results, started);
                         });
    sequence.load_first = -1;
    RETURN_IF_ERROR(status);
    for (const auto& list : started) RETURN_IF_ERROR(list->AnnotatedStatus());
  }
  const int needed = BlocksFor(sequence.tokens + static_cast<int64_t>(item.tokens.size()));
  while (static_cast<int>(sequence.blocks.size()) < needed) {
    sequence.blocks.emplace_back();
    ++sequence.unstored;
  }
  return absl::OkStatus();
}

std::vector<StepItemResult> CudaBackend::PrefillChunk(absl::Span<const StepItem> items) {
  return Run(items, false);
}

std::vector<StepItemResult> CudaBackend::DecodeStep(absl::Span<const StepItem> items) {
  return Run(items, true);
}

std::vector<StepItemResult> CudaBackend::Run(absl::Span<const StepItem> items, bool decode) {
  UseDevice();
  std::vector<StepItemResult> results(items.size());
  std::vector<Piece> pieces;
  int64_t rows = 0;
  const int64_t most_rows = decode ? options_.max_sequences : options_.max_prefill_rows;
  const size_t most_pieces = decode ? options_.max_sequences : kMaxChunks;
  const auto flush = [&] {
    if (!pieces.empty()) RunPieces(items, pieces, decode, results);
    pieces.clear();
    rows = 0;
  };
  for (size_t i = 0; i < items.size(); ++i) {
    results[i].status = Prepare(items[i], decode);
    if (!results[i].status.ok()) continue;
    const int64_t tokens = static_cast<int64_t>(items[i].tokens.size());
    for (int64_t first = 0; first < tokens;) {
      if (rows == most_rows || pieces.size() == most_pieces) flush();
      const int64_t count = std::min(tokens - first, most_rows - rows);
      pieces.push_back({i, first, count});
      rows += count;
      first += count;
      // The next piece of the same item reads what this one writes.
      if (first < tokens) flush();
    }
  }
  flush();
  for (size_t i = 0; i < items.size(); ++i) {
    if (results[i].status.ok()) At(items[i].sequence).tokens += items[i].tokens.size();
  }
  const absl::Status exported = Export(items, results);
  if (!exported.ok()) {
    for (StepItemResult& result : results) result.status.Update(exported);
  }
  return results;
}

void CudaBackend::RunPieces(absl::Span<const StepItem> items, absl::Span<const Piece> pieces,
                            bool decode, std::vector<StepItemResult>& results) {
  std::vector<StepToken> tokens;
  std::vector<size_t> sampled;       // items
  std::vector<int32_t> logits_rows;  // of the launch
  std::vector<size_t> first_row(pieces.size());
  bool partial = false;
  bool elsewhere = false;
  for (size_t p = 0; p < pieces.size(); ++p) {
    const Piece& piece = pieces[p];
    const StepItem& item = items[piece.item];
    const Sequence& sequence = At(item.sequence);
    first_row[p] = tokens.size();
    partial |= sequence.partial;
    elsewhere |= sequence.partial && sequence.elsewhere > 0;
    for (int64_t i = piece.first; i < piece.first + piece.tokens; ++i) {
      tokens.push_back({sequence.row, static_cast<int32_t>(sequence.tokens + i), item.tokens[i]});
    }
    if (item.sample.has_value() && item.sample->params.DrawnFromLogits()) {
      tokens.back().draw = item.sample->params.ToDraw(tokens.back().position + 1);
    }
    const bool last = piece.first + piece.tokens == static_cast<int64_t>(item.tokens.size());
    if (decode || (last && item.sample.has_value())) {
      sampled.push_back(piece.item);
      logits_rows.push_back(static_cast<int32_t>(tokens.size()) - 1);
    }
  }
  std::vector<std::unique_ptr<RecordReads>> started;
  const FetchFunction fetch = [&](absl::Span<const kernels::Load> loads, std::byte* landing,
                                  const std::function<void(int)>& arrived) {
    StartReads(loads, landing, arrived, items, results, started);
  };
  const Missing missing = !partial    ? Missing::kNever
                          : elsewhere ? Missing::kFetched
                                      : Missing::kMapped;
  const absl::StatusOr<StepOutput> output =
      decode ? step_->Decode(tokens, missing, fetch)
             : step_->Prefill(tokens, missing, fetch, logits_rows);
  if (!output.ok()) {
    for (const Piece& piece : pieces) results[piece.item].status.Update(output.status());
    return;
  }
  std::vector<int64_t> by_host(items.size(), 0);  // records
  for (const auto& list : started) {
    results[list->item].status.Update(list->AnnotatedStatus());
    by_host[list->item] += static_cast<int64_t>(list->indices.size());
  }
  for (size_t p = 0; p < pieces.size(); ++p) {
    // A chunk counts once, at its first row.
    const int2 totals = output->totals[first_row[p]];
    CacheCounters& counters = results[pieces[p].item].counters;
    counters.records_selected += totals.x;
    counters.records_resident += totals.x - totals.y;
    // What the host did not bring, attention read from mapped pages.
    const int64_t mapped =
        decode || missing == Missing::kMapped ? totals.y - by_host[pieces[p].item] : 0;
    counters.CountFetched(kvstore::Path::kMapped, mapped, layout_.record_bytes());
  }
  const std::vector<int32_t> drawn(output->tokens.begin(), output->tokens.end());
  SampleTokens(items, sampled, drawn, results);
}

absl::Status CudaBackend::RecordReads::AnnotatedStatus() const {
  return Annotate(status, "reading the KV cache");
}

void CudaBackend::StartReads(absl::Span<const kernels::Load> loads, std::byte* landing,
                             const std::function<void(int)>& arrived,
                             absl::Span<const StepItem> items, std::vector<StepItemResult>& results,
                             std::vector<std::unique_ptr<RecordReads>>& started) {
  // One list of reads per sequence, all in flight together: a failure is that of its item alone.
  absl::flat_hash_map<int, RecordReads*> by_row;
  for (size_t i = 0; i < items.size(); ++i) {
    auto list = std::make_unique<RecordReads>();
    list->item = i;
    by_row[At(items[i].sequence).row] = list.get();
    started.push_back(std::move(list));
  }
  for (size_t i = 0; i < loads.size(); ++i) {
    const kernels::Load& load = loads[i];
    RecordReads& list = *by_row.at(load.sequence);
    const Block& block = At(items[list.item].sequence).blocks[load.block];
    CHECK(block.ref.has_value());
    list.reads.push_back(
        {*block.ref, load.record, block.record_checksums[load.record],
         absl::MakeSpan(landing + i * layout_.record_bytes(), layout_.record_bytes())});
    list.indices.push_back(static_cast<int>(i));
    CacheCounters& counters = results[list.item].counters;
    counters.CountFetched(store_->PathTo(block.ref->store), 1, layout_.record_bytes());
  }
  for (const auto& [row, list] : by_row) {
    if (list->reads.empty()) continue;
    store_->ReadRecords(std::move(list->reads), [list = list, arrived](absl::Status status) {
      list->status = std::move(status);
      for (const int i : list->indices) arrived(i);
    });
  }
}

void CudaBackend::SampleTokens(absl::Span<const StepItem> items, absl::Span<const size_t> sampled,
                               absl::Span<const int32_t> drawn,
                               std::vector<StepItemResult>& results) {
  std::vector<size_t> others;  // index in `sampled`
  for (size_t i = 0; i < sampled.size(); ++i) {
    const StepItem& item = items[sampled[i]];
    if (!item.sample.has_value() || !results[sampled[i]].status.ok()) continue;
    if (item.sample->params.DrawnFromLogits()) {
      SampledToken token;
      token.id = drawn[i];
      results[sampled[i]].token = token;
    } else {
      others.push_back(i);
    }
  }
  if (others.empty()) return;
  const size_t vocab = config().vocab_size;
  std::vector<float> logits(sampled.size() * vocab);
  const absl::Status status =
      step_->ReadLogits(static_cast<int>(sampled.size()), absl::MakeSpan(logits));
  if (!status.ok()) {
    for (size_t i : others) results[sampled[i]].status.Update(status);
    return;
  }
  const auto sample = [&](size_t first) {
    for (size_t k = first; k < others.size(); k += options_.threads) {
      const size_t i = others[k];
      const StepItem& item = items[sampled[i]];
      const int64_t position =
          sequences_.at(item.sequence)->tokens + static_cast<int64_t>(item.tokens.size());
      results[sampled[i]].token =
          Sample(absl::MakeSpan(logits).subspan(i * vocab, vocab), item.sample->params,
                 item.sample->history, item.sample->prompt_tokens, position);
    }
  };
  std::vector<std::thread> threads;
  for (size_t t = 1; t < std::min<size_t>(options_.threads, others.size()); ++t) {
    threads.emplace_back(sample, t);
  }
  sample(0);
  for (std::thread& thread : threads) thread.join();
}

absl::Status CudaBackend::Export(absl::Span<const StepItem> items,
                                 std::vector<StepItemResult>& results) {
  size_t count = 0;
  for (size_t i = 0; i < items.size(); ++i) {
    if (!results[i].status.ok()) continue;
    Sequence& sequence = At(items[i].sequence);
    while ((sequence.unreported_from + 1) * kBlock <= sequence.tokens) {
      const int block = static_cast<int>(sequence.unreported_from);
      PageBuffer page = pages_->Allocate();
      if (page == nullptr) {
        // Admission keeps as many as the sequences may have unstored.
        return absl::InternalError(
            absl::StrCat("page pool of ", pages_->max_pages(), " pages is empty"));
      }
      page_list_[count++] = {sequence.row, block, page->data()};
      results[i].finished.push_back({block, std::move(page)});
      ++sequence.unreported_from;
    }
  }
  if (count == 0) return absl::OkStatus();
  kernels::ExportParams params;
  params.blocks = page_list_.data();
  params.cache = cache_->view();
  params.offsets.records = static_cast<int64_t>(layout_.record_offset(0));
  params.offsets.index = static_cast<int64_t>(layout_.index_offset());
  params.num_blocks = static_cast<int>(count);
  RETURN_IF_ERROR(CudaStatus(kernels::LaunchExport(params, stream_), "finished blocks"));
  return CudaStatus(cudaStreamSynchronize(stream_), "finished blocks");
}

void CudaBackend::CheckIntegrity() const {
  UseDevice();
  cache_->CheckIntegrity();
  for (const auto& [id, sequence] : sequences_) {
    CHECK(static_cast<int>(sequence->blocks.size()) == BlocksFor(sequence->tokens));
    int unstored = 0;
    for (const Block& block : sequence->blocks) unstored += block.ref.has_value() ? 0 : 1;
    CHECK(unstored == sequence->unstored && unstored <= options_.max_unstored_blocks);
  }
}

}  // namespace nosara::worker
