#include <algorithm>
#include <cmath>
#include <type_traits>

#include "kernels/common/attention.cuh"
#include "kernels/common/launch.cuh"
#include "kernels/prefill/prefill.h"

namespace nosara::kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kStages = 2;
constexpr int kTokens = 32;    // that a warp takes at a time
constexpr int kMaxStaged = 3;  // blocks of a stage
constexpr int kHeads = 16;     // query heads of a thread block

template <int dim>
struct alignas(256) Stage {
  uint4 k[kBlockTokens * dim / 8];
  uint4 v[kBlockTokens * dim / 8];
  float c[kBlockTokens];
};

/// One row leaves registers for its queries, two do not.
template <int dim, int warp_rows>
using Queries = std::conditional_t<warp_rows == 1, QueryRows<dim>, SharedQueryRows<dim>>;
template <int dim, int warp_rows>
constexpr size_t kQueryBytes =
    warp_rows == 1 ? 0 : sizeof(uint4) * SharedQueryRows<dim>::kChunks* kWarps* warp_rows;

/// One thread block: rows of one tile, one KV head, 16 query heads. Each warp has `warp_rows`
/// neighbours, which share what it reads from shared memory; all walk over the union of the rows'
/// blocks, and a warp skips what none of its rows has selected. They wait for each other once for
/// `staged` blocks: what one skips is not what another one skips.
///
/// grid.x: tiles times the thread blocks that share one, kPrefillTileRows / (kWarps * warp_rows).
template <int dim, int warp_rows>
__global__ void __launch_bounds__(kThreads, 1)
    PrefillKernel(PrefillParams p, float scale, int staged) {
  StartKernel();
  constexpr int kChunks = dim / 8;
  constexpr int kRows = kWarps * warp_rows;
  constexpr int kParts = kPrefillTileRows / kRows;
  static_assert(kRows <= 16, "a bit a row");
  extern __shared__ __align__(256) std::byte memory[];
  uint4* queries = reinterpret_cast<uint4*>(memory);
  Stage<dim>* stages = reinterpret_cast<Stage<dim>*>(memory + kQueryBytes<dim, warp_rows>);
  uint32_t* rows_of =
      reinterpret_cast<uint32_t*>(stages + kStages * staged);  // 16 bits, [max_blocks]
  // The blocks that any row selected, and their slots: [max_blocks].
  int32_t* slots = reinterpret_cast<int32_t*>(rows_of + (p.max_blocks + 1) / 2);
  uint16_t* list = reinterpret_cast<uint16_t*>(slots + p.max_blocks);
  __shared__ int counts[2][kWarps];

  const RowTile tile = p.tiles[blockIdx.x / kParts];
  const int first_row = tile.first_row + static_cast<int>(blockIdx.x) % kParts * kRows;
  const int rows = min(kRows, tile.first_row + tile.rows - first_row);
  if (rows <= 0) return;
  const StepRow last = p.rows_info[first_row + rows - 1];
  if (last.sequence < 0) return;
  const int group = p.num_heads / p.num_kv_heads;
  const int group_tiles = (group + kHeads - 1) / kHeads;
  const int head = blockIdx.y / group_tiles;
  const int first_head = blockIdx.y % group_tiles * kHeads;
  const int record = p.layer * p.num_kv_heads + head;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;

  // Which rows selected each block, then the list of the selected ones.
  const int blocks = last.position / kBlockTokens + 1;
  for (int i = threadIdx.x; i < (blocks + 1) / 2; i += kThreads) rows_of[i] = 0;
  __syncthreads();
  for (int r = warp; r < rows; r += kWarps) {
    const int64_t pair = static_cast<int64_t>(first_row + r) * p.num_kv_heads + head;
    const int count = p.count[pair];
    for (int i = lane; i < count; i += 32) {
      const int block = p.selected[pair * p.max_selected + i];
      atomicOr(rows_of + block / 2, 1u << (block % 2 * 16 + r));
    }
  }
  __syncthreads();
  const auto rows_selecting = [&](int block) {
    return rows_of[block / 2] >> (block % 2 * 16) & 0xffffu;
  };
  int listed = 0;
  for (int first = 0, round = 0; first < blocks; first += kThreads, ++round) {
    const int n = first + threadIdx.x;
    const bool used = n < blocks && rows_selecting(n) != 0;
    const uint32_t bits = __ballot_sync(kAllLanes, used);
    if (lane == 0) counts[round & 1][warp] = __popc(bits);
    __syncthreads();
    int before = __popc(bits & ((1u << lane) - 1));
    int all = 0;
    for (int w = 0; w < kWarps; ++w) {
      const int own = counts[round & 1][w];
      before += w < warp ? own : 0;
      all += own;
    }
    if (used) {
      list[listed + before] = static_cast<uint16_t>(n);
      slots[listed + before] = static_cast<int32_t>(p.cache.SlotOf(last.sequence, record, n));
    }
    listed += all;
  }
  __syncthreads();

  // The blocks round * staged .. of the list.
  const auto fetch = [&](int round) {
    for (int i = round * staged; i < min((round + 1) * staged, listed); ++i) {
      Stage<dim>& stage = stages[i % (kStages * staged)];
      const int block = list[i];
      const std::byte* slot = p.cache.Slot(slots[i]);
      const int valid = last.position - block * kBlockTokens + 1;
      const uint4* k = reinterpret_cast<const uint4*>(slot);
      const uint4* v = k + kBlockTokens * kChunks;
#pragma unroll
      for (int j = 0; j < kBlockTokens * kChunks / kThreads; ++j) {
        const int chunk = j * kThreads + threadIdx.x;
        const int token = chunk / kChunks;
        const int place = Swizzled<kChunks>(token, chunk % kChunks);
        CopyAsync16(SharedAddress(stage.k + place), k + chunk);
        CopyAsync16OrZero(SharedAddress(stage.v + place), v + chunk, token < valid);
      }
      if (threadIdx.x < kBlockTokens / 4) {
        const std::byte* c = slot + int64_t{4} * kBlockTokens * dim;
        CopyAsync16(SharedAddress(stage.c + 4 * threadIdx.x),
                    reinterpret_cast<const uint4*>(c) + threadIdx.x);
      }
    }
    CopyAsyncCommit();
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) fetch(i);

  const int heads = min(kHeads, group - first_head);
  const auto row_at = [&](int t) {
    return int64_t{first_row} + min(warp * warp_rows + t, rows - 1);
  };
  Queries<dim, warp_rows> q[warp_rows];
  SoftmaxState<dim> states[warp_rows];
  int positions[warp_rows];
#pragma unroll
  for (int t = 0; t < warp_rows; ++t) {
    positions[t] = p.rows_info[row_at(t)].position;
    const __nv_bfloat16* from = p.q + (row_at(t) * p.num_heads + head * group + first_head) * dim;
    if constexpr (warp_rows == 1) {
      q[t].Load(from, heads);
    } else {
      q[t].Load(from, heads, queries + (warp * warp_rows + t) * SharedQueryRows<dim>::kChunks);
    }
  }
  const auto attend = [&](int i) {
    const Stage<dim>& stage = stages[i % (kStages * staged)];
    const int block = list[i];
    const uint32_t selecting = rows_selecting(block) >> (warp * warp_rows);
    // A row that has not selected the block has no valid token in it.
    int valid[warp_rows];
    int most_valid = 0;
    int least_valid = kBlockTokens;
#pragma unroll
    for (int t = 0; t < warp_rows; ++t) {
      valid[t] = (selecting >> t & 1u) != 0 ? positions[t] - block * kBlockTokens + 1 : 0;
      most_valid = max(most_valid, min(valid[t], kBlockTokens));
      least_valid = min(least_valid, valid[t]);
    }
    const float* bias = p.bias == AttendBias::kCache ? stage.c : nullptr;
    const auto add = [&](auto masked, int token) {
      AddTokens<dim, warp_rows, kTokens / 16, decltype(masked)::value>(
          states, q, stage.k, stage.v, token, bias == nullptr ? nullptr : bias + token, valid,
          scale);
    };
    if (least_valid >= kBlockTokens) {
#pragma unroll 1
      for (int token = 0; token < kBlockTokens; token += kTokens) {
        add(std::false_type(), token);
      }
      return;
    }
#pragma unroll 1
    for (int token = 0; token < most_valid; token += kTokens) {
      add(std::true_type(), token);
#pragma unroll
      for (int t = 0; t < warp_rows; ++t) valid[t] -= kTokens;
    }
  };
#pragma unroll 1
  for (int round = 0; round * staged < listed; ++round) {
    fetch(round + kStages - 1);
    CopyAsyncWait<kStages - 1>();
    __syncthreads();
#pragma unroll 1
    for (int i = round * staged; i < min((round + 1) * staged, listed); ++i) attend(i);
    __syncthreads();  // the blocks' places may be filled again
  }
  CopyAsyncWait<0>();
#pragma unroll
  for (int t = 0; t < warp_rows; ++t) {
    SoftmaxState<dim>& state = states[t];
    state.Finish();
    if (warp * warp_rows + t >= rows) continue;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int g = lane / 4 + 8 * r;
      if (g >= heads) continue;
      __nv_bfloat16* to =
          p.out + (row_at(t) * p.num_heads + head * group + first_head + g) * dim + 2 * (lane % 4);
      const float scale_out = 1.0f / state.sum[r];
#pragma unroll
      for (int j = 0; j < dim / 8; ++j) {
        *reinterpret_cast<uint32_t*>(to + 8 * j) =
            PackBf16(state.output[j][2 * r] * scale_out, state.output[j][2 * r + 1] * scale_out);
      }
    }
  }
}

