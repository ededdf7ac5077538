#include "kernels/gather/gather_reference.h"

#include <cstring>

namespace nosara::kernels {

void GatherReference(const GatherParams& params) {
  const CacheView& cache = params.cache;
  const int64_t bytes = RecordBytes(cache.head_dim);
  for (int i = 0; i < *params.num_loads; ++i) {
    const Load& load = params.loads[i];
    const uint64_t page = cache.pages[int64_t{load.sequence} * cache.max_blocks + load.block];
    const std::byte* from = params.landing != nullptr
                                ? params.landing + i * bytes
                                : reinterpret_cast<const std::byte*>(page) + load.record * bytes;
    std::memcpy(cache.Slot(cache.SlotNumber(load.sequence, load.record, load.slot)), from, bytes);
  }
}

}  // namespace nosara::kernels
