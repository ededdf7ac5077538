#include <cmath>

#include "kernels/attend/attend.h"
#include "kernels/common/attention.cuh"

namespace nosara::kernels {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kStages = 3;
constexpr int kRows = 16;        // query heads of a thread block
constexpr int kWarpTokens = 16;  // tokens of each block that a warp takes

/// What a warp has in shared memory of its 16 tokens of one block.
template <int dim>
struct Stage {
  uint4 k[kWarpTokens * dim / 8];
  uint4 v[kWarpTokens * dim / 8];
  float c[kWarpTokens];
};

/// One thread block: one (row, KV head, 16 query heads) over one share of its list. Its four warps
/// take 16 tokens of each block and are merged at the end: until then nothing is shared by them.
template <int dim>
__global__ void __launch_bounds__(kThreads) AttendKernel(AttendParams p, float scale) {
  constexpr int kChunks = dim / 8;
  extern __shared__ __align__(128) std::byte memory[];
  const int row = blockIdx.x;
  const StepRow info = p.rows_info[row];
  if (info.sequence < 0) return;
  const int group = p.num_heads / p.num_kv_heads;
  const int group_tiles = (group + kRows - 1) / kRows;
  const int head = blockIdx.y / group_tiles;
  const int first_head = blockIdx.y % group_tiles * kRows;
  const int64_t pair = static_cast<int64_t>(row) * p.num_kv_heads + head;
  const int2 range = p.ranges[pair];
  const int begin = p.part == AttendPart::kResident ? 0 : range.x;
  const int end = p.part == AttendPart::kResident ? range.x : range.y;
  const int share = (end - begin + p.num_splits - 1) / p.num_splits;
  const int first = begin + static_cast<int>(blockIdx.z) * share;
  const int count = max(0, min(share, end - first));
  const int32_t* slots = p.slots + pair * p.max_selected + first;
  const int32_t* blocks = p.blocks + pair * p.max_selected + first;

  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  Stage<dim>* stages = reinterpret_cast<Stage<dim>*>(memory) + warp * kStages;
  const auto fetch = [&](int i) {
    if (i < count) {
      Stage<dim>& stage = stages[i % kStages];
      const std::byte* slot = p.cache.Slot(slots[i]);
      const int valid = info.position - blocks[i] * kBlockTokens + 1 - warp * kWarpTokens;
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
    }
    CopyAsyncCommit();
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) fetch(i);

  QueryRows<dim> q;
  q.Load(p.q + (static_cast<int64_t>(row) * p.num_heads + head * group + first_head) * dim,
         min(kRows, group - first_head));
  SoftmaxState<dim> state;
  for (int i = 0; i < count; ++i) {
    CopyAsyncWait<kStages - 2>();
    __syncwarp();
    fetch(i + kStages - 1);  // into the stage that the last round was done with
    const Stage<dim>& stage = stages[i % kStages];
    const int valid = info.position - blocks[i] * kBlockTokens + 1 - warp * kWarpTokens;
    if (valid > 0) {
      state.Add(q, stage.k, stage.v, 0, p.bias == AttendBias::kCache ? stage.c : nullptr, valid,
                scale);
    }
    __syncwarp();
  }
  CopyAsyncWait<0>();
  state.Finish();

  // Merge of the warps.
  float* outputs = reinterpret_cast<float*>(memory);  // [kWarps, kRows, dim + 4]
  constexpr int kPitch = dim + 4;
  __shared__ float2 states[kWarps][kRows];
  __syncthreads();  // the stages of all warps are done with
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int g = lane / 4 + 8 * r;
    float* to = outputs + (warp * kRows + g) * kPitch + 2 * (lane % 4);
#pragma unroll
    for (int j = 0; j < dim / 8; ++j) {
      *reinterpret_cast<float2*>(to + 8 * j) = {state.output[j][2 * r], state.output[j][2 * r + 1]};
    }
    if (lane % 4 == 0) states[warp][g] = {state.most[r], state.sum[r]};
  }
  __syncthreads();
  const int split = p.first_split + static_cast<int>(blockIdx.z);
  for (int i = threadIdx.x; i < kRows * dim; i += kThreads) {
    const int g = i / dim;
    const int d = i % dim;
    if (first_head + g >= group) break;
    float most = -INFINITY;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) most = fmaxf(most, states[w][g].x);
    float sum = 0;
    float output = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float2 part = states[w][g];
      const float weight = part.x == -INFINITY ? 0.0f : __expf(part.x - most);
      sum += weight * part.y;
      output += weight * outputs[(w * kRows + g) * kPitch + d];
    }
    const int64_t at = (pair * p.total_splits + split) * group + first_head + g;
    p.partial_o[at * dim + d] = output;
    if (d == 0) p.partial_mz[at] = {most, sum};
  }
}

