// A network's inputs along a trajectory, forward and backward.
//
//     x_t = α x + σ z      v_t = α' x + σ' z      x_± = α± x + σ± z
//
// each coefficient a number a sample, v_t and x_± for the trailing samples only. x and z are read
// once for all four. Backward reads each gradient once for dx and dz, and x and z only if the
// coefficients have gradients: those are sums over a sample, of which a block gives its own.
// The tiling is that of samples.cuh.
#include "samples.cuh"

namespace tim {
namespace {

constexpr int OUTPUTS = 4;  // x_t, v_t, x_+, x_−

struct Coefficients {
  const float *alpha, *sigma, *d_alpha, *d_sigma, *alpha_pm, *sigma_pm;
  int64_t skipped, trailing;  // samples without v_t and x_±, and with them

  // Of the outputs of a sample: the row of each, −1 without one, and its coefficients.
  __device__ __forceinline__ void pick(
      int64_t sample, int64_t (&row)[OUTPUTS], Pair (&pair)[OUTPUTS]) const {
    const float* all[OUTPUTS][2] = {
        {alpha, sigma}, {d_alpha, d_sigma}, {alpha_pm, sigma_pm}, {alpha_pm, sigma_pm}};
    const int64_t late = sample - skipped;
    row[0] = sample, row[1] = row[2] = late, row[3] = late < 0 ? late : late + trailing;
#pragma unroll
    for (int k = 0; k < OUTPUTS; k++) {
      if (all[k][0] == nullptr) row[k] = -1;
      if (row[k] >= 0) pair[k] = {all[k][0][row[k]], all[k][1][row[k]]};
    }
  }
};

template <typename T>
struct Forward {
  Row<T> x, z;
  Coefficients coefficients;
  T *x_t, *v_t, *x_pm;  // contiguous
};

template <typename T>
struct Backward {
  Row<T> dx_t, dv_t, dx_pm, x, z;
  Coefficients coefficients;
  T *dx, *dz;      // contiguous, or nullptr
  float* partial;  // (8, blocks): Σ d·x and Σ d·z of each output; nullptr without
};

template <int W, typename T>
__global__ void __launch_bounds__(SAMPLE_THREADS) forward_part(
    Forward<T> in, int64_t length, unsigned tiles) {
  const Part<W> part(length, tiles);
  Raw<W, T> x_raw[part.N], z_raw[part.N];
  part.load(in.x.at(part.sample), x_raw);
  part.load(in.z.at(part.sample), z_raw);
  int64_t row[OUTPUTS];
  Pair pair[OUTPUTS];
  in.coefficients.pick(part.sample, row, pair);
  const auto mix = [&](int k, T* out) {
    if (row[k] < 0) return;
    out += row[k] * length;
#pragma unroll
    for (int i = 0; i < part.N; i++) {
      if (!part.has(i)) continue;
      float x[W], z[W];
      x_raw[i].widen(x);
      z_raw[i].widen(z);
#pragma unroll
      for (int w = 0; w < W; w++) x[w] = pair[k].a * x[w] + pair[k].b * z[w];
      store_part(out + part.at(i), x);
    }
  };
  mix(0, in.x_t);
  mix(1, in.v_t);
  mix(2, in.x_pm);
  mix(3, in.x_pm);
}

template <int W, typename T>
__global__ void __launch_bounds__(SAMPLE_THREADS) backward_part(
    Backward<T> in, int64_t length, unsigned tiles) {
  const Part<W> part(length, tiles);
  int64_t row[OUTPUTS];
  Pair pair[OUTPUTS];
  in.coefficients.pick(part.sample, row, pair);
  const Row<T> d_rows[OUTPUTS] = {in.dx_t, in.dv_t, in.dx_pm, in.dx_pm};
  Raw<W, T> x_raw[part.N] = {}, z_raw[part.N] = {}, d_raw[OUTPUTS][part.N] = {};
#pragma unroll
  for (int k = 0; k < OUTPUTS; k++) {
    if (d_rows[k].data == nullptr) row[k] = -1;
    if (row[k] >= 0) part.load(d_rows[k].at(row[k]), d_raw[k]);
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
      if (row[k] < 0) continue;
      float d[W];
      d_raw[k][i].widen(d);
#pragma unroll
      for (int w = 0; w < W; w++) {
        dx[w] += pair[k].a * d[w];
        dz[w] += pair[k].b * d[w];
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
  return {pointer<const float>(alpha),    pointer<const float>(sigma),
          pointer<const float>(d_alpha),  pointer<const float>(d_sigma),
          pointer<const float>(alpha_pm), pointer<const float>(sigma_pm),
          samples - trailing,             trailing};
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
        row<T>(x), row<T>(z),
        coefficients(samples, alpha, sigma, d_alpha, d_sigma, alpha_pm, sigma_pm),
        pointer<T>(x_t), pointer<T>(v_t), pointer<T>(x_pm)};
    const auto run = [&](auto width) {
      launch(stream, forward_part<width, T>, samples * tiles, SAMPLE_THREADS, 0, in, length, tiles);
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
        row<T>(dx_t), row<T>(dv_t), row<T>(dx_pm), is_read ? row<T>(x) : Row<T>{},
        is_read ? row<T>(z) : Row<T>{},
        coefficients(samples, alpha, sigma, d_alpha, d_sigma, alpha_pm, sigma_pm),
        pointer<T>(dx), pointer<T>(dz), pointer<float>(partial)};
    const size_t bytes = 2 * OUTPUTS * WARP * sizeof(float);
    const auto run = [&](auto width) {
      launch(
          stream, backward_part<width, T>, samples * tiles, SAMPLE_THREADS, bytes, in, length,
          tiles);
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
