// A block of threads over the heads of tokens, for qk_norm_rope.cuh: the tensors, and who owns
// which channels of them.
#pragma once

#include "tensors.h"

namespace tim {

constexpr int HEADS_THREADS = 288;  // of a block, at most
constexpr int TOKENS = 2;           // of a thread at a time

// Something of q and of k. What there is one of alone comes first.
template <typename V>
struct Both {
  V q, k;

  __device__ __forceinline__ V of(bool is_k) const { return is_k ? k : q; }
};

// (B, N, heads, D) or (T, heads, D), q and k with the same strides.
template <typename T>
struct Heads {
  Both<T*> data;
  int64_t b;
  int n, h;
};

// A vector (D,) of any dtype, or one of (heads·D,) a sample if s is not 0.
struct AnyVector {
  const void* data;
  ScalarType dtype;
  int64_t s;

  __device__ __forceinline__ float at(int64_t i) const {
    if (dtype == ScalarType::Float) return static_cast<const float*>(data)[i];
    if (dtype == ScalarType::Half) return to_float(static_cast<const __half*>(data)[i]);
    return to_float(static_cast<const __nv_bfloat16*>(data)[i]);
  }
};

// The shape of a block's work, and where things lie in its shared memory, in floats from the start.
// The heads of q and then of k are one list.
struct Layout {
  int H, D, sides;         // heads and channels of each of the `sides`
  int chunks, heads;       // of a head; of a block
  int slots;               // tokens side by side
  unsigned columns;        // blocks with the same tokens
  int lanes;               // threads of a slot
  int tokens, vectors;     // at a time; tokens · heads, numbered token by token
  int stride;              // between the chunks of two vectors: odd, so that their banks differ
  int pairs;               // angles of a token
  unsigned pairs_inverse;  // ⌈2^32/pairs⌉
  int tile_at, moments_at, cos_at, sin_at, kept_at, along_at, a_at;
  int size;
  float per_channel, eps;  // 1/D
};

// A chunk of a head: `pivot` is its mean, rounded, the others are of d = x − pivot.
struct alignas(16) ChunkMoments {
  float pivot, mean, squares;  // squares: Σ (d − mean)²
  float gradient;              // Σ g·w, in backward
};

// A head: its mean is pivot + mean, pivot being the first chunk's.
struct alignas(16) HeadMoments {
  float pivot, mean, rstd;
  float b;  // in backward, where dx = rstd·g·w − a·x̂ − b
};

// x, of which the compiler knows nothing more: what follows from it is computed again where it is
// used, instead of being kept in registers over the loop.
__device__ __forceinline__ int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
template <typename T>
__device__ __forceinline__ T* opaque(T* x) {
  asm volatile("" : "+l"(x));
  return x;
}

// What a thread owns: a chunk of a head, of the tokens of its slot.
template <bool ALIGNED>
struct Share {
  const Layout& layout;
  int first;          // of the block's heads in the list
  int slot, local;    // the thread's slot, and its head from `first` on
  int chunk;          // of that head
  bool is_k, is_any;  // the last threads may have nothing

  __device__ __forceinline__ explicit Share(const Layout& layout) : layout(layout) {
    const unsigned lane = threadIdx.x % unsigned(layout.lanes);
    first = blockIdx.x % layout.columns * layout.heads;
    slot = threadIdx.x / unsigned(layout.lanes);
    local = lane / unsigned(layout.chunks), chunk = lane % unsigned(layout.chunks);
    is_any = slot < layout.slots && first + local < layout.sides * layout.H;
    if (!is_any) slot = local = chunk = 0;
    is_k = first + local >= layout.H;
  }

  // The same, opaque.
  __device__ __forceinline__ Share again() const {
    Share share = *this;
    share.slot = opaque(slot), share.local = opaque(local), share.chunk = opaque(chunk);
    return share;
  }

  __device__ __forceinline__ int head() const { return first + local - (is_k ? layout.H : 0); }
  __device__ __forceinline__ int column() const { return chunk * CHUNK; }
  __device__ __forceinline__ int channels() const { return min(CHUNK, layout.D - column()); }

