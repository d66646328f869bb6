// A guided step of the sampler, forward and backward.
//
//     F = F_uncond + guidance (F_cond − F_uncond)      x_r = a x + b F + c noise
//
// without F_uncond, F = F_cond; a, b, c and guidance are numbers of a sample. All in the state's
// precision: double if the state is, else float. State and noise are of one dtype, both F of
// another. Backward reads the inputs only if the coefficients have gradients: those are sums over a
// sample, of which a block gives its own. The tiling is that of samples.cuh.
#include "samples.cuh"

namespace tim {
namespace {

// The precision that a state is computed in.
template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename A, typename T>
__device__ __forceinline__ A widen(T x) {
  if constexpr (std::is_same_v<T, double>) {
    return x;
  } else {
    return to_float(x);
  }
}

template <typename T, typename F>
struct Inputs {
  PerSample<T> x, noise;
  PerSample<F> F_cond, F_uncond;
  const Wide<T>*guidance, *a, *b, *c;

  // Guidance is 1 without F_uncond, which is then zero, and c is 0 without noise.
  __device__ __forceinline__ Wide<T> guidance_of(int64_t sample) const {
    return guidance == nullptr ? 1 : guidance[sample];
  }
  __device__ __forceinline__ Wide<T> c_of(int64_t sample) const {
    return c == nullptr ? 0 : c[sample];
  }
};

// What a thread has of a sample's inputs; zeros of what there is not.
template <int W, typename T, typename F>
struct Loaded {
  using A = Wide<T>;
  static constexpr int N = Part<W>::N;
  Raw<W, T> x[N] = {}, noise[N] = {};
  Raw<W, F> F_cond[N] = {}, F_uncond[N] = {};

  __device__ __forceinline__ Loaded(const Inputs<T, F>& in, const Part<W>& part) {
    part.load(in.x.at(part.sample), x);
    part.load(in.F_cond.at(part.sample), F_cond);
    if (in.F_uncond.data != nullptr) part.load(in.F_uncond.at(part.sample), F_uncond);
    if (in.noise.data != nullptr) part.load(in.noise.at(part.sample), noise);
  }

