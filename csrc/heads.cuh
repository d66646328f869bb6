// A block of threads over the heads of tokens, for qk_norm_rope.cu: who owns which channels, and
// what the threads tell one another of a head and of a token.
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

// A row of any dtype; one a sample if s is not 0.
struct AnyRow {
  const void* data;
  ScalarType dtype;
  int64_t s;
};

// Where tokens sit: at positions (…, 2), or by index and divisor, which samples may share or not.
struct Places {
  const int32_t* positions;
  const int64_t* wide_positions;
  int64_t b;
  int divisor;
  const int32_t* divisors;
  int64_t divisors_s;
  const float* freq;  // (D/4,), or nullptr: nothing turns
};

// The shape of a block's work, and where things lie in its shared memory, in floats from the start.
// The heads of q and then of k are one list.
struct Layout {
  int H, D, sides;         // heads and channels of each of the `sides`
  int chunks, heads;       // of a head; of a block
  int slots;               // tokens side by side
  unsigned columns;        // blocks with the same tokens
  int lanes;               // threads of a slot
  int tokens, rows;        // at a time; their heads
  int stride;              // between the chunks of two heads: odd, so that their banks differ
  int pairs;               // angles of a token
  unsigned pairs_inverse;  // ⌈2^32/pairs⌉
  int tile_at, heads_at, cos_at, sin_at, kept_at, along_at, a_at;
  int size;
  float per_channel, eps;  // 1/D
};

// The tokens that a block walks over.
struct alignas(16) Tile {
  int64_t offset[3];  // of the first, in up to three tensors of heads
  int64_t place;      // and in `positions`
  int begin;          // and in its sample
  int divisor;
};

