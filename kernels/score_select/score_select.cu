#include "kernels/score_select/score_select.h"

#include <cooperative_groups.h>

#include <cmath>

#include "kernels/common/device.cuh"
#include "kernels/common/launch.cuh"
#include "kernels/score/score.h"
#include "kernels/select/take_best.cuh"

namespace nosara::kernels {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kWarpWindows = 16;  // that a warp scores at a time
constexpr int kMaxRanks = 8;      // thread blocks of a cluster
/// Windows are dealt out in whole blocks, and in whole tiles of a warp.
constexpr int kDealt = 32;

/// The cluster of this thread block: itself alone before Hopper.
struct Ranks {
  __device__ static int Count() {
#if __CUDA_ARCH__ >= 900
    return cooperative_groups::this_cluster().num_blocks();
#else
    return 1;
#endif
  }
  __device__ static int Own() {
#if __CUDA_ARCH__ >= 900
    return cooperative_groups::this_cluster().block_rank();
#else
    return 0;
#endif
  }
  __device__ static void Sync() {
#if __CUDA_ARCH__ >= 900
    cooperative_groups::this_cluster().sync();
#else
    __syncthreads();
#endif
  }
  /// The same place in the shared memory of another one.
  template <typename T>
  __device__ static T* Of(T* pointer, int rank) {
#if __CUDA_ARCH__ >= 900
    return cooperative_groups::this_cluster().map_shared_rank(pointer, rank);
#else
    return pointer;
#endif
  }
};

__device__ inline uint4 LoadOnce(const void* from) {
  uint4 value;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(from));
  return value;
}

template <int dim, int heads>
struct Shared {
  // The second operand of MultiplyAdd, as lanes take it: see ScoreSelectKernel.
  uint4 q[dim / 32][heads / 8][32];
  float warp_most[kWarps][heads];
  float warp_sum[kWarps][heads];
  float2 own[heads];             // (max, sum of exp) of this thread block's windows
  float2 all[kMaxRanks][heads];  // of each thread block of the cluster
  float factor[heads];           // from exp(l - own max) to exp(l - max) / sum
  uint32_t edge[kMaxRanks];      // in rank 0: key of the last window of the rank before
  TakeBestScratch<kThreads> best;
};

/// Row length of the logits in shared memory; the first of the padding has the window's score.
template <int heads>
constexpr int kPitch = heads + 4;