  // F_cond − F_uncond and F.
  __device__ __forceinline__ A difference(int i, int w) const {
    return widen<A>(F_cond[i].value[w]) - widen<A>(F_uncond[i].value[w]);
  }
  __device__ __forceinline__ A guided(int i, int w, A guidance) const {
    return widen<A>(F_uncond[i].value[w]) + guidance * difference(i, w);
  }
};

template <int W, typename T, typename F>
__global__ void __launch_bounds__(SAMPLE_THREADS)
    transition_step_forward_kernel(Inputs<T, F> in, T* out, int64_t length, unsigned tiles) {
  using A = Wide<T>;
  const Part<W> part(length, tiles);
  const Loaded<W, T, F> at(in, part);
  const A a = in.a[part.sample], b = in.b[part.sample], c = in.c_of(part.sample);
  const A guidance = in.guidance_of(part.sample);
#pragma unroll
  for (int i = 0; i < part.N; i++) {
    if (!part.has(i)) continue;
    A y[W];
#pragma unroll
    for (int w = 0; w < W; w++) {
      y[w] = a * widen<A>(at.x[i].value[w]) + b * at.guided(i, w, guidance);
      y[w] += c * widen<A>(at.noise[i].value[w]);
    }
    store_part(out + part.sample * length + part.at(i), y);
  }
}

constexpr int COEFFICIENTS = 4;  // a, b, c, guidance

template <typename T, typename F>
struct Gradients {
  PerSample<T> d;
  T *dx, *dnoise;  // contiguous, or nullptr
  F *dF_cond, *dF_uncond;
  Wide<T>* partial;  // (4, blocks), or nullptr
};

template <int W, typename A, typename T, typename F>
__device__ __forceinline__ void store_scaled(T* out, int64_t at, A by, const Raw<W, F>& d) {
  if (out == nullptr) return;
  A y[W];
#pragma unroll
  for (int w = 0; w < W; w++) y[w] = by * widen<A>(d.value[w]);
  store_part(out + at, y);
}

template <int W, typename T, typename F>
__global__ void __launch_bounds__(SAMPLE_THREADS) transition_step_backward_kernel(
    Inputs<T, F> in, Gradients<T, F> to, int64_t length, unsigned tiles) {
  using A = Wide<T>;
  const Part<W> part(length, tiles);
  const A a = in.a[part.sample], b = in.b[part.sample], c = in.c_of(part.sample);
  const A guidance = in.guidance_of(part.sample), bg = b * guidance;
  Raw<W, T> d[part.N] = {};
  part.load(to.d.at(part.sample), d);
#pragma unroll
  for (int i = 0; i < part.N; i++) {
    if (!part.has(i)) continue;
    const int64_t out = part.sample * length + part.at(i);
    store_scaled(to.dx, out, a, d[i]);
    store_scaled(to.dnoise, out, c, d[i]);
    store_scaled(to.dF_cond, out, bg, d[i]);
    store_scaled(to.dF_uncond, out, b - bg, d[i]);
  }
  if (to.partial == nullptr) return;

  const Loaded<W, T, F> at(in, part);
  A sums[COEFFICIENTS] = {};
#pragma unroll
  for (int i = 0; i < part.N; i++) {
    if (!part.has(i)) continue;
#pragma unroll
    for (int w = 0; w < W; w++) {
      const A gradient = widen<A>(d[i].value[w]);
      sums[0] += gradient * widen<A>(at.x[i].value[w]);
      sums[1] += gradient * at.guided(i, w, guidance);
      sums[2] += gradient * widen<A>(at.noise[i].value[w]);
      sums[3] += b * gradient * at.difference(i, w);
    }
  }
  block_sum(sums, shared<A>());
  if (threadIdx.x != 0) return;
#pragma unroll
  for (int k = 0; k < COEFFICIENTS; k++) to.partial[int64_t(k) * gridDim.x + blockIdx.x] = sums[k];
}

// Call f(Type<T>, Type<F>) with the dtypes of the state and of the network: any network under a
// double or float state (but no double one under float), else one dtype for both.
template <typename Call>
void with_state(ScalarType state, ScalarType network, Call f) {
  if (state == ScalarType::Double) {
    if (network == ScalarType::Double) return f(Type<double>{}, Type<double>{});
    return with_dtype(network, [&](auto type) { f(Type<double>{}, type); });
  }
  with_dtype(network, [&](auto type) {
    if (state == network) return f(type, type);
    STD_TORCH_CHECK(
        state == ScalarType::Float, "tim_kernels_cuda: the state is narrower than the network");
    f(Type<float>{}, type);
  });
}

template <typename T, typename F>
Inputs<T, F> inputs(
    const Tensor& x, const Tensor& F_cond, const Maybe& F_uncond, const Maybe& noise,
    const Maybe& guidance, const Tensor& a, const Tensor& b, const Maybe& c) {
  using A = const Wide<T>;
  return {per_sample<T>(x),        per_sample<T>(noise), per_sample<F>(F_cond),
          per_sample<F>(F_uncond), pointer<A>(guidance), pointer<A>(a),
          pointer<A>(b),           pointer<A>(c)};
}

void forward(
    Tensor x, Tensor F_cond, Maybe F_uncond, Maybe noise, Maybe guidance, Tensor a, Tensor b,
    Maybe c, Tensor out) {
  const int64_t length = x.size(1);
  const unsigned tiles = tiles_of(length);
  const int64_t blocks = x.size(0) * tiles;
  const Stream stream(x);
  with_state(x.scalar_type(), F_cond.scalar_type(), [&](auto state, auto network) {
    using T = typename decltype(state)::type;
    using F = typename decltype(network)::type;
    const auto in = inputs<T, F>(x, F_cond, F_uncond, noise, guidance, a, b, c);
    T* const to = pointer<T>(out);
    const auto run = [&](auto width) {
      launch(
          stream, transition_step_forward_kernel<width, T, F>, blocks, SAMPLE_THREADS, 0, in, to,
          length, tiles);
    };
    with_width(length, run, in.x, in.F_cond, in.F_uncond, in.noise, to);
  });
}

void backward(
    Tensor d, Tensor x, Tensor F_cond, Maybe F_uncond, Maybe noise, Maybe guidance, Tensor a,
    Tensor b, Maybe c, Maybe dx, Maybe dF_cond, Maybe dF_uncond, Maybe dnoise, Maybe partial) {
  const int64_t length = x.size(1);
  const unsigned tiles = tiles_of(length);
  const int64_t blocks = x.size(0) * tiles;
  STD_TORCH_CHECK(
      !partial.has_value() || partial->numel() == COEFFICIENTS * blocks,
      "tim_kernels_cuda: partial is (4, samples, blocks a sample)");
  const Stream stream(x);
  with_state(x.scalar_type(), F_cond.scalar_type(), [&](auto state, auto network) {
    using T = typename decltype(state)::type;
    using F = typename decltype(network)::type;
    const auto in = inputs<T, F>(x, F_cond, F_uncond, noise, guidance, a, b, c);
    const Gradients<T, F> to{per_sample<T>(d),    pointer<T>(dx),        pointer<T>(dnoise),
                             pointer<F>(dF_cond), pointer<F>(dF_uncond), pointer<Wide<T>>(partial)};
    const size_t bytes = COEFFICIENTS * WARP * sizeof(Wide<T>);
    const auto run = [&](auto width) {
      launch(
          stream, transition_step_backward_kernel<width, T, F>, blocks, SAMPLE_THREADS, bytes, in,
          to, length, tiles);
    };
    with_width(
        length, run, in.x, in.F_cond, in.F_uncond, in.noise, to.d, to.dx, to.dnoise, to.dF_cond,
        to.dF_uncond);
  });
}

}  // namespace
}  // namespace tim

TIM_IMPLEMENT(library) {
  library.impl("transition_step_forward", TORCH_BOX(&tim::forward));
  library.impl("transition_step_backward", TORCH_BOX(&tim::backward));
}
