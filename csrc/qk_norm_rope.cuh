// The kernels of QK-norm and RoPE.
//
// A thread owns a chunk of 8 channels of one head, for all the tokens that its block walks over, so
// the gradients of weight, bias and shift stay in its registers, those vectors there or in shared
// memory, and pairs (2j, 2j + 1) turn inside it. The heads of q and then of k are one list: 2·16
// heads of 9 chunks, or 2·12 of 8, are a block of 288 or 192 threads that reads a token's q and k
// in one coalesced sweep of 16-byte accesses. Heads that are fewer have several tokens side by side
// ("slots"), more have several blocks ("columns"). A thread has two tokens in flight.
//
// A head's 9 chunks lie across warps, so its sums go through shared memory. To keep that short, the
// threads write what they know of their chunk, one thread a head puts the chunks together while
// other warps make the tokens' cosines and sines, and all go on with the head's mean and rstd: two
// barriers for 2·slots tokens. Chunks are put together by Chan's formula, each known by its mean,
// rounded, by what that leaves and by the squares around it, so a mean far from zero loses nothing,
// nor does a channel far from the others. Backward has its two sums, of g·w and of g·w·x̂ for g the
// gradient turned back, in the same exchange: taken around the chunk's mean, moved to the head's
// afterwards.
//
// A head_dim that is no multiple of 8 has a shorter last chunk; then, and for views that are not
// aligned, the same kernels access single channels (ALIGNED is false).
#pragma once

#include "heads_storage.cuh"

