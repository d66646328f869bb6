// What the threads of a block of heads.cuh tell one another of heads and tokens.
#pragma once

#include "heads.cuh"

namespace tim {

// Of tokens: given (…, 2), int32 or int64, or found as index % period and index / period, with a
// period for all samples or for each.
struct Positions {
  const int32_t* as_int32;
  const int64_t* as_int64;
  int64_t b;
  int period;
  const int32_t* periods;
  int64_t periods_s;
  const float* freq;  // (D/4,), or nullptr: nothing turns
};

// The tokens that a block walks over.
struct alignas(16) Tile {
  int64_t offset[3];  // of the first, in up to three tensors of heads
  int64_t position;   // and in those given
  int begin, count;   // the first in its sample, and how many
  int period;
  bool is_grid;  // positions are not given

  // One thread of the block writes all but the offsets.
  __device__ __forceinline__ void locate(const Positions& positions, const Range& at) {
    if (threadIdx.x != 0) return;
    position = at.sample * positions.b + 2 * (at.first + at.begin);
    begin = at.begin, count = at.end - at.begin;
    is_grid = positions.as_int32 == nullptr && positions.as_int64 == nullptr;
    const int32_t* periods = positions.periods;
    period = max(periods ? periods[at.sample * positions.periods_s] : positions.period, 1);
  }

  // The first or the second position of the block's token n.
  __device__ __forceinline__ float position_of(
      const Positions& positions, int n, bool is_second) const {
    const int64_t at = position + 2 * n + is_second;
    if (positions.as_int32 != nullptr) return positions.as_int32[at];
    if (positions.as_int64 != nullptr) return positions.as_int64[at];
    const unsigned length = period, index = begin + n, turns = index / length;
    return is_second ? turns : index - turns * length;
  }
};

// The block's shared memory.
struct Storage {
  const Layout& layout;
  float* memory = shared<float>();

  // Of each of the `vectors`.
  __device__ __forceinline__ ChunkMoments* chunks(int vector) const {
    return reinterpret_cast<ChunkMoments*>(memory) + vector * layout.stride;
  }
  __device__ __forceinline__ float* along(int vector) const {  // of the same chunks, Σ g·w·d
    return memory + layout.along_at + vector * layout.stride;
  }
  __device__ __forceinline__ HeadMoments& moments(int vector) const {
    return reinterpret_cast<HeadMoments*>(memory + layout.moments_at)[vector];
  }
  __device__ __forceinline__ float& a(int vector) const { return memory[layout.a_at + vector]; }

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

  // The block's tokens; writes its tile, but for the offsets.
  __device__ __forceinline__ Range locate(const Positions& positions, const Grid& grid) const {
    const Range at = grid.locate(blockIdx.x / layout.columns);
    tile().locate(positions, at);
    return at;
  }

  // A chunk of a vector that would cost 8 registers: the same for every slot, in two halves, so
  // that neighbours' accesses follow on one another.
  template <bool ALIGNED>
  __device__ __forceinline__ void keep(
      int which, const Share<ALIGNED>& mine, const float (&x)[CHUNK]) const {
    if (!mine.is_any || mine.slot != 0) return;
    float4* half = kept_half(which, mine);
    half[0] = make_float4(x[0], x[1], x[2], x[3]);
    half[layout.lanes] = make_float4(x[4], x[5], x[6], x[7]);
  }
  template <bool ALIGNED>
  __device__ __forceinline__ void kept(
      int which, const Share<ALIGNED>& mine, float (&x)[CHUNK]) const {
    const float4 *half = kept_half(which, mine), low = half[0], high = half[layout.lanes];
    x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
    x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
  }

  // A head from its chunks, by Chan's formula.
  template <bool ALIGNED, bool IS_BACKWARD>
  __device__ __forceinline__ void combine(int vector) const {
    const ChunkMoments *chunk = chunks(vector), first = chunk[0];
    float sum = 0.f, squares = 0.f, gradient = 0.f, cross = 0.f;
#pragma unroll 3
    for (int c = 0; c < layout.chunks; c++) {
      const ChunkMoments v = chunk[c];
      const float n = ALIGNED ? CHUNK : min(CHUNK, layout.D - c * CHUNK);
      const float apart = v.pivot - first.pivot - first.mean;  // above the first's mean
      const float mean = apart + v.mean;
      sum += n * mean;
      squares += v.squares + n * mean * mean;
      if constexpr (IS_BACKWARD) {
        gradient += v.gradient;
        cross += along(vector)[c] + apart * v.gradient;
      }
    }
    const float mean = sum * layout.per_channel;
    const float rstd = rsqrtf((squares - sum * mean) * layout.per_channel + layout.eps);
    const float scale = rstd * layout.per_channel;
    moments(vector) = {first.pivot, first.mean + mean, rstd, scale * gradient};
    if constexpr (IS_BACKWARD) a(vector) = scale * rstd * (cross - mean * gradient);
  }

  // cos and sin of a pair of the block's token n, which is `token` of those at a time.
  __device__ __forceinline__ void make_angle(
      const Positions& positions, int n, int token, int pair) const {
    const int quarter = layout.D / 4;
    const bool is_second = pair >= quarter;
    const float position = tile().position_of(positions, n, is_second);
    const int j = is_second ? pair - quarter : pair;
    const float freq = j < quarter ? positions.freq[j] : 0.f;  // beyond the last of a shorter chunk
    float c, s;
    cos_sin(position * freq, c, s);
    cos(token)[pair] = c, sin(token)[pair] = s;
  }

  // Between two barriers: the moments of `vectors` from their chunks, if they are normed, and the
  // angles of the tokens from `begin` on.
  template <bool ALIGNED, bool IS_BACKWARD>
  __device__ __forceinline__ void exchange(
      const Positions& positions, int begin, int end, bool is_normed) const {
    const int vectors = is_normed ? layout.vectors : 0;
    const int first = (vectors + WARP - 1) / WARP * WARP;  // angles are other warps' work
    const int angles = positions.freq == nullptr ? 0 : layout.tokens * layout.pairs;
    __syncthreads();
    for (int job = opaque(threadIdx.x); job < first + angles; job += blockDim.x) {
      if (job < vectors) {
        combine<ALIGNED, IS_BACKWARD>(job);
      } else if (job >= first) {
        const unsigned angle = job - first;
        const int token = uint64_t(angle) * layout.pairs_inverse >> 32;
        if (begin + token < end)
          make_angle(positions, begin + token, token, angle - token * layout.pairs);
      }
    }
    __syncthreads();
  }

 private:
  template <bool ALIGNED>
  __device__ __forceinline__ float4* kept_half(int which, const Share<ALIGNED>& mine) const {
    float4* kept = reinterpret_cast<float4*>(memory + layout.kept_at);
    return kept + 2 * which * layout.lanes + mine.local * layout.chunks + mine.chunk;
  }
};

}  // namespace tim
