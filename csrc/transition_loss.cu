// The transition loss, forward and backward.
//
// For the prediction p and the target t of a sample, C channels at each of N positions,
//
//     t = a_x x + a_z z + a_D D + a_cond F_cond + a_uncond F_uncond
//     D = rate·(later − earlier), or later alone: of the trailing samples
//     squared = Σ (p − t)² / CN                       cosine = Σ_n (1 − cos(p_n, t_n)) / N
//     cos(p, t) = ⟨p, t⟩ / (|p| |t|), each norm at least EPS
//
// so that with sums ⟨p, p⟩, ⟨t, t⟩ and ⟨p, t⟩ of a position the gradient of −cos is
// p·cos/|p|² − t/(|p| |t|), without its first term where |p| is below EPS. The target is made again
// in backward and never written; its difference later − earlier is taken in float32.
#include "transition_loss.cuh"

#include "tensors.h"

namespace tim {
namespace {

// log2 of the lanes that have all channels, or −1 if teams do not serve them.
int log2_team_of(int64_t channels) {
  for (int log2 = 0; log2 < 4; log2++)
    if (channels == CHANNELS << log2) return log2;
  return -1;
}

template <typename T, typename S>
bool all_aligned(const Inputs<T, S>& in) {
  return is_aligned(in.prediction) && is_aligned(in.later) && is_aligned(in.earlier) &&
         is_aligned(in.F_cond) && is_aligned(in.F_uncond) && is_aligned(in.x) && is_aligned(in.z);
}

template <typename T, typename S>
Inputs<T, S> inputs(
    const Tensor& prediction, const Tensor& x, const Tensor& z, const Tensor& a_x,
    const Tensor& a_z, const Tensor& a_D, const Tensor& a_cond, const Tensor& a_uncond,
    const Maybe& later, const Maybe& earlier, double rate, const Maybe& F_cond,
    const Maybe& F_uncond, int64_t channels) {
  const int64_t elements = prediction.size(1);
  Inputs<T, S> in;
  in.prediction = per_sample<T>(prediction), in.later = per_sample<T>(later),
  in.earlier = per_sample<T>(earlier);
  in.F_cond = per_sample<T>(F_cond), in.F_uncond = per_sample<T>(F_uncond);
  in.x = per_sample<S>(x), in.z = per_sample<S>(z);
  in.a_x = pointer<const float>(a_x), in.a_z = pointer<const float>(a_z);
  in.a_D = pointer<const float>(a_D), in.a_cond = pointer<const float>(a_cond);
  in.a_uncond = pointer<const float>(a_uncond);
  in.rate = static_cast<float>(rate);
  in.per_element = static_cast<float>(1. / elements);
  in.per_position = static_cast<float>(static_cast<double>(channels) / elements);
  in.skipped = later.has_value() ? prediction.size(0) - later->size(0) : 0;
  in.channels = static_cast<int>(channels);
  return in;
}

void forward(
    Tensor prediction, Tensor x, Tensor z, Tensor a_x, Tensor a_z, Tensor a_D, Tensor a_cond,
    Tensor a_uncond, Maybe later, Maybe earlier, double rate, Maybe F_cond, Maybe F_uncond,
    Tensor partial, int64_t channels, int64_t positions) {
  const Grid grid = grid_of(prediction.size(1) / channels, positions);
  const int64_t blocks = prediction.size(0) * grid.tiles;
  STD_TORCH_CHECK(
      partial.numel() == 2 * blocks, "tim_kernels_cuda: partial is (2, samples, blocks a sample)");
  const Stream stream(prediction);
  with_dtypes(prediction.scalar_type(), x.scalar_type(), [&](auto t, auto s) {
    using T = typename decltype(t)::type;
    using S = typename decltype(s)::type;
    const auto in = inputs<T, S>(
        prediction, x, z, a_x, a_z, a_D, a_cond, a_uncond, later, earlier, rate, F_cond, F_uncond,
        channels);
    float* const to = pointer<float>(partial);
    const size_t bytes = 2 * WARP * sizeof(float);
    const int log2_team = log2_team_of(channels);
    if (log2_team >= 0 && grid.length % CHUNK == 0 && all_aligned(in))
      return launch(
          stream, transition_loss_forward_kernel<T, S>, blocks, THREADS, bytes, in, to, grid,
          log2_team);
    launch(stream, transition_loss_forward_any_kernel<T, S>, blocks, THREADS, bytes, in, to, grid);
  });
}

void backward(
    Maybe d_squared, Maybe d_cosine, Tensor prediction, Tensor x, Tensor z, Tensor a_x, Tensor a_z,
    Tensor a_D, Tensor a_cond, Tensor a_uncond, Maybe later, Maybe earlier, double rate,
    Maybe F_cond, Maybe F_uncond, Tensor dprediction, int64_t channels) {
  const int64_t samples = prediction.size(0), length = prediction.size(1) / channels;
  const Stream stream(prediction);
  with_dtypes(prediction.scalar_type(), x.scalar_type(), [&](auto t, auto s) {
    using T = typename decltype(t)::type;
    using S = typename decltype(s)::type;
    const auto in = inputs<T, S>(
        prediction, x, z, a_x, a_z, a_D, a_cond, a_uncond, later, earlier, rate, F_cond, F_uncond,
        channels);
    const Gradients<T> to{
        pointer<const float>(d_squared), pointer<const float>(d_cosine), pointer<T>(dprediction)};
    const int log2_team = log2_team_of(channels);
    if (log2_team >= 0 && length % CHUNK == 0 && all_aligned(in) && is_aligned(to.dp)) {
      const Grid grid = grid_of(length, THREADS * CHUNK >> log2_team);
      return launch(
          stream, transition_loss_backward_kernel<T, S>, samples * grid.tiles, THREADS, 0, in, to,
          grid, log2_team);
    }
    const Grid grid = grid_of(length, THREADS);
    launch(
        stream, transition_loss_backward_any_kernel<T, S>, samples * grid.tiles, THREADS, 0, in, to,
        grid);
  });
}

}  // namespace
}  // namespace tim

TIM_IMPLEMENT(library) {
  library.impl("transition_loss_forward", TORCH_BOX(&tim::forward));
  library.impl("transition_loss_backward", TORCH_BOX(&tim::backward));
}
