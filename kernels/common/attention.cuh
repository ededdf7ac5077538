// The inner part of attention over blocks of 64 tokens on tensor cores: 16 query rows against 16
// tokens, with an online softmax. Used by one warp at a time.
#pragma once

#include <cmath>

#include "kernels/common/device.cuh"

namespace nosara::kernels {

/// A warp's 16 query rows in registers, as the first operand of MultiplyAdd.
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

  /// Dimensions 16 step .. 16 step + 15.
  __device__ void Get(int step, uint32_t (&tile)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) tile[i] = tiles[step][i];
  }
};

/// The same in shared memory of the warp's own: registers for more tokens at a time.
template <int dim>
struct SharedQueryRows {
  static constexpr int kChunks = 16 * dim / 8;  // 16-byte chunks of memory
  uint32_t address;                             // of this lane's part of step 0

  /// As QueryRows::Load, into `memory`, which is 256-byte aligned. Ends with the warp in step.
  __device__ void Load(const __nv_bfloat16* q, int count, uint4* memory) {
    const int lane = threadIdx.x % 32;
    for (int i = lane; i < kChunks; i += 32) {
      const int row = i / (dim / 8);
      const uint4 chunk = row < count ? reinterpret_cast<const uint4*>(q)[i] : uint4{};
      memory[Swizzled<dim / 8>(row, i % (dim / 8))] = chunk;
    }
    __syncwarp();
    address = SharedAddress(memory + Swizzled<dim / 8>(lane % 16, lane / 16));
  }
  __device__ void Get(int step, uint32_t (&tile)[4]) const {
    LoadMatrix4(tile, address ^ (32u * step));
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

/// Adds 16 * groups tokens whose keys and values lie swizzled in shared memory to `tiles` states,
/// each with 16 query rows of its own: what is read from shared memory serves all of them. `k`, `v`
/// are tiles of rows of dim / 8 chunks, 256-byte aligned, the tokens' first row is `first_row`, a
/// multiple of 8. `bias`: c of the first of them, 8-byte aligned, or null. For states[t], tokens
/// from valid[t] on are masked (their values must be finite); `masked` false: there are none.
template <int dim, int tiles, int groups, bool masked, typename Queries>
__device__ void AddTokens(SoftmaxState<dim>* states, const Queries* q, const uint4* k,
                          const uint4* v, int first_row, const float* bias, const int* valid,
                          float scale) {
  constexpr int kChunks = dim / 8;
  constexpr int kGroupBytes = 16 * dim * 2;
  constexpr float kLog2E = 1.4426950408889634f;
  const int lane = threadIdx.x % 32;
  // Chunks of a row lie where an exclusive or takes them (Swizzled): so it does in the address.
  const uint32_t keys_at =
      SharedAddress(k + Swizzled<kChunks>(first_row + lane / 16 * 8 + lane % 8, lane / 8 % 2));
  const uint32_t values_at = SharedAddress(v + Swizzled<kChunks>(first_row + lane % 16, lane / 16));
  float scores[tiles][2 * groups][4] = {};
#pragma unroll
  for (int step = 0; step < dim / 16; ++step) {
    uint32_t queries[tiles][4];
#pragma unroll
    for (int t = 0; t < tiles; ++t) q[t].Get(step, queries[t]);
#pragma unroll
    for (int g = 0; g < groups; ++g) {
      uint32_t keys[4];
      LoadMatrix4(keys, (keys_at + g * kGroupBytes) ^ (32u * step));
#pragma unroll
      for (int t = 0; t < tiles; ++t) {
        MultiplyAdd(scores[t][2 * g], queries[t], keys[0], keys[1]);
        MultiplyAdd(scores[t][2 * g + 1], queries[t], keys[2], keys[3]);
      }
    }
  }
  float c[2 * groups][2] = {};
  if (bias != nullptr) {
#pragma unroll
    for (int n = 0; n < 2 * groups; ++n) {
      const float2 pair = *reinterpret_cast<const float2*>(bias + n * 8 + 2 * (lane % 4));
      c[n][0] = pair.x;
      c[n][1] = pair.y;
    }
  }
  uint32_t weights[tiles][groups][4];
#pragma unroll
  for (int t = 0; t < tiles; ++t) {
    SoftmaxState<dim>& state = states[t];
    float now[2] = {state.most[0], state.most[1]};
#pragma unroll
    for (int n = 0; n < 2 * groups; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& x = scores[t][n][i];
        x = x * scale + c[n][i % 2];
        if (masked && n * 8 + 2 * (lane % 4) + i % 2 >= valid[t]) x = -INFINITY;
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
        const float rescale = now[r] == -INFINITY ? 1.0f : Exp2((state.most[r] - now[r]) * kLog2E);
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
      const float reference = masked && now[r] == -INFINITY ? 0.0f : -now[r] * kLog2E;
#pragma unroll
      for (int n = 0; n < 2 * groups; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& x = scores[t][n][2 * r + i];
          x = Exp2(fmaf(x, kLog2E, reference));
          state.sum[r] += x;
        }
      }
    }
#pragma unroll
    for (int g = 0; g < groups; ++g) {
      const float(&low)[4] = scores[t][2 * g];
      const float(&high)[4] = scores[t][2 * g + 1];
      weights[t][g][0] = PackBf16(low[0], low[1]);
      weights[t][g][1] = PackBf16(low[2], low[3]);
      weights[t][g][2] = PackBf16(high[0], high[1]);
      weights[t][g][3] = PackBf16(high[2], high[3]);
    }
  }
#pragma unroll
  for (int g = 0; g < groups; ++g) {
#pragma unroll
    for (int j = 0; j < dim / 16; ++j) {
      uint32_t values[4];
      LoadMatrix4Transposed(values, (values_at + g * kGroupBytes) ^ (32u * j));
#pragma unroll
      for (int t = 0; t < tiles; ++t) {
        MultiplyAdd(states[t].output[2 * j], weights[t][g], values[0], values[1]);
        MultiplyAdd(states[t].output[2 * j + 1], weights[t][g], values[2], values[3]);
      }
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
