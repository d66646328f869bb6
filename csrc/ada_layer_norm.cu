// Gated residual, norm and modulation in any combination, forward and backward.
//
//     x' = x + gate·(branch + bias)                          left out when there is no branch
//     y  = (norm(x')·weight + norm_bias)·(1 + scale) + shift  left out when there is no norm
//
// Widths 768 and 1152 have kernels whose tokens stay in registers, with 16-byte accesses and every
// lane busy. Forward: a token belongs to 16 lanes, 6 or 9 chunks of 8 channels each, so that sums
// need no barrier and a warp has two tokens in flight. Backward: ada_layer_norm_backward.cuh. They
// have LayerNorm without weight and bias, gate, scale and shift in rows. Anything else, and a view
// that is not aligned, takes the kernels of ada_layer_norm.cuh.
//
// Statistics are recomputed in backward: the token is read anyway. They are taken of the token less
// its first mean, so that a mean far from zero loses nothing.
#include <algorithm>

#include "ada_layer_norm_backward.cuh"
#include "tensors.h"

namespace tim {
namespace {

constexpr int TEAM = 16, FORWARD_THREADS = 128;

template <int C, typename T, typename S>
__global__ void __launch_bounds__(FORWARD_THREADS, 4)
    ada_layer_norm_forward_kernel(Forward<T, S> in, Grid grid) {
  constexpr int CHUNKS = C / CHUNK / TEAM, TEAMS = FORWARD_THREADS / TEAM;
  // Chunks of the branch that are loaded before the first of them is stored, past which no load
  // moves: all of them, where there are registers for it.
  constexpr bool IS_SHORT = sizeof(T) + sizeof(S) == 4;
  constexpr int GROUP = IS_SHORT ? CHUNKS : 1;
  static_assert(CHUNKS * CHUNK * TEAM == C && CHUNKS % GROUP == 0);
  constexpr float PER_CHANNEL = 1.f / C;
  const Range at = grid.locate();
  const int lane = threadIdx.x % TEAM, team = threadIdx.x / TEAM;
  const S *gate = in.gate.at(at.sample), *bias = in.bias.at(at.sample);
  const S *shift = in.shift.at(at.sample), *scale = in.scale.at(at.sample);

  for (int64_t begin = at.begin; begin < at.end; begin += TEAMS) {
    const bool has_token = begin + team < at.end;  // a team without one reads the last one again
    const int64_t n = has_token ? begin + team : at.end - 1;
    const T* of_x = in.x.at(at.sample, at.first + n);
    const int64_t out = (at.first_out + n) * C;
    Raw<CHUNK, T> x_raw[CHUNKS], r_raw[GROUP];
    float x[CHUNKS][CHUNK];
#pragma unroll
    for (int j = 0; j < CHUNKS; j++) x_raw[j].load(of_x + (j * TEAM + lane) * CHUNK);
    if (!IS_SHORT || in.branch.data == nullptr) {
#pragma unroll
      for (int j = 0; j < CHUNKS; j++) x_raw[j].widen(x[j]);
    }
    if (in.branch.data != nullptr) {
      const T* branch = in.branch.at(at.sample, at.first + n);
#pragma unroll
      for (int j = 0; j < CHUNKS; j++) {
        if (j % GROUP == 0) {
#pragma unroll
          for (int i = 0; i < GROUP; i++) r_raw[i].load(branch + ((j + i) * TEAM + lane) * CHUNK);
        }
        const int column = (j * TEAM + lane) * CHUNK;
        float g[CHUNK], r[CHUNK];
        gated(r_raw[j % GROUP], gate, bias, column, g, r);
        if (IS_SHORT) x_raw[j].widen(x[j]);
#pragma unroll
        for (int i = 0; i < CHUNK; i++) x[j][i] += g[i] * r[i];
        if (has_token) store(in.out + out + column, x[j]);
      }
    }
    if (in.y == nullptr) continue;

    float sum[1] = {0.f}, rest[2] = {0.f, 0.f};
#pragma unroll
    for (int j = 0; j < CHUNKS; j++)
#pragma unroll
      for (int i = 0; i < CHUNK; i++) sum[0] += x[j][i];
    team_sum<TEAM>(sum);
    const float mean = sum[0] * PER_CHANNEL;
#pragma unroll
    for (int j = 0; j < CHUNKS; j++)
#pragma unroll
      for (int i = 0; i < CHUNK; i++) {
        x[j][i] -= mean;
        rest[0] += x[j][i];
        rest[1] += x[j][i] * x[j][i];
      }
    team_sum<TEAM>(rest);
    const float small = rest[0] * PER_CHANNEL;
    const float rstd = rsqrtf(rest[1] * PER_CHANNEL - small * small + in.eps);
#pragma unroll
    for (int j = 0; j < CHUNKS; j++) {
      const int column = (j * TEAM + lane) * CHUNK;
      float a[CHUNK], b[CHUNK];
      load(scale + column, a);
      load(shift + column, b);
#pragma unroll
      for (int i = 0; i < CHUNK; i++) x[j][i] = (x[j][i] - small) * rstd * (1.f + a[i]) + b[i];
      if (has_token) store(in.y + out + column, x[j]);
    }
  }
}

template <typename T, typename S>
Inputs<T, S> inputs(
    const Tensor& x, const Maybe& branch, const Maybe& gate, const Maybe& bias, const Maybe& shift,
    const Maybe& scale, double eps, bool is_packed) {
  return {tokens<const T>(x, is_packed), tokens<const T>(branch, is_packed),
          per_sample<S>(gate),           per_sample<S>(bias),
          per_sample<S>(shift),          per_sample<S>(scale),
          static_cast<float>(eps)};
}

template <typename T, typename S>
bool all_aligned(const Inputs<T, S>& in) {
  return is_aligned(in.x) && is_aligned(in.branch) && is_aligned(in.gate) && is_aligned(in.bias) &&
         is_aligned(in.shift) && is_aligned(in.scale);
}

ScalarType cond_dtype(const Tensor& x, std::initializer_list<const Maybe*> cond) {
  for (const Maybe* tensor : cond)
    if (tensor->has_value()) return (*tensor)->scalar_type();
  return x.scalar_type();
}

// The token's stride of conditioning (B, N, C) or packed (1, T, C); 0 of a row.
int64_t token_stride(const Maybe& cond) {
  return cond.has_value() && cond->dim() == 3 ? cond->stride(1) : 0;
}

template <typename S>
General<S> general(
    const Maybe& gate, const Maybe& shift, const Maybe& scale, const Maybe& weight,
    const Maybe& norm_bias, bool is_rms, const Maybe& dgate, const Maybe& dscale) {
  return {token_stride(gate),       token_stride(shift),         token_stride(scale),
          pointer<const S>(weight), pointer<const S>(norm_bias), is_rms,
          pointer<S>(dgate),        pointer<S>(dscale)};
}

bool is_row(const Maybe& cond) { return cond.has_value() && cond->dim() == 2; }

int general_threads(int C) { return std::min(GENERAL_THREADS, (C + WARP - 1) / WARP * WARP); }

void forward(
    Tensor x, Maybe branch, Maybe gate, Maybe bias, Maybe shift, Maybe scale, Maybe weight,
    Maybe norm_bias, Maybe out, Maybe y, double eps, bool is_rms, Maybe cu, int64_t max_length,
    int64_t tokens_per_block) {
  const int C = static_cast<int>(x.size(-1));
  const Stream stream(x);
  const Grid grid = grid_of(x, cu, max_length, tokens_per_block);
  const int64_t blocks = samples_of(x, cu) * grid.tiles;
  const bool is_plain = !is_rms && !weight.has_value() && !norm_bias.has_value() &&
                        (!branch.has_value() || is_row(gate)) &&
                        (!y.has_value() || (is_row(shift) && is_row(scale)));
  const auto other = cond_dtype(x, {&gate, &bias, &shift, &scale, &weight, &norm_bias});
  with_dtypes(x.scalar_type(), other, [&](auto t, auto s) {
    using T = typename decltype(t)::type;
    using S = typename decltype(s)::type;
    Forward<T, S> in{
        inputs<T, S>(x, branch, gate, bias, shift, scale, eps, cu.has_value()), pointer<T>(out),
        pointer<T>(y)};
    const bool is_fast =
        is_plain && all_aligned<T, S>(in) && is_aligned(in.out) && is_aligned(in.y);
    if (is_fast && C == 1152)
      return launch(
          stream, ada_layer_norm_forward_kernel<1152, T, S>, blocks, FORWARD_THREADS, 0, in, grid);
    if (is_fast && C == 768)
      return launch(
          stream, ada_layer_norm_forward_kernel<768, T, S>, blocks, FORWARD_THREADS, 0, in, grid);
    const size_t bytes = (2 * WARP + C) * sizeof(float);
    launch(
        stream, ada_layer_norm_forward_any_kernel<T, S>, blocks, general_threads(C), bytes, in,
        general<S>(gate, shift, scale, weight, norm_bias, is_rms, std::nullopt, std::nullopt), grid,
        C);
  });
}

void backward(
    Maybe dout, Maybe dy, Tensor x, Maybe branch, Maybe gate, Maybe bias, Maybe scale, Maybe weight,
    Maybe norm_bias, Tensor dx, Maybe dbranch, Maybe dgate, Maybe dscale, Tensor partial,
    double eps, bool is_rms, Maybe cu, int64_t max_length, int64_t tokens_per_block) {
  const int C = static_cast<int>(x.size(-1));
  const Stream stream(x);
  const Grid grid = grid_of(x, cu, max_length, tokens_per_block);
  const int64_t blocks = samples_of(x, cu) * grid.tiles;
  const int64_t sums = dscale.has_value() && norm_bias.has_value() ? 5 : 4;
  STD_TORCH_CHECK(
      partial.numel() == sums * blocks * C, "tim_kernels_cuda: partial is (4 or 5, blocks, C)");
  const bool is_plain = !is_rms && !weight.has_value() && !norm_bias.has_value() &&
                        (!branch.has_value() || is_row(gate)) && (!dy.has_value() || is_row(scale));
  const auto other = cond_dtype(x, {&gate, &bias, &scale, &weight, &norm_bias});
  with_dtypes(x.scalar_type(), other, [&](auto t, auto s) {
    using T = typename decltype(t)::type;
    using S = typename decltype(s)::type;
    const bool is_packed = cu.has_value();
    Backward<T, S> in{
        inputs<T, S>(x, branch, gate, bias, std::nullopt, scale, eps, is_packed),
        tokens<const T>(dout, is_packed),
        tokens<const T>(dy, is_packed),
        pointer<T>(dx),
        pointer<T>(dbranch),
        pointer<float>(partial)};
    const bool is_fast = is_plain && all_aligned<T, S>(in) && is_aligned(in.dout) &&
                         is_aligned(in.dy) && is_aligned(in.dx) && is_aligned(in.dbranch);
    if (is_fast && C == 1152)
      return launch(
          stream, ada_layer_norm_backward_kernel<1152, T, S>, blocks, BACKWARD_THREADS,
          sizeof(Storage<1152, T>), in, grid);
    if (is_fast && C == 768)
      return launch(
          stream, ada_layer_norm_backward_kernel<768, T, S>, blocks, BACKWARD_THREADS,
          sizeof(Storage<768, T>), in, grid);
    const size_t bytes = (2 * WARP + 2 * C) * sizeof(float);
    launch(
        stream, ada_layer_norm_backward_any_kernel<T, S>, blocks, general_threads(C), bytes, in,
        general<S>(gate, std::nullopt, scale, weight, norm_bias, is_rms, dgate, dscale), grid, C);
  });
}

}  // namespace
}  // namespace tim

TIM_IMPLEMENT(library) {
  library.impl("ada_layer_norm_forward", TORCH_BOX(&tim::forward));
  library.impl("ada_layer_norm_backward", TORCH_BOX(&tim::backward));
}
