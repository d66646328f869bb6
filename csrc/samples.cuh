// What the kernels over latents share: tensors (B, L), a sample without gaps, with coefficients of
// one number a sample.
//
// A block has ELEMENTS of one sample, a thread 16 of them: two chunks of 8, or where 16-byte
// accesses are not possible 16 single ones, consecutive threads side by side. A sample of the
// published models, 4·32·32 or 32·16·16 elements, is four such blocks.
#pragma once

#include "tensors.h"

namespace tim {

constexpr int SAMPLE_THREADS = 128, ELEMENTS = 2048;

// The elements of a thread: W from `at(i)` on for each i < N, if it has them.
template <int W>
struct Part {
  static constexpr int N = ELEMENTS / SAMPLE_THREADS / W;
  int64_t sample, begin, length;

  __device__ __forceinline__ Part(int64_t length, unsigned tiles)
      : sample(blockIdx.x / tiles),
        begin(int64_t(blockIdx.x % tiles) * ELEMENTS + threadIdx.x * W),
        length(length) {}

  __device__ __forceinline__ int64_t at(int i) const { return begin + i * SAMPLE_THREADS * W; }
  __device__ __forceinline__ bool has(int i) const { return at(i) < length; }

  template <typename T>
  __device__ __forceinline__ void load(const T* data, Raw<W, T> (&raw)[N]) const {
#pragma unroll
    for (int i = 0; i < N; i++)
      if (has(i)) raw[i].load(data + at(i));
  }
};

// Round numbers of the precision A, and store them in global memory, 16 bytes at a time. (Left to
// itself the compiler splits the first of several chunks at one base address.)
template <int W, typename T, typename A>
__device__ __forceinline__ void store_part(T* p, const A (&x)[W]) {
  Raw<W, T> raw;
#pragma unroll
  for (int i = 0; i < W; i++) {
    if constexpr (std::is_same_v<T, double>) {
      raw.value[i] = x[i];
    } else {
      round_to(raw.value[i], static_cast<float>(x[i]));
    }
  }
#ifdef __CUDACC__
  if constexpr (W > 1) {
    const auto* parts = reinterpret_cast<const uint4*>(raw.value);
#pragma unroll
    for (int i = 0; i < raw.PARTS; i++)
      asm volatile(
          "st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(
              __cvta_generic_to_global(reinterpret_cast<uint4*>(p) + i)),
          "r"(parts[i].x), "r"(parts[i].y), "r"(parts[i].z), "r"(parts[i].w));
    return;
  }
#endif
  raw.store(p);
}

inline unsigned tiles_of(int64_t length) {
  return static_cast<unsigned>((length + ELEMENTS - 1) / ELEMENTS);
}

}  // namespace tim
