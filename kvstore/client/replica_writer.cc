#include "kvstore/client/replica_writer.h"

#include <algorithm>
#include <utility>

namespace nosara::kvstore {

struct ReplicaWriter::State {
  ChainPosition position;
  std::vector<PageWrite> pages;
  StoreClient::Done<WriteResult> done;
  WriteResult result;

  // Of the group that is being written: pages [begin, end).
  size_t begin = 0;
  size_t end = 0;
  PageKey group;
  std::vector<size_t> homes;  // the last one is written next
  std::vector<size_t> spare;  // to be tried where one of these fails
  size_t wanted = 0;          // copies
  std::vector<WriteResult> copies;
  absl::Status error;        // the last one
  bool last_failed = false;  // the last copy tried
};

void ReplicaWriter::Write(ChainPosition position, std::vector<PageWrite> pages,
                          StoreClient::Done<WriteResult> done) {
  auto write = std::make_shared<State>();
  write->position = position;
  write->pages = std::move(pages);
  write->done = std::move(done);
  StartGroup(std::move(write));
}

void ReplicaWriter::StartGroup(StatePtr write) {
  write->begin = write->end;
  const size_t block = write->position.block + write->begin;
  write->end = std::min(write->pages.size(), write->begin + kGroupBlocks - block % kGroupBlocks);
  write->group = write->begin == 0 ? write->position.group : write->pages[write->begin].key;
  write->homes = options_.stores->Homes(write->group, options_.replicas + 1);
  write->spare.assign(write->homes.begin() + std::min(options_.replicas, write->homes.size()),
                      write->homes.end());
  write->homes.resize(write->homes.size() - write->spare.size());
  write->wanted = std::min(options_.replicas, options_.stores->members().size());
  // The nearest last, the first home among equals: from the back of the list.
  std::stable_sort(write->homes.begin(), write->homes.end(), [this](size_t a, size_t b) {
    return Distance(options_.stores->at(a).path()) < Distance(options_.stores->at(b).path());
  });
  write->copies.clear();
  write->error = absl::OkStatus();
  write->last_failed = false;
  WriteCopy(std::move(write));
}

void ReplicaWriter::WriteCopy(StatePtr write) {
  const size_t store = write->homes.back();
  write->homes.pop_back();
  const PageKey parent =
      write->begin == 0 ? write->position.parent : write->pages[write->begin - 1].key;
  std::vector<PageWrite> pages(write->pages.begin() + write->begin,
                               write->pages.begin() + write->end);
  options_.writer->Write(
      store, parent, write->position.name_space, std::move(pages),
      [this, write](absl::StatusOr<WriteResult> copy) { OnCopy(write, std::move(copy)); });
}

void ReplicaWriter::OnCopy(const StatePtr& write, absl::StatusOr<WriteResult> copy) {
  write->last_failed = !copy.ok();
  if (copy.ok()) {
    write->copies.push_back(*std::move(copy));
  } else {
    write->error = copy.status();
  }
  if (write->homes.empty() && write->copies.size() < write->wanted) {
    write->homes = std::exchange(write->spare, {});
  }
  if (!write->homes.empty() && !absl::IsCancelled(write->error)) {
    WriteCopy(write);
  } else {
    FinishGroup(write);
  }
}

void ReplicaWriter::FinishGroup(StatePtr write) {
  if (write->copies.empty()) {
    options_.copies->Remove(write->result.leases);
    options_.leases->Release(write->result.leases);
    std::move(write->done)(write->error);
    return;
  }
  copies_missing_.fetch_add(
      (write->wanted - std::min(write->wanted, write->copies.size())) * (write->end - write->begin),
      std::memory_order_relaxed);
  for (const WriteResult& copy : write->copies) {
    write->result.leases.insert(write->result.leases.end(), copy.leases.begin(), copy.leases.end());
    if (options_.replicas == 1) continue;
    for (size_t i = 0; i < copy.pages.size(); ++i) {
      const size_t page = write->begin + i;
      const PageOrigin origin{write->group,
                              page == 0 ? write->position.parent : write->pages[page - 1].key,
                              write->position.name_space};
      options_.copies->Add(copy.pages[i], copy.leases[0], origin);
    }
  }
  const WriteResult& named = write->copies.back();
  for (size_t i = 0; i < named.pages.size(); ++i) {
    write->result.pages.push_back(named.pages[i]);
    // After a later failure the memory may be sealed for a slot that nobody reads: the checksums
    // of the copy that is named are in its own prefix.
    write->result.already_stored.push_back(write->last_failed ? 1 : named.already_stored[i]);
  }
  if (write->end < write->pages.size()) {
    StartGroup(std::move(write));
    return;
  }
  std::move(write->done)(std::move(write->result));
}

}  // namespace nosara::kvstore
