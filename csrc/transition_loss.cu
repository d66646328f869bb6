// The transition loss, forward and backward.
//
// For the prediction p and the target t of a sample, C channels at each of N positions,
//
//     t = a_x x + a_z z + a_D D + a_c F_c + a_u F_u,  D = rate·(F_+ − F_−) for the trailing samples
//     squared = Σ (p − t)² / CN                       cosine = Σ_n (1 − cos(p_n, t_n)) / N
//     cos(p, t) = ⟨p, t⟩ / (|p| |t|), each norm at least EPS
//
// so that with sums ⟨p, p⟩, ⟨t, t⟩ and ⟨p, t⟩ of a position the gradient of −cos is
// p·cos/|p|² − t/(|p| |t|), without its first term where |p| is below EPS. The target is made again
// in backward and never written; its difference F_+ − F_− is taken in float32.
//
// C = 4, 8, 16, 32: a thread has 4 channels at 8 positions, so that accesses are of 16 bytes and
// prediction and target stay in registers between the sums and the gradient; a team of C/4 lanes
// has all channels of its positions and adds its sums by shuffles. Lanes side by side are at
// positions side by side. Forward, a block has many positions of one sample, as the sums of blocks
// are left to be added. Any other C, or positions that 16-byte accesses do not fit: a position is a
// thread's, channels pass one by one, and backward reads them twice.
#include "tensors.h"

namespace tim {
namespace {

constexpr int THREADS = 128, CHANNELS = 4;
constexpr float EPS = 1e-8f;

template <typename T, typename S>
struct Inputs {
  Row<T> prediction, later, earlier, f_cond, f_uncond;
  Row<S> x, z;
  const float *a_x, *a_z, *a_d, *a_cond, *a_uncond;
  float rate, per_element, per_position;
  int64_t skipped;  // leading samples without D
  int channels;
};

// Everything of one sample.
template <typename T, typename S>
struct Sample {
  const T *prediction, *later = nullptr, *earlier = nullptr, *f_cond, *f_uncond;
  const S *x, *z;
  float a_x, a_z, a_d = 0.f, a_cond = 0.f, a_uncond = 0.f, rate;