/// Shared memory of a launch: `staged` blocks of a stage; 0: it does not fit.
struct Plan {
  int staged = 0;
  size_t shared = 0;
};

template <int dim, int warp_rows>
Plan MakePlan(const PrefillParams& params, size_t most) {
  constexpr size_t kStatic = 1 << 10;  // no less than what the kernel declares
  constexpr size_t kStageBytes = kStages * sizeof(Stage<dim>);
  const size_t others = kQueryBytes<dim, warp_rows> +
                        (params.max_blocks + 1) / 2 * sizeof(uint32_t) +
                        params.max_blocks * (sizeof(int32_t) + sizeof(uint16_t));
  if (others + kStatic + kStageBytes > most) return {};
  const size_t staged = std::min<size_t>((most - others - kStatic) / kStageBytes, kMaxStaged);
  return {static_cast<int>(staged), staged * kStageBytes + others};
}

template <int dim, int warp_rows>
cudaError_t Launch(const PrefillParams& params, const Plan& plan, cudaStream_t stream) {
  const cudaError_t status = cudaFuncSetAttribute(PrefillKernel<dim, warp_rows>,
                                                  cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                  static_cast<int>(plan.shared));
  if (status != cudaSuccess) return status;
  const int group = params.num_heads / params.num_kv_heads;
  const dim3 grid(params.num_tiles * (kPrefillTileRows / (kWarps * warp_rows)),
                  params.num_kv_heads * ((group + kHeads - 1) / kHeads));
  return LaunchKernel(PrefillKernel<dim, warp_rows>, grid, kThreads, plan.shared, stream, params,
                      1.0f / std::sqrt(float{dim}), plan.staged);
}

