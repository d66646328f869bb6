// SwiGLU's elementwise half, forward and backward.
//
//     out = g·σ(g)·v
//     dg  = d·v·(σ(g) + g·σ(g)·σ(−g))      dv = d·g·σ(g)
//
// Gate, value, their gradients, d and out are (tokens, C) with a stride of tokens each, which is
// all that tells the half of a packed tensor from a tensor of its own. What a thread works on at a
// time is 8 channels, or one where a width or a view does not allow 16-byte accesses. It has
// several such units, a block's width apart, so that consecutive threads read consecutive units,
// whatever the width; all their loads go out before the first result: 8 of 16 bytes forward, 6
// backward. Units are counted in 32 bits, as finding the token of one is a division, and in a
// launch for every 2^31 of them.
//
// σ comes from e = exp(−|g|) ≤ 1, so that nothing overflows and σ(−g) keeps its digits. The
// instructions of an element are what could hold up the widest memories, so that 2-byte dtypes take
// e by one multiplication and one ex2, right to 4e-7 where |g| ≤ 10: they round a thousand times
// coarser.
//
// What sums gradients over tokens besides, for the biases of gate and value, gives a thread 8
// channels of all its block's tokens, two at a time: the sums stay in its registers, without a
// barrier. Sums over blocks are torch.sum's.
#include <algorithm>

#include "tensors.h"

