// The kernels of QK-norm and RoPE for common head_dims, whose heads follow on one another in
// memory: index arithmetic is the compiler's.
//
// A warp has up to 16 or 8 heads of a token's q or k at a time, two or four lanes a head. The row
// comes to shared memory by asynchronous copies of 16 bytes, two steps ahead, a lane takes its part
// of a head from there, and puts it back for whole accesses of 16 bytes to global memory. A head's
// sums are one or two shuffles; warps meet every 32 tokens alone, whose angles the block then makes
// together. Arithmetic is in float32, two channels at a time; the mean is taken off before x is
// squared where it would cost digits not to.
#pragma once

#include "heads_staged.cuh"
#include "qk_norm_rope.cuh"

namespace tim {
namespace {

// Warps of a block, at most, and blocks of a multiprocessor.
constexpr int FORWARD_WARPS = 4;
template <typename T>
constexpr int FORWARD_BLOCKS = sizeof(T) == 2 ? 3 : 2;
template <typename T>
constexpr int BACKWARD_WARPS = sizeof(T) == 2 ? 4 : 8;
template <typename T>
constexpr int BACKWARD_BLOCKS = sizeof(T) == 2 ? 2 : 1;

// Tokens of a warp, on their way and the one it has: so many blocks fit into the 164 KB of sm_80.
template <typename T>
constexpr int FORWARD_STAGES = sizeof(T) == 2 ? 3 : 2;
template <typename Row>
constexpr int BACKWARD_STAGES = Row::BYTES <= 2304 ? 3 : 2;

// The mean of a head, of which a lane has x, by `take`, which sums x, x² and what else there is
// over the lane. One pass, if that loses at most four bits, of float fewer; else x becomes x − mean
// before it is squared, and the mean is what is then left.
template <int LANES, typename T, int N, int M, typename Take>
__device__ __forceinline__ float mean_of(float (&x)[N], float (&sums)[M], Take take) {
  constexpr float PER_CHANNEL = 1.f / (LANES * N), MOST = std::is_same_v<T, float> ? 0.06f : 16.f;
  take();
  team_sum<LANES>(sums);
  float mean = sums[0] * PER_CHANNEL;
  const auto is_far = [&] {  // also where squares overflow
    return !(mean * mean * (1 + MOST) <= fminf(MOST * PER_CHANNEL * sums[1], 3e38f));
  };
#pragma unroll 1
  for (int i = 0; i < 2 && __any_sync(ALL_LANES, is_far()); i++) {
    const float2 less = make_float2(-mean, -mean);
#pragma unroll
    for (int j = 0; j < N; j += 2) set(x, j, add2(at(x, j), less));
    take();
    team_sum<LANES>(sums);
    mean = sums[0] * PER_CHANNEL;
  }
  return mean;
}

template <int D, int LANES, typename T>
__global__ void __launch_bounds__(FORWARD_WARPS* WARP, FORWARD_BLOCKS<T>)
    qk_norm_rope_forward_staged_kernel(
        Forward<T> in, Positions positions, Staged layout, Grid grid) {
  using Row = tim::Row<D, LANES, T>;
  constexpr int N = Row::N, STAGES = FORWARD_STAGES<T>;
  using Tables = tim::Tables<Row, STAGES, 1>;
  const Tables tables{layout};
  const Own<Row> own(layout);
  const Range at = grid.locate(blockIdx.x / layout.columns);
  const int end = at.end - at.begin, part = own.lane % LANES;
  const auto first = [&](const auto& x) {
    return x.data.of(own.is_k) + offset(x, at) + (own.begin(x.h) + own.slot * x.n);
  };
  const T* from = first(in.x);
  T* to = first(in.y);
  char* const rows = tables.rows(threadIdx.x / WARP);  // of the warp
  char* const copies = rows + Row::place(own.lane);
  char* const pieces = rows + own.lane * Row::Channels::STRIDE;
  const auto fetch = [&](bool is_any, int stage) {  // the next token
    if (is_any) Row::fetch(copies + stage, from, own.lane, own.left, in.x.h);
    __pipeline_commit();
    from += opaque(layout.slots) * in.x.n;
  };
#pragma unroll
  for (int i = 0; i < STAGES; i++) fetch(own.slot + i * layout.slots < end, i * Row::BYTES);
  tables.tile().locate(positions, at);
  const int is_normed = opaque(int(in.weight.of(own.is_k).data != nullptr));
  tables.fill(own, in.shift.of(own.is_k), at.sample, in.weight.of(own.is_k), in.bias.of(own.is_k));
  __syncthreads();
  float shift[N], weight[N], bias[N];
  Row::Floats::load(tables.shift(own.group, own.lane), shift);
  Row::Floats::load(tables.weight(own.side, part), weight);
  Row::Floats::load(tables.bias(own.side, part), bias);

  int stage = 0;              // bytes into the rows
  int left = end - own.slot;  // tokens, from the warp's on
  const float* angles = tables.angles(own.slot, part);
  for (int begin = 0; begin < tables.tile().count; begin += STAGED_TOKENS) {
    if (begin > 0) __syncthreads();
    tables.make_angles(positions, begin);
    __syncthreads();
    const int after = max(tables.tile().count - begin - STAGED_TOKENS, 0);
    for (; left > after; left -= layout.slots) {
      __pipeline_wait_prior(STAGES - 1);
      __syncwarp();
      char* const piece = pieces + stage;
      float x[N];
      Row::Channels::take(piece, x);
#pragma unroll
      for (int i = 0; i < N; i += 2) set(x, i, add2(tim::at(x, i), tim::at(shift, i)));
      float2 scale = make_float2(1.f, 1.f), rest = make_float2(0.f, 0.f);
      if (is_normed) {
        float sums[2];
        const float mean = mean_of<LANES, T>(x, sums, [&] {
          float2 sum = tim::at(x, 0), squares = mul2(sum, sum);
#pragma unroll
          for (int i = 2; i < N; i += 2)
            sum = add2(sum, tim::at(x, i)), squares = fma2(tim::at(x, i), tim::at(x, i), squares);
          sums[0] = sum.x + sum.y, sums[1] = squares.x + squares.y;
        });
        const float rstd = rsqrtf(sums[1] * (1.f / D) - mean * mean + layout.eps);
        scale = make_float2(rstd, rstd), rest = make_float2(-mean * rstd, -mean * rstd);
      }
      constexpr int PART = Row::PART;
#pragma unroll
      for (int i = 0; i < N; i += PART) {
        float turn[PART], y[PART];
        Row::Floats::load(angles + i, turn);
#pragma unroll
        for (int j = 0; j < PART; j += 2) {
          const float2 normal = fma2(tim::at(x, i + j), scale, rest);
          set(y, j, fma2(normal, tim::at(weight, i + j), tim::at(bias, i + j)));
        }
        turn_by<false>(y, turn);
        Row::Channels::put(piece + i * sizeof(T), y);
      }
      angles += layout.slots * (Tables::A_TOKEN / int(sizeof(float)));
      __syncwarp();
      Row::flush(copies + stage, to, own.lane, own.left, in.y.h);
      to += layout.slots * in.y.n;
      fetch(left > STAGES * layout.slots, stage);
      stage = stage == (STAGES - 1) * Row::BYTES ? 0 : stage + Row::BYTES;
    }
    angles -= STAGED_TOKENS * (Tables::A_TOKEN / int(sizeof(float)));  // if there is a next tile
  }
}

template <int D, int LANES, typename T>
__global__ void __launch_bounds__(BACKWARD_WARPS<T>* WARP, BACKWARD_BLOCKS<T>)
    qk_norm_rope_backward_staged_kernel(
        Backward<T> in, Positions positions, Staged layout, Grid grid) {
  using Row = tim::Row<D, LANES, T>;
  constexpr int N = Row::N, STAGES = BACKWARD_STAGES<Row>, STAGE = 2 * Row::BYTES;
  const Tables<Row, STAGES, 2> tables{layout};
  const Own<Row> own(layout);
  const Range at = grid.locate(blockIdx.x / layout.columns);
  const int end = at.end - at.begin, part = own.lane % LANES;
  const bool is_normed = in.weight.of(own.is_k).data != nullptr;
  char* const rows = tables.rows(threadIdx.x / WARP);  // of the warp
  const int place = Row::place(own.lane);
  const auto of = [&](const auto& x, int64_t offset, int n) {
    return x.data.of(own.is_k) + offset + (own.begin(x.h) + n * x.n);
  };
  const auto fetch = [&](int n, char* to, int64_t dy, int64_t x) {
    if (n < end) {
      to += place;
      Row::fetch(to, opaque(of(in.dy, dy, n)), own.lane, own.left, in.dy.h);
      if (is_normed)
        Row::fetch(to + Row::BYTES, opaque(of(in.x, x, n)), own.lane, own.left, in.x.h);
    }
    __pipeline_commit();
  };
#pragma unroll
  for (int i = 0; i < STAGES - 1; i++)
    fetch(own.slot + i * layout.slots, rows + i * STAGE, offset(in.dy, at), offset(in.x, at));
  Tile& tile = tables.tile();
  tile.locate(positions, at);
  if (threadIdx.x == 0) {  // registers are few
    tile.offset[0] = offset(in.dy, at), tile.offset[1] = offset(in.x, at);
    tile.offset[2] = offset(in.dx, at);
  }
  tables.fill(own, in.shift.of(own.is_k), at.sample, in.weight.of(own.is_k), {});
  __syncthreads();

  float dweight[N] = {}, dbias[N] = {}, dshift[N] = {};
  int stage = 0;  // bytes into the rows
  for (int begin = 0; begin < end; begin += STAGED_TOKENS) {
    if (begin > 0) __syncthreads();
    tables.make_angles(positions, begin);
    __syncthreads();
    const int stop = min(begin + STAGED_TOKENS, end);
    for (int n = begin + own.slot; n < stop; n += layout.slots) {
      char* const row = rows + stage;
      __pipeline_wait_prior(STAGES - 2);
      __syncwarp();  // the token is there, the one before it gone
      fetch(
          n + (STAGES - 1) * layout.slots,
          rows + (stage == 0 ? (STAGES - 1) * STAGE : stage - STAGE), tile.offset[0],
          tile.offset[1]);
      stage = stage == (STAGES - 1) * STAGE ? 0 : stage + STAGE;
      char* const piece = row + own.lane * Row::Channels::STRIDE;
      constexpr int PART = Row::PART;
      float g[N];
      Row::Channels::take(piece, g);
#pragma unroll
      for (int i = 0; i < N; i += PART) {
        float turn[PART];
        Row::Floats::load(tables.angles(n - begin, part) + i, turn);
        turn_by<true>(reinterpret_cast<float (&)[PART]>(g[i]), turn);
      }
      if (is_normed) {
        float x[N];
        Row::Channels::take(piece + Row::BYTES, x);
#pragma unroll
        for (int i = 0; i < N; i += PART) {
          float shift[PART];
          Row::Floats::load(tables.shift(own.group, own.lane) + i, shift);
#pragma unroll
          for (int j = 0; j < PART; j += 2)
            set(x, i + j, add2(tim::at(x, i + j), tim::at(shift, j)));
        }
        float of_normal[N];  // its gradient, g·w
#pragma unroll
        for (int i = 0; i < N; i += PART) {
          float weight[PART];
          Row::Floats::load(tables.weight(own.side, part) + i, weight);
#pragma unroll
          for (int j = 0; j < PART; j += 2)
            set(of_normal, i + j, mul2(tim::at(g, i + j), tim::at(weight, j)));
        }
        float sums[4];  // of x, of squares, of g·w and of g·w·x
        const float mean = mean_of<LANES, T>(x, sums, [&] {
          float2 sum[4] = {};
#pragma unroll
          for (int i = 0; i < N; i += 2) {
            const float2 d = tim::at(x, i), of_d = tim::at(of_normal, i);
            sum[0] = add2(sum[0], d), sum[1] = fma2(d, d, sum[1]);
            sum[2] = add2(sum[2], of_d), sum[3] = fma2(of_d, d, sum[3]);
          }
#pragma unroll
          for (int i = 0; i < 4; i++) sums[i] = sum[i].x + sum[i].y;
        });
        const float rstd = rsqrtf(sums[1] * (1.f / D) - mean * mean + layout.eps);
        const float scale = rstd * (1.f / D), along = scale * rstd * (sums[3] - mean * sums[2]);
        const auto both = [](float x) { return make_float2(x, x); };
        const float2 a = both(-along), b = both(-scale * sums[2]);
        const float2 of_x = both(rstd), rest = both(-mean * rstd);
#pragma unroll
        for (int i = 0; i < N; i += 2) {
          const float2 of_y = tim::at(g, i), normal = fma2(tim::at(x, i), of_x, rest);
          set(dweight, i, fma2(of_y, normal, tim::at(dweight, i)));
          set(dbias, i, add2(tim::at(dbias, i), of_y));
          set(g, i, fma2(tim::at(of_normal, i), of_x, fma2(normal, a, b)));
        }
      }
#pragma unroll
      for (int i = 0; i < N; i += 2) set(dshift, i, add2(tim::at(dshift, i), tim::at(g, i)));
      Row::Channels::put(piece, g);
      __syncwarp();
      Row::flush(row + place, of(in.dx, tile.offset[2], opaque(n)), own.lane, own.left, in.dx.h);
    }
  }

  // The sums of the block, over its slots, and for weight and bias over a side's heads.
  constexpr int WIDTH = Row::HEADS * D;
  float* const sums = reinterpret_cast<float*>(tables.rows(0));  // (slots, groups, WIDTH)
  const auto publish = [&](const float (&x)[N]) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; i++) sums[threadIdx.x * N + i] = x[kept_at<N>(i)];
    __syncthreads();
  };
  if (in.dshift.q != nullptr) {
    publish(dshift);
    const int64_t tokens = opaque(blockIdx.x) / layout.columns;
    for (int job = threadIdx.x; job < layout.groups() * WIDTH; job += blockDim.x) {
      const Own<Row> of(layout, job / WIDTH);
      const int head = job % WIDTH / D;
      if (head >= of.heads) continue;
      float total = 0.f;
      for (int slot = 0; slot < layout.slots; slot++)
        total += sums[slot * layout.groups() * WIDTH + job];
      in.dshift.of(of.is_k)[(tokens * layout.H + of.first + head) * D + job % D] = total;
    }
  }
  const auto reduce = [&](const float (&x)[N], int which) {
    publish(x);
    for (int job = threadIdx.x; job < layout.all_sides * D; job += blockDim.x) {
      const bool is_second = job >= D;
      float total = 0.f;
      for (int warp = 0; warp < layout.groups() * layout.slots; warp++) {
        const Own<Row> of(layout, warp);
        if (of.is_k != is_second) continue;
        for (int head = 0; head < of.heads; head++)
          total += sums[warp * WIDTH + head * D + job % D];
      }
      const int64_t block = int64_t(which) * gridDim.x + blockIdx.x;
      in.daffine.of(is_second)[block * D + job % D] = total;
    }
  };
  if (in.daffine.q != nullptr) reduce(dweight, 0), reduce(dbias, 1);
}

}  // namespace
}  // namespace tim