  __device__ __forceinline__ Sample(const Inputs<T, S>& in, int64_t sample)
      : prediction(in.prediction.at(sample)),
        f_cond(in.f_cond.at(sample)),
        f_uncond(in.f_uncond.at(sample)),
        x(in.x.at(sample)),
        z(in.z.at(sample)),
        a_x(in.a_x[sample]),
        a_z(in.a_z[sample]),
        rate(in.rate) {
    if (in.later.data != nullptr && sample >= in.skipped) {
      later = in.later.at(sample - in.skipped);
      earlier = in.earlier.at(sample - in.skipped);
      a_d = in.a_d[sample];
    }
    if (f_cond != nullptr) a_cond = in.a_cond[sample], a_uncond = in.a_uncond[sample];
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
      add(at.a_d, later, t);
    } else {
      Raw<W, T> earlier[K];
      load_raw(at.earlier + offset, step, earlier);
#pragma unroll
      for (int k = 0; k < K; k++)
#pragma unroll
        for (int i = 0; i < W; i++) {
          const float difference = to_float(later[k].value[i]) - to_float(earlier[k].value[i]);
          t[k][i] += at.a_d * (difference * at.rate);
        }
    }
  }
  if (at.f_cond != nullptr) {
    Raw<W, T> cond[K], uncond[K];
    load_raw(at.f_cond + offset, step, cond);
    load_raw(at.f_uncond + offset, step, uncond);
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
__global__ void __launch_bounds__(THREADS, 3) forward_teams(
    Inputs<T, S> in, float* partial, Grid grid, int log2_team) {
  const Rows at = grid.locate();
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
__global__ void __launch_bounds__(THREADS) forward_any(
    Inputs<T, S> in, float* partial, Grid grid) {
  const Rows at = grid.locate();
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
__global__ void __launch_bounds__(THREADS, 3) backward_teams(
    Inputs<T, S> in, Gradients<T> to, Grid grid, int log2_team) {
  const Rows at = grid.locate();
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
__global__ void __launch_bounds__(THREADS) backward_any(
    Inputs<T, S> in, Gradients<T> to, Grid grid) {
  const Rows at = grid.locate();
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

// log2 of the lanes that have all channels, or −1 if teams do not serve them.
int log2_team_of(int64_t channels) {
  for (int log2 = 0; log2 < 4; log2++)
    if (channels == CHANNELS << log2) return log2;
  return -1;
}

template <typename T, typename S>
bool all_aligned(const Inputs<T, S>& in) {
  return is_aligned(in.prediction) && is_aligned(in.later) && is_aligned(in.earlier) &&
         is_aligned(in.f_cond) && is_aligned(in.f_uncond) && is_aligned(in.x) && is_aligned(in.z);
}

Grid grid_of(int64_t length, int64_t positions) {
  return {nullptr, length, static_cast<unsigned>((length + positions - 1) / positions), positions};
}

template <typename T, typename S>
Inputs<T, S> inputs(
    const Tensor& prediction, const Tensor& x, const Tensor& z, const Tensor& a_x,
    const Tensor& a_z, const Tensor& a_D, const Tensor& a_cond, const Tensor& a_uncond,
    const Maybe& later, const Maybe& earlier, double rate, const Maybe& F_cond,
    const Maybe& F_uncond, int64_t channels) {
  const int64_t elements = prediction.size(1);
  Inputs<T, S> in;
  in.prediction = row<T>(prediction), in.later = row<T>(later), in.earlier = row<T>(earlier);
  in.f_cond = row<T>(F_cond), in.f_uncond = row<T>(F_uncond);
  in.x = row<S>(x), in.z = row<S>(z);
  in.a_x = pointer<const float>(a_x), in.a_z = pointer<const float>(a_z);
  in.a_d = pointer<const float>(a_D), in.a_cond = pointer<const float>(a_cond);
  in.a_uncond = pointer<const float>(a_uncond);
  in.rate = static_cast<float>(rate);
  in.per_element = static_cast<float>(1. / elements);
  in.per_position = static_cast<float>(static_cast<double>(channels) / elements);
  in.skipped = later.has_value() ? prediction.size(0) - later->size(0) : 0;
  in.channels = static_cast<int>(channels);
  return in;
}

void forward(
    Tensor prediction, Tensor x, Tensor z, Tensor a_x, Tensor a_z, Tensor a_D, Tensor a_cond,
    Tensor a_uncond, Maybe later, Maybe earlier, double rate, Maybe F_cond, Maybe F_uncond,
    Tensor partial, int64_t channels, int64_t positions) {
  const Grid grid = grid_of(prediction.size(1) / channels, positions);
  const int64_t blocks = prediction.size(0) * grid.tiles;
  STD_TORCH_CHECK(
      partial.numel() == 2 * blocks, "tim_kernels_cuda: partial is (2, samples, blocks a sample)");
  const Stream stream(prediction);
  with_dtypes(prediction.scalar_type(), x.scalar_type(), [&](auto t, auto s) {
    using T = typename decltype(t)::type;
    using S = typename decltype(s)::type;
    const auto in = inputs<T, S>(
        prediction, x, z, a_x, a_z, a_D, a_cond, a_uncond, later, earlier, rate, F_cond, F_uncond,
        channels);
    float* const to = pointer<float>(partial);
    const size_t bytes = 2 * WARP * sizeof(float);
    const int log2_team = log2_team_of(channels);
    if (log2_team >= 0 && grid.length % CHUNK == 0 && all_aligned(in))
      return launch(
          stream, forward_teams<T, S>, blocks, THREADS, bytes, in, to, grid, log2_team);
    launch(stream, forward_any<T, S>, blocks, THREADS, bytes, in, to, grid);
  });
}

void backward(
    Maybe d_squared, Maybe d_cosine, Tensor prediction, Tensor x, Tensor z, Tensor a_x, Tensor a_z,
    Tensor a_D, Tensor a_cond, Tensor a_uncond, Maybe later, Maybe earlier, double rate,
    Maybe F_cond, Maybe F_uncond, Tensor dprediction, int64_t channels) {
  const int64_t samples = prediction.size(0), length = prediction.size(1) / channels;
  const Stream stream(prediction);
  with_dtypes(prediction.scalar_type(), x.scalar_type(), [&](auto t, auto s) {
    using T = typename decltype(t)::type;
    using S = typename decltype(s)::type;
    const auto in = inputs<T, S>(
        prediction, x, z, a_x, a_z, a_D, a_cond, a_uncond, later, earlier, rate, F_cond, F_uncond,
        channels);
    const Gradients<T> to{
        pointer<const float>(d_squared), pointer<const float>(d_cosine), pointer<T>(dprediction)};
    const int log2_team = log2_team_of(channels);
    if (log2_team >= 0 && length % CHUNK == 0 && all_aligned(in) && is_aligned(to.dp)) {
      const Grid grid = grid_of(length, THREADS * CHUNK >> log2_team);
      return launch(
          stream, backward_teams<T, S>, samples * grid.tiles, THREADS, 0, in, to, grid, log2_team);
    }
    const Grid grid = grid_of(length, THREADS);
    launch(stream, backward_any<T, S>, samples * grid.tiles, THREADS, 0, in, to, grid);
  });
}

}  // namespace
}  // namespace tim

TIM_IMPLEMENT(library) {
  library.impl("transition_loss_forward", TORCH_BOX(&tim::forward));
  library.impl("transition_loss_backward", TORCH_BOX(&tim::backward));
}