/// Grid: (ranks, KV heads, rows). Products of keys [16 windows, 16 dimensions] and queries: which
/// 16 of the D dimensions a product takes is free as long as both operands agree, so that a lane
/// loads 8 dimensions at a time, 32 j + 8 (lane % 4) and on, and uses them for two products.
template <int dim, int heads>
__global__ void __launch_bounds__(kThreads, 2)
    ScoreSelectKernel(ScoreSelectParams p, float scale, int capacity) {
  StartKernel();
  constexpr int kEights = heads / 8;
  constexpr int kChunks = dim / 32;
  constexpr int pitch = kPitch<heads>;
  __shared__ Shared<dim, heads> shared;
  extern __shared__ __align__(16) float logits[];  // [capacity, pitch]
  uint32_t* keys = reinterpret_cast<uint32_t*>(logits + static_cast<int64_t>(capacity) * pitch);
  uint32_t* importance = keys + p.max_blocks;
  uint32_t* taken = importance + p.max_blocks;  // bit set of blocks

  const int rank = Ranks::Own();
  const int ranks = Ranks::Count();
  const int head = blockIdx.y;
  const int row = blockIdx.z;
  const int64_t pair = static_cast<int64_t>(row) * p.num_kv_heads + head;
  const StepRow info = p.rows_info[row];
  int32_t* out = p.selected + pair * p.max_selected;
  if (info.sequence < 0) {
    if (rank == 0 && threadIdx.x == 0) p.count[pair] = 0;
    return;
  }
  const int own_block = info.position / kBlockTokens;
  const int blocks = own_block + 1;
  if (blocks <= p.numbers.topk_blocks) {
    if (rank > 0) return;
    for (int n = threadIdx.x; n < blocks; n += kThreads) out[n] = n;
    if (threadIdx.x == 0) p.count[pair] = blocks;
    return;
  }
  const int group = p.num_heads / p.num_kv_heads;
  const int record = p.layer * p.num_kv_heads + head;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;

  // What this thread block has of the windows and of the blocks.
  const int visible = VisibleWindows(info.position);
  const int share = ((visible + ranks - 1) / ranks + kDealt - 1) / kDealt * kDealt;
  const int begin = min(rank * share, visible);
  const int count = min(begin + share, visible) - begin;
  const int block_begin = min(rank * share / 4, blocks);
  const int block_end = rank == ranks - 1 ? blocks : min((rank + 1) * share / 4, blocks);

  for (int i = threadIdx.x; i < kChunks * kEights * 32; i += kThreads) {
    const int g = i / 32 % kEights * 8 + i % 32 / 4;
    const int d = i / 32 / kEights * 32 + i % 4 * 8;
    shared.q[i / 32 / kEights][i / 32 % kEights][i % 32] =
        g < group
            ? *reinterpret_cast<const uint4*>(
                  p.q + (static_cast<int64_t>(row) * p.num_heads + head * group + g) * dim + d)
            : uint4{};
  }
  // Importance needs nothing but memory.
  const int by_query = min(p.numbers.query_blocks, p.numbers.topk_blocks);
  const bool by_importance = by_query < p.numbers.topk_blocks;
  if (by_importance) {
    for (int n = block_begin + threadIdx.x; n < block_end; n += kThreads) {
      importance[n] = ImportanceKey(p.cache, info.sequence, record, n, visible);
    }
  }
  for (int i = threadIdx.x; i < (blocks + 31) / 32; i += kThreads) taken[i] = 0;
  __syncthreads();

  // Logits, and the largest ones of each head that the lane has: windows lane / 4 and + 8 of a
  // tile, heads 2 (lane % 4) and the next of each eight.
  float most[kEights][2];
#pragma unroll
  for (int e = 0; e < kEights; ++e) most[e][0] = most[e][1] = -INFINITY;
  for (int first = warp * kWarpWindows; first < count; first += kWarps * kWarpWindows) {
    // A tile lies in one slot. What is not visible is memory all the same.
    const int window = begin + first;
    const std::byte* at = p.cache.IndexSlot(info.sequence, record, window) +
                          (window % kIndexWindows + lane / 4) * (2 * dim) + 16 * (lane % 4);
    uint4 low[kChunks], high[kChunks];
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
      low[j] = LoadOnce(at + 64 * j);
      high[j] = LoadOnce(at + 8 * (2 * dim) + 64 * j);
    }
    float scores[kEights][4] = {};
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
      const uint32_t first_keys[4] = {low[j].x, high[j].x, low[j].y, high[j].y};
      const uint32_t other_keys[4] = {low[j].z, high[j].z, low[j].w, high[j].w};
#pragma unroll
      for (int e = 0; e < kEights; ++e) {
        const uint4 q = shared.q[j][e][lane];
        MultiplyAdd(scores[e], first_keys, q.x, q.y);
        MultiplyAdd(scores[e], other_keys, q.z, q.w);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int w = first + half * 8 + lane / 4;
      if (w >= count) continue;
#pragma unroll
      for (int e = 0; e < kEights; ++e) {
        const float a = scores[e][2 * half] * scale;
        const float b = scores[e][2 * half + 1] * scale;
        *reinterpret_cast<float2*>(logits + w * pitch + 8 * e + 2 * (lane % 4)) = {a, b};
        most[e][0] = fmaxf(most[e][0], a);
        most[e][1] = fmaxf(most[e][1], b);
      }
    }
  }
