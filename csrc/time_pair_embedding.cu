// The sinusoids of several times, forward and backward.
//
//     out[slot, sample] = [cos(τ·f), sin(τ·f)]      of (slots, B, 256)
//
// τ is the time that the slot asks for: t, r or t − r, by a code of two bits. The frequencies
// f_i = exp(−ln(10000)·i/128) are made in every thread in the steps of the reference: the exponent
// rounded to float, its exponential in double and then rounded. A thread has one frequency: the
// sinusoids are few and short, what costs is the latency of one angle, so that each has a block of
// its own forward. Backward a block has all slots of a sample, as dt and dr are sums over them.
//
// Why they are not fused into the first layer, a GEMM of (slots·B, 256) by (256, H). Its weights
// are 256·H·2 bytes of bfloat16, 590 KB at H = 1152. Keeping a sinusoid on chip would save 512
// bytes written and 512 read. For one slot that is, of weights, sinusoids and 2·H bytes of hidden
// activations a sample,
//
//     B              1      16      64     256
//     saved, KB      1      16      66     262
//     of, KB       593     643     803    1442      0.2, 2.5, 8, 18 %
//
// at most a quarter of a megabyte, which stays in any L2 cache from one launch to the next. What is
// left is one launch of the seven of "t-r" (three for each embedder), once a forward of 12 to 28
// blocks. For that a hand-written GEMM would have to equal cuBLAS at every B and H, dtype and
// architecture, and backward would need the sinusoids again for the weights' gradient. It does not
// pay.
#include "tensors.h"

namespace tim {
namespace {

constexpr int HALF = 128;  // frequencies

enum Code : unsigned { T_ALONE, R_ALONE, T_LESS_R };  // as in slots.py

template <typename T>
struct Times {
  const T *t, *r;
  int64_t t_stride, r_stride;
  unsigned codes;  // two bits a slot

  __device__ __forceinline__ unsigned code(int slot) const { return codes >> 2 * slot & 3; }

  __device__ __forceinline__ float at(int slot, int64_t sample) const {
    const float of_t = to_float(t[sample * t_stride]), of_r = to_float(r[sample * r_stride]);
    return code(slot) == T_ALONE ? of_t : code(slot) == R_ALONE ? of_r : of_t - of_r;
  }
};

__device__ __forceinline__ float frequency(int i) {
  constexpr float LOG_PERIOD = 9.210340371976184f;  // ln 10000
  return static_cast<float>(exp(static_cast<double>(-LOG_PERIOD * i / HALF)));
}

template <typename T, typename O>
__global__ void __launch_bounds__(HALF)
    time_pair_embedding_forward_kernel(Times<T> times, O* out, unsigned samples) {
  const int slot = blockIdx.x / samples, i = threadIdx.x;
  float cos, sin;
  cos_sin(times.at(slot, blockIdx.x % samples) * frequency(i), cos, sin);
  O* sinusoid = out + int64_t(blockIdx.x) * 2 * HALF;
  round_to(sinusoid[i], cos);
  round_to(sinusoid[HALF + i], sin);
}

template <typename T, typename O>
__global__ void __launch_bounds__(HALF)
    time_pair_embedding_backward_kernel(Times<T> times, const O* dout, T* dt, T* dr, int slots) {
  const int64_t sample = blockIdx.x;
  const int i = threadIdx.x;
  const float f = frequency(i);
  float sums[2] = {0.f, 0.f};  // of t and r
  for (int slot = 0; slot < slots; slot++) {
    float cos, sin;
    cos_sin(times.at(slot, sample) * f, cos, sin);
    const O* of_dout = dout + (int64_t(slot) * gridDim.x + sample) * 2 * HALF;
    const float d = (to_float(of_dout[HALF + i]) * cos - to_float(of_dout[i]) * sin) * f;
    if (times.code(slot) != R_ALONE) sums[0] += d;
    if (times.code(slot) != T_ALONE) sums[1] += times.code(slot) == R_ALONE ? d : -d;
  }
  block_sum(sums, shared<float>());
  if (i != 0) return;
  round_to(dt[sample], sums[0]);
  round_to(dr[sample], sums[1]);
}

// Call f(Type<T>, Type<O>) with the dtypes of times and of sinusoids.
template <typename F>
void with_both(const Tensor& t, const Tensor& sinusoids, F f) {
  with_dtype(t.scalar_type(), [&](auto time) {
    with_dtype(sinusoids.scalar_type(), [&](auto sinusoid) { f(time, sinusoid); });
  });
}

template <typename T>
Times<T> times_of(const Tensor& t, const Tensor& r, int64_t codes) {
  return {
      pointer<const T>(t), pointer<const T>(r), t.stride(0), r.stride(0),
      static_cast<unsigned>(codes)};
}

void forward(Tensor t, Tensor r, int64_t codes, Tensor out) {
  const Stream stream(t);
  const auto samples = static_cast<unsigned>(t.size(0));
  with_both(t, out, [&](auto time, auto sinusoid) {
    using T = typename decltype(time)::type;
    using O = typename decltype(sinusoid)::type;
    launch(
        stream, time_pair_embedding_forward_kernel<T, O>, out.size(0) * samples, HALF, 0,
        times_of<T>(t, r, codes), pointer<O>(out), samples);
  });
}

void backward(Tensor dout, Tensor t, Tensor r, int64_t codes, Tensor dt, Tensor dr) {
  const Stream stream(t);
  with_both(t, dout, [&](auto time, auto sinusoid) {
    using T = typename decltype(time)::type;
    using O = typename decltype(sinusoid)::type;
    launch(
        stream, time_pair_embedding_backward_kernel<T, O>, t.size(0), HALF,
        2 * WARP * sizeof(float), times_of<T>(t, r, codes), pointer<const O>(dout), pointer<T>(dt),
        pointer<T>(dr), static_cast<int>(dout.size(0)));
  });
}

}  // namespace
}  // namespace tim

TIM_IMPLEMENT(library) {
  library.impl("time_pair_embedding_forward", TORCH_BOX(&tim::forward));
  library.impl("time_pair_embedding_backward", TORCH_BOX(&tim::backward));
}
