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

// Of a warp at a time, so that they share what is read of tables.
template <typename T>
constexpr int FORWARD_TOKENS = sizeof(T) == 2 ? 2 : 1;

template <int D, int LANES, typename T>
__global__ void __launch_bounds__(STAGED_WARPS* WARP, 2) qk_norm_rope_forward_staged_kernel(
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

}  // namespace
}  // namespace tim
