#include "kvstore/client/store_set.h"

#include <algorithm>
#include <utility>

#include "kvstore/client/placement.h"

namespace nosara::kvstore {

bool StoreSet::SetMembers(
    absl::Span<const std::string> members,
    const std::function<std::unique_ptr<StoreConnection>(size_t, const std::string&)>& connect) {
  if (members.empty()) return true;  // so that who found members finds them a moment later
  std::vector<size_t> numbers;
  for (const std::string& address : members) {
    const size_t known = size();
    size_t store = 0;
    while (store < known && at(store).address() != address) ++store;
    if (store == kMaxStores) return false;
    if (store == known) {
      connections_[store] = connect(store, address);
      size_.store(store + 1, std::memory_order_release);
    }
    numbers.push_back(store);
  }
  absl::MutexLock lock(&mu_);
  names_.assign(members.begin(), members.end());
  members_ = std::move(numbers);
  return true;
}

std::vector<size_t> StoreSet::Homes(const PageKey& group, size_t count) const {
  std::vector<size_t> ranked;
  {
    absl::MutexLock lock(&mu_);
    for (const size_t i : RankStores(names_, group)) ranked.push_back(members_[i]);
  }
  std::vector<size_t> homes;
  for (const size_t store : ranked) {
    if (homes.size() == count) break;
    if (at(store).live()) homes.push_back(store);
  }
  if (homes.empty()) {
    ranked.resize(std::min(ranked.size(), count));
    return ranked;
  }
  return homes;
}

std::vector<size_t> StoreSet::members() const {
  absl::MutexLock lock(&mu_);
  return members_;
}

}  // namespace nosara::kvstore