/// One thread block of D threads a (row, query head).
__global__ void MergeKernel(MergeParams p) {
  const int row = blockIdx.x;
  const int head = blockIdx.y;
  const int d = threadIdx.x;
  __nv_bfloat16* out = p.out + (static_cast<int64_t>(row) * p.num_heads + head) * p.head_dim + d;
  if (p.rows_info[row].sequence < 0) {
    *out = __float2bfloat16_rn(0.0f);
    return;
  }
  const int group = p.num_heads / p.num_kv_heads;
  const int64_t first =
      (static_cast<int64_t>(row) * p.num_kv_heads + head / group) * p.total_splits * group +
      head % group;
  float most = -INFINITY;
  for (int s = 0; s < p.total_splits; ++s) most = fmaxf(most, p.partial_mz[first + s * group].x);
  float sum = 0;
  float output = 0;
  for (int s = 0; s < p.total_splits; ++s) {
    const float2 part = p.partial_mz[first + s * group];
    if (part.x == -INFINITY) continue;
    const float weight = __expf(part.x - most);
    sum += weight * part.y;
    output += weight * p.partial_o[(first + s * group) * p.head_dim + d];
  }
  *out = __float2bfloat16_rn(output / sum);
}

template <int dim>
cudaError_t Launch(const AttendParams& params, cudaStream_t stream) {
  constexpr size_t kStageBytes = sizeof(Stage<dim>) * kStages * kWarps;
  constexpr size_t kMergeBytes = sizeof(float) * kWarps * kRows * (dim + 4);
  constexpr size_t kShared = kStageBytes > kMergeBytes ? kStageBytes : kMergeBytes;
  const cudaError_t status = cudaFuncSetAttribute(
      AttendKernel<dim>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(kShared));
  if (status != cudaSuccess) return status;
  const int group = params.num_heads / params.num_kv_heads;
  const dim3 grid(params.rows, params.num_kv_heads * ((group + kRows - 1) / kRows),
                  params.num_splits);
  AttendKernel<dim><<<grid, kThreads, kShared, stream>>>(params, 1.0f / std::sqrt(float{dim}));
  return cudaGetLastError();
}

}  // namespace

cudaError_t LaunchAttend(const AttendParams& params, cudaStream_t stream) {
  if (params.rows < 1 || params.num_kv_heads < 1 || params.num_heads % params.num_kv_heads != 0 ||
      params.num_heads / params.num_kv_heads > kMaxGroup || params.num_splits < 1 ||
      params.first_split < 0 || params.first_split + params.num_splits > params.total_splits) {
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

cudaError_t LaunchMerge(const MergeParams& params, cudaStream_t stream) {
  if (params.rows < 1 || params.num_kv_heads < 1 || params.num_heads % params.num_kv_heads != 0 ||
      params.total_splits < 1 || (params.head_dim != 64 && params.head_dim != 128)) {
    return cudaErrorInvalidValue;
  }
  MergeKernel<<<dim3(params.rows, params.num_heads), params.head_dim, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace nosara::kernels