#pragma unroll
  for (int e = 0; e < kEights; ++e) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int offset = 4; offset < 32; offset *= 2) {
        most[e][i] = fmaxf(most[e][i], __shfl_xor_sync(kAllLanes, most[e][i], offset));
      }
      if (lane < 4) shared.warp_most[warp][8 * e + 2 * lane + i] = most[e][i];
    }
  }
  __syncthreads();

  // exp(l - max) in place, and its sum: a thread has one head.
  {
    const int g = threadIdx.x % heads;
    float largest = -INFINITY;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) largest = fmaxf(largest, shared.warp_most[i][g]);
    float sum = 0;
    for (int w = threadIdx.x / heads; w < count; w += kThreads / heads) {
      const float weight = __expf(logits[w * pitch + g] - largest);
      logits[w * pitch + g] = weight;
      sum += weight;
    }
#pragma unroll
    for (int offset = heads; offset < 32; offset *= 2) {
      sum += __shfl_xor_sync(kAllLanes, sum, offset);
    }
    if (lane < heads) shared.warp_sum[warp][lane] = sum;
    __syncthreads();
    if (threadIdx.x < heads) {
      float all = 0;
#pragma unroll
      for (int i = 0; i < kWarps; ++i) all += shared.warp_sum[i][g];
      shared.own[g] = {largest, all};
    }
  }
  Ranks::Sync();
  if (static_cast<int>(threadIdx.x) < ranks * heads) {
    const int from = threadIdx.x / heads;
    const int g = threadIdx.x % heads;
    shared.all[from][g] = *Ranks::Of(&shared.own[g], from);
  }
  __syncthreads();
  if (threadIdx.x < heads) {
    const int g = threadIdx.x;
    float largest = -INFINITY;
    for (int r = 0; r < ranks; ++r) largest = fmaxf(largest, shared.all[r][g].x);
    float sum = 0;
    for (int r = 0; r < ranks; ++r) {
      const float2 part = shared.all[r][g];
      if (part.x != -INFINITY) sum += part.y * __expf(part.x - largest);
    }
    const float own = shared.own[g].x;
    shared.factor[g] = g < group && own != -INFINITY ? __expf(own - largest) / sum : 0.0f;
  }
  __syncthreads();

  // Scores of windows, then of blocks, into rank 0.
  for (int w = threadIdx.x; w < count; w += kThreads) {
    float* weights = logits + w * pitch;
    float score = 0;
#pragma unroll
    for (int g = 0; g < heads; g += 4) {
      const float4 x = *reinterpret_cast<const float4*>(weights + g);
      score += x.x * shared.factor[g] + x.y * shared.factor[g + 1] + x.z * shared.factor[g + 2] +
               x.w * shared.factor[g + 3];
    }
    weights[heads] = score;
  }
  __syncthreads();
  const auto window_score = [&](int window) { return logits[(window - begin) * pitch + heads]; };
  for (int n = block_begin + threadIdx.x; n < block_end; n += kThreads) {
    float best = -INFINITY;
#pragma unroll
    for (int i = -1; i < 4; ++i) {
      const int window = 4 * n + i;
      if (window >= begin && window < begin + count) best = fmaxf(best, window_score(window));
    }
    const bool forced = n < p.numbers.init_blocks || n >= own_block - p.numbers.window_blocks;
    *Ranks::Of(keys + n, 0) = forced ? kForced : OrderedKey(best);
    if (rank > 0 && by_importance) *Ranks::Of(importance + n, 0) = importance[n];
  }
  if (threadIdx.x == 0 && rank + 1 < ranks) {
    // The block behind this thread block's last one overlaps its last window.
    *Ranks::Of(shared.edge + rank + 1, 0) =
        OrderedKey(count == share ? window_score(begin + count - 1) : -INFINITY);
  }
  Ranks::Sync();
  if (rank > 0) return;
  if (threadIdx.x > 0 && static_cast<int>(threadIdx.x) < ranks) {
    const int n = threadIdx.x * share / 4;
    if (n < blocks) keys[n] = max(keys[n], shared.edge[threadIdx.x]);
  }
  __syncthreads();

  TakeBest(shared.best, keys, blocks, by_query, taken);
  if (by_importance) {
    for (int n = threadIdx.x; n < blocks; n += kThreads) {
      keys[n] = (taken[n / 32] >> (n % 32) & 1u) != 0 ? kExcluded : importance[n];
    }
    __syncthreads();
    TakeBest(shared.best, keys, blocks, p.numbers.topk_blocks - by_query, taken);
  }
  // The keys are done with.
  WriteTaken<kThreads>(taken, blocks, keys, out, p.count + pair);
}

