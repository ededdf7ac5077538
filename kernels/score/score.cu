#include <cmath>

#include "kernels/common/device.cuh"
#include "kernels/common/launch.cuh"
#include "kernels/score/score.h"

namespace nosara::kernels {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kWarpWindows = kIndexWindows / kWarps;  // 32: two tiles of 16

/// Eight query heads as the second operand of MultiplyAdd: head lane / 4, dimensions by lane % 4.
template <int dim>
struct Queries {
  uint32_t low[dim / 16];
  uint32_t high[dim / 16];

  __device__ void Load(const __nv_bfloat16* q, bool exists) {
    const uint32_t* from = reinterpret_cast<const uint32_t*>(q);
#pragma unroll
    for (int k = 0; k < dim / 16; ++k) {
      low[k] = exists ? __ldg(from + k * 8) : 0;
      high[k] = exists ? __ldg(from + k * 8 + 4) : 0;
    }
  }
};

/// One thread block: the 128 windows of one index slot against the queries of a tile of rows, 8 *
/// `eights` heads at a time. A warp has 32 windows.
template <int dim, int eights>
__global__ void __launch_bounds__(kThreads, 6) ScoreKernel(ScoreParams p, float scale) {
  StartKernel();
  constexpr int kChunks = dim / 8;                         // 16-byte chunks of a key
  extern __shared__ uint4 keys[];                          // [128, kChunks], swizzled
  __shared__ float2 warp_partials[2][kWarps][8 * eights];  // by turns: one barrier a turn

  const RowTile tile =
      p.tiles == nullptr ? RowTile{static_cast<int32_t>(blockIdx.z), 1} : p.tiles[blockIdx.z];
  const StepRow last = p.rows_info[tile.first_row + tile.rows - 1];
  const int first_window = blockIdx.x * kIndexWindows;
  if (last.sequence < 0 || last.position / kBlockTokens + 1 <= p.dense_blocks) return;
  const int windows = VisibleWindows(last.position);
  if (first_window >= windows) return;
  const int head = blockIdx.y;
  const int group = p.num_heads / p.num_kv_heads;
  const int padded = PaddedGroup(group);
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;

  const uint4* index = reinterpret_cast<const uint4*>(
      p.cache.IndexSlot(last.sequence, p.layer * p.num_kv_heads + head, first_window));
  const int here = min(kIndexWindows, windows - first_window);
#pragma unroll
  for (int j = 0; j < kIndexWindows * kChunks / kThreads; ++j) {
    const int i = j * kThreads + threadIdx.x;
    if (i < here * kChunks) {
      CopyAsync16(SharedAddress(keys + Swizzled<kChunks>(i / kChunks, i % kChunks)), index + i);
    }
  }
  CopyAsyncCommit();

  // While the keys are on their way.
  Queries<dim> queries[eights];
  const auto load_queries = [&](int row, int first_head) {
#pragma unroll
    for (int e = 0; e < eights; ++e) {
      const int g = first_head + 8 * e + lane / 4;
      queries[e].Load(
          p.q + (static_cast<int64_t>(row) * p.num_heads + head * group + g) * dim + 2 * (lane % 4),
          g < group);
    }
  };
  load_queries(tile.first_row, 0);
  CopyAsyncWait<0>();
  __syncthreads();

  int turn = 0;
  for (int i = 0; i < tile.rows; ++i) {
    const int row = tile.first_row + i;
    const int position = p.rows_info[row].position;
    const int visible = VisibleWindows(position);
    if (position / kBlockTokens + 1 <= p.dense_blocks || first_window >= visible) continue;
    float* out =
        p.logits + (static_cast<int64_t>(row) * p.num_kv_heads + head) * p.max_windows * padded;
    for (int first_head = 0; first_head < padded; first_head += 8 * eights, turn ^= 1) {
      if (i > 0 || first_head > 0) load_queries(row, first_head);
      float scores[2][eights][4] = {};
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int k = 0; k < dim / 16; ++k) {
          uint32_t key_tile[4];
          const int key = warp * kWarpWindows + m * 16 + lane % 16;
          LoadMatrix4(key_tile, SharedAddress(keys + Swizzled<kChunks>(key, 2 * k + lane / 16)));
#pragma unroll
          for (int e = 0; e < eights; ++e) {
            MultiplyAdd(scores[m][e], key_tile, queries[e].low[k], queries[e].high[k]);
          }
        }
      }
      // Lane: windows lane / 4 and + 8 of both tiles, heads 2 * (lane % 4) and the next.
#pragma unroll
      for (int e = 0; e < eights; ++e) {
        float2 most = {-INFINITY, -INFINITY};
#pragma unroll
        for (int m = 0; m < 2; ++m) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int window = first_window + warp * kWarpWindows + m * 16 + half * 8 + lane / 4;
            float& a = scores[m][e][2 * half];
            float& b = scores[m][e][2 * half + 1];
            a *= scale;
            b *= scale;
            if (window < visible) {
              *reinterpret_cast<float2*>(out + static_cast<int64_t>(window) * padded + first_head +
                                         8 * e + 2 * (lane % 4)) = {a, b};
            } else {
              a = b = -INFINITY;
            }
            most.x = fmaxf(most.x, a);
            most.y = fmaxf(most.y, b);
          }
        }
#pragma unroll
        for (int offset = 4; offset < 32; offset *= 2) {
          most.x = fmaxf(most.x, __shfl_xor_sync(kAllLanes, most.x, offset));
          most.y = fmaxf(most.y, __shfl_xor_sync(kAllLanes, most.y, offset));
        }
        float2 sum = {0, 0};
#pragma unroll
        for (int m = 0; m < 2; ++m) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float a = scores[m][e][2 * half];
            const float b = scores[m][e][2 * half + 1];
            sum.x += a == -INFINITY ? 0.0f : __expf(a - most.x);
            sum.y += b == -INFINITY ? 0.0f : __expf(b - most.y);
          }
        }
