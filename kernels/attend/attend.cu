#include <cmath>

#include "kernels/attend/attend.h"
#include "kernels/common/attention.cuh"
#include "kernels/common/launch.cuh"

namespace nosara::kernels {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kStages = 3;
constexpr int kRows = 16;        // query heads of a thread block
constexpr int kMaxParts = 32;    // shares, or warps, that are merged
constexpr int kWarpTokens = 16;  // tokens of each block that a warp takes

/// What a warp has in shared memory of its 16 tokens of one block.
template <int dim>
struct alignas(256) Stage {
  uint4 k[kWarpTokens * dim / 8];
  uint4 v[kWarpTokens * dim / 8];
  float c[kWarpTokens];
};

__device__ inline void AddScaled(float4& sum, float weight, const float4& x) {
  sum.x += weight * x.x;
  sum.y += weight * x.y;
  sum.z += weight * x.z;
  sum.w += weight * x.w;
}

__device__ inline void PutBf16(__nv_bfloat16* to, const float4& x, float scale) {
  *reinterpret_cast<uint2*>(to) =
      make_uint2(PackBf16(x.x * scale, x.y * scale), PackBf16(x.z * scale, x.w * scale));
}

/// Copies a record by one warp, many reads under way at a time: they cross PCIe.
template <int dim>
__device__ void CopyRecord(const std::byte* from, std::byte* to) {
  constexpr int kChunks = static_cast<int>(RecordBytes(dim) / 16);
  constexpr int kInFlight = 8;
  const uint4* source = reinterpret_cast<const uint4*>(from);
  uint4* target = reinterpret_cast<uint4*>(to);
  for (int first = threadIdx.x % 32; first < kChunks; first += 32 * kInFlight) {
    uint4 data[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      if (first + 32 * k < kChunks) data[k] = __ldcs(source + first + 32 * k);
    }
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      if (first + 32 * k < kChunks) target[first + 32 * k] = data[k];
    }
  }
}

/// Waits until the host has tagged what it brings. All lanes then see what it wrote before.
__device__ inline void WaitForTag(const uint64_t* arrived, uint64_t tag) {
  if (threadIdx.x % 32 == 0) {
    uint64_t seen;
    while (true) {
      asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(seen) : "l"(arrived) : "memory");
      if (seen == tag) break;
      __nanosleep(500);
    }
  }
  __syncwarp();
}

