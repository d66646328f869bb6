// The kernels of the transition loss.
//
// C = 4, 8, 16, 32: a thread has 4 channels at 8 positions, so that accesses are of 16 bytes and
// prediction and target stay in registers between the sums and the gradient; a team of C/4 lanes
// has all channels of its positions and adds its sums by shuffles. Lanes side by side are at
// positions side by side. Forward, a block has many positions of one sample, as the sums of blocks
// are left to be added. Any other C, or positions that 16-byte accesses do not fit: a position is a
// thread's, channels pass one by one, and backward reads them twice.
#pragma once

#include "common.cuh"

namespace tim {
namespace {

constexpr int THREADS = 128, CHANNELS = 4;
constexpr float EPS = 1e-8f;

template <typename T, typename S>
struct Inputs {
  PerSample<T> prediction, later, earlier, F_cond, F_uncond;
  PerSample<S> x, z;
  const float *a_x, *a_z, *a_D, *a_cond, *a_uncond;
  float rate, per_element, per_position;
  int64_t skipped;  // leading samples without D
  int channels;
};

// Everything of one sample.
template <typename T, typename S>
struct Sample {
  const T *prediction, *later = nullptr, *earlier = nullptr, *F_cond, *F_uncond;
  const S *x, *z;
  float a_x, a_z, a_D = 0.f, a_cond = 0.f, a_uncond = 0.f, rate;

  __device__ __forceinline__ Sample(const Inputs<T, S>& in, int64_t sample)
      : prediction(in.prediction.at(sample)),
        F_cond(in.F_cond.at(sample)),
        F_uncond(in.F_uncond.at(sample)),
        x(in.x.at(sample)),
        z(in.z.at(sample)),
        a_x(in.a_x[sample]),
        a_z(in.a_z[sample]),
        rate(in.rate) {
    if (in.later.data != nullptr && sample >= in.skipped) {
      later = in.later.at(sample - in.skipped);
      earlier = in.earlier.at(sample - in.skipped);
      a_D = in.a_D[sample];
    }
    if (F_cond != nullptr) a_cond = in.a_cond[sample], a_uncond = in.a_uncond[sample];
  }
};

// W positions of K channels, `step` elements apart, as they are in memory.
template <int W, int K, typename T>
__device__ __forceinline__ void load_raw(const T* data, int64_t step, Raw<W, T> (&raw)[K]) {
#pragma unroll
  for (int k = 0; k < K; k++) raw[k].load(data + k * step);
}

template <int W, int K, typename T>
__device__ __forceinline__ void add(float by, const Raw<W, T> (&raw)[K], float (&t)[K][W]) {
#pragma unroll
  for (int k = 0; k < K; k++)
#pragma unroll
    for (int i = 0; i < W; i++) t[k][i] += by * to_float(raw[k].value[i]);
}

// Prediction and target at W positions of K channels, the first of them at `offset`.
template <int W, int K, typename T, typename S>
__device__ __forceinline__ void load_tile(
    const Sample<T, S>& at, int64_t offset, int64_t step, float (&p)[K][W], float (&t)[K][W]) {
  Raw<W, T> p_raw[K];
  Raw<W, S> x[K], z[K];
  load_raw(at.prediction + offset, step, p_raw);
  load_raw(at.x + offset, step, x);
  load_raw(at.z + offset, step, z);
#pragma unroll
  for (int k = 0; k < K; k++)
#pragma unroll
    for (int i = 0; i < W; i++)
      t[k][i] = at.a_x * to_float(x[k].value[i]) + at.a_z * to_float(z[k].value[i]);
  if (at.later != nullptr) {
    Raw<W, T> later[K];
    load_raw(at.later + offset, step, later);
    if (at.earlier == nullptr) {
      add(at.a_D, later, t);
    } else {
      Raw<W, T> earlier[K];
      load_raw(at.earlier + offset, step, earlier);
#pragma unroll
      for (int k = 0; k < K; k++)
#pragma unroll
        for (int i = 0; i < W; i++) {
          const float difference = to_float(later[k].value[i]) - to_float(earlier[k].value[i]);
          t[k][i] += at.a_D * (difference * at.rate);
        }
    }
  }
  if (at.F_cond != nullptr) {
    Raw<W, T> cond[K], uncond[K];
    load_raw(at.F_cond + offset, step, cond);
    load_raw(at.F_uncond + offset, step, uncond);
    add(at.a_cond, cond, t);
    add(at.a_uncond, uncond, t);
  }
#pragma unroll
  for (int k = 0; k < K; k++) p_raw[k].widen(p[k]);
}

// ⟨p, p⟩, ⟨t, t⟩ and ⟨p, t⟩ of W positions.
template <int W>
struct Products {
  float pp[W] = {}, tt[W] = {}, pt[W] = {};

