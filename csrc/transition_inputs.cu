// A network's inputs along a trajectory, forward and backward.
//
//     x_t = alpha x + sigma z      v_t = d_alpha x + d_sigma z      x_pm = alpha_pm x + sigma_pm z
//
// each coefficient a number a sample, v_t and x_pm for the trailing samples only. x and z are read
// once for all four. Backward reads each gradient once for dx and dz, and x and z only if the
// coefficients have gradients: those are sums over a sample, of which a block gives its own.
// The tiling is that of samples.cuh.
#include "samples.cuh"

namespace tim {
namespace {

constexpr int OUTPUTS = 4;  // x_t, v_t, x_+, x_−

// The two coefficients of an output: zeros of one that is not made.
struct Pair {
  float alpha = 0.f, sigma = 0.f;
};

struct Coefficients {
  const float *alpha, *sigma, *d_alpha, *d_sigma, *alpha_pm, *sigma_pm;
  int64_t skipped, trailing;  // samples without v_t and x_pm, and with them

  // Of a sample: its index in each of the outputs, −1 where it is not, and the coefficients there.
  __device__ __forceinline__ void pick(
      int64_t sample, int64_t (&index)[OUTPUTS], Pair (&pair)[OUTPUTS]) const {
    const float* all[OUTPUTS][2] = {
        {alpha, sigma}, {d_alpha, d_sigma}, {alpha_pm, sigma_pm}, {alpha_pm, sigma_pm}};
    const int64_t late = sample - skipped;
    index[0] = sample, index[1] = index[2] = late, index[3] = late < 0 ? late : late + trailing;
#pragma unroll
    for (int k = 0; k < OUTPUTS; k++) {
      if (all[k][0] == nullptr) index[k] = -1;
      if (index[k] >= 0) pair[k] = {all[k][0][index[k]], all[k][1][index[k]]};
    }
  }
};

template <typename T>
struct Forward {
  PerSample<T> x, z;
  Coefficients coefficients;
  T *x_t, *v_t, *x_pm;  // contiguous
};

template <typename T>
struct Backward {
  PerSample<T> dx_t, dv_t, dx_pm, x, z;
  Coefficients coefficients;
  T *dx, *dz;      // contiguous, or nullptr
  float* partial;  // (8, blocks): Σ d·x and Σ d·z of each output; nullptr without
};

template <int W, typename T>
__global__ void __launch_bounds__(SAMPLE_THREADS)
    transition_inputs_forward_kernel(Forward<T> in, int64_t length, unsigned tiles) {
  const Part<W> part(length, tiles);
  Raw<W, T> x_raw[part.N], z_raw[part.N];
  part.load(in.x.at(part.sample), x_raw);
  part.load(in.z.at(part.sample), z_raw);
  int64_t index[OUTPUTS];
  Pair pair[OUTPUTS];
  in.coefficients.pick(part.sample, index, pair);
  const auto mix = [&](int k, T* out) {
    if (index[k] < 0) return;
    out += index[k] * length;
#pragma unroll
    for (int i = 0; i < part.N; i++) {
      if (!part.has(i)) continue;
      float x[W], z[W];
      x_raw[i].widen(x);
      z_raw[i].widen(z);
#pragma unroll
      for (int w = 0; w < W; w++) x[w] = pair[k].alpha * x[w] + pair[k].sigma * z[w];
      store_part(out + part.at(i), x);
    }
  };
  mix(0, in.x_t);
  mix(1, in.v_t);
  mix(2, in.x_pm);
  mix(3, in.x_pm);
}

template <int W, typename T>
__global__ void __launch_bounds__(SAMPLE_THREADS)
    transition_inputs_backward_kernel(Backward<T> in, int64_t length, unsigned tiles) {
  const Part<W> part(length, tiles);
  int64_t index[OUTPUTS];
  Pair pair[OUTPUTS];
  in.coefficients.pick(part.sample, index, pair);
  const PerSample<T> gradients[OUTPUTS] = {in.dx_t, in.dv_t, in.dx_pm, in.dx_pm};
  Raw<W, T> x_raw[part.N] = {}, z_raw[part.N] = {}, d_raw[OUTPUTS][part.N] = {};
#pragma unroll
  for (int k = 0; k < OUTPUTS; k++) {
    if (gradients[k].data == nullptr) index[k] = -1;
    if (index[k] >= 0) part.load(gradients[k].at(index[k]), d_raw[k]);
  }
  if (in.partial != nullptr) {
    part.load(in.x.at(part.sample), x_raw);
    part.load(in.z.at(part.sample), z_raw);
  }
  float sums[2 * OUTPUTS] = {};
#pragma unroll
  for (int i = 0; i < part.N; i++) {
    if (!part.has(i)) continue;
    float x[W], z[W], dx[W] = {}, dz[W] = {};
    x_raw[i].widen(x);
    z_raw[i].widen(z);
#pragma unroll
    for (int k = 0; k < OUTPUTS; k++) {
      if (index[k] < 0) continue;
      float d[W];
      d_raw[k][i].widen(d);
#pragma unroll
      for (int w = 0; w < W; w++) {
        dx[w] += pair[k].alpha * d[w];
        dz[w] += pair[k].sigma * d[w];
        sums[2 * k] += d[w] * x[w];
        sums[2 * k + 1] += d[w] * z[w];
      }
    }
    const int64_t out = part.sample * length + part.at(i);
    if (in.dx != nullptr) store_part(in.dx + out, dx);
    if (in.dz != nullptr) store_part(in.dz + out, dz);
  }
  if (in.partial == nullptr) return;
  block_sum(sums, shared<float>());
  if (threadIdx.x != 0) return;
#pragma unroll
  for (int k = 0; k < 2 * OUTPUTS; k++) in.partial[int64_t(k) * gridDim.x + blockIdx.x] = sums[k];
}

Coefficients coefficients(
    int64_t samples, const Tensor& alpha, const Tensor& sigma, const Maybe& d_alpha,
    const Maybe& d_sigma, const Maybe& alpha_pm, const Maybe& sigma_pm) {
  int64_t trailing = 0;
  if (d_alpha.has_value()) trailing = d_alpha->size(0);
  if (alpha_pm.has_value()) trailing = alpha_pm->size(0) / 2;
  return {
      pointer<const float>(alpha),
      pointer<const float>(sigma),
      pointer<const float>(d_alpha),
      pointer<const float>(d_sigma),
      pointer<const float>(alpha_pm),
      pointer<const float>(sigma_pm),
      samples - trailing,
      trailing};
}

void forward(
    Tensor x, Tensor z, Tensor alpha, Tensor sigma, Maybe d_alpha, Maybe d_sigma, Maybe alpha_pm,
    Maybe sigma_pm, Tensor x_t, Maybe v_t, Maybe x_pm) {
  const int64_t samples = x.size(0), length = x.size(1);
  const unsigned tiles = tiles_of(length);
  const Stream stream(x);
  with_dtype(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const Forward<T> in{
        per_sample<T>(x),
        per_sample<T>(z),
        coefficients(samples, alpha, sigma, d_alpha, d_sigma, alpha_pm, sigma_pm),
        pointer<T>(x_t),
        pointer<T>(v_t),
        pointer<T>(x_pm)};
    const auto run = [&](auto width) {
      launch(
          stream, transition_inputs_forward_kernel<width, T>, samples * tiles, SAMPLE_THREADS, 0,
          in, length, tiles);
    };
    with_width(length, run, in.x, in.z, in.x_t, in.v_t, in.x_pm);
  });
}

void backward(
    Maybe dx_t, Maybe dv_t, Maybe dx_pm, Tensor x, Tensor z, Tensor alpha, Tensor sigma,
    Maybe d_alpha, Maybe d_sigma, Maybe alpha_pm, Maybe sigma_pm, Maybe dx, Maybe dz,
    Maybe partial) {
  const int64_t samples = x.size(0), length = x.size(1);
  const unsigned tiles = tiles_of(length);
  STD_TORCH_CHECK(
      !partial.has_value() || partial->numel() == 2 * OUTPUTS * samples * tiles,
      "tim_kernels_cuda: partial is (8, samples, blocks a sample)");
  const Stream stream(x);
  with_dtype(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const bool is_read = partial.has_value();
    const Backward<T> in{
        per_sample<T>(dx_t),
        per_sample<T>(dv_t),
        per_sample<T>(dx_pm),
        is_read ? per_sample<T>(x) : PerSample<T>{},
        is_read ? per_sample<T>(z) : PerSample<T>{},
        coefficients(samples, alpha, sigma, d_alpha, d_sigma, alpha_pm, sigma_pm),
        pointer<T>(dx),
        pointer<T>(dz),
        pointer<float>(partial)};
    const size_t bytes = 2 * OUTPUTS * WARP * sizeof(float);
    const auto run = [&](auto width) {
      launch(
          stream, transition_inputs_backward_kernel<width, T>, samples * tiles, SAMPLE_THREADS,
          bytes, in, length, tiles);
    };
    with_width(length, run, in.dx_t, in.dv_t, in.dx_pm, in.x, in.z, in.dx, in.dz);
  });
}

}  // namespace
}  // namespace tim

TIM_IMPLEMENT(library) {
  library.impl("transition_inputs_forward", TORCH_BOX(&tim::forward));
  library.impl("transition_inputs_backward", TORCH_BOX(&tim::backward));
}