/// How a launch is cut; ranks 0: it cannot be.
struct Plan {
  int ranks = 0;
  int capacity = 0;  // windows of a thread block
  size_t shared = 0;
};

Plan MakePlan(const ScoreSelectParams& p) {
  if (p.rows < 1 || p.rows > 65535 || p.num_kv_heads < 1 || p.num_heads % p.num_kv_heads != 0 ||
      p.max_blocks < 1 || (p.cache.head_dim != 64 && p.cache.head_dim != 128)) {
    return {};
  }
  const int group = p.num_heads / p.num_kv_heads;
  if (group > 16) return {};
  int device = 0;
  int major = 0;
  int multiprocessors = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device) !=
          cudaSuccess) {
    return {};
  }
  // Two thread blocks a multiprocessor, by threads and, where it can be, by shared memory.
  constexpr size_t kWanted = 96 << 10;
  constexpr size_t kMost = 200 << 10;
  const int pitch = (group > 8 ? kPitch<16> : kPitch<8>);
  for (const size_t most : {kWanted, kMost}) {
    for (int ranks = 1; ranks <= (major >= 9 ? kMaxRanks : 1); ranks *= 2) {
      Plan plan;
      plan.ranks = ranks;
      plan.capacity = ((4 * p.max_blocks + ranks - 1) / ranks + kDealt - 1) / kDealt * kDealt;
      plan.shared = sizeof(float) * plan.capacity * pitch +
                    sizeof(uint32_t) * (2 * p.max_blocks + (p.max_blocks + 31) / 32);
      const bool last = ranks == kMaxRanks || major < 9;
      // Few rows: more thread blocks, as long as each has a tile for each of its warps.
      const bool enough = p.rows * p.num_kv_heads * ranks >= multiprocessors ||
                          plan.capacity <= kWarps * kWarpWindows || last;
      if (plan.shared <= most && enough) return plan;
    }
  }
  return {};
}

template <int dim, int heads>
cudaError_t Launch(const ScoreSelectParams& params, const Plan& plan, cudaStream_t stream) {
  const cudaError_t status = cudaFuncSetAttribute(ScoreSelectKernel<dim, heads>,
                                                  cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                  static_cast<int>(plan.shared));
  if (status != cudaSuccess) return status;
  return LaunchClusters(plan.ranks, ScoreSelectKernel<dim, heads>,
                        dim3(plan.ranks, params.num_kv_heads, params.rows), kThreads, plan.shared,
                        stream, params, 1.0f / std::sqrt(float{dim}), plan.capacity);
}

}  // namespace

bool CanScoreSelect(const ScoreSelectParams& params) { return MakePlan(params).ranks > 0; }

cudaError_t LaunchScoreSelect(const ScoreSelectParams& params, cudaStream_t stream) {
  const Plan plan = MakePlan(params);
  const SelectionNumbers& numbers = params.numbers;
  if (plan.ranks == 0 || params.max_selected < numbers.topk_blocks || numbers.query_blocks < 1 ||
      numbers.topk_blocks > kMaxSelected) {
    return cudaErrorInvalidValue;
  }
  const bool small = params.num_heads / params.num_kv_heads <= 8;
  if (params.cache.head_dim == 64) {
    return small ? Launch<64, 8>(params, plan, stream) : Launch<64, 16>(params, plan, stream);
  }
  return small ? Launch<128, 8>(params, plan, stream) : Launch<128, 16>(params, plan, stream);
}

}  // namespace nosara::kernels
