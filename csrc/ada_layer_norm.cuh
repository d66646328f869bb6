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
  float* partial;  // (4 or 5, blocks, C), as triton.py's backward has them
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

constexpr int GENERAL_THREADS = 256;  // at most: a narrow token has a thread a channel

// What only the kernels below know. The token strides are 0 of a row of the sample; gradients of
// conditioning of each token are contiguous, or nullptr.
template <typename S>
struct General {
  int64_t gate_n, shift_n, scale_n;
  const S *weight, *norm_bias;
  bool is_rms;
  S *dgate, *dscale;
};

template <typename S>
__device__ __forceinline__ float value_or(const S* p, int c, float otherwise) {
  return p == nullptr ? otherwise : to_float(p[c]);
}

// The conditioning of a token, nullptr where there is none.
template <typename S>
__device__ __forceinline__ const S* of_token(
    const PerSample<S>& cond, int64_t sample, int64_t stride, int64_t token) {
  return cond.data == nullptr ? nullptr : cond.at(sample) + stride * token;
}

// x' of a token into shared memory, one channel a thread at a time; the caller needs no barrier, as
// each thread works on its own channels.
template <typename T, typename S>
__device__ __forceinline__ void stage(
    const Inputs<T, S>& in, const General<S>& more, int64_t sample, int64_t token, int C, float* x,
    T* out) {
  const T* of_x = in.x.at(sample, token);
  const S* gate = of_token(in.gate, sample, more.gate_n, token);
  const S* bias = in.bias.at(sample);
  for (int c = threadIdx.x; c < C; c += blockDim.x) {
    x[c] = to_float(of_x[c]);
    if (in.branch.data != nullptr) {
      const float r = to_float(in.branch.at(sample, token)[c]) + value_or(bias, c, 0.f);
      x[c] += value_or(gate, c, 1.f) * r;
      if (out != nullptr) round_to(out[c], x[c]);
    }
  }
}

// x of shared memory becomes x̂; returns rstd. RMSNorm takes no mean off.
__device__ __forceinline__ float normalise(
    float* x, int C, float eps, bool is_rms, float* scratch) {
  const float per_channel = 1.f / C;
  float sum[1] = {0.f}, rest[2] = {0.f, 0.f};
  if (!is_rms) {
    for (int c = threadIdx.x; c < C; c += blockDim.x) sum[0] += x[c];
    block_sum(sum, scratch);
  }
  const float mean = sum[0] * per_channel;
  for (int c = threadIdx.x; c < C; c += blockDim.x) {
    x[c] -= mean;
    rest[0] += x[c];
    rest[1] += x[c] * x[c];
  }
  block_sum(rest, scratch);
  const float small = is_rms ? 0.f : rest[0] * per_channel;
  const float rstd = rsqrtf(rest[1] * per_channel - small * small + eps);
  for (int c = threadIdx.x; c < C; c += blockDim.x) x[c] = (x[c] - small) * rstd;
  return rstd;
}

template <typename T, typename S>
__global__ void __launch_bounds__(GENERAL_THREADS, 2)
    ada_layer_norm_forward_any_kernel(Forward<T, S> in, General<S> more, Grid grid, int C) {
  const Range at = grid.locate();
  float *scratch = shared<float>(), *x = scratch + 2 * WARP;
  for (int64_t n = at.begin; n < at.end; n++) {
    const int64_t token = at.first + n, out = (at.first_out + n) * C;
    stage(in, more, at.sample, token, C, x, in.out == nullptr ? nullptr : in.out + out);
    if (in.y == nullptr) continue;
    normalise(x, C, in.eps, more.is_rms, scratch);
    const S* shift = of_token(in.shift, at.sample, more.shift_n, token);
    const S* scale = of_token(in.scale, at.sample, more.scale_n, token);
    for (int c = threadIdx.x; c < C; c += blockDim.x) {
      const float y = x[c] * value_or(more.weight, c, 1.f) + value_or(more.norm_bias, c, 0.f);
      round_to(in.y[out + c], y * (1.f + value_or(scale, c, 0.f)) + value_or(shift, c, 0.f));
    }
  }
}

// A thread's sums over tokens are kept in `partial`, where the block's are nobody else's.
template <typename T, typename S>
__global__ void __launch_bounds__(GENERAL_THREADS, 2)
    ada_layer_norm_backward_any_kernel(Backward<T, S> in, General<S> more, Grid grid, int C) {
  const Range at = grid.locate();
  float *scratch = shared<float>(), *x = scratch + 2 * WARP, *d = x + C;
  const S* bias = in.bias.at(at.sample);
  const float per_channel = 1.f / C;
  const int64_t step = int64_t(gridDim.x) * C;
  const bool is_fifth = more.dscale != nullptr && more.norm_bias != nullptr;
  float* sums = in.partial + int64_t(blockIdx.x) * C;
  for (int i = 0; i < 4 + is_fifth; i++)
    for (int c = threadIdx.x; c < C; c += blockDim.x) sums[i * step + c] = 0.f;
  for (int64_t n = at.begin; n < at.end; n++) {
    const int64_t token = at.first + n, out = (at.first_out + n) * C;
    const S* gate = of_token(in.gate, at.sample, more.gate_n, token);
    const S* scale = of_token(in.scale, at.sample, more.scale_n, token);
    float along[2] = {0.f, 0.f}, rstd = 0.f;
    if (in.dy.data != nullptr) {
      const T* dy = in.dy.at(at.sample, token);
      stage(in, more, at.sample, token, C, x, static_cast<T*>(nullptr));
      rstd = normalise(x, C, in.eps, more.is_rms, scratch);
      for (int c = threadIdx.x; c < C; c += blockDim.x) {
        const float y = to_float(dy[c]), m = y * (1.f + value_or(scale, c, 0.f));
        const float w = value_or(more.weight, c, 1.f);
        sums[c] += y;
        if (more.dscale != nullptr) {
          const float normed = x[c] * w + value_or(more.norm_bias, c, 0.f);
          round_to(more.dscale[out + c], y * normed);
          if (is_fifth) sums[4 * step + c] += m;
        }
        sums[step + c] += (more.dscale == nullptr ? y : m) * x[c];
        d[c] = m * w;
        along[0] += d[c];
        along[1] += d[c] * x[c];
      }
      block_sum(along, scratch);
      if (more.is_rms) along[0] = 0.f;
    }
    for (int c = threadIdx.x; c < C; c += blockDim.x) {
      float dx = in.dout.data == nullptr ? 0.f : to_float(in.dout.at(at.sample, token)[c]);
      if (in.dy.data != nullptr)
        dx += rstd * (d[c] - along[0] * per_channel - x[c] * (along[1] * per_channel));
      round_to(in.dx[out + c], dx);
      if (in.branch.data != nullptr) {
        const float r = to_float(in.branch.at(at.sample, token)[c]) + value_or(bias, c, 0.f);
        const float dbranch = dx * value_or(gate, c, 1.f);
        round_to(in.dbranch[out + c], dbranch);
        if (more.dgate != nullptr)
          round_to(more.dgate[out + c], dx * r);
        else
          sums[2 * step + c] += dx * r;
        sums[3 * step + c] += dbranch;
      }
    }
  }
}

}  // namespace
}  // namespace tim
