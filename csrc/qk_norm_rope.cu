// QK-norm and axial RoPE of queries and keys, forward and backward.
//
//     y = RoPE(LN(x + shift)·weight + bias)     each part left out when its tensor is None
//
// RoPE turns the pairs of a head's first half by the token's first position, of the second half by
// its second.
#include "qk_norm_rope_staged.cuh"

#include <algorithm>

namespace tim {
namespace {

// Whichever of q and k there is; a dimension of one has no stride.
template <typename T>
Heads<T> heads_of(const Maybe& q, const Maybe& k, bool is_packed) {
  const auto view = [&](const Tensor& x) -> Heads<T> {
    const auto stride = [&](int64_t dim) { return x.size(dim) > 1 ? x.stride(dim) : 0; };
    const int64_t n = stride(x.dim() - 3), h = stride(x.dim() - 2);
    STD_TORCH_CHECK(
        stride(x.dim() - 1) <= 1 && n < INT32_MAX && h < INT32_MAX,
        "tim_kernels_cuda: channels must have no gaps, heads and tokens less than 2^31");
    return {{pointer<T>(x), nullptr}, is_packed ? 0 : stride(0), int(n), int(h)};
  };
  if (!q.has_value() && !k.has_value()) return {};
  Heads<T> heads = view(q.has_value() ? *q : *k);
  if (q.has_value() && k.has_value()) {
    const Heads<T> other = view(*k);
    STD_TORCH_CHECK(
        heads.b == other.b && heads.n == other.n && heads.h == other.h,
        "tim_kernels_cuda: q and k must have the same strides");
    heads.data.k = other.data.q;
  }
  return heads;
}

AnyVector any_vector(const Maybe& x) {
  if (!x.has_value()) return {nullptr, ScalarType::Float, 0};
  STD_TORCH_CHECK(
      x->stride(x->dim() - 1) == 1 || x->size(x->dim() - 1) <= 1,
      "tim_kernels_cuda: channels must have no gaps");
  with_dtype(x->scalar_type(), [](auto) {});  // one of the three
  const bool is_shared = x->dim() == 1 || x->size(0) == 1;
  return {x->data_ptr(), x->scalar_type(), is_shared ? 0 : x->stride(0)};
}

// Vectors of q and k, or of k alone.
Both<AnyVector> vectors_of(const Maybe& q, const Maybe& k, bool has_q = true) {
  return {any_vector(has_q ? q : k), any_vector(has_q ? k : std::nullopt)};
}

template <typename T>
bool is_aligned(const Heads<T>& x) {
  return tim::is_aligned(x.data.q, x.b, x.n, x.h) && tim::is_aligned(x.data.k);
}
bool is_aligned(const Both<AnyVector>& x) {
  return tim::is_aligned(x.q.data, x.q.s) && tim::is_aligned(x.k.data, x.k.s);
}

Positions positions_of(
    const Maybe& given, int64_t period, const Maybe& periods, const Maybe& freq) {
  Positions positions = {};
  positions.period = static_cast<int>(period), positions.periods = pointer<int32_t>(periods);
  positions.freq = pointer<float>(freq);
  if (periods.has_value()) positions.periods_s = periods->stride(0);
  if (!given.has_value()) return positions;
  STD_TORCH_CHECK(given->is_contiguous(), "tim_kernels_cuda: positions have gaps");
  if (given->dim() == 3) positions.b = given->stride(0);
  if (given->scalar_type() == ScalarType::Int)
    positions.as_int32 = pointer<int32_t>(given);
  else
    positions.as_int64 = pointer<int64_t>(given);
  return positions;
}

Layout layout_of(const Tensor& x, int64_t sides, double eps, int64_t heads, int64_t slots) {
  Layout of;
  of.H = static_cast<int>(x.size(-2)), of.D = static_cast<int>(x.size(-1));
  of.sides = static_cast<int>(sides), of.heads = static_cast<int>(heads);
  of.slots = static_cast<int>(slots);
  of.chunks = (of.D + CHUNK - 1) / CHUNK, of.lanes = of.heads * of.chunks;
  STD_TORCH_CHECK(
      heads > 0 && slots > 0 && slots * of.lanes <= HEADS_THREADS, "tim_kernels_cuda: ", heads,
      " heads of ", of.D, " channels in ", slots, " slots are too many for a block");
  of.columns = static_cast<unsigned>((sides * of.H + heads - 1) / heads);
  of.tokens = TOKENS * of.slots, of.vectors = of.tokens * of.heads;
  of.stride = of.chunks | 1, of.pairs = of.chunks * CHUNK / 2;
  of.pairs_inverse = UINT32_MAX / static_cast<unsigned>(of.pairs) + 1;
  of.per_channel = 1.f / static_cast<float>(of.D), of.eps = static_cast<float>(eps);
  of.moments_at = 4 * of.vectors * of.stride;  // the chunks are first
  of.tile_at = of.moments_at + 4 * of.vectors;
  of.cos_at = of.tile_at + static_cast<int>(sizeof(Tile) / sizeof(float));
  of.sin_at = of.cos_at + of.tokens * of.pairs;
  of.kept_at = of.sin_at + of.tokens * of.pairs;
  of.along_at = of.kept_at + 2 * CHUNK * of.lanes;
  of.a_at = of.along_at + of.vectors * of.stride;
  of.size = std::max(of.a_at + of.vectors, of.slots * of.lanes * CHUNK);
  return of;
}

// How many lanes a head has where kernels for its size are, else 0.
template <typename F>
bool with_staged(int D, F f) {
  switch (D) {
    case 64: return f(std::integral_constant<int, 64>{}, std::integral_constant<int, 2>{});
    case 72: return f(std::integral_constant<int, 72>{}, std::integral_constant<int, 2>{});
    case 128: return f(std::integral_constant<int, 128>{}, std::integral_constant<int, 4>{});
    default: return false;
  }
}

// The work of a block, of a warp that has `heads` heads; no slots if it does not fit.
Staged staged_of(const Layout& layout, int heads, int warps) {
  Staged of;
  const bool is_alone = layout.columns == 1;
  of.H = layout.H, of.all_sides = layout.sides;
  of.sides = is_alone ? layout.sides : 1;
  of.columns = static_cast<int>(layout.columns), of.heads = is_alone ? layout.H : layout.heads;
  of.warps = (of.heads + heads - 1) / heads, of.eps = layout.eps;
  of.slots = layout.H % of.heads == 0 ? warps / of.groups() : 0;
  while (STAGED_TOKENS % std::max(of.slots, 1)) of.slots--;  // so that warps meet
  return of;
}

template <typename Kernel, typename In>
void run(
    const Stream& stream, Kernel kernel, int64_t blocks, const In& in, const Positions& positions,
    const Layout& layout, const Grid& grid) {
  const int threads = (layout.slots * layout.lanes + WARP - 1) / WARP * WARP;
  launch(
      stream, kernel, blocks * layout.columns, threads, layout.size * sizeof(float), in, positions,
      layout, grid);
}

void forward(
    Tensor q, Maybe k, Maybe q_weight, Maybe q_bias, Maybe k_weight, Maybe k_bias, Maybe q_shift,
    Maybe k_shift, Maybe positions, int64_t period, Maybe periods, Maybe freq, Tensor q_out,
    Maybe k_out, double eps, Maybe cu, int64_t max_length, int64_t tokens_per_block, int64_t heads,
    int64_t slots) {
  const Stream stream(q);
  const Grid grid = grid_of(q, cu, max_length, tokens_per_block);
  const Layout layout = layout_of(q, k.has_value() ? 2 : 1, eps, heads, slots);
  const Positions where = positions_of(positions, period, periods, freq);
  const int64_t blocks = samples_of(q, cu) * grid.tiles;
  with_dtype(q.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const Forward<T> in{
        heads_of<const T>(q, k, cu.has_value()), heads_of<T>(q_out, k_out, cu.has_value()),
        vectors_of(q_weight, k_weight), vectors_of(q_bias, k_bias), vectors_of(q_shift, k_shift)};
    const auto is_run = [&](auto dim, auto lanes) {
      using Tables = tim::Tables<Row<dim, lanes, T>, FORWARD_STAGES<T>, 1>;
      const Staged staged = staged_of(layout, WARP / lanes, FORWARD_WARPS);
      if (staged.slots == 0 || where.freq == nullptr) return false;
      if (!is_aligned(in.x) || !is_aligned(in.y)) return false;
      launch(
          stream, qk_norm_rope_forward_staged_kernel<dim, lanes, T>, blocks * layout.columns,
          Tables::warps(staged) * WARP, Tables::size(staged), in, where, staged, grid);
      return true;
    };
    if (with_staged(layout.D, is_run)) return;
    const bool is_fast = layout.D % CHUNK == 0 && is_aligned(in.x) && is_aligned(in.y) &&
                         is_aligned(in.weight) && is_aligned(in.bias) && is_aligned(in.shift);
    run(stream,
        is_fast ? qk_norm_rope_forward_kernel<true, T> : qk_norm_rope_forward_kernel<false, T>,
        blocks, in, where, layout, grid);
  });
}

void backward(
    Maybe dq_out, Maybe dk_out, Tensor q, Maybe k, Maybe q_weight, Maybe k_weight, Maybe q_shift,
    Maybe k_shift, Maybe positions, int64_t period, Maybe periods, Maybe freq, Maybe dq, Maybe dk,
    Maybe shifts, Maybe affine, double eps, Maybe cu, int64_t max_length, int64_t tokens_per_block,
    int64_t heads, int64_t slots) {
  const Stream stream(q);
  const Grid grid = grid_of(q, cu, max_length, tokens_per_block);
  const bool has_q = dq_out.has_value(), has_k = dk_out.has_value();
  const Layout layout = layout_of(q, int64_t(has_q) + int64_t(has_k), eps, heads, slots);
  const Positions where = positions_of(positions, period, periods, freq);
  const int64_t blocks = samples_of(q, cu) * grid.tiles;
  const int64_t shift_size = blocks * layout.H * layout.D;
  const int64_t affine_size = 2 * blocks * layout.columns * layout.D;
  STD_TORCH_CHECK(
      !shifts.has_value() || shifts->numel() == 2 * shift_size,
      "tim_kernels_cuda: shifts is (2, samples, tiles, heads·head_dim)");
  STD_TORCH_CHECK(
      !affine.has_value() || affine->numel() == 2 * affine_size,
      "tim_kernels_cuda: affine is (4, blocks, head_dim)");
  const auto halves = [&](const Maybe& of, int64_t size) -> Both<float*> {
    if (!of.has_value()) return {nullptr, nullptr};
    float* data = pointer<float>(of);
    return {has_q ? data : data + size, data + size};
  };
  with_dtype(q.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const Maybe x = has_q ? Maybe(q) : std::nullopt, other = has_k ? k : std::nullopt;
    const Backward<T> in{
        heads_of<const T>(dq_out, dk_out, cu.has_value()),
        heads_of<const T>(x, other, cu.has_value()),
        heads_of<T>(has_q ? dq : std::nullopt, has_k ? dk : std::nullopt, cu.has_value()),
        vectors_of(q_weight, k_weight, has_q),
        vectors_of(q_shift, k_shift, has_q),
        halves(shifts, shift_size),
        halves(affine, affine_size)};
    const auto is_run = [&](auto dim, auto lanes) {
      constexpr int LANES = sizeof(T) == 2 ? lanes : 2 * lanes;
      using Row = tim::Row<dim, LANES, T>;
      using Tables = tim::Tables<Row, BACKWARD_STAGES<Row>, 2>;
      const Staged staged = staged_of(layout, WARP / LANES, BACKWARD_WARPS<T>);
      if (staged.slots == 0 || where.freq == nullptr) return false;
      if (!is_aligned(in.dy) || !is_aligned(in.x) || !is_aligned(in.dx)) return false;
      launch(
          stream, qk_norm_rope_backward_staged_kernel<dim, LANES, T>, blocks * layout.columns,
          Tables::warps(staged) * WARP, Tables::size(staged), in, where, staged, grid);
      return true;
    };
    if (with_staged(layout.D, is_run)) return;
    const bool is_fast = layout.D % CHUNK == 0 && is_aligned(in.dy) && is_aligned(in.x) &&
                         is_aligned(in.dx) && is_aligned(in.weight) && is_aligned(in.shift);
    run(stream,
        is_fast ? qk_norm_rope_backward_kernel<true, T> : qk_norm_rope_backward_kernel<false, T>,
        blocks, in, where, layout, grid);
  });
}

}  // namespace
}  // namespace tim

TIM_IMPLEMENT(library) {
  library.impl("qk_norm_rope_forward", TORCH_BOX(&tim::forward));
  library.impl("qk_norm_rope_backward", TORCH_BOX(&tim::backward));
}