template <int dim>
cudaError_t Launch(const PrefillParams& params, cudaStream_t stream) {
  int device = 0;
  int processors = 0;
  int most = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess) return status;
  status = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (status != cudaSuccess) return status;
  const int group = params.num_heads / params.num_kv_heads;
  const int heads = params.num_kv_heads * ((group + kHeads - 1) / kHeads);
  // Two rows a warp are faster where that leaves enough thread blocks for all SMs.
  const Plan two = MakePlan<dim, 2>(params, most);
  if (two.staged > 0 && params.num_tiles * heads * 4 >= processors * 3) {
    return Launch<dim, 2>(params, two, stream);
  }
  const Plan one = MakePlan<dim, 1>(params, most);
  if (one.staged == 0) return cudaErrorInvalidConfiguration;
  return Launch<dim, 1>(params, one, stream);
}

}  // namespace

cudaError_t LaunchPrefill(const PrefillParams& params, cudaStream_t stream) {
  if (params.num_tiles < 1 || params.num_kv_heads < 1 ||
      params.num_heads % params.num_kv_heads != 0 ||
      params.num_heads / params.num_kv_heads > kMaxGroup || params.max_blocks < 1 ||
      params.max_blocks > 16384) {
    return cudaErrorInvalidValue;
  }
  switch (params.cache.head_dim) {
    case 64:
      return Launch<64>(params, stream);
    case 128:
      return Launch<128>(params, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace nosara::kernels