  // The thread's t-th of the block's tokens at a time, and of their vectors.
  __device__ __forceinline__ int token(int t) const { return t * layout.slots + slot; }
  __device__ __forceinline__ int vector(int t) const { return token(t) * layout.heads + local; }

  // The thread's chunk of the n-th token after `offset`.
  template <typename T>
  __device__ __forceinline__ T* of(const Heads<T>& x, int64_t offset, int n) const {
    return x.data.of(is_k) + offset + (n * x.n + head() * x.h + column());
  }

  template <typename T>
  __device__ __forceinline__ void load(Raw<CHUNK, T>& raw, const T* p) const {
    if constexpr (ALIGNED) {
      raw.load(p);
    } else {
#pragma unroll
      for (int i = 0; i < CHUNK; i++) raw.value[i] = i < channels() ? p[i] : T{};
    }
  }

  template <typename T>
  __device__ __forceinline__ void store(T* p, const float (&x)[CHUNK]) const {
    if constexpr (ALIGNED) {
      tim::store(p, x);
    } else {
#pragma unroll
      for (int i = 0; i < CHUNK; i++)
        if (i < channels()) round_to(p[i], x[i]);
    }
  }

  // The thread's chunk of a vector (D,), zero if there is none.
  __device__ __forceinline__ void load(const AnyVector& vector, float (&x)[CHUNK]) const {
    load_at(vector, column(), x);
  }
  // And of a sample's (heads·D,).
  __device__ __forceinline__ void load(
      const AnyVector& vector, int64_t sample, float (&x)[CHUNK]) const {
    load_at(vector, sample * vector.s + head() * layout.D + column(), x);
  }

  // x becomes d = x − pivot.
  __device__ __forceinline__ ChunkMoments centre(float (&x)[CHUNK]) const {
    const float part = ALIGNED ? 1.f / CHUNK : __fdividef(1.f, channels());
    float pivot = 0.f, mean = 0.f, squares = 0.f;
#pragma unroll
    for (int i = 0; i < CHUNK; i++) pivot += x[i];
    pivot *= part;
#pragma unroll
    for (int i = 0; i < CHUNK; i++) {
      x[i] = ALIGNED || i < channels() ? x[i] - pivot : 0.f;
      mean += x[i];
      squares += x[i] * x[i];
    }
    squares -= mean * (mean * part);
    return {pivot, mean * part, squares, 0.f};
  }

 private:
  __device__ __forceinline__ void load_at(
      const AnyVector& vector, int64_t at, float (&x)[CHUNK]) const {
    if (vector.data == nullptr) {
#pragma unroll
      for (int i = 0; i < CHUNK; i++) x[i] = 0.f;
    } else if (vector.dtype == ScalarType::Float) {
      load_as<float>(vector.data, at, x);
    } else if (vector.dtype == ScalarType::Half) {
      load_as<__half>(vector.data, at, x);
    } else {
      load_as<__nv_bfloat16>(vector.data, at, x);
    }
  }

  template <typename S>
  __device__ __forceinline__ void load_as(const void* data, int64_t at, float (&x)[CHUNK]) const {
    Raw<CHUNK, S> raw;
    load(raw, static_cast<const S*>(data) + at);
    raw.widen(x);
  }
};

// The pairs of a chunk turned by their angles, or back.
template <bool BACK>
__device__ __forceinline__ void turn(float (&x)[CHUNK], const float* cos_of, const float* sin_of) {
  const float4 c = *reinterpret_cast<const float4*>(cos_of);
  const float4 s = *reinterpret_cast<const float4*>(sin_of);
  const float cos[CHUNK / 2] = {c.x, c.y, c.z, c.w}, sin[CHUNK / 2] = {s.x, s.y, s.z, s.w};
#pragma unroll
  for (int j = 0; j < CHUNK / 2; j++) {
    const float even = x[2 * j], odd = x[2 * j + 1], up = BACK ? -sin[j] : sin[j];
    x[2 * j] = even * cos[j] - odd * up;
    x[2 * j + 1] = even * up + odd * cos[j];
  }
}

}  // namespace tim