  template <int K>
  __device__ __forceinline__ void add(const float (&p)[K][W], const float (&t)[K][W]) {
#pragma unroll
    for (int k = 0; k < K; k++)
#pragma unroll
      for (int i = 0; i < W; i++) {
        pp[i] += p[k][i] * p[k][i];
        tt[i] += t[k][i] * t[k][i];
        pt[i] += p[k][i] * t[k][i];
      }
  }

  // Sum over a team: lanes `groups` apart.
  __device__ __forceinline__ void sum(int groups) {
    for (int step = WARP / 2; step >= groups; step /= 2) {
#pragma unroll
      for (int i = 0; i < W; i++) {
        pp[i] += __shfl_xor_sync(ALL_LANES, pp[i], step);
        tt[i] += __shfl_xor_sync(ALL_LANES, tt[i], step);
        pt[i] += __shfl_xor_sync(ALL_LANES, pt[i], step);
      }
    }
  }
};

struct Cosine {
  float value, per_p, per_t;  // cos, 1/|p| and 1/|t|
  bool is_small;              // |p| < EPS

  __device__ __forceinline__ Cosine(float pp, float tt, float pt)
      : per_p(pp < EPS * EPS ? 1.f / EPS : rsqrtf(pp)),
        per_t(tt < EPS * EPS ? 1.f / EPS : rsqrtf(tt)),
        is_small(pp < EPS * EPS) {
    value = pt * per_p * per_t;
  }
};

template <int W, int K>
__device__ __forceinline__ float square(const float (&p)[K][W], const float (&t)[K][W]) {
  float sum = 0.f;
#pragma unroll
  for (int k = 0; k < K; k++)
#pragma unroll
    for (int i = 0; i < W; i++) sum += (p[k][i] - t[k][i]) * (p[k][i] - t[k][i]);
  return sum;
}

// The block's sums of both terms, `sums`, into partial (2, blocks).
__device__ __forceinline__ void write(float (&sums)[2], float by, float by_cosine, float* partial) {
  block_sum(sums, shared<float>());
  if (threadIdx.x != 0) return;
  partial[blockIdx.x] = sums[0] * by;
  partial[gridDim.x + blockIdx.x] = sums[1] * by_cosine;
}

// Where a thread is among the teams of its block.
struct Lane {
  int groups;     // teams of a warp
  int position;   // the first of its CHUNK, from the block's first
  int positions;  // of all teams of a block
  int channel;    // the first of its CHANNELS

  __device__ __forceinline__ explicit Lane(int log2_team) {
    const int lane = threadIdx.x % WARP, log2_groups = 5 - log2_team;
    groups = 1 << log2_groups;
    position = (threadIdx.x / WARP * groups + lane % groups) * CHUNK;
    positions = THREADS / WARP * groups * CHUNK;
    channel = (lane >> log2_groups) * CHANNELS;
  }
};

template <typename T, typename S>
__global__ void __launch_bounds__(THREADS, 3)
    transition_loss_forward_kernel(Inputs<T, S> in, float* partial, Grid grid, int log2_team) {
  const Range at = grid.locate();
  const Sample<T, S> sample(in, at.sample);
  const Lane lane(log2_team);
  float sums[2] = {0.f, 0.f};
  for (int64_t begin = at.begin; begin < at.end; begin += lane.positions) {
    const bool is_there = begin + lane.position < at.end;
    float p[CHANNELS][CHUNK] = {}, t[CHANNELS][CHUNK] = {};
    if (is_there) {
      const int64_t offset = lane.channel * grid.length + begin + lane.position;
      load_tile(sample, offset, grid.length, p, t);
    }
    Products<CHUNK> products;
    products.add(p, t);
    products.sum(lane.groups);
    sums[0] += square(p, t);
    if (!is_there || lane.channel != 0) continue;
#pragma unroll
    for (int i = 0; i < CHUNK; i++)
      sums[1] += 1.f - Cosine(products.pp[i], products.tt[i], products.pt[i]).value;
  }
  write(sums, in.per_element, in.per_position, partial);
}

template <typename T, typename S>
__global__ void __launch_bounds__(THREADS)
    transition_loss_forward_any_kernel(Inputs<T, S> in, float* partial, Grid grid) {
  const Range at = grid.locate();
  const Sample<T, S> sample(in, at.sample);
  float sums[2] = {0.f, 0.f};
  for (int64_t n = at.begin + threadIdx.x; n < at.end; n += THREADS) {
    Products<1> products;
    for (int c = 0; c < in.channels; c++) {
      float p[1][1], t[1][1];
      load_tile(sample, c * grid.length + n, 0, p, t);
      products.add(p, t);
      sums[0] += square(p, t);
    }
    sums[1] += 1.f - Cosine(products.pp[0], products.tt[0], products.pt[0]).value;
  }
  write(sums, in.per_element, in.per_position, partial);
}

// What arrives at the two terms of a sample, nullptr for nothing, and the gradient of p.
template <typename T>
struct Gradients {
  const float *squared, *cosine;  // (B,)
  T* dp;                          // contiguous
};

// The gradient of p, of which `squared` and `cosine` are the factors of both terms.
struct Slope {
  float squared, along_p, along_t;

