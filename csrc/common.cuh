// What every kernel shares: element types as float, chunks of channels in registers, sums.
//
// All arithmetic is in float32; a value is rounded once, when it is stored. Kernels use dynamic
// shared memory alone, through `shared<T>()`.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace tim {

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int CHUNK = 8;  // channels: 16 bytes of a 2-byte dtype, twice 16 of float

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

__device__ __forceinline__ void round_to(float& to, float x) { to = x; }
__device__ __forceinline__ void round_to(__nv_bfloat16& to, float x) {
  to = __float2bfloat16_rn(x);
}
__device__ __forceinline__ void round_to(__half& to, float x) { to = __float2half_rn(x); }

// W channels as they are in memory; W = 8 takes 16-byte accesses and wants p aligned to them.
template <int W, typename T>
struct alignas(W == 1 ? sizeof(T) : sizeof(uint4)) Raw {
  static constexpr int PARTS = W * sizeof(T) / sizeof(uint4);
  T value[W];

  __device__ __forceinline__ void load(const T* p) {
    if constexpr (W == 1) {
      value[0] = *p;
    } else {
#pragma unroll
      for (int i = 0; i < PARTS; i++)
        reinterpret_cast<uint4*>(value)[i] = reinterpret_cast<const uint4*>(p)[i];
    }
  }

  __device__ __forceinline__ void store(T* p) const {
    if constexpr (W == 1) {
      *p = value[0];
    } else {
#pragma unroll
      for (int i = 0; i < PARTS; i++)
        reinterpret_cast<uint4*>(p)[i] = reinterpret_cast<const uint4*>(value)[i];
    }
  }

  __device__ __forceinline__ void widen(float (&x)[W]) const {
    if constexpr (W > 1 && std::is_same_v<T, __nv_bfloat16>) {  // an instruction each, of a pair
#pragma unroll
      for (int i = 0; i < W; i += 2) {
        const uint32_t pair = reinterpret_cast<const uint32_t*>(value)[i / 2];
        x[i] = __uint_as_float(pair << 16), x[i + 1] = __uint_as_float(pair & 0xffff0000u);
      }
    } else {
#pragma unroll
      for (int i = 0; i < W; i++) x[i] = to_float(value[i]);
    }
  }
};

template <int W, typename T>
__device__ __forceinline__ void load(const T* p, float (&x)[W]) {
  Raw<W, T> raw;
  raw.load(p);
  raw.widen(x);
}

template <int W, typename T>
__device__ __forceinline__ void store(T* p, const float (&x)[W]) {
  Raw<W, T> raw;
#pragma unroll
  for (int i = 0; i < W; i++) round_to(raw.value[i], x[i]);
  raw.store(p);
}

// Dynamic shared memory of the block.
template <typename T>
__device__ __forceinline__ T* shared() {
#ifdef __CUDACC__
  extern __shared__ __align__(16) unsigned char memory[];
  return reinterpret_cast<T*>(memory);
#else
  return static_cast<T*>(emulation::dynamic_shared());
#endif
}

// cos and sin of an angle below 2^50 to float32 accuracy; NaN of one that is not finite. The
// multiple of π/2 is taken off in double, and what is left, |r| ≤ π/4, goes into the Taylor series,
// whose remainders are below 2e-9. (CUDA's own functions carry a slow path that needs a stack.)
__device__ __forceinline__ void cos_sin(float angle, float& cos, float& sin) {
  constexpr double TWO_OVER_PI = 0.63661977236758134, INTEGER = 6755399441055744.0;  // 1.5·2^52
  constexpr double HALF_PI = 1.5707963267948966, HALF_PI_REST = 6.123233995736766e-17;
  const double wide = angle, shifted = fma(wide, TWO_OVER_PI, INTEGER);
  const double quarter = shifted - INTEGER;  // rounded to nearest, its low bits are shifted's
  const unsigned turns = __double2loint(shifted);
  const float r = static_cast<float>(fma(quarter, -HALF_PI_REST, fma(quarter, -HALF_PI, wide)));
  const float z = r * r;
  float s = z * (z * (1.f / 362880) - 1.f / 5040);
  s = r + r * (z * (z * (s + 1.f / 120) - 1.f / 6));
  float c = z * (z * (z * (-1.f / 3628800) + 1.f / 40320) - 1.f / 720);
  c = 1.f + z * (z * (c + 1.f / 24) - 0.5f);
  const bool is_odd = turns & 1;
  cos = is_odd ? s : c, sin = is_odd ? c : s;
  if ((turns + 1) & 2) cos = -cos;
  if (turns & 2) sin = -sin;
}

// Sum over teams of TEAM neighbouring lanes; every lane of the warp must call it.
template <int TEAM, int N, typename A>
__device__ __forceinline__ void team_sum(A (&x)[N]) {
#pragma unroll
  for (int step = TEAM / 2; step > 0; step /= 2) {
#pragma unroll
    for (int i = 0; i < N; i++) x[i] += __shfl_xor_sync(ALL_LANES, x[i], step);
  }
}

// Sum over the block, the same in every thread. `scratch` is N·32 numbers of shared memory;
// calls with one scratch need no barrier between them.
template <int N, typename A>
__device__ __forceinline__ void block_sum(A (&x)[N], A* scratch) {
  team_sum<WARP>(x);
  const int warps = blockDim.x / WARP, lane = threadIdx.x % WARP;
  __syncthreads();  // the last call's readers are done
  if (lane == 0) {
#pragma unroll
    for (int i = 0; i < N; i++) scratch[i * WARP + threadIdx.x / WARP] = x[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; i++) {
    x[i] = 0;
    for (int warp = 0; warp < warps; warp++) x[i] += scratch[i * WARP + warp];
  }
}

// Which tokens a block has. Samples are (B, length) or, with cu_seqlens, packed end to end.
struct Range {
  int64_t sample, first, begin, end;  // tokens begin … end − 1 of the sample; `first` of an input
  int64_t first_out;                  // and of a contiguous output
};

struct Grid {
  const int32_t* cu;  // cu_seqlens (samples + 1,) or nullptr
  int64_t length;     // of every sample, or the longest
  unsigned tiles;     // blocks a sample
  int64_t tokens_per_block;

  // The tokens of a block; blocks that share their tokens pass a number of their own.
  __device__ __forceinline__ Range locate(unsigned block = blockIdx.x) const {
    Range at;
    at.sample = block / tiles;
    int64_t tokens = length;
    at.first = 0, at.first_out = at.sample * length;
    if (cu != nullptr) {
      at.first = at.first_out = cu[at.sample];
      tokens = cu[at.sample + 1] - at.first;
    }
    at.begin = int64_t(block % tiles) * tokens_per_block;
    at.end = at.begin + tokens_per_block < tokens ? at.begin + tokens_per_block : tokens;
    return at;
  }
};

// A token tensor (B, N, …) or (T, …): the address of a token is data + sample·b + token·n.
template <typename T>
struct Tokens {
  T* data;
  int64_t b, n;

  __device__ __forceinline__ T* at(int64_t sample, int64_t token) const {
    return data + sample * b + token * n;
  }
};

// (samples, …): the conditioning of a sample or its latents, or one conditioning for all samples.
template <typename T>
struct PerSample {
  const T* data;
  int64_t s;

  __device__ __forceinline__ const T* at(int64_t sample) const {
    return data == nullptr ? nullptr : data + sample * s;
  }
};

}  // namespace tim
