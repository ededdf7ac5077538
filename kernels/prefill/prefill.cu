#include <cmath>

#include "kernels/common/attention.cuh"
#include "kernels/common/launch.cuh"
#include "kernels/prefill/prefill.h"

namespace nosara::kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
static_assert(kWarps == kPrefillTileRows, "a warp a row");
constexpr int kStages = 2;
constexpr int kRows = 16;  // query heads of a thread block

template <int dim>
struct Stage {
  uint4 k[kBlockTokens * dim / 8];
  uint4 v[kBlockTokens * dim / 8];
  float c[kBlockTokens];
};

/// One thread block: up to eight rows of one sequence, one KV head, 16 query heads. Each warp has
/// one row; all walk over the union of the rows' blocks, and a warp skips what its row has not
/// selected.
template <int dim>
__global__ void __launch_bounds__(kThreads, 1) PrefillKernel(PrefillParams p, float scale) {
  StartKernel();
  constexpr int kChunks = dim / 8;
  extern __shared__ __align__(128) std::byte memory[];
  Stage<dim>* stages = reinterpret_cast<Stage<dim>*>(memory);
  uint32_t* queries_of = reinterpret_cast<uint32_t*>(stages + kStages);  // bytes, [max_blocks]
  uint16_t* list = reinterpret_cast<uint16_t*>(queries_of + (p.max_blocks + 3) / 4);
  __shared__ int counts[2][kWarps];

  const RowTile tile = p.tiles[blockIdx.x];
  const StepRow last = p.rows_info[tile.first_row + tile.rows - 1];
  if (last.sequence < 0) return;
  const int group = p.num_heads / p.num_kv_heads;
  const int group_tiles = (group + kRows - 1) / kRows;
  const int head = blockIdx.y / group_tiles;
  const int first_head = blockIdx.y % group_tiles * kRows;
  const int record = p.layer * p.num_kv_heads + head;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;

  // Which rows selected each block, then the list of the selected ones.
  const int blocks = last.position / kBlockTokens + 1;
  for (int i = threadIdx.x; i < (blocks + 3) / 4; i += kThreads) queries_of[i] = 0;
  __syncthreads();
  if (warp < tile.rows) {
    const int64_t pair = static_cast<int64_t>(tile.first_row + warp) * p.num_kv_heads + head;
    const int count = p.count[pair];
    for (int i = lane; i < count; i += 32) {
      const int block = p.selected[pair * p.max_selected + i];
      atomicOr(queries_of + block / 4, 1u << (block % 4 * 8 + warp));
    }
  }
  __syncthreads();
  int listed = 0;
  for (int first = 0, round = 0; first < blocks; first += kThreads, ++round) {
    const int n = first + threadIdx.x;
    const bool used = n < blocks && (queries_of[n / 4] >> (n % 4 * 8) & 0xffu) != 0;
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
    if (used) list[listed + before] = static_cast<uint16_t>(n);
    listed += all;
  }
  __syncthreads();

  const auto fetch = [&](int i) {
    if (i < listed) {
      Stage<dim>& stage = stages[i % kStages];
      const int block = list[i];
      const std::byte* slot = p.cache.Slot(p.cache.SlotOf(last.sequence, record, block));
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

  const int64_t row = tile.first_row + min(warp, tile.rows - 1);
  const int position = p.rows_info[row].position;
  const int heads = min(kRows, group - first_head);
  QueryRows<dim> q;
  q.Load(p.q + (row * p.num_heads + head * group + first_head) * dim, heads);
  SoftmaxState<dim> state;
  for (int i = 0; i < listed; ++i) {
    fetch(i + kStages - 1);
    CopyAsyncWait<kStages - 1>();
    __syncthreads();
    const Stage<dim>& stage = stages[i % kStages];
    const int block = list[i];
    if (warp < tile.rows && (queries_of[block / 4] >> (block % 4 * 8 + warp) & 1u) != 0) {
      const int valid = position - block * kBlockTokens + 1;
      const bool bias = p.bias == AttendBias::kCache;
#pragma unroll 1
      for (int token = 0; token < min(valid, kBlockTokens); token += 16) {
        state.Add(q, stage.k, stage.v, token, bias ? stage.c + token : nullptr, valid - token,
                  scale);
      }
    }
    __syncthreads();  // the stage may be filled again
  }
  CopyAsyncWait<0>();
  state.Finish();
  if (warp >= tile.rows) return;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int g = lane / 4 + 8 * r;
    if (g >= heads) continue;
    __nv_bfloat16* to =
        p.out + (row * p.num_heads + head * group + first_head + g) * dim + 2 * (lane % 4);
    const float scale_out = 1.0f / state.sum[r];
#pragma unroll
    for (int j = 0; j < dim / 8; ++j) {
      *reinterpret_cast<uint32_t*>(to + 8 * j) =
          PackBf16(state.output[j][2 * r] * scale_out, state.output[j][2 * r + 1] * scale_out);
    }
  }
}

template <int dim>
cudaError_t Launch(const PrefillParams& params, cudaStream_t stream) {
  const size_t shared = sizeof(Stage<dim>) * kStages + (params.max_blocks + 3) / 4 * 4 +
                        sizeof(uint16_t) * params.max_blocks;
  const cudaError_t status = cudaFuncSetAttribute(
      PrefillKernel<dim>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (status != cudaSuccess) return status;
  const int group = params.num_heads / params.num_kv_heads;
  const dim3 grid(params.num_tiles, params.num_kv_heads * ((group + kRows - 1) / kRows));
  return LaunchKernel(PrefillKernel<dim>, grid, kThreads, shared, stream, params,
                      1.0f / std::sqrt(float{dim}));
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