  __device__ __forceinline__ Slope(float squared, float cosine, float pp, float tt, float pt)
      : squared(squared), along_p(0.f) {
    const Cosine cos(pp, tt, pt);
    along_t = -cosine * cos.per_p * cos.per_t;
    if (!cos.is_small) along_p = cosine * cos.value * cos.per_p * cos.per_p;
  }
  __device__ __forceinline__ float at(float p, float t) const {
    return squared * (p - t) + (along_p * p + along_t * t);
  }
};

template <typename T, typename S>
__global__ void __launch_bounds__(THREADS, 3)
    transition_loss_backward_kernel(Inputs<T, S> in, Gradients<T> to, Grid grid, int log2_team) {
  const Range at = grid.locate();
  const Sample<T, S> sample(in, at.sample);
  const Lane lane(log2_team);
  const int64_t n = at.begin + lane.position, offset = lane.channel * grid.length + n;
  const bool is_there = n < at.end;
  float p[CHANNELS][CHUNK] = {}, t[CHANNELS][CHUNK] = {};
  if (is_there) load_tile(sample, offset, grid.length, p, t);
  Products<CHUNK> products;
  products.add(p, t);
  products.sum(lane.groups);
  if (!is_there) return;
  const float squared = to.squared == nullptr ? 0.f : 2.f * in.per_element * to.squared[at.sample];
  const float cosine = to.cosine == nullptr ? 0.f : in.per_position * to.cosine[at.sample];
#pragma unroll
  for (int i = 0; i < CHUNK; i++) {
    const Slope slope(squared, cosine, products.pp[i], products.tt[i], products.pt[i]);
#pragma unroll
    for (int k = 0; k < CHANNELS; k++) p[k][i] = slope.at(p[k][i], t[k][i]);
  }
  T* dp = to.dp + at.sample * grid.length * in.channels + offset;
#pragma unroll
  for (int k = 0; k < CHANNELS; k++) store(dp + k * grid.length, p[k]);
}

template <typename T, typename S>
__global__ void __launch_bounds__(THREADS)
    transition_loss_backward_any_kernel(Inputs<T, S> in, Gradients<T> to, Grid grid) {
  const Range at = grid.locate();
  const Sample<T, S> sample(in, at.sample);
  const int64_t n = at.begin + threadIdx.x;
  if (n >= at.end) return;
  const float squared = to.squared == nullptr ? 0.f : 2.f * in.per_element * to.squared[at.sample];
  const float cosine = to.cosine == nullptr ? 0.f : in.per_position * to.cosine[at.sample];
  Products<1> products;
  float p[1][1], t[1][1];
  for (int c = 0; c < in.channels; c++) {
    load_tile(sample, c * grid.length + n, 0, p, t);
    products.add(p, t);
  }
  const Slope slope(squared, cosine, products.pp[0], products.tt[0], products.pt[0]);
  T* dp = to.dp + at.sample * grid.length * in.channels + n;
  for (int c = 0; c < in.channels; c++) {
    load_tile(sample, c * grid.length + n, 0, p, t);
    round_to(dp[c * grid.length], slope.at(p[0][0], t[0][0]));
  }
}

}  // namespace
}  // namespace tim
