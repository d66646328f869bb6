// The backward kernel of adaLN at widths 768 and 1152.
//
// A thread keeps the sums over tokens of its 8 channels, so a token belongs to C/8 threads and a
// block of 288 has 3 or 2 tokens at a time: a step. Tokens come to shared memory by asynchronous
// copies, each thread its own chunks, which thus need no barrier: dy and dout a step ahead, x and
// branch two, so that the mean of the next step's x' and the sums of this one meet at one barrier.
//
// The bias and the gate are the same for all tokens, so that their part in their gradients waits
// for the end: dbias = gate·Σdx, dgate = Σ(dx·branch) + bias·Σdx.
#pragma once

#include <cuda_pipeline_primitives.h>

#include "ada_layer_norm.cuh"
#include "pairs.cuh"

namespace tim {
namespace {

constexpr int BACKWARD_THREADS = 288;

// A chunk of each thread, 16 bytes of neighbouring threads side by side.
template <typename T>
struct Chunks {
  static constexpr int PARTS = Raw<CHUNK, T>::PARTS;
  uint4 part[PARTS][BACKWARD_THREADS];

  __device__ __forceinline__ void fetch(const T* from) {
#pragma unroll
    for (int i = 0; i < PARTS; i++)
      __pipeline_memcpy_async(
          &part[i][threadIdx.x], reinterpret_cast<const uint4*>(from) + i, sizeof(uint4));
  }
  __device__ __forceinline__ Raw<CHUNK, T> read() const {
    Raw<CHUNK, T> raw;
#pragma unroll
    for (int i = 0; i < PARTS; i++) reinterpret_cast<uint4*>(raw.value)[i] = part[i][threadIdx.x];
    return raw;
  }
  __device__ __forceinline__ void write(const T (&x)[CHUNK]) {
    Raw<CHUNK, T> raw;
#pragma unroll
    for (int i = 0; i < CHUNK; i++) round_to(raw.value[i], x[i]);
#pragma unroll
    for (int i = 0; i < PARTS; i++)
      part[i][threadIdx.x] = reinterpret_cast<const uint4*>(raw.value)[i];
  }
};

// Sums of tokens, in parts of TEAM threads: none spans two tokens.
template <int C>
struct alignas(16) Sums {
  static constexpr int LANES = C / CHUNK, TOKENS = BACKWARD_THREADS / LANES;
  static constexpr int TEAM = LANES % WARP == 0 ? WARP : WARP / 2, PARTS = LANES / TEAM;
  static constexpr int ROW = (PARTS + 3) / 4 * 4;  // whole 16 bytes
  static_assert(TOKENS * LANES == BACKWARD_THREADS && PARTS * TEAM == LANES);
  float of[5][TOKENS][ROW];
};

// The block's shared memory. What is read more than once has stages: while one is read, another is
// on its way.
template <int C, typename T>
struct Storage {
  Chunks<T> x, branch[3], dy[2], dout[2];
  Chunks<float> made;  // x'
  Sums<C> sums[2];     // in turns, so that a slow reader is not overtaken
};

// Four sums over a team of 16 or 32 lanes: lane 4i ends with that of x[i].
template <int TEAM>
__device__ __forceinline__ float four_sums(const float (&x)[4]) {
  const bool is_second = threadIdx.x & 8, is_odd = threadIdx.x & 4;
  float pair[2], sum[1];
#pragma unroll
  for (int i = 0; i < 2; i++)
    pair[i] =
        (is_second ? x[i + 2] : x[i]) + __shfl_xor_sync(ALL_LANES, is_second ? x[i] : x[i + 2], 8);
  sum[0] = (is_odd ? pair[1] : pair[0]) + __shfl_xor_sync(ALL_LANES, is_odd ? pair[0] : pair[1], 4);
  team_sum<4>(sum);
  if (TEAM == WARP) sum[0] += __shfl_xor_sync(ALL_LANES, sum[0], 16);
  return sum[0];
}

// Sums over the C/8 threads of each token that a block has, of x and of four more, at one barrier.
template <int C>
__device__ __forceinline__ void token_sums(float (&x)[1], float (&more)[4], Sums<C>& sums) {
  using Sums = tim::Sums<C>;
  const int part = threadIdx.x / Sums::TEAM, lane = threadIdx.x % Sums::TEAM;
  const int token = part / Sums::PARTS;
  team_sum<Sums::TEAM>(x);
  const float one = four_sums<Sums::TEAM>(more);
  if (lane == 1) sums.of[4][token][part % Sums::PARTS] = x[0];
  if (lane < 16 && lane % 4 == 0) sums.of[lane / 4][token][part % Sums::PARTS] = one;
  __syncthreads();
  const auto total = [&](int i) {
    Raw<Sums::ROW, float> row;
    row.load(sums.of[i][token]);
    float sum = row.value[0];
#pragma unroll
    for (int j = 1; j < Sums::PARTS; j++) sum += row.value[j];
    return sum;
  };
#pragma unroll
  for (int i = 0; i < 4; i++) more[i] = total(i);
  x[0] = total(4);
}

template <int C, typename T, typename S>
__global__ void __launch_bounds__(BACKWARD_THREADS, sizeof(T) + sizeof(S) == 4 ? 2 : 1)
    ada_layer_norm_backward_kernel(Backward<T, S> in, Grid grid) {
  constexpr int LANES = Sums<C>::LANES, TOKENS = Sums<C>::TOKENS;
  constexpr float PER_CHANNEL = 1.f / C;
  const Range at = grid.locate();
  const int slot = threadIdx.x / LANES, column = threadIdx.x % LANES * CHUNK;
  const int count = at.end - at.begin, steps = (count + TOKENS - 1) / TOKENS;
  const bool is_normed = in.dy.data != nullptr, is_gated = in.branch.data != nullptr;
  Storage<C, T>& storage = *shared<Storage<C, T>>();

  const int64_t first = at.first + at.begin + slot;
  const auto from = [&](const Tokens<const T>& tokens) {
    return tokens.data == nullptr ? nullptr : tokens.at(at.sample, first) + column;
  };
  const T *of_x = from(in.x), *of_branch = from(in.branch);  // of the next copies
  const T *of_dy = from(in.dy), *of_dout = from(in.dout);
  const auto fetch = [&](bool is_there, const T*& from, int64_t stride, Chunks<T>& to) {
    if (!is_there) return;
    to.fetch(from);
    from += TOKENS * stride;
  };
  // Of a token that the block has not, nothing is copied, and what is read is nobody's.
  int left = count - slot;                 // tokens from the thread's in this step on
  const auto fetch_late = [&](int step) {  // for the next step
    if (left <= TOKENS) return;
    fetch(is_normed, of_dy, in.dy.n, storage.dy[step % 2]);
    fetch(in.dout.data != nullptr, of_dout, in.dout.n, storage.dout[step % 2]);
  };
  const auto fetch_early = [&](int stage) {  // for the one after it
    if (left > 2 * TOKENS) {
      fetch(is_normed, of_x, in.x.n, storage.x);
      fetch(is_gated, of_branch, in.branch.n, storage.branch[stage]);
    }
    __pipeline_commit();
  };
  const S *gate = in.gate.at(at.sample), *bias = in.bias.at(at.sample);
  float weight[CHUNK] = {};  // 1 + scale
  if (is_normed) {
    load(in.scale.at(at.sample) + column, weight);
#pragma unroll
    for (int i = 0; i < CHUNK; i++) weight[i] += 1.f;
  }
  // x' of a step, and its sum.
  const auto make = [&](const Raw<CHUNK, T>& raw, int stage, float (&x)[CHUNK]) {
    raw.widen(x);
    if (is_gated) {
      float g[CHUNK], r[CHUNK];
      gated(storage.branch[stage].read(), gate, bias, column, g, r);
#pragma unroll
      for (int i = 0; i < CHUNK; i += 2)
        set(x, i, fma2(tim::at(g, i), tim::at(r, i), tim::at(x, i)));
    }
    float2 sum = tim::at(x, 0);
#pragma unroll
    for (int i = 2; i < CHUNK; i += 2) sum = add2(sum, tim::at(x, i));
    return sum.x + sum.y;
  };

  // Sums over tokens: of dy, dy·x̂, dx·branch and dx.
  float dshift[CHUNK] = {}, dscale[CHUNK] = {}, dgate[CHUNK] = {}, dx[CHUNK] = {};
  float mean = 0.f;
  Raw<CHUNK, T> next = {};
  if (left > 0) {
    fetch(is_gated, of_branch, in.branch.n, storage.branch[0]);
    if (is_normed) next.load(of_x), of_x += TOKENS * in.x.n;
  }
  __pipeline_commit();
  left += TOKENS, fetch_late(0), fetch_early(1), left -= TOKENS;
  if (is_normed) {
    __pipeline_wait_prior(1);
    float made[CHUNK], sum[1] = {make(next, 0, made)}, none[4] = {};
    storage.made.write(made);
    token_sums(sum, none, storage.sums[1]);
    mean = sum[0] * PER_CHANNEL;
  }

  int now = 0, soon = 1, late = 2;  // stages of the branch
  int64_t out = (at.first_out + at.begin + slot) * C + column;
  for (int step = 0; step < steps; step++) {
    __pipeline_wait_prior(0);
    fetch_late(step + 1);
    Raw<CHUNK, T> next = {};
    if (is_normed) next = storage.x.read();
    fetch_early(late);
    float x[CHUNK], y[CHUNK], d[CHUNK] = {}, rstd = 0.f, level = 0.f, along = 0.f;
    if (is_normed) {
      float made[CHUNK], sum[1] = {make(next, soon, made)}, sums[4] = {};
      storage.made.read().widen(x);  // only now, for fewer registers
      storage.made.write(made);
      storage.dy[step % 2].read().widen(y);
      const float2 less = make_float2(-mean, -mean);
#pragma unroll
      for (int i = 0; i < CHUNK; i += 2) {
        set(x, i, add2(tim::at(x, i), less));
        set(y, i, mul2(tim::at(y, i), tim::at(weight, i)));
      }
#pragma unroll
      for (int i = 0; i < CHUNK; i++) {
        sums[0] += x[i];
        sums[1] += x[i] * x[i];
        sums[2] += y[i];
        sums[3] += y[i] * x[i];
      }
      token_sums(sum, sums, storage.sums[step % 2]);
      mean = sum[0] * PER_CHANNEL;
      const float small = sums[0] * PER_CHANNEL;
      rstd = rsqrtf(sums[1] * PER_CHANNEL - small * small + in.eps);
      along = (sums[3] - small * sums[2]) * rstd * PER_CHANNEL;
      level = sums[2] * PER_CHANNEL;
      const float2 of_x = make_float2(rstd, rstd), shift = make_float2(-small, -small);
#pragma unroll
      for (int i = 0; i < CHUNK; i += 2) set(x, i, mul2(add2(tim::at(x, i), shift), of_x));
    }
    if (left > 0) {
      if (in.dout.data != nullptr) storage.dout[step % 2].read().widen(d);
      if (is_normed) {
        storage.dy[step % 2].read().widen(y);
        const float2 of_d = make_float2(rstd, rstd), a = make_float2(-along, -along);
        const float2 b = make_float2(-level, -level);
#pragma unroll
        for (int i = 0; i < CHUNK; i += 2) {
          const float2 of_y = tim::at(y, i), normal = tim::at(x, i);
          set(dshift, i, add2(tim::at(dshift, i), of_y));
          set(dscale, i, fma2(of_y, normal, tim::at(dscale, i)));
          const float2 inner = fma2(of_y, tim::at(weight, i), fma2(normal, a, b));
          set(d, i, fma2(of_d, inner, tim::at(d, i)));
        }
      }
      store(in.dx + out, d);
      if (is_gated) {
        float g[CHUNK], r[CHUNK];
        storage.branch[now].read().widen(r);
        load(gate + column, g);
#pragma unroll
        for (int i = 0; i < CHUNK; i += 2) {
          const float2 of_out = tim::at(d, i);
          set(dgate, i, fma2(of_out, tim::at(r, i), tim::at(dgate, i)));
          set(dx, i, add2(tim::at(dx, i), of_out));
          set(d, i, mul2(of_out, tim::at(g, i)));
        }
        store(in.dbranch + out, d);
      }
    }
    left -= TOKENS, out += TOKENS * C;
    const int free = now;
    now = soon, soon = late, late = free;
  }

  // The slots' sums meet in shared memory; slot 0 writes the block's.
  float* sums = reinterpret_cast<float*>(&storage);  // (TOKENS, C)
  static_assert(sizeof(storage) >= BACKWARD_THREADS * CHUNK * sizeof(float));
  const auto write = [&](int which, const float (&x)[CHUNK]) {
    __syncthreads();
    store(sums + slot * C + column, x);
    __syncthreads();
    if (slot != 0) return;
    float total[CHUNK];
    load(sums + column, total);
    for (int other = 1; other < TOKENS; other++) {
      float part[CHUNK];
      load(sums + other * C + column, part);
#pragma unroll
      for (int i = 0; i < CHUNK; i++) total[i] += part[i];
    }
    store(in.partial + (int64_t(which) * gridDim.x + blockIdx.x) * C + column, total);
  };
  if (is_normed) write(0, dshift), write(1, dscale);
  if (!is_gated) return;
  float g[CHUNK], b[CHUNK] = {};
  load(gate + column, g);
  if (bias != nullptr) load(bias + column, b);
#pragma unroll
  for (int i = 0; i < CHUNK; i++) dgate[i] += b[i] * dx[i], dx[i] *= g[i];
  write(2, dgate), write(3, dx);
}

}  // namespace
}  // namespace tim