/// One thread block: one (row, KV head, 16 query heads) over one share of its list. Four warps take
/// 16 tokens of each block and are merged at the end: until then they share nothing. With `fetches`
/// a fifth warp brings the missing records into their slots, and the four come to them last.
template <int dim, bool fetches>
__global__ void __launch_bounds__(kThreads + (fetches ? 32 : 0), 2)
    AttendKernel(AttendParams p, float scale) {
  StartKernel();
  constexpr int kChunks = dim / 8;
  extern __shared__ __align__(256) std::byte memory[];
  __shared__ int arrived;  // missing records of this share that are in their slots
  const int row = blockIdx.x;
  const StepRow info = p.rows_info[row];
  const int group = p.num_heads / p.num_kv_heads;
  const int group_tiles = (group + kRows - 1) / kRows;
  const int head = blockIdx.y / group_tiles;
  const int first_head = blockIdx.y % group_tiles * kRows;
  const int heads = min(kRows, group - first_head);
  __nv_bfloat16* out =
      p.out + (static_cast<int64_t>(row) * p.num_heads + head * group + first_head) * dim;
  if (info.sequence < 0) {
    if (blockIdx.z > 0) return;
    for (int i = threadIdx.x; i < heads * dim; i += blockDim.x) out[i] = __float2bfloat16_rn(0.0f);
    return;
  }
  const int64_t pair = static_cast<int64_t>(row) * p.num_kv_heads + head;
  const int2 range = p.ranges[pair];
  // Of what is here, a share of neighbours; of what is missing, every num_splits-th.
  const int here = fetches ? range.x : range.y;
  const int share = (here + p.num_splits - 1) / p.num_splits;
  const int split = static_cast<int>(blockIdx.z);
  const int first = split * share;
  const int count = max(0, min(share, here - first));
  const int missing =
      fetches ? max(0, (range.y - range.x - split + p.num_splits - 1) / p.num_splits) : 0;
  const int32_t* slots = p.slots + pair * p.max_selected;
  const int32_t* blocks = p.blocks + pair * p.max_selected;
  const auto missing_entry = [&](int i) { return range.x + split + i * p.num_splits; };

  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  if (fetches) {
    if (threadIdx.x == 0) arrived = 0;
    __syncthreads();
  }
  SoftmaxState<dim> state;
  if (fetches && warp == kWarps) {
    const int record = p.layer * p.num_kv_heads + head;
    for (int i = 0; i < missing; ++i) {
      const int entry = missing_entry(i);
      const uint64_t page =
          p.cache.pages[int64_t{info.sequence} * p.cache.max_blocks + blocks[entry]];
      const std::byte* from = reinterpret_cast<const std::byte*>(page) + record * RecordBytes(dim);
      if (p.missing == AttendMissing::kArriving) {
        const Arrivals& arrivals = p.arrivals;
        const int source = arrivals.sources[pair * p.max_selected + entry];
        if (source >= 0) {
          WaitForTag(arrivals.arrived + source, ArrivalTag(*arrivals.step, p.layer));
          from = arrivals.landing + source * RecordBytes(dim);
        }
      }
      CopyRecord<dim>(from, p.cache.Slot(slots[entry]));
      __threadfence();
      __syncwarp();
      if (lane == 0) atomicAdd(&arrived, 1);
    }
  } else {
    Stage<dim>* stages = reinterpret_cast<Stage<dim>*>(memory) + warp * kStages;
    const auto fetch = [&](int i, int entry) {
      Stage<dim>& stage = stages[i % kStages];
      const std::byte* slot = p.cache.Slot(slots[entry]);
      const int valid = info.position - blocks[entry] * kBlockTokens + 1 - warp * kWarpTokens;
      const uint4* k = reinterpret_cast<const uint4*>(slot) + warp * kWarpTokens * kChunks;
      const uint4* v = k + kBlockTokens * kChunks;
#pragma unroll
      for (int j = 0; j < kWarpTokens * kChunks / 32; ++j) {
        const int chunk = j * 32 + lane;
        const int token = chunk / kChunks;
        const int place = Swizzled<kChunks>(token, chunk % kChunks);
        CopyAsync16(SharedAddress(stage.k + place), k + chunk);
        // Memory behind the last token may hold anything; a weight of 0 does not undo a NaN.
        CopyAsync16OrZero(SharedAddress(stage.v + place), v + chunk, token < valid);
      }
      if (lane < kWarpTokens / 4) {
        const std::byte* c = slot + int64_t{4} * kBlockTokens * dim;
        CopyAsync16(SharedAddress(stage.c + 4 * lane),
                    reinterpret_cast<const uint4*>(c) + warp * (kWarpTokens / 4) + lane);
      }
    };
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) {
      if (i < count) fetch(i, first + i);
      CopyAsyncCommit();
    }
    QueryRows<dim> q;
    q.Load(p.q + (static_cast<int64_t>(row) * p.num_heads + head * group + first_head) * dim,
           heads);
    const auto attend = [&](int i, int entry) {
      const Stage<dim>& stage = stages[i % kStages];
      const int valid = info.position - blocks[entry] * kBlockTokens + 1 - warp * kWarpTokens;
      if (valid > 0) {
        AddTokens<dim, 1, 1, true>(&state, &q, stage.k, stage.v, 0,
                                   p.bias == AttendBias::kCache ? stage.c : nullptr, &valid, scale);
      }
      __syncwarp();
    };
    for (int i = 0; i < count; ++i) {
      CopyAsyncWait<kStages - 2>();
      __syncwarp();
      // Into the stage that the last round was done with.
      if (i + kStages - 1 < count) fetch(i + kStages - 1, first + i + kStages - 1);
      CopyAsyncCommit();
      attend(i, first + i);
    }
    for (int i = 0; i < missing; ++i) {
      while (atomicAdd(&arrived, 0) <= i) __nanosleep(100);
      __threadfence();
      fetch(i, missing_entry(i));
      CopyAsyncCommit();
      CopyAsyncWait<0>();
      __syncwarp();
      attend(i, missing_entry(i));
    }
    CopyAsyncWait<0>();
    state.Finish();
  }

  // Merge of the warps.
  float* outputs = reinterpret_cast<float*>(memory);  // [kWarps, kRows, dim + 4]
  constexpr int kPitch = dim + 4;
  __shared__ float2 states[kWarps][kRows];
  __syncthreads();  // the stages of all warps are done with
  if (warp < kWarps) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int g = lane / 4 + 8 * r;
      float* to = outputs + (warp * kRows + g) * kPitch + 2 * (lane % 4);