namespace tim {
namespace {

template <typename T>
struct Forward {
  Heads<const T> x;
  Heads<T> y;
  Both<AnyVector> weight, bias, shift;
};

template <typename T>
struct Backward {
  Heads<const T> dy, x;
  Heads<T> dx;
  Both<AnyVector> weight, shift;
  Both<float*> dshift, daffine;  // (samples, tiles, H·D) and (2, blocks, D), or nullptr
};

template <typename T>
__device__ __forceinline__ int64_t offset(const Heads<T>& x, const Range& at) {
  return at.sample * x.b + (at.first + at.begin) * x.n;
}

enum Kept { SHIFT, WEIGHT };

template <bool ALIGNED, typename T>
__global__ void __launch_bounds__(HEADS_THREADS, ALIGNED ? 3 : 1)
    qk_norm_rope_forward_kernel(Forward<T> in, Positions positions, Layout layout, Grid grid) {
  const Storage storage{layout};
  const Share<ALIGNED> share(layout);
  const bool is_normed = in.weight.of(share.is_k).data != nullptr;
  const bool is_any_normed = in.weight.q.data != nullptr || in.weight.k.data != nullptr;
  const Range at = storage.locate(positions, grid);
  const int end = at.end - at.begin;
  if (threadIdx.x == 0)
    storage.tile().offset[0] = offset(in.x, at), storage.tile().offset[1] = offset(in.y, at);
  float weight[CHUNK], bias[CHUNK], shift[CHUNK];
  share.load(in.shift.of(share.is_k), at.sample, shift);
  storage.keep(SHIFT, share, shift);
  share.load(in.weight.of(share.is_k), weight);
  share.load(in.bias.of(share.is_k), bias);
  __syncthreads();

  for (int begin = 0; begin < end; begin += layout.tokens) {
    Raw<CHUNK, T> raw[TOKENS];
    float d[TOKENS][CHUNK];
    {
      const Share<ALIGNED> mine = share.again();
#pragma unroll
      for (int t = 0; t < TOKENS; t++) {  // a thread without a token reads the last one again
        const int n = min(begin + mine.token(t), end - 1);
        mine.load(raw[t], mine.of(in.x, storage.tile().offset[0], n));
      }
      storage.kept(SHIFT, mine, shift);
#pragma unroll
      for (int t = 0; t < TOKENS; t++) {
        raw[t].widen(d[t]);
#pragma unroll
        for (int i = 0; i < CHUNK; i++) d[t][i] += shift[i];
        if (!is_normed) continue;
        const ChunkMoments chunk = mine.centre(d[t]);
        if (mine.is_any) storage.chunks(mine.vector(t))[mine.chunk] = chunk;
      }
    }
    storage.exchange<ALIGNED, false>(positions, begin, end, is_any_normed);
    const Share<ALIGNED> mine = share.again();
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
      const int vector = mine.vector(t), n = begin + mine.token(t), pair = mine.column() / 2;
      if (!mine.is_any || n >= end) continue;
      if (is_normed) {
        const HeadMoments head = storage.moments(vector);
        const float above =
            (storage.chunks(vector)[mine.chunk].pivot - head.pivot - head.mean) * head.rstd;
#pragma unroll
        for (int i = 0; i < CHUNK; i++)
          d[t][i] = (d[t][i] * head.rstd + above) * weight[i] + bias[i];
      }
      if (positions.freq != nullptr)
        turn<false>(d[t], storage.cos(mine.token(t)) + pair, storage.sin(mine.token(t)) + pair);
      mine.store(mine.of(in.y, storage.tile().offset[1], n), d[t]);
    }
  }
}

template <bool ALIGNED, typename T>
__global__ void __launch_bounds__(HEADS_THREADS, ALIGNED ? 2 : 1)
    qk_norm_rope_backward_kernel(Backward<T> in, Positions positions, Layout layout, Grid grid) {
  const Storage storage{layout};
  const Share<ALIGNED> share(layout);
  const bool is_normed = in.weight.of(share.is_k).data != nullptr;
  const bool is_any_normed = in.weight.q.data != nullptr || in.weight.k.data != nullptr;
  const Range at = storage.locate(positions, grid);
  const int end = at.end - at.begin;
  if (threadIdx.x == 0) {
    storage.tile().offset[0] = offset(in.dy, at), storage.tile().offset[1] = offset(in.x, at);
    storage.tile().offset[2] = offset(in.dx, at);
  }
  float dweight[CHUNK] = {}, dbias[CHUNK] = {}, dshift[CHUNK] = {}, weight[CHUNK], shift[CHUNK];
  share.load(in.shift.of(share.is_k), at.sample, shift);
  storage.keep(SHIFT, share, shift);
  share.load(in.weight.of(share.is_k), weight);
  storage.keep(WEIGHT, share, weight);
  storage.exchange<ALIGNED, true>(positions, 0, end, false);  // the first angles

  for (int begin = 0; begin < end; begin += layout.tokens) {
    Raw<CHUNK, T> raw_dy[TOKENS], raw_x[TOKENS] = {};
    float g[TOKENS][CHUNK], d[TOKENS][CHUNK];
    {
      const Share<ALIGNED> mine = share.again();
#pragma unroll
      for (int t = 0; t < TOKENS; t++) {
        const int n = min(begin + mine.token(t), end - 1);
        mine.load(raw_dy[t], mine.of(in.dy, storage.tile().offset[0], n));
        if (is_normed) mine.load(raw_x[t], mine.of(in.x, storage.tile().offset[1], n));
      }
      const int pair = mine.column() / 2;
#pragma unroll
      for (int t = 0; t < TOKENS; t++) {
        raw_dy[t].widen(g[t]);
        if (positions.freq != nullptr)
          turn<true>(g[t], storage.cos(mine.token(t)) + pair, storage.sin(mine.token(t)) + pair);
      }
      if (is_normed) {
        storage.kept(SHIFT, mine, shift);
        storage.kept(WEIGHT, mine, weight);
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
          raw_x[t].widen(d[t]);
#pragma unroll
          for (int i = 0; i < CHUNK; i++) d[t][i] += shift[i];
          ChunkMoments chunk = mine.centre(d[t]);
          float along = 0.f;
#pragma unroll
          for (int i = 0; i < CHUNK; i++) {
            chunk.gradient += g[t][i] * weight[i];
            along += g[t][i] * weight[i] * d[t][i];
          }
          if (!mine.is_any) continue;
          storage.chunks(mine.vector(t))[mine.chunk] = chunk;
          storage.along(mine.vector(t))[mine.chunk] = along;
        }
      }
    }
    storage.exchange<ALIGNED, true>(positions, begin + layout.tokens, end, is_any_normed);
    const Share<ALIGNED> mine = share.again();
    storage.kept(WEIGHT, mine, weight);
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
      const int vector = mine.vector(t), n = begin + mine.token(t);
      if (!mine.is_any || n >= end) continue;
      if (is_normed) {
        const HeadMoments head = storage.moments(vector);
        const float above =
            (storage.chunks(vector)[mine.chunk].pivot - head.pivot - head.mean) * head.rstd;
        const float a = storage.a(vector);
#pragma unroll
        for (int i = 0; i < CHUNK; i++) {
          const float normal = d[t][i] * head.rstd + above;
          dweight[i] += g[t][i] * normal;
          dbias[i] += g[t][i];
          g[t][i] = g[t][i] * weight[i] * head.rstd - (normal * a + head.b);
        }
      }
#pragma unroll
      for (int i = 0; i < CHUNK; i++) dshift[i] += g[t][i];
      mine.store(mine.of(in.dx, storage.tile().offset[2], n), g[t]);
    }
  }

  // The sums of the block, over its slots, and for weight and bias over a side's heads.
  const int width = layout.chunks * CHUNK, slot_width = layout.heads * width;
  float* sums = storage.memory;  // (slots, heads, width)
  float* my_sums = sums + share.local * width + share.column();
  const auto publish = [&](const float (&x)[CHUNK]) {
    __syncthreads();
    if (share.is_any) store(my_sums + share.slot * slot_width, x);
    __syncthreads();
  };
  if (in.dshift.q != nullptr) {
    publish(dshift);
    float total[CHUNK] = {};
    for (int slot = 0; slot < layout.slots; slot++) {
      float part[CHUNK];
      load(my_sums + slot * slot_width, part);
#pragma unroll
      for (int i = 0; i < CHUNK; i++) total[i] += part[i];
    }
    const int64_t tile = unsigned(opaque(blockIdx.x)) / layout.columns;
    const int64_t head = tile * layout.H + share.head();
    if (share.is_any && share.slot == 0)
      share.store(in.dshift.of(share.is_k) + head * layout.D + share.column(), total);
  }
  const auto reduce = [&](const float (&x)[CHUNK], int which) {
    publish(x);
    for (int job = threadIdx.x; job < layout.sides * layout.D; job += blockDim.x) {
      const int is_second = job >= layout.D, channel = is_second ? job - layout.D : job;
      const int before = is_second * layout.H - share.first;
      float total = 0.f;
      for (int slot = 0; slot < layout.slots; slot++)
        for (int head = max(before, 0); head < min(before + layout.H, layout.heads); head++)
          total += sums[slot * slot_width + head * width + channel];
      const int64_t block = int64_t(which) * gridDim.x + blockIdx.x;
      in.daffine.of(is_second)[block * layout.D + channel] = total;
    }
  };
  if (in.daffine.q != nullptr) reduce(dweight, 0), reduce(dbias, 1);
}

}  // namespace
}  // namespace tim