// x, of which the compiler knows nothing more: what follows from it is computed again where it is
// used, instead of being kept in registers over the loop.
__device__ __forceinline__ int forgotten(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// What a thread owns: a chunk of a head, of the tokens of its slot.
template <bool ALIGNED>
struct Place {
  const Layout& layout;
  int first;           // of the block's heads in the list
  int slot, local;     // the thread's slot, and its head from `first` on
  int chunk;           // of that head
  bool is_k, is_any;   // the last threads may have nothing

  __device__ __forceinline__ explicit Place(const Layout& layout) : layout(layout) {
    const unsigned lane = threadIdx.x % unsigned(layout.lanes);
    first = blockIdx.x % layout.columns * layout.heads;
    slot = threadIdx.x / unsigned(layout.lanes);
    local = lane / unsigned(layout.chunks), chunk = lane % unsigned(layout.chunks);
    is_any = slot < layout.slots && first + local < layout.sides * layout.H;
    if (!is_any) slot = local = chunk = 0;
    is_k = first + local >= layout.H;
  }

  __device__ __forceinline__ Place again() const {
    Place place = *this;
    place.slot = forgotten(slot), place.local = forgotten(local), place.chunk = forgotten(chunk);
    return place;
  }

  __device__ __forceinline__ int head() const { return first + local - (is_k ? layout.H : 0); }
  __device__ __forceinline__ int column() const { return chunk * CHUNK; }
  __device__ __forceinline__ int channels() const { return min(CHUNK, layout.D - column()); }

  // The thread's t-th of the block's tokens at a time, and of their heads.
  __device__ __forceinline__ int token(int t) const { return t * layout.slots + slot; }
  __device__ __forceinline__ int row(int t) const { return token(t) * layout.heads + local; }

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

  // The thread's chunk of a row (D,), zero if there is none.
  __device__ __forceinline__ void load(const AnyRow& row, float (&x)[CHUNK]) const {
    load_at(row, column(), x);
  }
  // And of a sample's row (heads·D,).
  __device__ __forceinline__ void load(
      const AnyRow& row, int64_t sample, float (&x)[CHUNK]) const {
    load_at(row, sample * row.s + head() * layout.D + column(), x);
  }

  // x becomes d = x − m, m being about its mean, or as near as a float comes to it; returns m, the
  // mean of d and Σ(d − that)².
  __device__ __forceinline__ float4 centre(float (&x)[CHUNK]) const {
    const float part = ALIGNED ? 1.f / CHUNK : __fdividef(1.f, channels());
    float m = 0.f, mean = 0.f, squares = 0.f;
#pragma unroll
    for (int i = 0; i < CHUNK; i++) m += x[i];
    m *= part;
#pragma unroll
    for (int i = 0; i < CHUNK; i++) {
      x[i] = ALIGNED || i < channels() ? x[i] - m : 0.f;
      mean += x[i];
      squares += x[i] * x[i];
    }
    squares -= mean * (mean * part);
    return make_float4(m, mean * part, squares, 0.f);
  }

 private:
  __device__ __forceinline__ void load_at(
      const AnyRow& row, int64_t at, float (&x)[CHUNK]) const {
    if (row.data == nullptr) {
#pragma unroll
      for (int i = 0; i < CHUNK; i++) x[i] = 0.f;
    } else if (row.dtype == ScalarType::Float) {
      load_as<float>(row.data, at, x);
    } else if (row.dtype == ScalarType::Half) {
      load_as<__half>(row.data, at, x);
    } else {
      load_as<__nv_bfloat16>(row.data, at, x);
    }
  }

  template <typename S>
  __device__ __forceinline__ void load_as(const void* data, int64_t at, float (&x)[CHUNK]) const {
    Raw<CHUNK, S> raw;
    load(raw, static_cast<const S*>(data) + at);
    raw.widen(x);
  }
};

// What the threads of a block tell one another, in shared memory.
struct Exchange {
  const Layout& layout;
  float* memory = shared<float>();

  // The chunks of a head, of `rows`, as `centre` knows them, and Σ g·w.
  __device__ __forceinline__ float4* chunks(int row) const {
    return reinterpret_cast<float4*>(memory) + row * layout.stride;
  }
  // The same chunks: Σ g·w·d.
  __device__ __forceinline__ float* along(int row) const {
    return memory + layout.along_at + row * layout.stride;
  }
  // A head of `rows`: the m of its first chunk, the mean above that, rstd, and b and a of backward.
  __device__ __forceinline__ float4& head(int row) const {
    return reinterpret_cast<float4*>(memory + layout.heads_at)[row];
  }
  __device__ __forceinline__ float& a(int row) const { return memory[layout.a_at + row]; }

  // The angles of a token.
  __device__ __forceinline__ float* cos(int token) const {
    return memory + layout.cos_at + token * layout.pairs;
  }
  __device__ __forceinline__ float* sin(int token) const {
    return memory + layout.sin_at + token * layout.pairs;
  }

  __device__ __forceinline__ Tile& tile() const {
    return *reinterpret_cast<Tile*>(memory + layout.tile_at);
  }

  // A row's chunk that would cost 8 registers: the same for every slot, in two halves, so that
  // neighbours' accesses follow on one another.
  template <bool ALIGNED>
  __device__ __forceinline__ void keep(
      int which, const Place<ALIGNED>& me, const float (&x)[CHUNK]) const {
    if (!me.is_any || me.slot != 0) return;
    float4* half = kept_half(which, me);
    half[0] = make_float4(x[0], x[1], x[2], x[3]);
    half[layout.lanes] = make_float4(x[4], x[5], x[6], x[7]);
  }
  template <bool ALIGNED>
  __device__ __forceinline__ void kept(
      int which, const Place<ALIGNED>& me, float (&x)[CHUNK]) const {
    const float4 *half = kept_half(which, me), low = half[0], high = half[layout.lanes];
    x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
    x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
  }

  // A head from its chunks, by Chan's formula. dx = rstd·g·w − a·x̂ − b.
  template <bool ALIGNED, bool IS_BACKWARD>
  __device__ __forceinline__ void combine(int row) const {
    const float4 *chunk = chunks(row), first = chunk[0];
    float sum = 0.f, squares = 0.f, gradient = 0.f, cross = 0.f;
#pragma unroll 3
    for (int c = 0; c < layout.chunks; c++) {
      const float4 v = chunk[c];
      const float n = ALIGNED ? CHUNK : min(CHUNK, layout.D - c * CHUNK);
      const float apart = v.x - first.x - first.y, mean = apart + v.y;  // above the first's mean
      sum += n * mean;
      squares += v.z + n * mean * mean;
      if constexpr (IS_BACKWARD) {
        gradient += v.w;
        cross += along(row)[c] + apart * v.w;
      }
    }
    const float mean = sum * layout.per_channel;
    const float rstd = rsqrtf((squares - sum * mean) * layout.per_channel + layout.eps);
    const float scale = rstd * layout.per_channel;
    head(row) = make_float4(first.x, first.y + mean, rstd, scale * gradient);
    if constexpr (IS_BACKWARD) a(row) = scale * rstd * (cross - mean * gradient);
  }

  // cos and sin of a pair of the block's token n, which is `token` of those at a time.
  __device__ __forceinline__ void make_angle(
      const Places& places, int n, int token, int pair) const {
    const int quarter = layout.D / 4;
    const bool is_second = pair >= quarter;
    const int64_t at = tile().place + 2 * n + is_second;
    float position;
    if (places.positions != nullptr) {
      position = places.positions[at];
    } else if (places.wide_positions != nullptr) {
      position = places.wide_positions[at];
    } else {
      const unsigned divisor = tile().divisor, index = tile().begin + n, row = index / divisor;
      position = is_second ? row : index - row * divisor;
    }
    const int j = is_second ? pair - quarter : pair;
    const float freq = j < quarter ? places.freq[j] : 0.f;  // beyond the last of a shorter chunk
    float c, s;
    cos_sin(position * freq, c, s);
    cos(token)[pair] = c, sin(token)[pair] = s;
  }

  // Between two barriers: the heads of `rows` from their chunks, if they are normed, and the angles
  // of the tokens from `begin` on.
  template <bool ALIGNED, bool IS_BACKWARD>
  __device__ __forceinline__ void run(
      const Places& places, int begin, int end, bool is_normed) const {
    const int heads = is_normed ? layout.rows : 0;
    const int first = (heads + WARP - 1) / WARP * WARP;  // angles are other warps' work
    const int angles = places.freq == nullptr ? 0 : layout.tokens * layout.pairs;
    __syncthreads();
    for (int job = forgotten(threadIdx.x); job < first + angles; job += blockDim.x) {
      if (job < heads) {
        combine<ALIGNED, IS_BACKWARD>(job);
      } else if (job >= first) {
        const unsigned angle = job - first;
        const int token = uint64_t(angle) * layout.pairs_inverse >> 32;
        if (begin + token < end)
          make_angle(places, begin + token, token, angle - token * layout.pairs);
      }
    }
    __syncthreads();
  }

 private:
  template <bool ALIGNED>
  __device__ __forceinline__ float4* kept_half(int which, const Place<ALIGNED>& me) const {
    float4* kept = reinterpret_cast<float4*>(memory + layout.kept_at);
    return kept + 2 * which * layout.lanes + me.local * layout.chunks + me.chunk;
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
