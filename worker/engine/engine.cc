#include "worker/engine/engine.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/log.h"
#include "base/status_macros.h"

namespace nosara::worker {
namespace {

using kvstore::kBlockTokens;

/// Blocks of one write: what one reservation asks for at most.
constexpr size_t kBlocksPerWrite = 16;

/// True for what a sequence survives by computing its pages again: nothing else reaches the backend
/// from the stores, and none of it says that the request or the device is at fault.
bool PagesLost(const absl::Status& status) {
  return absl::IsUnavailable(status) || absl::IsAborted(status) || absl::IsDataLoss(status) ||
         absl::IsNotFound(status);
}

}  // namespace

/// A request and, while it is admitted, its sequence in the backend.
struct Engine::Sequence {
  enum class Phase {
    kQueued,    // no memory yet
    kLookup,    // waiting for the stores' answer
    kRunning,   // prefill or decode
    kFlushing,  // the sink has been told; blocks are still being stored
  };

  uint64_t handle = 0;
  Request request;
  std::shared_ptr<RequestSink> sink;
  Phase phase = Phase::kQueued;
  /// In the backend; another one each time that the sequence comes into it.
  SequenceId id;
  bool in_backend = false;

  std::vector<int32_t> tokens;       // prompt and output
  int64_t prefill_tokens = 0;        // prompt and what was generated elsewhere
  int64_t position = 0;              // tokens in the cache
  int64_t cached_tokens = -1;        // found by the first look-up; -1: not yet accepted
  int64_t progress_tokens = 0;       // of the prefill, as the sink knows it
  int64_t first_prefill_tokens = 0;  // prefill_tokens before any recovery
  int recoveries = 0;
  int64_t lost_position = 0;  // position at the last loss
  CacheCounters cache;
  int64_t pages_written = 0;

  kvstore::PageKey namespace_key;
  std::vector<kvstore::PageKey> keys;  // of full blocks, as far as they were needed
  std::vector<kvstore::LeaseId> leases;
  /// Of before a recovery: held until what is left has been leased anew.
  std::vector<kvstore::LeaseId> old_leases;
  /// When to look up again; infinite: no look-up has failed.
  absl::Time lookup_at = absl::InfiniteFuture();
  /// Until when failed look-ups are repeated.
  absl::Time lookup_until = absl::InfinitePast();
  std::deque<FinishedBlock> unstored;
  bool write_in_flight = false;
  absl::Time retry_at = absl::InfinitePast();
  absl::Time stuck_since = absl::InfiniteFuture();  // no headroom, waiting for the store
  absl::Status last_write_error;

