// What all kernels of adaLN take, and those for any width and alignment: a block has a token at a
// time, staged in shared memory, a thread a channel at a time.
#pragma once

#include "common.cuh"

namespace tim {
namespace {

template <typename T, typename S>
struct Inputs {
  Tokens<const T> x, branch;
  PerSample<S> gate, bias, shift, scale;  // the conditioning
  float eps;
};

template <typename T, typename S>
struct Forward : Inputs<T, S> {
  T *out, *y;  // contiguous, or nullptr
};

template <typename T, typename S>
struct Backward : Inputs<T, S> {
  Tokens<const T> dout, dy;
  T *dx, *dbranch;
  float* partial;  // (4, blocks, C): shift, scale, gate, bias
};

// The gate and branch + bias of W channels.
template <int W, typename T, typename S>
__device__ __forceinline__ void gated(
    const Raw<W, T>& branch, const S* gate, const S* bias, int column, float (&g)[W],
    float (&r)[W]) {
  branch.widen(r);
  load(gate + column, g);
  if (bias != nullptr) {
    float b[W];
    load(bias + column, b);
#pragma unroll
    for (int i = 0; i < W; i++) r[i] += b[i];
  }
}

template <int W, typename T, typename S>
__device__ __forceinline__ void load_gated(
    const T* branch, const S* gate, const S* bias, int column, float (&g)[W], float (&r)[W]) {
  Raw<W, T> raw;
  raw.load(branch + column);
  gated(raw, gate, bias, column, g, r);
}

constexpr int GENERAL_THREADS = 256;  // at most: a narrow token has a thread a channel

// x' of a token into shared memory, one channel a thread at a time; the caller needs no barrier, as
// each thread works on its own channels.
template <typename T, typename S>
__device__ __forceinline__ void stage(
    const Inputs<T, S>& in, const Range& at, int64_t n, int C, float* x, T* out) {
  const T* of_x = in.x.at(at.sample, at.first + n);
  const S *gate = in.gate.at(at.sample), *bias = in.bias.at(at.sample);
  for (int c = threadIdx.x; c < C; c += blockDim.x) {
    x[c] = to_float(of_x[c]);
    if (in.branch.data != nullptr) {
      float g[1], r[1];
      load_gated(in.branch.at(at.sample, at.first + n), gate, bias, c, g, r);
      x[c] += g[0] * r[0];
      if (out != nullptr) round_to(out[c], x[c]);
    }
  }
}

// x of shared memory becomes x̂; returns rstd.
__device__ __forceinline__ float normalise(float* x, int C, float eps, float* scratch) {
  const float per_channel = 1.f / C;
  float sum[1] = {0.f}, rest[2] = {0.f, 0.f};
  for (int c = threadIdx.x; c < C; c += blockDim.x) sum[0] += x[c];
  block_sum(sum, scratch);
  const float mean = sum[0] * per_channel;
  for (int c = threadIdx.x; c < C; c += blockDim.x) {
    x[c] -= mean;
    rest[0] += x[c];
    rest[1] += x[c] * x[c];
  }
  block_sum(rest, scratch);
  const float small = rest[0] * per_channel;
  const float rstd = rsqrtf(rest[1] * per_channel - small * small + eps);
  for (int c = threadIdx.x; c < C; c += blockDim.x) x[c] = (x[c] - small) * rstd;
  return rstd;
}

template <typename T, typename S>
__global__ void __launch_bounds__(GENERAL_THREADS, 2)
    ada_layer_norm_forward_any_kernel(Forward<T, S> in, Grid grid, int C) {
  const Range at = grid.locate();
  float *scratch = shared<float>(), *x = scratch + 2 * WARP;
  const S *shift = in.shift.at(at.sample), *scale = in.scale.at(at.sample);
  for (int64_t n = at.begin; n < at.end; n++) {
    const int64_t out = (at.first_out + n) * C;
    stage(in, at, n, C, x, in.out == nullptr ? nullptr : in.out + out);
    if (in.y == nullptr) continue;
    normalise(x, C, in.eps, scratch);
    for (int c = threadIdx.x; c < C; c += blockDim.x)
      round_to(in.y[out + c], x[c] * (1.f + to_float(scale[c])) + to_float(shift[c]));
  }
}

// A thread's sums over tokens are kept in `partial`, where the block's are nobody else's.
template <typename T, typename S>
__global__ void __launch_bounds__(GENERAL_THREADS, 2)
    ada_layer_norm_backward_any_kernel(Backward<T, S> in, Grid grid, int C) {
  const Range at = grid.locate();
  float *scratch = shared<float>(), *x = scratch + 2 * WARP, *d = x + C;
  const S *gate = in.gate.at(at.sample), *bias = in.bias.at(at.sample);
  const S* scale = in.scale.at(at.sample);
  const float per_channel = 1.f / C;
  float* sums[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    sums[i] = in.partial + (int64_t(i) * gridDim.x + blockIdx.x) * C;
    for (int c = threadIdx.x; c < C; c += blockDim.x) sums[i][c] = 0.f;
  }
  for (int64_t n = at.begin; n < at.end; n++) {
    const int64_t token = at.first + n, out = (at.first_out + n) * C;
    float along[2] = {0.f, 0.f}, rstd = 0.f;
    if (in.dy.data != nullptr) {
      const T* dy = in.dy.at(at.sample, token);
      stage(in, at, n, C, x, static_cast<T*>(nullptr));
      rstd = normalise(x, C, in.eps, scratch);
      for (int c = threadIdx.x; c < C; c += blockDim.x) {
        const float y = to_float(dy[c]);
        sums[0][c] += y;
        sums[1][c] += y * x[c];
        d[c] = y * (1.f + to_float(scale[c]));
        along[0] += d[c];
        along[1] += d[c] * x[c];
      }
      block_sum(along, scratch);
    }
    for (int c = threadIdx.x; c < C; c += blockDim.x) {
      float dx = in.dout.data == nullptr ? 0.f : to_float(in.dout.at(at.sample, token)[c]);
      if (in.dy.data != nullptr)
        dx += rstd * (d[c] - along[0] * per_channel - x[c] * (along[1] * per_channel));
      round_to(in.dx[out + c], dx);
      if (in.branch.data != nullptr) {
        float g[1], r[1];
        load_gated(in.branch.at(at.sample, token), gate, bias, c, g, r);
        round_to(in.dbranch[out + c], dx * g[0]);
        sums[2][c] += dx * r[0];
        sums[3][c] += dx * g[0];
      }
    }
  }
}

}  // namespace
}  // namespace tim
