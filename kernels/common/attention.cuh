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

  /// Completes the sums over the lanes of each row.
  __device__ void Finish() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] += __shfl_xor_sync(kAllLanes, sum[r], 1);
      sum[r] += __shfl_xor_sync(kAllLanes, sum[r], 2);
    }
  }
};

/// Adds 16 tokens whose keys and values lie swizzled in shared memory to `tiles` states, each with
/// 16 query rows of its own: what is read from shared memory serves all of them. `k`, `v` are tiles
/// of rows of dim / 8 chunks, the tokens' first row is `first_row`. `bias`: c of the first of them,
/// 8-byte aligned, or null. For states[t], tokens from valid[t] on are masked (their values must be
/// finite).
template <int dim, int tiles>
__device__ void AddTokens(SoftmaxState<dim>* states, const QueryRows<dim>* q, const uint4* k,
                          const uint4* v, int first_row, const float* bias, const int* valid,
                          float scale) {
  constexpr int kChunks = dim / 8;
  const int lane = threadIdx.x % 32;
  float scores[tiles][2][4] = {};
#pragma unroll
  for (int step = 0; step < dim / 16; ++step) {
    uint32_t keys[4];
    LoadMatrix4(keys, SharedAddress(k + Swizzled<kChunks>(first_row + lane / 16 * 8 + lane % 8,
                                                          2 * step + lane / 8 % 2)));
#pragma unroll
    for (int t = 0; t < tiles; ++t) {
      MultiplyAdd(scores[t][0], q[t].tiles[step], keys[0], keys[1]);
      MultiplyAdd(scores[t][1], q[t].tiles[step], keys[2], keys[3]);
    }
  }
  float c[2][2] = {};
  if (bias != nullptr) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const float2 pair = *reinterpret_cast<const float2*>(bias + n * 8 + 2 * (lane % 4));
      c[n][0] = pair.x;
      c[n][1] = pair.y;
    }
  }
  uint32_t weights[tiles][4];
#pragma unroll
  for (int t = 0; t < tiles; ++t) {
    SoftmaxState<dim>& state = states[t];
    float now[2] = {state.most[0], state.most[1]};
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& x = scores[t][n][i];
        x = x * scale + c[n][i % 2];
        if (n * 8 + 2 * (lane % 4) + i % 2 >= valid[t]) x = -INFINITY;
        now[i / 2] = fmaxf(now[i / 2], x);
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      now[r] = fmaxf(now[r], __shfl_xor_sync(kAllLanes, now[r], 1));
      now[r] = fmaxf(now[r], __shfl_xor_sync(kAllLanes, now[r], 2));
    }
    // Once the largest score was seen, which is soon, there is nothing to rescale.
    if (__any_sync(kAllLanes, now[0] != state.most[0] || now[1] != state.most[1])) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        // Nothing but masked tokens so far: there is nothing to rescale, either.
        const float rescale = now[r] == -INFINITY ? 1.0f : __expf(state.most[r] - now[r]);
        state.most[r] = now[r];
        state.sum[r] *= rescale;
#pragma unroll
        for (int j = 0; j < dim / 8; ++j) {
          state.output[j][2 * r] *= rescale;
          state.output[j][2 * r + 1] *= rescale;
        }
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      // Nothing but masked tokens so far: any finite reference serves.
      const float reference = now[r] == -INFINITY ? 0.0f : now[r];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& x = scores[t][n][2 * r + i];
          x = __expf(x - reference);
          state.sum[r] += x;
        }
      }
    }
    weights[t][0] = PackBf16(scores[t][0][0], scores[t][0][1]);
    weights[t][1] = PackBf16(scores[t][0][2], scores[t][0][3]);
    weights[t][2] = PackBf16(scores[t][1][0], scores[t][1][1]);
    weights[t][3] = PackBf16(scores[t][1][2], scores[t][1][3]);
  }
#pragma unroll
  for (int j = 0; j < dim / 16; ++j) {
    uint32_t values[4];
    LoadMatrix4Transposed(
        values, SharedAddress(v + Swizzled<kChunks>(first_row + lane % 16, 2 * j + lane / 16)));
#pragma unroll
    for (int t = 0; t < tiles; ++t) {
      MultiplyAdd(states[t].output[2 * j], weights[t], values[0], values[1]);
      MultiplyAdd(states[t].output[2 * j + 1], weights[t], values[2], values[3]);
    }
  }
}

/// As CopyAsync16, or 16 zero bytes where `exists` is false (then nothing is read).
__device__ inline void CopyAsync16OrZero(uint32_t shared, const void* global, bool exists) {
  const int bytes = exists ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared), "l"(global),
               "r"(bytes)
               : "memory");
}

}  // namespace nosara::kernels
