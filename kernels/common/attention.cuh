// The inner part of attention over blocks of 64 tokens on tensor cores: 16 query rows against 16
// tokens, with an online softmax. Used by one warp at a time.
#pragma once

#include <cmath>

#include "kernels/common/device.cuh"

namespace nosara::kernels {

/// A warp's 16 query rows, as the first operand of MultiplyAdd.
template <int dim>
struct QueryRows {
  uint32_t tiles[dim / 16][4];

  /// `q`: row 0; rows `count` .. 15 are zero. Rows are `dim` apart.
  __device__ void Load(const __nv_bfloat16* q, int count) {
    const int lane = threadIdx.x % 32;
    const int row = lane / 4;
    const uint32_t* from = reinterpret_cast<const uint32_t*>(q + row * dim + 2 * (lane % 4));
#pragma unroll
    for (int k = 0; k < dim / 16; ++k) {
      tiles[k][0] = row < count ? from[k * 8] : 0;
      tiles[k][1] = row + 8 < count ? from[k * 8 + 4 * dim] : 0;
      tiles[k][2] = row < count ? from[k * 8 + 4] : 0;
      tiles[k][3] = row + 8 < count ? from[k * 8 + 4 + 4 * dim] : 0;
    }
  }
};

/// Running softmax state of 16 query rows. A lane holds rows lane / 4 and + 8; of the output,
/// columns 8j + 2 (lane % 4) and the next.
template <int dim>
struct SoftmaxState {
  float most[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0, 0};  // of this lane's columns alone, until Finish
  float output[dim / 8][4] = {};

  /// Adds 16 tokens whose keys and values lie swizzled in shared memory: `k`, `v` are tiles of
  /// rows of dim / 8 chunks, the tokens' first row is `first_row`. `bias`: c of the first of them,
  /// or null. Tokens from `valid` on are masked (their values must be finite).
  __device__ void Add(const QueryRows<dim>& q, const uint4* k, const uint4* v, int first_row,
                      const float* bias, int valid, float scale) {
    constexpr int kChunks = dim / 8;
    const int lane = threadIdx.x % 32;
    float scores[2][4] = {};
#pragma unroll
    for (int step = 0; step < dim / 16; ++step) {
      uint32_t keys[4];
      LoadMatrix4(keys, SharedAddress(k + Swizzled<kChunks>(first_row + lane / 16 * 8 + lane % 8,
                                                            2 * step + lane / 8 % 2)));
      MultiplyAdd(scores[0], q.tiles[step], keys[0], keys[1]);
      MultiplyAdd(scores[1], q.tiles[step], keys[2], keys[3]);
    }
    float now[2] = {most[0], most[1]};
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = n * 8 + 2 * (lane % 4) + i % 2;
        float& x = scores[n][i];
        x *= scale;
        if (bias != nullptr) x += bias[token];
        if (token >= valid) x = -INFINITY;
        now[i / 2] = fmaxf(now[i / 2], x);
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      now[r] = fmaxf(now[r], __shfl_xor_sync(kAllLanes, now[r], 1));
      now[r] = fmaxf(now[r], __shfl_xor_sync(kAllLanes, now[r], 2));
      // Nothing but masked tokens so far: any finite reference serves.
      const float reference = now[r] == -INFINITY ? 0.0f : now[r];
      const float rescale = __expf(most[r] - reference);
      most[r] = now[r];
      sum[r] *= rescale;
#pragma unroll
      for (int j = 0; j < dim / 8; ++j) {
        output[j][2 * r] *= rescale;
        output[j][2 * r + 1] *= rescale;
      }
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& x = scores[n][2 * r + i];
          x = __expf(x - reference);
          sum[r] += x;
        }
      }
    }
    const uint32_t weights[4] = {
        PackBf16(scores[0][0], scores[0][1]), PackBf16(scores[0][2], scores[0][3]),
        PackBf16(scores[1][0], scores[1][1]), PackBf16(scores[1][2], scores[1][3])};
#pragma unroll
    for (int j = 0; j < dim / 16; ++j) {
      uint32_t values[4];
      LoadMatrix4Transposed(
          values, SharedAddress(v + Swizzled<kChunks>(first_row + lane % 16, 2 * j + lane / 16)));
      MultiplyAdd(output[2 * j], weights, values[0], values[1]);
      MultiplyAdd(output[2 * j + 1], weights, values[2], values[3]);
    }
  }

  /// Completes the sums over the lanes of each row.
  __device__ void Finish() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] += __shfl_xor_sync(kAllLanes, sum[r], 1);
      sum[r] += __shfl_xor_sync(kAllLanes, sum[r], 2);
    }
  }
};

/// As CopyAsync16, or 16 zero bytes where `exists` is false (then nothing is read).
__device__ inline void CopyAsync16OrZero(uint32_t shared, const void* global, bool exists) {
  const int bytes = exists ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared), "l"(global),
               "r"(bytes)
               : "memory");
}

}  // namespace nosara::kernels
