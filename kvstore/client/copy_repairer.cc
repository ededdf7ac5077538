#include "kvstore/client/copy_repairer.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace nosara::kvstore {

struct CopyRepairer::Repair {
  PageRef page;
  PageOrigin origin;
  std::vector<std::byte> bytes;  // of the page
  uint32_t tokens = kBlockTokens;
  std::vector<size_t> homes;  // to be written to
};

void CopyRepairer::Add(const PageRef& page, const PageOrigin& origin) {
  if (options_.bytes_per_second == 0) return;
  {
    absl::MutexLock lock(&mu_);
    if (closed_ || waiting_.size() >= kMaxWaiting || !keys_.insert(page.key).second) return;
    auto repair = std::make_shared<Repair>();
    repair->page = page;
    repair->origin = origin;
    waiting_.push_back(std::move(repair));
    if (running_) return;
    running_ = true;
  }
  options_.transfers->Run([this] { StartNext(); });
}

void CopyRepairer::StartNext() {
  RepairPtr repair;
  {
    absl::MutexLock lock(&mu_);
    if (closed_ || waiting_.empty()) {
      running_ = false;
      return;
    }
    repair = std::move(waiting_.front());
    waiting_.pop_front();
    keys_.erase(repair->page.key);
  }
  repair->bytes.resize(options_.layout.page_bytes());
  TransferThread::Piece piece;
  piece.kind = TransferThread::Piece::Kind::kReadPrefix;
  piece.store = repair->page.store.value;
  piece.key = repair->page.key;
  piece.slot = repair->page.slot;
  piece.generation = repair->page.generation;
  piece.local = absl::MakeSpan(repair->bytes).first(options_.layout.prefix_bytes());
  options_.reader->Read({piece}, [this, repair](absl::StatusOr<std::vector<PageRef>> copies) {
    if (!copies.ok()) {
      Finish(repair);
      return;
    }
    repair->page = (*copies)[0];
    ReadRecords(repair);
  });
}

void CopyRepairer::ReadRecords(RepairPtr repair) {
  const PageLayout& layout = options_.layout;
  PageHeader header;
  std::memcpy(&header, repair->bytes.data(), sizeof(header));
  repair->tokens = header.tokens;
  std::vector<TransferThread::Piece> pieces;
  for (int record = 0; record < layout.num_records(); ++record) {
    TransferThread::Piece piece;
    piece.kind = TransferThread::Piece::Kind::kReadRecord;
    piece.store = repair->page.store.value;
    piece.key = repair->page.key;
    piece.slot = repair->page.slot;
    piece.generation = repair->page.generation;
    piece.record = record;
    piece.checksum = RecordChecksum(layout, repair->bytes, record);
    piece.local =
        absl::MakeSpan(repair->bytes).subspan(layout.record_offset(record), layout.record_bytes());
    pieces.push_back(piece);
  }
  options_.reader->Read(
      std::move(pieces), [this, repair](absl::StatusOr<std::vector<PageRef>> copies) {
        if (!copies.ok()) {
          Finish(repair);
          return;
        }
        repair->homes = options_.stores->Homes(repair->origin.group, options_.replicas);
        WriteNext(repair);
      });
}

void CopyRepairer::WriteNext(RepairPtr repair) {
  if (repair->homes.empty()) {
    Finish(repair);
    return;
  }
  const size_t store = repair->homes.back();
  repair->homes.pop_back();
  // Where the page is already, this is one call and no bytes.
  const PageWrite write{repair->page.key, repair->tokens, absl::MakeSpan(repair->bytes)};
  options_.writer->Write(store, repair->origin.parent, repair->origin.name_space, {write},
                         [this, repair](absl::StatusOr<WriteResult> written) {
                           if (written.ok()) {
                             if (written->already_stored[0] == 0) {
                               repaired_.fetch_add(1, std::memory_order_relaxed);
                             }
                             options_.leases->Release(written->leases);
                           }
                           WriteNext(repair);
                         });
}

void CopyRepairer::Finish(const RepairPtr& repair) {
  const absl::Duration pause = absl::Seconds(static_cast<double>(repair->bytes.size()) /
                                             static_cast<double>(options_.bytes_per_second));
  options_.transfers->RunAfter(pause, [this] { StartNext(); });
}

void CopyRepairer::Close() {
  absl::MutexLock lock(&mu_);
  closed_ = true;
  waiting_.clear();
  keys_.clear();
}

void CopyRepairer::WaitIdle() {
  absl::MutexLock lock(&mu_);
  mu_.Await(absl::Condition(this, &CopyRepairer::Idle));
}

}  // namespace nosara::kvstore
