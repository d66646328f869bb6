// Heads of tokens that pass through shared memory, for qk_norm_rope_staged.cuh: what a lane owns,
// how a warp copies a token's heads in and out, and the tables that a block's warps share.
#pragma once

#include <cuda_pipeline_primitives.h>

#include "heads_storage.cuh"
#include "pairs.cuh"

namespace tim {

constexpr int STAGED_TOKENS = 32;  // whose angles a block has at a time

// Where channel i of N is kept in registers and tables: of four, the evens come before the odds, so
// that two of either are neighbours and sm_100 turns two pairs at once. Its own inverse.
template <int N>
__host__ __device__ constexpr int kept_at(int i) {
  return N % 4 == 0 ? (i & ~3) + (i & 1) * 2 + (i >> 1 & 1) : i;
}

// N neighbouring channels in shared memory, which one lane reads and writes in accesses of WIDTH
// bytes; those of the next lane are an odd number of accesses further, so that banks differ.
template <typename T, int N>
struct Piece {
  static constexpr int BYTES = N * sizeof(T);
  static constexpr int WIDTH = BYTES % 16 == 0 ? 16 : BYTES % 8 == 0 ? 8 : 4;
  static constexpr int STRIDE = BYTES / WIDTH % 2 ? BYTES : BYTES + WIDTH;
  using Access =
      std::conditional_t<WIDTH == 16, uint4, std::conditional_t<WIDTH == 8, uint2, uint32_t>>;

  // M channels, whole accesses.
  template <int M>
  __device__ __forceinline__ static void load(const void* from, float (&x)[M]) {
    Raw<M, T> raw;
#pragma unroll
    for (int i = 0; i < int(M * sizeof(T)) / WIDTH; i++)
      reinterpret_cast<Access*>(raw.value)[i] = static_cast<const Access*>(from)[i];
    raw.widen(x);
  }
  // Between memory and where they are kept.
  template <int M>
  __device__ __forceinline__ static void take(const void* from, float (&x)[M]) {
    float y[M];
    load(from, y);
#pragma unroll
    for (int i = 0; i < M; i++) x[kept_at<M>(i)] = y[i];
  }
  template <int M>
  __device__ __forceinline__ static void put(void* to, const float (&x)[M]) {
    float y[M];
#pragma unroll
    for (int i = 0; i < M; i++) y[i] = x[kept_at<M>(i)];
    store(to, y);
  }
  template <int M>
  __device__ __forceinline__ static void store(void* to, const float (&x)[M]) {
    Raw<M, T> raw;
#pragma unroll
    for (int i = 0; i < M; i++) round_to(raw.value[i], x[i]);
#pragma unroll
    for (int i = 0; i < int(M * sizeof(T)) / WIDTH; i++)
      static_cast<Access*>(to)[i] = reinterpret_cast<const Access*>(raw.value)[i];
  }
};

// LANES neighbouring lanes own a head of D channels, an even part each, of one half of the head: so
// a lane turns by one position. A warp has up to HEADS heads of one side of a token, which are a
// row without gaps in global memory.
template <int D, int TEAM, typename T>
struct Row {
  static constexpr int LANES = TEAM, N = D / LANES, HEADS = WARP / LANES;
  static_assert(D % LANES == 0 && LANES % 2 == 0 && N % 2 == 0);
  using Channels = Piece<T, N>;
  using Floats = Piece<float, N>;
  static constexpr int BYTES = WARP * Channels::STRIDE;                // of a row in shared memory
  static constexpr int COPY = 16, WIDE = COPY / sizeof(T);             // bytes, channels of a copy
  static constexpr int A_HEAD = D / WIDE;                              // copies
  static constexpr int COPIES = (HEADS * D / WIDE + WARP - 1) / WARP;  // of a lane
  static_assert(BYTES % COPY == 0 && HEADS * D % WIDE == 0);
  // Channels that are whole accesses of both.
  static constexpr int PART = Channels::WIDTH / sizeof(T) > Floats::WIDTH / sizeof(float)
                                  ? Channels::WIDTH / sizeof(T)
                                  : Floats::WIDTH / sizeof(float);