#pragma unroll
        for (int offset = 4; offset < 32; offset *= 2) {
          sum.x += __shfl_xor_sync(kAllLanes, sum.x, offset);
          sum.y += __shfl_xor_sync(kAllLanes, sum.y, offset);
        }
        if (lane < 4) {
          warp_partials[turn][warp][8 * e + 2 * lane] = {most.x, sum.x};
          warp_partials[turn][warp][8 * e + 2 * lane + 1] = {most.y, sum.y};
        }
      }
      __syncthreads();
      if (threadIdx.x < 8 * eights && first_head + static_cast<int>(threadIdx.x) < padded) {
        float best = -INFINITY;
        for (int w = 0; w < kWarps; ++w) best = fmaxf(best, warp_partials[turn][w][threadIdx.x].x);
        float total = 0;
        for (int w = 0; w < kWarps; ++w) {
          const float2 part = warp_partials[turn][w][threadIdx.x];
          total += part.x == -INFINITY ? 0.0f : part.y * __expf(part.x - best);
        }
        p.partials[((static_cast<int64_t>(row) * p.num_kv_heads + head) *
                        ScoreTiles(p.max_windows) +
                    blockIdx.x) *
                       padded +
                   first_head + threadIdx.x] = {best, total};
      }
    }
  }
}

template <int dim, int eights>
cudaError_t Launch(const ScoreParams& params, cudaStream_t stream) {
  const dim3 grid(ScoreTiles(params.max_windows), params.num_kv_heads, params.num_tiles);
  const size_t shared = sizeof(uint4) * kIndexWindows * dim / 8;
  return LaunchKernel(ScoreKernel<dim, eights>, grid, kThreads, shared, stream, params,
                      1.0f / std::sqrt(float{dim}));
}

template <int dim>
cudaError_t Launch(const ScoreParams& params, cudaStream_t stream) {
  const int padded = PaddedGroup(params.num_heads / params.num_kv_heads);
  return padded % 16 == 0 ? Launch<dim, 2>(params, stream) : Launch<dim, 1>(params, stream);
}

}  // namespace

cudaError_t LaunchScore(const ScoreParams& params, cudaStream_t stream) {
  if (params.num_tiles < 1 || params.num_tiles > 65535 || params.num_kv_heads < 1 ||
      params.num_heads % params.num_kv_heads != 0 ||
      params.num_heads / params.num_kv_heads > kMaxGroup ||
      params.max_windows % kIndexWindows != 0) {
    return cudaErrorInvalidValue;
  }
  if (params.max_windows == 0) return cudaSuccess;
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