namespace tim {
namespace {

constexpr int THREADS = 128, FORWARD_UNITS = 4, BACKWARD_UNITS = 2;

#ifdef __CUDACC__
__device__ __forceinline__ float power_of_2(float x) {
  asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
}
__device__ __forceinline__ float reciprocal(float x) {
  asm("rcp.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
}
#else
inline float power_of_2(float x) { return exp2f(x); }
inline float reciprocal(float x) { return 1.f / x; }
#endif

template <typename T>
struct Sigmoid {
  float of, of_minus;  // σ(g), σ(−g)

  __device__ __forceinline__ explicit Sigmoid(float g) {
    constexpr float LOG2_E = 1.44269504f;
    const float e = sizeof(T) == 2 ? power_of_2(-LOG2_E * fabsf(g)) : expf(-fabsf(g));
    const float large = reciprocal(1.f + e), small = e * large;
    of = g < 0.f ? small : large;
    of_minus = g < 0.f ? large : small;
  }
};

// The N units of a thread: unit i is at channel column[i] of token[i], if it is there.
template <int W, int N>
struct Units {
  int64_t token[N];
  int column[N];
  bool is_there[N];

  __device__ __forceinline__ Units(unsigned units, unsigned units_per_token) {
#pragma unroll
    for (int i = 0; i < N; i++) {
      const unsigned unit = (blockIdx.x * N + i) * THREADS + threadIdx.x;
      is_there[i] = unit < units;
      const unsigned t = unit / units_per_token;
      token[i] = t, column[i] = static_cast<int>(unit - t * units_per_token) * W;
    }
  }

  template <typename T>
  __device__ __forceinline__ void load(Tokens<const T> x, Raw<W, T> (&raw)[N]) const {
#pragma unroll
    for (int i = 0; i < N; i++)
      if (is_there[i]) raw[i].load(x.at(0, token[i]) + column[i]);
  }
};

template <int W, typename T>
__global__ void __launch_bounds__(THREADS) swiglu_forward_kernel(
    Tokens<const T> gate, Tokens<const T> value, Tokens<T> out, unsigned units,
    unsigned units_per_token) {
  const Units<W, FORWARD_UNITS> at(units, units_per_token);
  Raw<W, T> g_raw[FORWARD_UNITS], v_raw[FORWARD_UNITS];
  at.load(gate, g_raw);
  at.load(value, v_raw);
#pragma unroll
  for (int j = 0; j < FORWARD_UNITS; j++) {
    if (!at.is_there[j]) continue;
    float g[W], v[W];
    g_raw[j].widen(g);
    v_raw[j].widen(v);
#pragma unroll
    for (int i = 0; i < W; i++) v[i] *= g[i] * Sigmoid<T>(g[i]).of;
    store(out.at(0, at.token[j]) + at.column[j], v);
  }
}

// g and v become their gradients.
template <typename T, int W>
__device__ __forceinline__ void differentiate(const float (&d)[W], float (&g)[W], float (&v)[W]) {
#pragma unroll
  for (int i = 0; i < W; i++) {
    const Sigmoid<T> sigma(g[i]);
    const float silu = g[i] * sigma.of;
    g[i] = d[i] * v[i] * (sigma.of + silu * sigma.of_minus);
    v[i] = d[i] * silu;
  }
}

template <int W, typename T>
__global__ void __launch_bounds__(THREADS) swiglu_backward_kernel(
    Tokens<const T> dout, Tokens<const T> gate, Tokens<const T> value, Tokens<T> dgate,
    Tokens<T> dvalue, unsigned units, unsigned units_per_token) {
  const Units<W, BACKWARD_UNITS> at(units, units_per_token);
  Raw<W, T> d_raw[BACKWARD_UNITS], g_raw[BACKWARD_UNITS], v_raw[BACKWARD_UNITS];
  at.load(dout, d_raw);
  at.load(gate, g_raw);
  at.load(value, v_raw);
#pragma unroll
  for (int j = 0; j < BACKWARD_UNITS; j++) {
    if (!at.is_there[j]) continue;
    float d[W], g[W], v[W];
    d_raw[j].widen(d);
    g_raw[j].widen(g);
    v_raw[j].widen(v);
    differentiate<T>(d, g, v);
    store(dgate.at(0, at.token[j]) + at.column[j], g);
    store(dvalue.at(0, at.token[j]) + at.column[j], v);
  }
}

// `partial` is (2, blocks that do not share tokens, C): sums of dgate and of dvalue.
template <int W, typename T>
__global__ void __launch_bounds__(THREADS) swiglu_summed_backward_kernel(
    Tokens<const T> dout, Tokens<const T> gate, Tokens<const T> value, Tokens<T> dgate,
    Tokens<T> dvalue, float* partial, int64_t tokens, int64_t tokens_per_block, unsigned columns,
    int C) {
  constexpr int N = BACKWARD_UNITS;
  const int64_t share = blockIdx.x / columns, shares = gridDim.x / columns;
  const int64_t begin = share * tokens_per_block;
  const int64_t end = begin + tokens_per_block < tokens ? begin + tokens_per_block : tokens;
  const int column = ((blockIdx.x % columns) * THREADS + threadIdx.x) * W;
  if (column >= C) return;
  float g_sum[W] = {}, v_sum[W] = {};
  for (int64_t first = begin; first < end; first += N) {
    Raw<W, T> d_raw[N], g_raw[N], v_raw[N];
#pragma unroll
    for (int j = 0; j < N; j++) {
      if (first + j >= end) continue;
      d_raw[j].load(dout.at(0, first + j) + column);
      g_raw[j].load(gate.at(0, first + j) + column);
      v_raw[j].load(value.at(0, first + j) + column);
    }
#pragma unroll
    for (int j = 0; j < N; j++) {
      if (first + j >= end) continue;
      float d[W], g[W], v[W];
      d_raw[j].widen(d);
      g_raw[j].widen(g);
      v_raw[j].widen(v);
      differentiate<T>(d, g, v);
#pragma unroll
      for (int i = 0; i < W; i++) g_sum[i] += g[i], v_sum[i] += v[i];
      store(dgate.at(0, first + j) + column, g);
      store(dvalue.at(0, first + j) + column, v);
    }
  }
  store(partial + share * C + column, g_sum);
  store(partial + (shares + share) * C + column, v_sum);
}

template <typename T>
Tokens<T> skip(Tokens<T> x, int64_t tokens) {
  return {x.at(0, tokens), x.b, x.n};
}

// f(first token, units, blocks) for slices of the tokens whose units can be counted in 32 bits.
template <typename F>
void over_slices(int64_t tokens, int64_t units_per_token, int units_per_thread, F f) {
  const int64_t most = std::max<int64_t>(1, (int64_t(1) << 31) / units_per_token);
  const int64_t units_per_block = int64_t(units_per_thread) * THREADS;
  for (int64_t first = 0; first < tokens; first += most) {
    const int64_t units = std::min(most, tokens - first) * units_per_token;
    f(first, static_cast<unsigned>(units), (units + units_per_block - 1) / units_per_block);
  }
}

void forward(Tensor gate, Tensor value, Tensor out) {
  const int64_t N = out.size(0), C = out.size(1);
  const Stream stream(out);
  with_dtype(out.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const auto g = tokens<const T>(gate, true), v = tokens<const T>(value, true);
    const auto o = tokens<T>(out, true);
    const auto run = [&](auto width) {
      constexpr int W = width;
      over_slices(N, C / W, FORWARD_UNITS, [&](int64_t first, unsigned units, int64_t blocks) {
        launch(
            stream, swiglu_forward_kernel<W, T>, blocks, THREADS, 0, skip(g, first), skip(v, first),
            skip(o, first), units, C / W);
      });
    };
    with_width(C, run, g, v, o);
  });
}

// f(type, width, and all of these as tokens of that type).
template <typename F>
void with_gradients(
    Tensor dout, Tensor gate, Tensor value, Tensor dgate, Tensor dvalue, const F& f) {
  with_dtype(dgate.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const auto d = tokens<const T>(dout, true), g = tokens<const T>(gate, true);
    const auto v = tokens<const T>(value, true);
    const auto dg = tokens<T>(dgate, true), dv = tokens<T>(dvalue, true);
    const auto run = [&](auto width) { f(type, width, d, g, v, dg, dv); };
    with_width(dgate.size(1), run, d, g, v, dg, dv);
  });
}

void backward(Tensor dout, Tensor gate, Tensor value, Tensor dgate, Tensor dvalue) {
  const int64_t N = dgate.size(0), C = dgate.size(1);
  const Stream stream(dgate);
  const auto run = [&](auto type, auto width, auto d, auto g, auto v, auto dg, auto dv) {
    using T = typename decltype(type)::type;
    constexpr int W = width;
    over_slices(N, C / W, BACKWARD_UNITS, [&](int64_t first, unsigned units, int64_t blocks) {
      launch(
          stream, swiglu_backward_kernel<W, T>, blocks, THREADS, 0, skip(d, first), skip(g, first),
          skip(v, first), skip(dg, first), skip(dv, first), units, C / W);
    });
  };
  with_gradients(dout, gate, value, dgate, dvalue, run);
}

void summed_backward(
    Tensor dout, Tensor gate, Tensor value, Tensor dgate, Tensor dvalue, Tensor partial,
    int64_t tokens_per_block) {
  const int64_t N = dgate.size(0), C = dgate.size(1);
  const Stream stream(dgate);
  const auto run = [&](auto type, auto width, auto d, auto g, auto v, auto dg, auto dv) {
    using T = typename decltype(type)::type;
    constexpr int W = width;
    const int64_t columns = (C / W + THREADS - 1) / THREADS;
    launch(
        stream, swiglu_summed_backward_kernel<W, T>, partial.size(1) * columns, THREADS, 0, d, g, v,
        dg, dv, pointer<float>(partial), N, tokens_per_block, columns, C);
  };
  with_gradients(dout, gate, value, dgate, dvalue, run);
}

}  // namespace
}  // namespace tim

TIM_IMPLEMENT(library) {
  library.impl("swiglu_forward", TORCH_BOX(&tim::forward));
  library.impl("swiglu_backward", TORCH_BOX(&tim::backward));
  library.impl("swiglu_summed_backward", TORCH_BOX(&tim::summed_backward));
}