  // Where the i-th 16 bytes of a row lie in shared memory.
  __device__ __forceinline__ static int place(int i) {
    if constexpr (Channels::STRIDE == Channels::BYTES) {
      return i * COPY;
    } else {
      constexpr int A_PIECE = Channels::BYTES / COPY;
      static_assert(Channels::WIDTH == COPY && WARP % A_PIECE == 0);
      return i / A_PIECE * Channels::STRIDE + i % A_PIECE * COPY;
    }
  }
  // The same of 32 copies further, from one place to the next.
  static constexpr int STEP =
      WARP * COPY / Channels::BYTES * Channels::STRIDE + WARP * COPY % Channels::BYTES;

  // f(i, channel of the token) for the i-th 32 copies of a row, of which the lane has `left`/32
  // from its own first on. Heads that do not follow on one another cost a division each.
  template <typename F>
  __device__ __forceinline__ static void each(int lane, int left, int head_stride, F f) {
    if (head_stride == D || left <= 0) {
#pragma unroll
      for (int i = 0; i < COPIES; i++)
        if (i * WARP < left) f(i, i * WARP * WIDE);
    } else {
      lane = opaque(lane);  // nothing of this is kept for later
      const int first = lane / A_HEAD * D + lane % A_HEAD * WIDE;
#pragma unroll 1
      for (int i = 0; i * WARP < left; i++) {
        const int copy = lane + i * WARP;
        f(i, copy / A_HEAD * head_stride + copy % A_HEAD * WIDE - first);
      }
    }
  }
  // Begin to copy a row into shared memory; the lanes of the warp together, each from its own first
  // copy on.
  __device__ __forceinline__ static void fetch(
      char* row, const T* from, int lane, int left, int head_stride) {
    each(lane, left, head_stride, [&](int i, int channel) {
      __pipeline_memcpy_async(row + i * STEP, from + channel, COPY);
    });
  }
  __device__ __forceinline__ static void flush(
      const char* row, T* to, int lane, int left, int head_stride) {
    each(lane, left, head_stride, [&](int i, int channel) {
      *reinterpret_cast<uint4*>(to + channel) = *reinterpret_cast<const uint4*>(row + i * STEP);
    });
  }
};

// The shape of a block's work: `columns` blocks share their tokens, each with `heads` heads a side
// of one side or, where there is one column, of all: `sides`. `warps` warps have one token of a
// side.
struct Staged {
  int H, all_sides, sides, columns, heads, warps, slots;
  float eps;

  __host__ __device__ __forceinline__ int groups() const { return sides * warps; }
};

// What a warp owns: up to Row::HEADS heads of one side, of the tokens of its slot.
template <typename Row>
struct Own {
  int lane, group, slot;
  int side;         // of the block's
  int first;        // head of the tensor
  int heads, left;  // copies from the lane's first on
  bool is_k;

  __device__ __forceinline__ explicit Own(const Staged& layout, int warp = threadIdx.x / WARP) {
    const int column = opaque(blockIdx.x) % layout.columns;
    lane = threadIdx.x % WARP;
    group = warp % layout.groups(), slot = warp / layout.groups();
    side = group / layout.warps;
    const int before = group % layout.warps * Row::HEADS;
    first = before + column * layout.heads % layout.H;
    heads = min(Row::HEADS, layout.heads - before);
    left = heads * Row::A_HEAD - lane;
    is_k = layout.columns == 1 ? side == 1 : column * layout.heads >= layout.H;
  }

  // The lane's first copy of a token, whose heads are so far apart.
  __device__ __forceinline__ int begin(int head_stride) const {
    return first * head_stride + (lane / Row::A_HEAD) * Row::LANES * Row::N +
           lane % Row::A_HEAD * Row::WIDE;
  }
};

// The block's shared memory: rows on their way, and tables of floats. A table's pieces are those of
// the lanes that read them.
template <typename Row, int STAGES, int ROWS>
struct Tables {
  using Floats = typename Row::Floats;
  static constexpr int LANES = Row::LANES, D = Row::N * LANES;
  static constexpr int A_TOKEN =
      LANES * Floats::STRIDE + 16;  // bytes of angles; tokens' banks differ
  static constexpr int A_WARP = STAGES * ROWS * Row::BYTES;  // bytes of rows
  const Staged& layout;
  char* memory = shared<char>();

  __host__ __device__ static int warps(const Staged& layout) {
    return layout.groups() * layout.slots;
  }
  __host__ static size_t size(const Staged& layout) {
    return sizeof(Tile) + warps(layout) * A_WARP + STAGED_TOKENS * A_TOKEN +
           (layout.groups() * WARP + 2 * layout.sides * LANES) * Floats::STRIDE;
  }

