// The kernels of QK-norm and RoPE for common head_dims, whose heads follow on one another in
// memory: index arithmetic is the compiler's.
//
// A warp has up to 16 or 8 heads of a token's q or k at a time, two or four lanes a head. The row
// comes to shared memory by asynchronous copies of 16 bytes, a step ahead, a lane takes its part of
// a head from there, and puts it back for whole accesses of 16 bytes to global memory. A head's
// sums are one or two shuffles; warps meet every 32 tokens alone, whose angles the block then makes
// together. Arithmetic is that of qk_norm_rope.cuh: float32, x − mean before it is squared.
#pragma once

#include "heads_staged.cuh"
#include "qk_norm_rope.cuh"

namespace tim {
namespace {

// Warps of a block, at most, and blocks of a multiprocessor.
constexpr int FORWARD_WARPS = 8, FORWARD_BLOCKS = 2;
template <typename T>
constexpr int BACKWARD_WARPS = sizeof(T) == 2 ? 4 : 8;
template <typename T>
constexpr int BACKWARD_BLOCKS = sizeof(T) == 2 ? 2 : 1;

// Of a warp at a time, so that they share what is read of tables.
template <typename T>
constexpr int FORWARD_TOKENS = sizeof(T) == 2 ? 2 : 1;

// Tokens on their way to a warp, and the one it has: two blocks fit into the 164 KB of sm_80.
template <typename Row>
constexpr int BACKWARD_STAGES = Row::BYTES <= 2304 ? 3 : 2;

template <int D, int LANES, typename T>
__global__ void __launch_bounds__(FORWARD_WARPS* WARP, FORWARD_BLOCKS)
    qk_norm_rope_forward_staged_kernel(
        Forward<T> in, Positions positions, Staged layout, Grid grid) {
  using Row = tim::Row<D, LANES, T>;
  constexpr int N = Row::N, TOKENS = FORWARD_TOKENS<T>;
  const Tables<Row, 2, TOKENS> tables{layout};
  const Own<Row> own(layout);
  const Range at = grid.locate(blockIdx.x / layout.columns);
  const int end = at.end - at.begin, part = own.lane % LANES, step = TOKENS * layout.slots;
  const T* from = in.x.data.of(own.is_k) + offset(in.x, at) + own.begin(in.x.h);
  T* to = in.y.data.of(own.is_k) + offset(in.y, at) + own.begin(in.y.h);
  char* const rows = tables.rows(threadIdx.x / WARP);  // of the warp
  const int place = Row::place(own.lane);
  const auto fetch = [&](int n, char* to) {
#pragma unroll
    for (int t = 0; t < TOKENS; t++)
      if (n + t < end)
        Row::fetch(
            to + t * Row::BYTES + place, opaque(from + (n + t) * in.x.n), own.lane, own.left,
            in.x.h);
    __pipeline_commit();
  };
  fetch(own.slot * TOKENS, rows);
  tables.tile().locate(positions, at);
  const bool is_normed = in.weight.of(own.is_k).data != nullptr;
  tables.fill(own, in.shift.of(own.is_k), at.sample, in.weight.of(own.is_k), in.bias.of(own.is_k));
  __syncthreads();

  int stage = 0;  // bytes into the rows
  for (int begin = 0; begin < end; begin += STAGED_TOKENS) {
    if (begin > 0) __syncthreads();
    tables.make_angles(positions, begin, end);
    __syncthreads();
    const int stop = min(begin + STAGED_TOKENS, end);
    for (int n = begin + own.slot * TOKENS; n < stop; n += step) {
      char* const row = rows + stage;
      stage = TOKENS * Row::BYTES - stage;
      __pipeline_wait_prior(0);
      __syncwarp();  // the tokens are there, those before them gone
      fetch(n + step, rows + stage);
      char* const piece = row + own.lane * Row::Channels::STRIDE;
      float x[TOKENS][N];
#pragma unroll
      for (int t = 0; t < TOKENS; t++) Row::Channels::load(piece + t * Row::BYTES, x[t]);
      float of_shift[N];
      Row::Floats::load(tables.shift(own.group, own.lane), of_shift);
#pragma unroll
      for (int i = 0; i < N; i++) {
#pragma unroll
        for (int t = 0; t < TOKENS; t++) x[t][i] += of_shift[i];
      }
      centre<LANES, T>(x, is_normed);
      float rstd[TOKENS] = {};
#pragma unroll
      for (int t = 0; t < TOKENS; t++) {
#pragma unroll
        for (int i = 0; i < N; i++) rstd[t] += x[t][i] * x[t][i];
      }
      team_sum<LANES>(rstd);
#pragma unroll
      for (int t = 0; t < TOKENS; t++)
        rstd[t] = is_normed ? rsqrtf(rstd[t] * (1.f / D) + layout.eps) : 1.f;
      constexpr int PART = Row::PART;
#pragma unroll
      for (int i = 0; i < N; i += PART) {
        float weight[PART], bias[PART];
        Row::Floats::load(tables.weight(own.side, part) + i, weight);
        Row::Floats::load(tables.bias(own.side, part) + i, bias);
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
          float y[PART], turn[PART];
          Row::Floats::load(tables.angles(n - begin + t, part) + i, turn);
#pragma unroll
          for (int j = 0; j < PART; j++) y[j] = x[t][i + j] * rstd[t] * weight[j] + bias[j];
          turn_by<false>(y, turn);
          Row::Channels::store(piece + t * Row::BYTES + i * sizeof(T), y);
        }
      }
      __syncwarp();
#pragma unroll
      for (int t = 0; t < TOKENS; t++)
        if (n + t < end)
          Row::flush(
              row + t * Row::BYTES + place, to + opaque((n + t) * in.y.n), own.lane, own.left,
              in.y.h);
    }
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
    tables.make_angles(positions, begin, end);
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
      Row::Channels::load(piece, g);
#pragma unroll
      for (int i = 0; i < N; i += PART) {
        float turn[PART];
        Row::Floats::load(tables.angles(n - begin, part) + i, turn);
        turn_by<true>(reinterpret_cast<float (&)[PART]>(g[i]), turn);
      }
      if (is_normed) {
        float x[1][N];
        Row::Channels::load(piece + Row::BYTES, x[0]);
#pragma unroll
        for (int i = 0; i < N; i += PART) {
          float shift[PART];
          Row::Floats::load(tables.shift(own.group, own.lane) + i, shift);
#pragma unroll
          for (int j = 0; j < PART; j++) x[0][i + j] += shift[j];
        }
        centre<LANES, T>(x, true);
        const float* weights = tables.weight(own.side, part);
        float sum[3] = {};  // of squares, of g·w and of g·w·(x − mean)
#pragma unroll
        for (int i = 0; i < N; i += PART) {
          float weight[PART];
          Row::Floats::load(weights + i, weight);
#pragma unroll
          for (int j = 0; j < PART; j++) {
            const float of_normal = g[i + j] * weight[j], d = x[0][i + j];
            sum[0] += d * d, sum[1] += of_normal, sum[2] += of_normal * d;
          }
        }
        team_sum<LANES>(sum);
        const float rstd = rsqrtf(sum[0] * (1.f / D) + layout.eps), scale = rstd * (1.f / D);
        const float a = scale * rstd * sum[2], b = scale * sum[1];
        weights += opaque(0);  // read again, as they are too many to keep
#pragma unroll
        for (int i = 0; i < N; i += PART) {
          float weight[PART];
          Row::Floats::load(weights + i, weight);
#pragma unroll
          for (int j = 0; j < PART; j++) {
            const float normal = x[0][i + j] * rstd;
            dweight[i + j] += g[i + j] * normal;
            dbias[i + j] += g[i + j];
            g[i + j] = g[i + j] * weight[j] * rstd - (normal * a + b);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < N; i++) dshift[i] += g[i];
      Row::Channels::store(piece, g);
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
    for (int i = 0; i < N; i++) sums[threadIdx.x * N + i] = x[i];
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
