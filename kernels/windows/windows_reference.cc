#include "kernels/windows/windows_reference.h"

#include "kernels/common/record_reference.h"

namespace nosara::kernels {
namespace {

/// The slot of the block that holds position t.
std::byte* SlotOfPosition(const CacheView& cache, int sequence, int record, int t) {
  return cache.Slot(cache.SlotOf(sequence, record, t / kBlockTokens));
}

}  // namespace

void WindowsReference(const WindowsParams& params) {
  const CacheView& cache = params.cache;
  const int D = cache.head_dim;
  for (int r = 0; r < params.rows; ++r) {
    const StepRow info = params.rows_info[r];
    const int first = info.position - (kWindowTokens - 1);
    if (info.sequence < 0 || first < 0 || first % kWindowStride != 0) continue;
    const int window = first / kWindowStride;
    for (int h = 0; h < params.num_kv_heads; ++h) {
      const int record = params.layer * params.num_kv_heads + h;
      std::byte* index = cache.IndexSlot(info.sequence, record, window);
      for (int i = 0; i < D; ++i) {
        double sum = 0;
        for (int t = first; t <= info.position; ++t) {
          std::byte* slot = SlotOfPosition(cache, info.sequence, record, t);
          sum += __bfloat162float(RecordKey(slot, D, t % kBlockTokens)[i]);
        }
        IndexKey(index, D, window)[i] = __float2bfloat16_rn(static_cast<float>(sum / 32));
      }
      double sum = 0;
      for (int t = first; t <= info.position; ++t) {
        std::byte* slot = SlotOfPosition(cache, info.sequence, record, t);
        sum += RecordBias(slot, D)[t % kBlockTokens];
      }
      *IndexScore(index, D, window) = static_cast<float>(sum / 32);
    }
  }
}

}  // namespace nosara::kernels