  __device__ __forceinline__ Tile& tile() const { return *reinterpret_cast<Tile*>(memory); }
  __device__ __forceinline__ char* rows(int warp) const {
    return memory + sizeof(Tile) + warp * A_WARP;
  }
  __device__ __forceinline__ float* angles(int token, int part) const {
    return of(rows(warps(layout)) + token * A_TOKEN, part);
  }
  __device__ __forceinline__ float* shift(int group, int lane) const {
    return of(rows(warps(layout)) + STAGED_TOKENS * A_TOKEN, group * WARP + lane);
  }
  __device__ __forceinline__ float* weight(int side, int part) const {
    return shift(layout.groups(), side * LANES + part);
  }
  __device__ __forceinline__ float* bias(int side, int part) const {
    return weight(layout.sides + side, part);
  }

  // What warps read of vectors. Without a weight all stays as it is.
  __device__ __forceinline__ void fill(
      const Own<Row>& own, const AnyVector& shifts, int64_t sample, const AnyVector& weights,
      const AnyVector& biases) const {
    if (own.slot != 0) return;
    fill(shift(own.group, 0), shifts, sample * shifts.s + own.first * D, own.heads * D, own.lane);
    if (own.group % layout.warps != 0) return;
    fill(weight(own.side, 0), weights, 0, D, own.lane, 1.f);
    fill(bias(own.side, 0), biases, 0, D, own.lane);
  }

  // cos and sin of the block's tokens from `begin` on, pair by pair; a lane has one of the tokens.
  __device__ __forceinline__ void make_angles(const Positions& positions, int begin) const {
    constexpr int PAIRS = D / 2;
    static_assert(STAGED_TOKENS == WARP);
    const int token = threadIdx.x % WARP;
    if (begin + token >= tile().count) return;
    const float first = tile().position_of(positions, begin + token, false);
    const float second = tile().position_of(positions, begin + token, true);
    // Where 32 tokens are whole rows of a grid, their columns are those of the 32 before.
    const bool is_again = begin > 0 && tile().is_grid && STAGED_TOKENS % tile().period == 0;
    const int from = threadIdx.x / WARP + (is_again ? PAIRS / 2 : 0);
    for (int pair = from; pair < PAIRS; pair += warps(layout)) {
      const bool is_second = pair >= PAIRS / 2;
      const float freq = positions.freq[is_second ? pair - PAIRS / 2 : pair];
      float cos, sin;
      cos_sin((is_second ? second : first) * freq, cos, sin);
      float* const to = &channel(angles(token, 0), 2 * pair);
      to[0] = cos, to[kept_at<Row::N>(1)] = sin;
    }
  }

 private:
  __device__ __forceinline__ static float* of(char* pieces, int i) {
    return reinterpret_cast<float*>(pieces + i * Floats::STRIDE);
  }
  __device__ __forceinline__ static float& channel(float* piece, int at) {
    return piece[at / Row::N * int(Floats::STRIDE / sizeof(float)) + kept_at<Row::N>(at % Row::N)];
  }
  __device__ __forceinline__ static void fill(
      float* piece, const AnyVector& vector, int64_t at, int channels, int lane,
      float otherwise = 0.f) {
#pragma unroll 4
    for (int i = lane; i < channels; i += WARP)
      channel(piece, i) = vector.data == nullptr ? otherwise : vector.at(at + i);
  }
};

// Pairs turned by (cos, sin) of each, kept in the same order, or back.
template <bool BACK, int N>
__device__ __forceinline__ void turn_by(float (&x)[N], const float (&turn)[N]) {
  if constexpr (N % 4 == 0) {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      const float2 even = at(x, i), odd = at(x, i + 2), cos = at(turn, i), sin = at(turn, i + 2);
      const float2 across = mul2(odd, sin), along = mul2(even, sin);
      set(x, i, BACK ? fma2(even, cos, across) : fms2(even, cos, across));
      set(x, i + 2, BACK ? fms2(odd, cos, along) : fma2(odd, cos, along));
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      const float even = x[i], odd = x[i + 1], cos = turn[i],
                  sin = BACK ? -turn[i + 1] : turn[i + 1];
      x[i] = even * cos - odd * sin;
      x[i + 1] = even * sin + odd * cos;
    }
  }
}

}  // namespace tim