  /// Extends the key chain to `blocks` full blocks.
  void NeedKeys(size_t blocks) {
    while (keys.size() < blocks) {
      keys.push_back(kvstore::ChildKey(
          keys.empty() ? namespace_key : keys.back(),
          absl::MakeConstSpan(tokens).subspan(keys.size() * kBlockTokens, kBlockTokens)));
    }
  }
};

absl::StatusOr<std::unique_ptr<Engine>> Engine::Create(std::unique_ptr<Backend> backend,
                                                       kvstore::StoreClient* store,
                                                       const Clock* clock, EngineOptions options) {
  RETURN_IF_ERROR(options.Validate());
  std::unique_ptr<Engine> engine(new Engine(std::move(backend), store, clock, options));
  absl::MutexLock lock(&engine->stop_mu_);
  engine->thread_ = std::thread([raw = engine.get()] { raw->Run(); });
  return engine;
}

Engine::Engine(std::unique_ptr<Backend> backend, kvstore::StoreClient* store, const Clock* clock,
               EngineOptions options)
    : backend_(std::move(backend)),
      store_(store),
      clock_(clock),
      options_(options),
      // Room for every submission and cancel at once, and for the few store operations of each
      // running sequence: events are never dropped.
      inbox_(4 * static_cast<size_t>(options.max_queued) +
             64 * static_cast<size_t>(options.max_running) + 4096) {}

Engine::~Engine() { Stop(); }

absl::Status Engine::Validate(const Request& request) const {
  const ModelConfig& config = backend_->config();
  if (request.prompt.empty()) {
    return absl::InvalidArgumentError("prompt_tokens is empty: must have at least 1 token");
  }
  for (const std::vector<int32_t>* tokens : {&request.prompt, &request.generated}) {
    for (int32_t token : *tokens) {
      if (token < 0 || token >= config.vocab_size) {
        return absl::InvalidArgumentError(
            absl::StrCat("token ", token, ": must be 0 to ", config.vocab_size - 1));
      }
    }
  }
  const int64_t prompt = request.prompt.size();
  const int64_t generated = request.generated.size();
  if (request.max_tokens <= generated) {
    return absl::InvalidArgumentError(absl::StrCat("max_tokens = ", request.max_tokens,
                                                   ": must be more than the ", generated,
                                                   " tokens generated already"));
  }
  if (prompt + request.max_tokens > config.max_position_embeddings) {
    return absl::InvalidArgumentError(absl::StrCat(
        "prompt of ", prompt, " tokens and max_tokens = ", request.max_tokens,
        ": together at most ", config.max_position_embeddings, ", the model's context"));
  }
  return absl::OkStatus();
}

absl::StatusOr<RequestHandle> Engine::Submit(Request request, std::shared_ptr<RequestSink> sink) {
  RETURN_IF_ERROR(Validate(request));
  if (draining_.load(std::memory_order_relaxed)) {
    return absl::FailedPreconditionError("the worker is draining");
  }
  if (waiting_.fetch_add(1, std::memory_order_relaxed) >= options_.max_queued) {
    waiting_.fetch_sub(1, std::memory_order_relaxed);
    return absl::ResourceExhaustedError(
        absl::StrCat("the worker's queue of ", options_.max_queued, " requests is full"));
  }
  const RequestHandle handle{next_handle_.fetch_add(1, std::memory_order_relaxed)};
  auto sequence = std::make_unique<Sequence>();
  sequence->handle = handle.value;
  sequence->tokens = request.prompt;
  sequence->tokens.insert(sequence->tokens.end(), request.generated.begin(),
                          request.generated.end());
  sequence->prefill_tokens = sequence->tokens.size();
  sequence->first_prefill_tokens = sequence->prefill_tokens;
  sequence->request = std::move(request);
  sequence->sink = std::move(sink);
  const bool pushed = inbox_.TryPush([this, sequence = std::move(sequence)]() mutable {
    const uint64_t value = sequence->handle;
    if (stopping_) {
      sequence->sink->OnFailed(absl::UnavailableError("the worker is stopping"));
      waiting_.fetch_sub(1, std::memory_order_relaxed);
      return;
    }
    sequences_[value] = std::move(sequence);
    queue_.push_back(value);
  });
  if (!pushed) {
    waiting_.fetch_sub(1, std::memory_order_relaxed);
    return absl::UnavailableError("the worker is stopping");
  }
  return handle;
}

void Engine::Cancel(RequestHandle handle) {
  (void)inbox_.TryPush([this, handle] {
    Sequence* sequence = Find(handle.value);
    if (sequence == nullptr || sequence->phase == Sequence::Phase::kFlushing) return;
    sequence->unstored.clear();
    Leave(*sequence);
    EraseIfDone(handle.value);
  });
}

EngineLoad Engine::load() const {
  absl::MutexLock lock(&load_mu_);
  EngineLoad load = load_;
  load.draining = draining_.load(std::memory_order_relaxed);
  return load;
}

void Engine::Drain() { draining_.store(true, std::memory_order_relaxed); }

void Engine::Stop() {
  absl::MutexLock lock(&stop_mu_);
  if (!thread_.joinable()) return;
  draining_.store(true, std::memory_order_relaxed);
  Post([this] { stopping_ = true; });
  thread_.join();
}

void Engine::Post(Event event) {
  // Full only if the bound of the constructor is wrong.
  const bool pushed = inbox_.TryPush(std::move(event));
  CHECK(pushed || inbox_.closed());
}

Engine::Sequence* Engine::Find(uint64_t handle) {
  const auto found = sequences_.find(handle);
  return found == sequences_.end() ? nullptr : found->second.get();
}

void Engine::Run() {
  while (true) {
    for (Event& event : inbox_.PopAll()) std::move(event)();
    if (stopping_) {
      std::vector<uint64_t> all;
      for (const auto& [handle, sequence] : sequences_) all.push_back(handle);
      for (uint64_t handle : all) {
        Sequence& sequence = *sequences_[handle];
        sequence.unstored.clear();
        Fail(sequence, absl::UnavailableError("the worker is stopping"));
        EraseIfDone(handle);
      }
      // Landing buffers of operations in flight are the client's until they complete.
      if (store_operations_ > 0) {
        inbox_.WaitNotEmpty(absl::InfiniteDuration());
        continue;
      }
      // What came in last is answered too.
      inbox_.Close();
      for (Event& event : inbox_.PopAll()) std::move(event)();
      return;
    }
    const absl::Duration until_next = Housekeep();
    AdmitQueued();
    const bool ran = RunStep();
    PublishLoad();
    if (!ran) inbox_.WaitNotEmpty(until_next);
  }
}

absl::Duration Engine::Housekeep() {
  const absl::Time now = clock_->Now();
  absl::Time next = absl::InfiniteFuture();
  std::vector<uint64_t> all;
  for (const auto& [handle, sequence] : sequences_) all.push_back(handle);
  for (uint64_t handle : all) {
    Sequence& sequence = *sequences_[handle];
    if (sequence.phase != Sequence::Phase::kFlushing) {
      if (sequence.request.deadline <= now) {
        sequence.unstored.clear();
        Fail(sequence, absl::DeadlineExceededError("the request's deadline has passed"));
        EraseIfDone(handle);
        continue;
      }
      next = std::min(next, sequence.request.deadline);
    }
    if (sequence.lookup_at <= now) {
      LookUp(sequence);
    } else {
      next = std::min(next, sequence.lookup_at);
    }
    if (!sequence.unstored.empty() && !sequence.write_in_flight) {
      if (sequence.retry_at <= now) {
        StoreBlocks(sequence);
      } else {
        next = std::min(next, sequence.retry_at);
      }
    }
    if (sequence.phase == Sequence::Phase::kFlushing) {
      EraseIfDone(handle);
      continue;
    }
    if (sequence.stuck_since + options_.store_patience <= now) {
      absl::Status error = sequence.last_write_error;
      if (error.ok()) error = absl::UnavailableError("the KV store does not answer");
      Fail(sequence, Annotate(error, absl::StrCat("no KV store took the sequence's blocks for ",
                                                  absl::FormatDuration(options_.store_patience))));
      EraseIfDone(handle);
      continue;
    }
    next = std::min(next, sequence.stuck_since + options_.store_patience);
  }
  return next - now;
}

void Engine::AdmitQueued() {
  while (!queue_.empty() && static_cast<int>(running_.size()) < options_.max_running) {
    Sequence& sequence = *sequences_[queue_.front()];
    const int64_t max_tokens = sequence.request.prompt.size() + sequence.request.max_tokens;
    sequence.id = SequenceId{next_sequence_++};
    const absl::Status added = backend_->AddSequence(sequence.id, max_tokens);
    // No room until others, or pages on their way to the store, have left: the first in line waits,
    // so that a large request is not starved by small ones.
    if (absl::IsResourceExhausted(added) &&
        (sequences_.size() > queue_.size() || store_operations_ > 0)) {
      return;
    }
    if (!added.ok()) {
      Fail(sequence, added);
      EraseIfDone(sequence.handle);
      continue;
    }
    queue_.pop_front();
    waiting_.fetch_sub(1, std::memory_order_relaxed);
    sequence.in_backend = true;
    if (sequence.recoveries == 0) {
      // Stores that all are gone for a moment fail nobody.
      sequence.lookup_until = clock_->Now() + options_.store_patience;
    }
    running_.push_back(sequence.handle);
    LookUp(sequence);
  }
}

void Engine::LookUp(Sequence& sequence) {
  sequence.phase = Sequence::Phase::kLookup;
  sequence.lookup_at = absl::InfiniteFuture();
  const Request& request = sequence.request;
  sequence.namespace_key = kvstore::NamespaceKey(
      backend_->model_fingerprint(), backend_->layout().fingerprint(),
      absl::StrCat("theta=", backend_->config().rope_theta), request.cache_salt);
  // The last token is always computed, so that there are logits to sample from.
  const size_t blocks = (sequence.tokens.size() - 1) / kBlockTokens;
  if (blocks == 0) {
    StartPrefill(sequence, 0);
    return;
  }
  sequence.NeedKeys(blocks);
  ++store_operations_;
  store_->Lookup(sequence.keys,
                 [this, handle = sequence.handle](absl::StatusOr<kvstore::LookupResult> result) {
                   Post([this, handle, result = std::move(result)]() mutable {
                     --store_operations_;
                     OnLookup(handle, std::move(result));
                   });
                 });
}

void Engine::OnLookup(uint64_t handle, absl::StatusOr<kvstore::LookupResult> result) {
  Sequence* sequence = Find(handle);
  if (sequence == nullptr || sequence->phase != Sequence::Phase::kLookup || !sequence->in_backend) {
    // Cancelled meanwhile.
    if (result.ok()) store_->Release(std::move(result->leases));
    EraseIfDone(handle);
    return;
  }
  if (!result.ok()) {
    // Without a store, only what fits into the worker's own unstored blocks can be served.
    const int64_t tokens = sequence->request.prompt.size() + sequence->request.max_tokens;
    if (tokens > backend_->Headroom(sequence->id)) {
      const absl::Time retry_at = clock_->Now() + options_.store_retry_delay;
      if (retry_at <= sequence->lookup_until) {
        sequence->lookup_at = retry_at;
        return;
      }
      Fail(*sequence, Annotate(result.status(), "looking up the prompt in the KV store"));
      EraseIfDone(handle);
      return;
    }
    LogWarning("request {}: no KV store, serving without: {}", sequence->request.request_id,
               result.status().ToString());
    StartPrefill(*sequence, 0);
    return;
  }
  for (const kvstore::LeaseId lease : result->leases) sequence->leases.push_back(lease);
  if (result->pages.empty()) {
    StartPrefill(*sequence, 0);
    return;
  }
  const size_t prefix_bytes = backend_->layout().prefix_bytes();
  auto bytes = std::make_shared<std::vector<std::byte>>(result->pages.size() * prefix_bytes);
  std::vector<kvstore::PrefixRead> reads;
  for (size_t i = 0; i < result->pages.size(); ++i) {
    reads.push_back(
        {result->pages[i], absl::MakeSpan(*bytes).subspan(i * prefix_bytes, prefix_bytes)});
  }
  ++store_operations_;
  store_->ReadPrefixes(
      std::move(reads),
      [this, handle, bytes](absl::StatusOr<std::vector<kvstore::PageRef>> pages) mutable {
        Post([this, handle, pages = std::move(pages), bytes = std::move(bytes)]() mutable {
          --store_operations_;
          OnPrefixes(handle, std::move(pages), std::move(bytes));
        });
      });
}

void Engine::OnPrefixes(uint64_t handle, absl::StatusOr<std::vector<kvstore::PageRef>> pages,
                        std::shared_ptr<std::vector<std::byte>> bytes) {
  Sequence* sequence = Find(handle);
  if (sequence == nullptr || sequence->phase != Sequence::Phase::kLookup || !sequence->in_backend) {
    EraseIfDone(handle);
    return;
  }
  int64_t cached = 0;
  absl::Status status = pages.status();
  if (status.ok()) {
    const size_t prefix_bytes = backend_->layout().prefix_bytes();
    std::vector<BoundPage> bound;
    for (size_t i = 0; i < pages->size(); ++i) {
      bound.push_back(
          {(*pages)[i], absl::MakeConstSpan(*bytes).subspan(i * prefix_bytes, prefix_bytes)});
    }
    status = backend_->BindPages(sequence->id, bound);
    cached = static_cast<int64_t>(pages->size()) * kBlockTokens;
  }
  if (!status.ok()) {
    // What cannot be read is computed anew.
    LogWarning("request {}: cached pages not used: {}", sequence->request.request_id,
               status.ToString());
    store_->Release(std::move(sequence->leases));
    sequence->leases.clear();
    cached = 0;
  }
  StartPrefill(*sequence, cached);
}

void Engine::StartPrefill(Sequence& sequence, int64_t cached_tokens) {
  sequence.phase = Sequence::Phase::kRunning;
  sequence.position = cached_tokens;
  if (!sequence.old_leases.empty()) store_->Release(std::exchange(sequence.old_leases, {}));
  total_recomputed_tokens_ += std::max<int64_t>(0, sequence.lost_position - cached_tokens);
  sequence.lost_position = 0;
  const int64_t tokens = sequence.tokens.size();
  const int64_t replay = tokens - std::max(sequence.first_prefill_tokens, cached_tokens);
  sequence.prefill_tokens =
      replay <= options_.max_replay_tokens ? sequence.first_prefill_tokens : tokens;
  if (sequence.cached_tokens >= 0) return;  // the sink knows that it runs
  sequence.cached_tokens = cached_tokens;
  sequence.sink->OnAccepted(cached_tokens);
}

bool Engine::RunStep() {
  const absl::Time now = clock_->Now();
  std::vector<Sequence*> candidates;
  std::vector<SequenceView> views;
  for (uint64_t handle : running_) {
    Sequence& sequence = *sequences_[handle];
    if (sequence.phase != Sequence::Phase::kRunning) continue;
    const int64_t headroom = backend_->Headroom(sequence.id);
    if (headroom > 0) {
      sequence.stuck_since = absl::InfiniteFuture();
    } else if (sequence.stuck_since == absl::InfiniteFuture()) {
      sequence.stuck_since = now;
    }
    candidates.push_back(&sequence);
    views.push_back({sequence.position, sequence.prefill_tokens, headroom});
  }
  const Schedule schedule = PlanStep(views, options_.limits);
  const auto items_of = [&](const std::vector<ScheduledItem>& scheduled) {
    std::vector<StepItem> items;
    for (const ScheduledItem& one : scheduled) {
      const Sequence& sequence = *candidates[one.view];
      StepItem item;
      item.sequence = sequence.id;
      item.tokens = absl::MakeConstSpan(sequence.tokens).subspan(sequence.position, one.tokens);
      if (sequence.position + one.tokens == static_cast<int64_t>(sequence.tokens.size())) {
        item.sample = SampleRequest{sequence.request.sampling, sequence.tokens,
                                    sequence.request.prompt.size()};
      }
      items.push_back(item);
    }
    return items;
  };
  const auto finish = [&](const std::vector<ScheduledItem>& scheduled,
                          std::vector<StepItemResult> results) {
    for (size_t i = 0; i < scheduled.size(); ++i) {
      AfterStep(*candidates[scheduled[i].view], scheduled[i].tokens, std::move(results[i]));
    }
  };
  if (!schedule.decode.empty()) {
    finish(schedule.decode, backend_->DecodeStep(items_of(schedule.decode)));
  }
  if (!schedule.prefill.empty()) {
    finish(schedule.prefill, backend_->PrefillChunk(items_of(schedule.prefill)));
  }
  if (options_.integrity == EngineOptions::Integrity::kEachStep) backend_->CheckIntegrity();
  // Only now: results hold no pointers to sequences any more.
  for (const std::vector<ScheduledItem>* list : {&schedule.decode, &schedule.prefill}) {
    for (const ScheduledItem& one : *list) EraseIfDone(candidates[one.view]->handle);
  }
  return !schedule.decode.empty() || !schedule.prefill.empty();
}

void Engine::AfterStep(Sequence& sequence, int64_t tokens, StepItemResult result) {
  sequence.cache += result.counters;
  total_cache_ += result.counters;
  if (PagesLost(result.status)) {
    Recover(sequence, result.status);
    return;
  }
  if (!result.status.ok()) {
    sequence.unstored.clear();
    Fail(sequence, result.status);
    return;
  }
  if (result.counters.records_by_mapped > 0) {
    // A device may have read mapped pages by itself: they were what they should be if the leases
    // have held until now.
    for (const kvstore::LeaseId lease : sequence.leases) {
      const absl::Status held = store_->CheckLease(lease);
      if (held.ok()) continue;
      Recover(sequence, held);
      return;
    }
  }
  sequence.position += tokens;
  for (FinishedBlock& block : result.finished) sequence.unstored.push_back(std::move(block));
  // After a recovery the sink is told what is new to it.
  const int64_t progress = std::min(sequence.position, sequence.first_prefill_tokens);
  if (progress > sequence.progress_tokens) {
    sequence.progress_tokens = progress;
    sequence.sink->OnPrefillProgress(progress, sequence.first_prefill_tokens);
  }
  if (result.token.has_value()) TakeToken(sequence, *std::move(result.token));
  if (!sequence.unstored.empty() && !sequence.write_in_flight &&
      sequence.retry_at <= clock_->Now()) {
    StoreBlocks(sequence);
  }
}

void Engine::TakeToken(Sequence& sequence, SampledToken token) {
  const std::vector<int32_t>& stops = sequence.request.stop_token_ids;
  if (std::find(stops.begin(), stops.end(), token.id) != stops.end()) {
    Complete(sequence, FinishReason::kStop);
    return;
  }
  sequence.tokens.push_back(token.id);
  sequence.sink->OnToken(token);
  const int64_t generated = sequence.tokens.size() - sequence.request.prompt.size();
  if (generated >= sequence.request.max_tokens) Complete(sequence, FinishReason::kLength);
}

void Engine::Recover(Sequence& sequence, const absl::Status& cause) {
  sequence.unstored.clear();
  if (sequence.recoveries >= options_.max_recoveries) {
    Fail(sequence,
         absl::UnavailableError(absl::StrCat("cached pages were lost ", sequence.recoveries + 1,
                                             " times (max_recoveries = ", options_.max_recoveries,
                                             "), the last time: ", cause.message())));
    return;
  }
  ++sequence.recoveries;
  ++total_recoveries_;
  LogWarning("request {}: pages lost at token {}, computing them again: {}",
             sequence.request.request_id, sequence.position, cause.ToString());
  LeaveBackend(sequence);
  sequence.id = SequenceId{};  // a write in flight is not of the blocks to come
  for (const kvstore::LeaseId lease : std::exchange(sequence.leases, {})) {
    sequence.old_leases.push_back(lease);
  }
  sequence.lost_position = sequence.position;
  sequence.position = 0;
  sequence.stuck_since = absl::InfiniteFuture();
  sequence.retry_at = absl::InfinitePast();
  sequence.lookup_until = clock_->Now() + options_.store_patience;
  // Before all others: it was admitted before them.
  sequence.phase = Sequence::Phase::kQueued;
  queue_.push_front(sequence.handle);
  waiting_.fetch_add(1, std::memory_order_relaxed);
}

void Engine::StoreBlocks(Sequence& sequence) {
  CHECK(!sequence.write_in_flight && !sequence.unstored.empty());
  std::vector<FinishedBlock> blocks;
  while (!sequence.unstored.empty() && blocks.size() < kBlocksPerWrite) {
    blocks.push_back(std::move(sequence.unstored.front()));
    sequence.unstored.pop_front();
  }
  const size_t first = blocks.front().block;
  sequence.NeedKeys(first + blocks.size());
  kvstore::ChainPosition position;
  position.block = first;
  position.group = sequence.keys[first - first % kvstore::kGroupBlocks];
  position.parent = first == 0 ? sequence.namespace_key : sequence.keys[first - 1];
  position.name_space = sequence.namespace_key;
  std::vector<kvstore::PageWrite> writes;
  for (const FinishedBlock& block : blocks) {
    writes.push_back({sequence.keys[block.block], kBlockTokens, *block.page});
  }
  sequence.write_in_flight = true;
  ++store_operations_;
  store_->Write(
      position, std::move(writes),
      [this, handle = sequence.handle, id = sequence.id,
       blocks = std::move(blocks)](absl::StatusOr<kvstore::WriteResult> result) mutable {
        Post([this, handle, id, blocks = std::move(blocks), result = std::move(result)]() mutable {
          --store_operations_;
          OnWritten(handle, id, std::move(blocks), std::move(result));
        });
      });
}

void Engine::OnStaleWrite(Sequence& sequence, const absl::Status& status) {
  // The blocks are being computed again; that they are stored saves the next write.
  sequence.write_in_flight = false;
  sequence.last_write_error = status;
  EraseIfDone(sequence.handle);
}

void Engine::OnWritten(uint64_t handle, SequenceId id, std::vector<FinishedBlock> blocks,
                       absl::StatusOr<kvstore::WriteResult> result) {
  Sequence* sequence = Find(handle);
  CHECK(sequence != nullptr);  // a sequence lives until its write is over
  if (result.ok()) {
    for (kvstore::LeaseId lease : result->leases) sequence->leases.push_back(lease);
  }
  if (sequence->id != id) {
    OnStaleWrite(*sequence, result.status());
    return;
  }
  if (!result.ok()) {
    WriteFailed(*sequence, std::move(blocks), result.status());
    EraseIfDone(handle);
    return;
  }
  const bool foreign = std::find(result->already_stored.begin(), result->already_stored.end(), 1) !=
                       result->already_stored.end();
  if (foreign && sequence->in_backend) {
    // Somebody else's bytes have somebody else's checksums.
    const size_t prefix_bytes = backend_->layout().prefix_bytes();
    auto prefixes = std::make_shared<std::vector<std::byte>>(blocks.size() * prefix_bytes);
    std::vector<kvstore::PrefixRead> reads;
    for (size_t i = 0; i < blocks.size(); ++i) {
      reads.push_back(
          {result->pages[i], absl::MakeSpan(*prefixes).subspan(i * prefix_bytes, prefix_bytes)});
    }
    ++store_operations_;
    store_->ReadPrefixes(
        std::move(reads),
        [this, handle, id, blocks = std::move(blocks), result = *std::move(result),
         prefixes](absl::StatusOr<std::vector<kvstore::PageRef>> pages) mutable {
          if (pages.ok()) result.pages = *std::move(pages);
          Post([this, handle, id, blocks = std::move(blocks), result = std::move(result),
                prefixes = std::move(prefixes), status = pages.status()]() mutable {
            --store_operations_;
            OnForeignPrefixes(handle, id, std::move(blocks), std::move(result), std::move(prefixes),
                              std::move(status));
          });
        });
    return;
  }
  std::vector<std::vector<uint64_t>> checksums(blocks.size());
  for (size_t i = 0; i < blocks.size(); ++i) {
    for (int record = 0; record < backend_->layout().num_records(); ++record) {
      checksums[i].push_back(kvstore::RecordChecksum(backend_->layout(), *blocks[i].page, record));
    }
  }
  CommitBlocks(*sequence, blocks, *result, checksums);
  EraseIfDone(handle);
}

void Engine::OnForeignPrefixes(uint64_t handle, SequenceId id, std::vector<FinishedBlock> blocks,
                               kvstore::WriteResult result,
                               std::shared_ptr<std::vector<std::byte>> prefixes,
                               absl::Status status) {
  Sequence* sequence = Find(handle);
  CHECK(sequence != nullptr);
  if (sequence->id != id) {
    OnStaleWrite(*sequence, status);
    return;
  }
  if (!status.ok()) {
    WriteFailed(*sequence, std::move(blocks), status);
    EraseIfDone(handle);
    return;
  }
  const kvstore::PageLayout& layout = backend_->layout();
  std::vector<std::vector<uint64_t>> checksums(blocks.size());
  for (size_t i = 0; i < blocks.size(); ++i) {
    for (int record = 0; record < layout.num_records(); ++record) {
      checksums[i].push_back(kvstore::RecordChecksum(
          layout,
          absl::MakeConstSpan(*prefixes).subspan(i * layout.prefix_bytes(), layout.prefix_bytes()),
          record));
    }
  }
  CommitBlocks(*sequence, blocks, result, checksums);
  EraseIfDone(handle);
}

void Engine::CommitBlocks(Sequence& sequence, const std::vector<FinishedBlock>& blocks,
                          const kvstore::WriteResult& result,
                          const std::vector<std::vector<uint64_t>>& checksums) {
  sequence.write_in_flight = false;
  sequence.last_write_error = absl::OkStatus();
  for (size_t i = 0; i < blocks.size(); ++i) {
    const int64_t written = result.already_stored[i] != 0 ? 0 : 1;
    sequence.pages_written += written;
    total_pages_written_ += written;
    if (sequence.in_backend) {
      backend_->CommitBlock(sequence.id, blocks[i].block, result.pages[i], checksums[i]);
    }
  }
  if (!sequence.unstored.empty()) StoreBlocks(sequence);
}

void Engine::WriteFailed(Sequence& sequence, std::vector<FinishedBlock> blocks,
                         const absl::Status& status) {
  sequence.write_in_flight = false;
  if (sequence.last_write_error.ok()) {
    LogWarning("request {}: blocks {} to {} not stored, trying again: {}",
               sequence.request.request_id, blocks.front().block, blocks.back().block,
               status.ToString());
  }
  sequence.last_write_error = status;
  if (sequence.phase == Sequence::Phase::kFlushing || sequence.sink == nullptr) {
    // Nobody waits for these pages: they are a lost chance of reuse, no more.
    sequence.unstored.clear();
    return;
  }
  // They stay on the worker; the sequence goes on while it has headroom.
  for (auto block = blocks.rbegin(); block != blocks.rend(); ++block) {
    sequence.unstored.push_front(std::move(*block));
  }
  sequence.retry_at = clock_->Now() + options_.store_retry_delay;
}

void Engine::Complete(Sequence& sequence, FinishReason reason) {
  Completion completion;
  completion.reason = reason;
  completion.prompt_tokens = sequence.request.prompt.size();
  completion.completion_tokens = sequence.tokens.size() - sequence.request.prompt.size();
  completion.cached_prompt_tokens = std::max<int64_t>(0, sequence.cached_tokens);
  completion.cache = sequence.cache;
  // Blocks on their way count: they are this request's doing.
  completion.pages_written = sequence.pages_written;
  const std::shared_ptr<RequestSink> sink = std::move(sequence.sink);
  Leave(sequence);
  sink->OnCompleted(completion);
}

void Engine::Fail(Sequence& sequence, const absl::Status& status) {
  const std::shared_ptr<RequestSink> sink = std::move(sequence.sink);
  Leave(sequence);
  if (sink != nullptr) sink->OnFailed(status);
}

void Engine::Leave(Sequence& sequence) {
  if (sequence.phase == Sequence::Phase::kQueued) {
    queue_.erase(std::find(queue_.begin(), queue_.end(), sequence.handle));
    waiting_.fetch_sub(1, std::memory_order_relaxed);
  }
  sequence.sink = nullptr;
  sequence.phase = Sequence::Phase::kFlushing;
  sequence.stuck_since = absl::InfiniteFuture();
  sequence.lookup_at = absl::InfiniteFuture();
  LeaveBackend(sequence);
}

void Engine::LeaveBackend(Sequence& sequence) {
  if (!sequence.in_backend) return;
  sequence.in_backend = false;
  backend_->RemoveSequence(sequence.id);
  running_.erase(std::find(running_.begin(), running_.end(), sequence.handle));
}

void Engine::EraseIfDone(uint64_t handle) {
  Sequence* sequence = Find(handle);
  if (sequence == nullptr || sequence->phase != Sequence::Phase::kFlushing) return;
  if (sequence->write_in_flight || !sequence->unstored.empty()) return;
  for (std::vector<kvstore::LeaseId>* leases : {&sequence->leases, &sequence->old_leases}) {
    if (!leases->empty()) store_->Release(std::move(*leases));
  }
  sequences_.erase(handle);
}

void Engine::PublishLoad() {
  EngineLoad load;
  load.queued_requests = queue_.size();
  load.running_requests = running_.size();
  for (uint64_t handle : running_) {
    const Sequence& sequence = *sequences_[handle];
    load.running_tokens += sequence.tokens.size();
    load.pending_prefill_tokens +=
        std::max<int64_t>(0, sequence.prefill_tokens - sequence.position);
  }
  for (uint64_t handle : queue_) load.pending_prefill_tokens += sequences_[handle]->prefill_tokens;
  load.cache = total_cache_;
  load.pages_written = total_pages_written_;
  load.recoveries = total_recoveries_;
  load.recomputed_tokens = total_recomputed_tokens_;
  absl::MutexLock lock(&load_mu_);
  load_ = load;
}

}  // namespace nosara::worker