#pragma unroll
      for (int j = 0; j < dim / 8; ++j) {
        *reinterpret_cast<float2*>(to + 8 * j) = {state.output[j][2 * r],
                                                  state.output[j][2 * r + 1]};
      }
      if (lane % 4 == 0) states[warp][g] = {state.most[r], state.sum[r]};
    }
  }
  __syncthreads();
  // Weights of the warps' parts; the thread block's own m and z.
  __shared__ float weights[kMaxParts][kRows];
  __shared__ float2 own[kRows];
  if (threadIdx.x < kRows) {
    const int g = threadIdx.x;
    float most = -INFINITY;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) most = fmaxf(most, states[w][g].x);
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float2 part = states[w][g];
      weights[w][g] = part.x == -INFINITY ? 0.0f : __expf(part.x - most);
      sum += weights[w][g] * part.y;
    }
    own[g] = {most, sum};
  }
  __syncthreads();
  const int64_t partial = pair * p.num_splits * group + first_head;  // of split 0
  const int64_t at = partial + static_cast<int64_t>(split) * group;
  for (int i = threadIdx.x; i < heads * dim / 4; i += blockDim.x) {
    const int g = i / (dim / 4);
    float4 output = {0, 0, 0, 0};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float4 part =
          reinterpret_cast<const float4*>(outputs + (w * kRows + g) * kPitch)[i % (dim / 4)];
      AddScaled(output, weights[w][g], part);
    }
    if (p.num_splits == 1) {
      PutBf16(out + 4 * i, output, 1.0f / own[g].y);
    } else {
      reinterpret_cast<float4*>(p.partial_o + at * dim)[i] = output;
    }
  }
  if (p.num_splits == 1) return;
  if (static_cast<int>(threadIdx.x) < heads) p.partial_mz[at + threadIdx.x] = own[threadIdx.x];

  // Merge of the shares, by whoever comes last.
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  int32_t* finished = p.finished + pair * group_tiles + blockIdx.y % group_tiles;
  if (threadIdx.x == 0) last = atomicAdd(finished, 1) == p.num_splits - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();
  if (threadIdx.x == 0) *finished = 0;
  for (int g = threadIdx.x / 32; g < heads; g += blockDim.x / 32) {
    // One warp a head, one lane a share.
    const float2 part =
        lane < p.num_splits
            ? __ldcg(p.partial_mz + partial + static_cast<int64_t>(lane) * group + g)
            : float2{-INFINITY, 0};
    const float most = WarpMax(part.x);
    const float weight = part.x == -INFINITY ? 0.0f : __expf(part.x - most);
    const float sum = WarpSum(weight * part.y);
    if (lane < p.num_splits) weights[lane][g] = weight / sum;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < heads * dim / 4; i += blockDim.x) {
    const int g = i / (dim / 4);
    const float4* from = reinterpret_cast<const float4*>(p.partial_o + partial * dim) + i;
    float4 output = {0, 0, 0, 0};
#pragma unroll 4
    for (int s = 0; s < p.num_splits; ++s) {
      AddScaled(output, weights[s][g], __ldcg(from + static_cast<int64_t>(s) * group * (dim / 4)));
    }
    PutBf16(out + 4 * i, output, 1.0f);
  }
}

template <int dim, bool fetches>
cudaError_t Launch(const AttendParams& params, cudaStream_t stream) {
  constexpr size_t kStageBytes = sizeof(Stage<dim>) * kStages * kWarps;
  constexpr size_t kMergeBytes = sizeof(float) * kWarps * kRows * (dim + 4);
  constexpr size_t kShared = kStageBytes > kMergeBytes ? kStageBytes : kMergeBytes;
  const cudaError_t status =
      cudaFuncSetAttribute(AttendKernel<dim, fetches>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           static_cast<int>(kShared));
  if (status != cudaSuccess) return status;
  const int group = params.num_heads / params.num_kv_heads;
  const dim3 grid(params.rows, params.num_kv_heads * ((group + kRows - 1) / kRows),
                  params.num_splits);
  return LaunchKernel(AttendKernel<dim, fetches>, grid, kThreads + (fetches ? 32 : 0), kShared,
                      stream, params, 1.0f / std::sqrt(float{dim}));
}

template <int dim>
cudaError_t Launch(const AttendParams& params, cudaStream_t stream) {
  return params.missing == AttendMissing::kInSlots ? Launch<dim, false>(params, stream)
                                                   : Launch<dim, true>(params, stream);
}

}  // namespace

cudaError_t LaunchAttend(const AttendParams& params, cudaStream_t stream) {
  if (params.rows < 1 || params.num_kv_heads < 1 || params.num_heads % params.num_kv_heads != 0 ||
      params.num_heads / params.num_kv_heads > kMaxGroup || params.num_splits < 1 ||
      params.num_splits > kMaxParts) {
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
