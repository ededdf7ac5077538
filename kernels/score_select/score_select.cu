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
  __device__ static void Sync(int ranks) {
#if __CUDA_ARCH__ >= 900
    if (ranks > 1) {
      cooperative_groups::this_cluster().sync();
      return;
    }
#endif
    __syncthreads();
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
  uint4 q[dim / 32][2][32];      // the first operand of MultiplyAdd, as lanes take it
  float2 own[heads];             // (max, sum of 2^) of this thread block's windows
  float2 all[kMaxRanks][heads];  // of each thread block of the cluster
  float2 total[heads];           // (max, 1 / sum) of all
  uint32_t edge[kMaxRanks];      // in rank 0: key of the last window of the rank before
  TakeBestScratch<kThreads> best;
};

/// Row length of the weights in shared memory; the first of the padding has the window's score.
template <int heads>
constexpr int kPitch = heads + 4;

/// Grid: (ranks, KV heads, rows). A warp takes tiles of 16 windows: products of queries [16 heads,
/// 16 dimensions] and keys [16 dimensions, 8 windows]. Which 16 of the D dimensions a product takes
/// is free as long as both operands agree, so that a lane loads 8 dimensions of a key at a time, 32
/// j + 8 (lane % 4) and on, and uses them for two products. Logits are in units of ln 2. What stays
/// of a tile are its weights 2^(l - max) and for each head the maximum and the sum.
template <int dim, int heads>
__global__ void __launch_bounds__(kThreads, 2)
    ScoreSelectKernel(ScoreSelectParams p, float scale, int capacity) {
  StartKernel();
  constexpr int kChunks = dim / 32;
  constexpr int kHalves = heads / 8;
  constexpr int pitch = kPitch<heads>;
  __shared__ Shared<dim, heads> shared;
  extern __shared__ __align__(16) float weights[];  // [capacity, pitch]
  float2* tiles = reinterpret_cast<float2*>(weights + static_cast<int64_t>(capacity) * pitch);
  uint32_t* keys = reinterpret_cast<uint32_t*>(tiles + capacity / kWarpWindows * heads);
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

  // Keys of a tile, which lies in one slot; what is not visible is memory all the same.
  uint4 keys_of[2][kChunks];  // windows lane / 4 and + 8
  const auto place = [&](int first) {
    return p.cache.IndexSlot(info.sequence, record, begin + first) +
           ((begin + first) % kIndexWindows + lane / 4) * (2 * dim) + 16 * (lane % 4);
  };
  const auto load = [&](const std::byte* at) {
#pragma unroll
    for (int t = 0; t < 2; ++t) {
#pragma unroll
      for (int j = 0; j < kChunks; ++j) keys_of[t][j] = LoadOnce(at + 8 * t * (2 * dim) + 64 * j);
    }
  };
  constexpr int kStep = kWarps * kWarpWindows;
  int first = warp * kWarpWindows;
  if (first < count) load(place(first));
  const std::byte* next = first + kStep < count ? place(first + kStep) : nullptr;
  // Importance needs nothing but memory.
  const int by_query = min(p.numbers.query_blocks, p.numbers.topk_blocks);
  const bool by_importance = by_query < p.numbers.topk_blocks;
  Importance first_importance;
  if (by_importance && block_begin + static_cast<int>(threadIdx.x) < block_end) {
    first_importance =
        LoadImportance(p.cache, info.sequence, record, block_begin + threadIdx.x, visible);
  }

  for (int i = threadIdx.x; i < kChunks * 2 * 32; i += kThreads) {
    const int d = i / 64 * 32 + i % 4 * 8 + i / 32 % 2 * 4;
    const auto query = [&](int g) {
      return g < group
                 ? *reinterpret_cast<const uint2*>(
                       p.q + (static_cast<int64_t>(row) * p.num_heads + head * group + g) * dim + d)
                 : uint2{};
    };
    const uint2 low = query(i % 32 / 4);
    const uint2 high = query(i % 32 / 4 + 8);
    shared.q[i / 64][i / 32 % 2][i % 32] = {low.x, high.x, low.y, high.y};
  }
  for (int i = threadIdx.x; i < (blocks + 31) / 32; i += kThreads) taken[i] = 0;
  __syncthreads();

  for (; first < count; first += kStep) {
    // Heads lane / 4 and + 8, windows 2 (lane % 4) and the next of each half of the tile.
    float scores[2][4] = {};
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        const uint4 q = shared.q[j][s][lane];
        const uint32_t a[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
        for (int t = 0; t < 2; ++t) {
          const uint4& key = keys_of[t][j];
          MultiplyAdd(scores[t], a, s == 0 ? key.x : key.z, s == 0 ? key.y : key.w);
        }
      }
    }
    if (next != nullptr) load(next);
    next = first + 2 * kStep < count ? place(first + 2 * kStep) : nullptr;

    const int left = count - first - 2 * (lane % 4);
    float2* stats = tiles + first / kWarpWindows * heads + lane / 4;
    float* to = weights + (first + 2 * (lane % 4)) * pitch + lane / 4;
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      float l[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        l[i] = i / 2 * 8 + i % 2 < left ? scores[i / 2][2 * half + i % 2] : -INFINITY;
      }
      float most = fmaxf(fmaxf(l[0], l[1]), fmaxf(l[2], l[3]));
      most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 1));
      most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 2)) * scale;
      float sum = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        l[i] = Exp2(fmaf(l[i], scale, -most));
        sum += l[i];
        to[(i / 2 * 8 + i % 2) * pitch + 8 * half] = l[i];
      }
      sum += __shfl_xor_sync(kAllLanes, sum, 1);
      sum += __shfl_xor_sync(kAllLanes, sum, 2);
      if (lane % 4 == 0) stats[8 * half] = {most, sum};
    }
  }
  if (by_importance) {
    for (int n = block_begin + threadIdx.x; n < block_end; n += kThreads) {
      if (n >= block_begin + kThreads) {
        first_importance = LoadImportance(p.cache, info.sequence, record, n, visible);
      }
      importance[n] = ImportanceKey(first_importance, n, visible);
    }
  }
  __syncthreads();

  // (max, sum) of each head, here and in the cluster: a warp a head.
  const int num_tiles = (count + kWarpWindows - 1) / kWarpWindows;
  if (warp < heads) {
    float most = -INFINITY;
    for (int t = lane; t < num_tiles; t += 32) most = fmaxf(most, tiles[t * heads + warp].x);
    most = WarpMax(most);
    float sum = 0;
    for (int t = lane; t < num_tiles; t += 32) {
      const float2 part = tiles[t * heads + warp];
      sum += part.y * Exp2(part.x - most);
    }
    sum = WarpSum(sum);
    if (lane == 0) shared.own[warp] = {most, sum};
  }
  Ranks::Sync(ranks);
  if (static_cast<int>(threadIdx.x) < ranks * heads) {
    const int from = threadIdx.x / heads;
    const int g = threadIdx.x % heads;
    shared.all[from][g] = *Ranks::Of(&shared.own[g], from);
  }
  __syncthreads();
  if (threadIdx.x < heads) {
    const int g = threadIdx.x;
    float most = -INFINITY;
    for (int r = 0; r < ranks; ++r) most = fmaxf(most, shared.all[r][g].x);
    float sum = 0;
    for (int r = 0; r < ranks; ++r) {
      const float2 part = shared.all[r][g];
      if (part.x != -INFINITY) sum += part.y * Exp2(part.x - most);
    }
    shared.total[g] = {most, g < group ? 1.0f / sum : 0.0f};
  }
  __syncthreads();
  // From weights of a tile to parts of the sum of all: over the tile's maximum.
  for (int i = threadIdx.x; i < num_tiles * heads; i += kThreads) {
    const float2 total = shared.total[i % heads];
    tiles[i].x = Exp2(tiles[i].x - total.x) * total.y;
  }
  __syncthreads();

  // Scores of windows, then of blocks, into rank 0.
  for (int w = threadIdx.x; w < count; w += kThreads) {
    float* of_window = weights + w * pitch;
    const float4* factors = reinterpret_cast<const float4*>(tiles + w / kWarpWindows * heads);
    float score = 0;
#pragma unroll
    for (int g = 0; g < heads; g += 4) {
      const float4 x = *reinterpret_cast<const float4*>(of_window + g);
      const float4 f0 = factors[g / 2];
      const float4 f1 = factors[g / 2 + 1];
      score += x.x * f0.x + x.y * f0.z + x.z * f1.x + x.w * f1.z;
    }
    of_window[heads] = score;
  }
  __syncthreads();
  const auto window_score = [&](int window) { return weights[(window - begin) * pitch + heads]; };
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
  Ranks::Sync(ranks);
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
  int most = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) !=
          cudaSuccess) {
    return {};
  }
  constexpr size_t kStatic = 12 << 10;  // no less than Shared
  static_assert(sizeof(Shared<128, 16>) <= kStatic);
  // Measured: two thread blocks of one cluster do best, also where each has a multiprocessor of its
  // own; few rows want more of them.
  constexpr int kEnough = 64;
  const int pitch = (group > 8 ? kPitch<16> : kPitch<8>);
  const int first = major >= 9 ? 2 : 1;
  const int last = major >= 9 ? kMaxRanks : 1;
  for (int ranks = first; ranks <= last; ranks *= 2) {
    Plan plan;
    plan.ranks = ranks;
    plan.capacity = ((4 * p.max_blocks + ranks - 1) / ranks + kDealt - 1) / kDealt * kDealt;
    plan.shared = sizeof(float) * plan.capacity * pitch +
                  sizeof(float2) * plan.capacity / kWarpWindows * (pitch - 4) +
                  sizeof(uint32_t) * (2 * p.max_blocks + (p.max_blocks + 31) / 32);
    const bool enough = p.rows * p.num_kv_heads * ranks >= kEnough ||
                        plan.capacity <= kWarps * kWarpWindows || ranks == last;
    if (plan.shared + kStatic <= static_cast<size_t>(most) && enough) return plan;
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
                        stream, params, std::log2(std::exp(1.0f)) / std::sqrt(float{dim}),
                        plan.capacity);
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
