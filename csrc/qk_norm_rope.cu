// QK-norm and axial RoPE of queries and keys, forward and backward.
//
//     y = RoPE(LN(x + shift)·weight + bias)     each part left out when its tensor is None
//
// A thread owns a chunk of 8 channels of one head, for all the tokens that its block walks over, so
// the gradients of weight, bias and shift stay in its registers, those rows there or in shared
// memory, and pairs (2j, 2j + 1) turn inside it. The heads of q and then of k are one list: 2·16 heads of 9 chunks, or 2·12 of 8, are a block
// of 288 or 192 threads that reads a token's q and k in one coalesced sweep of 16-byte accesses.
// Heads that are fewer have several tokens side by side ("slots"), more have several blocks
// ("columns"). A thread has two tokens in flight.
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
#include <algorithm>

#include "heads.cuh"

namespace tim {
namespace {

template <typename T>
struct Forward {
  Heads<const T> x;
  Heads<T> y;
  Both<AnyRow> weight, bias, shift;
};

template <typename T>
struct Backward {
  Heads<const T> dy, x;
  Heads<T> dx;
  Both<AnyRow> weight, shift;
  Both<float*> dshift, daffine;  // (samples, tiles, H·D) and (2, blocks, D), or nullptr
};

// Writes the block's tile, but for its offsets.
__device__ __forceinline__ Rows tile_of(
    const Exchange& shared, const Places& places, const Grid& grid) {
  const Rows at = grid.locate(blockIdx.x / shared.layout.columns);
  if (threadIdx.x == 0) {
    Tile& tile = shared.tile();
    tile.place = at.sample * places.b + 2 * (at.first + at.begin);
    tile.begin = at.begin;
    const int32_t* divisors = places.divisors;
    tile.divisor = max(divisors ? divisors[at.sample * places.divisors_s] : places.divisor, 1);
  }
  return at;
}

template <typename T>
__device__ __forceinline__ int64_t offset(const Heads<T>& x, const Rows& at) {
  return at.sample * x.b + (at.first + at.begin) * x.n;
}

enum Kept { SHIFT, WEIGHT };

template <bool ALIGNED, typename T>
__global__ void __launch_bounds__(HEADS_THREADS, ALIGNED ? 3 : 1) forward_heads(
    Forward<T> in, Places places, Layout layout, Grid grid) {
  const Exchange shared{layout};
  const Place<ALIGNED> place(layout);
  const bool is_normed = in.weight.of(place.is_k).data != nullptr;
  const bool is_any_normed = in.weight.q.data != nullptr || in.weight.k.data != nullptr;
  const Rows at = tile_of(shared, places, grid);
  const int end = at.end - at.begin;
  if (threadIdx.x == 0)
    shared.tile().offset[0] = offset(in.x, at), shared.tile().offset[1] = offset(in.y, at);
  float weight[CHUNK], bias[CHUNK], shift[CHUNK];
  place.load(in.shift.of(place.is_k), at.sample, shift);
  shared.keep(SHIFT, place, shift);
  place.load(in.weight.of(place.is_k), weight);
  place.load(in.bias.of(place.is_k), bias);
  __syncthreads();

  for (int begin = 0; begin < end; begin += layout.tokens) {
    Raw<CHUNK, T> raw[TOKENS];
    float d[TOKENS][CHUNK];
    {
      const Place<ALIGNED> me = place.again();
#pragma unroll
      for (int t = 0; t < TOKENS; t++) {  // a thread without a token reads the last one again
        const int n = min(begin + me.token(t), end - 1);
        me.load(raw[t], me.of(in.x, shared.tile().offset[0], n));
      }
      shared.kept(SHIFT, me, shift);
#pragma unroll
      for (int t = 0; t < TOKENS; t++) {
        raw[t].widen(d[t]);
#pragma unroll
        for (int i = 0; i < CHUNK; i++) d[t][i] += shift[i];
        if (!is_normed) continue;
        const float4 chunk = me.centre(d[t]);
        if (me.is_any) shared.chunks(me.row(t))[me.chunk] = chunk;
      }
    }
    shared.run<ALIGNED, false>(places, begin, end, is_any_normed);
    const Place<ALIGNED> me = place.again();
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
      const int row = me.row(t), n = begin + me.token(t), pair = me.column() / 2;
      if (!me.is_any || n >= end) continue;
      if (is_normed) {
        const float4 of = shared.head(row);
        const float above = (shared.chunks(row)[me.chunk].x - of.x - of.y) * of.z;
#pragma unroll
        for (int i = 0; i < CHUNK; i++) d[t][i] = (d[t][i] * of.z + above) * weight[i] + bias[i];
      }
      if (places.freq != nullptr)
        turn<false>(d[t], shared.cos(me.token(t)) + pair, shared.sin(me.token(t)) + pair);
      me.store(me.of(in.y, shared.tile().offset[1], n), d[t]);
    }
  }
}

template <bool ALIGNED, typename T>
__global__ void __launch_bounds__(HEADS_THREADS, ALIGNED ? 2 : 1) backward_heads(
    Backward<T> in, Places places, Layout layout, Grid grid) {
  const Exchange shared{layout};
  const Place<ALIGNED> place(layout);
  const bool is_normed = in.weight.of(place.is_k).data != nullptr;
  const bool is_any_normed = in.weight.q.data != nullptr || in.weight.k.data != nullptr;
  const Rows at = tile_of(shared, places, grid);
  const int end = at.end - at.begin;
  if (threadIdx.x == 0) {
    shared.tile().offset[0] = offset(in.dy, at), shared.tile().offset[1] = offset(in.x, at);
    shared.tile().offset[2] = offset(in.dx, at);
  }
  float dweight[CHUNK] = {}, dbias[CHUNK] = {}, dshift[CHUNK] = {}, weight[CHUNK], shift[CHUNK];
  place.load(in.shift.of(place.is_k), at.sample, shift);
  shared.keep(SHIFT, place, shift);
  place.load(in.weight.of(place.is_k), weight);
  shared.keep(WEIGHT, place, weight);
  shared.run<ALIGNED, true>(places, 0, end, false);  // the first angles

  for (int begin = 0; begin < end; begin += layout.tokens) {
    Raw<CHUNK, T> raw_dy[TOKENS], raw_x[TOKENS] = {};
    float g[TOKENS][CHUNK], d[TOKENS][CHUNK];
    {
      const Place<ALIGNED> me = place.again();
#pragma unroll
      for (int t = 0; t < TOKENS; t++) {
        const int n = min(begin + me.token(t), end - 1);
        me.load(raw_dy[t], me.of(in.dy, shared.tile().offset[0], n));
        if (is_normed) me.load(raw_x[t], me.of(in.x, shared.tile().offset[1], n));
      }
      const int pair = me.column() / 2;
#pragma unroll
      for (int t = 0; t < TOKENS; t++) {
        raw_dy[t].widen(g[t]);
        if (places.freq != nullptr)
          turn<true>(g[t], shared.cos(me.token(t)) + pair, shared.sin(me.token(t)) + pair);
      }
      if (is_normed) {
        shared.kept(SHIFT, me, shift);
        shared.kept(WEIGHT, me, weight);
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
          raw_x[t].widen(d[t]);
#pragma unroll
          for (int i = 0; i < CHUNK; i++) d[t][i] += shift[i];
          float4 chunk = me.centre(d[t]);
          float along = 0.f;
#pragma unroll
          for (int i = 0; i < CHUNK; i++) {
            chunk.w += g[t][i] * weight[i];
            along += g[t][i] * weight[i] * d[t][i];
          }
          if (!me.is_any) continue;
          shared.chunks(me.row(t))[me.chunk] = chunk;
          shared.along(me.row(t))[me.chunk] = along;
        }
      }
    }
    shared.run<ALIGNED, true>(places, begin + layout.tokens, end, is_any_normed);
    const Place<ALIGNED> me = place.again();
    shared.kept(WEIGHT, me, weight);
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
      const int row = me.row(t), n = begin + me.token(t);
      if (!me.is_any || n >= end) continue;
      if (is_normed) {
        const float4 of = shared.head(row);
        const float above = (shared.chunks(row)[me.chunk].x - of.x - of.y) * of.z;
        const float a = shared.a(row);
#pragma unroll
        for (int i = 0; i < CHUNK; i++) {
          const float normal = d[t][i] * of.z + above;
          dweight[i] += g[t][i] * normal;
          dbias[i] += g[t][i];
          g[t][i] = g[t][i] * weight[i] * of.z - (normal * a + of.w);
        }
      }
#pragma unroll
      for (int i = 0; i < CHUNK; i++) dshift[i] += g[t][i];
      me.store(me.of(in.dx, shared.tile().offset[2], n), g[t]);
    }
  }

  // The sums of the block, over its slots, and for weight and bias over a side's heads.
  const int width = layout.chunks * CHUNK, slot_width = layout.heads * width;
  float* sums = shared.memory;  // (slots, heads, width)
  float* mine = sums + place.local * width + place.column();
  const auto share = [&](const float(&x)[CHUNK]) {
    __syncthreads();
    if (place.is_any) store(mine + place.slot * slot_width, x);
    __syncthreads();
  };
  if (in.dshift.q != nullptr) {
    share(dshift);
    float total[CHUNK] = {};
    for (int slot = 0; slot < layout.slots; slot++) {
      float part[CHUNK];
      load(mine + slot * slot_width, part);
#pragma unroll
      for (int i = 0; i < CHUNK; i++) total[i] += part[i];
    }
    const int64_t tile = unsigned(forgotten(blockIdx.x)) / layout.columns;
    const int64_t row = tile * layout.H + place.head();
    if (place.is_any && place.slot == 0)
      place.store(in.dshift.of(place.is_k) + row * layout.D + place.column(), total);
  }
  const auto reduce = [&](const float(&x)[CHUNK], int which) {
    share(x);
    for (int job = threadIdx.x; job < layout.sides * layout.D; job += blockDim.x) {
      const int is_second = job >= layout.D, channel = is_second ? job - layout.D : job;
      const int before = is_second * layout.H - place.first;
      float total = 0.f;
      for (int slot = 0; slot < layout.slots; slot++)
        for (int head = max(before, 0); head < min(before + layout.H, layout.heads); head++)
          total += sums[slot * slot_width + head * width + channel];
      const int64_t row = int64_t(which) * gridDim.x + blockIdx.x;
      in.daffine.of(is_second)[row * layout.D + channel] = total;
    }
  };
  if (in.daffine.q != nullptr) reduce(dweight, 0), reduce(dbias, 1);
}

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

AnyRow any_row(const Maybe& x) {
  if (!x.has_value()) return {nullptr, ScalarType::Float, 0};
  STD_TORCH_CHECK(
      x->stride(x->dim() - 1) == 1 || x->size(x->dim() - 1) <= 1,
      "tim_kernels_cuda: channels must have no gaps");
  with_dtype(x->scalar_type(), [](auto) {});  // one of the three
  const bool is_shared = x->dim() == 1 || x->size(0) == 1;
  return {x->data_ptr(), x->scalar_type(), is_shared ? 0 : x->stride(0)};
}

// Rows of q and k, or of k alone.
Both<AnyRow> rows_of(const Maybe& q, const Maybe& k, bool has_q = true) {
  return {any_row(has_q ? q : k), any_row(has_q ? k : std::nullopt)};
}

template <typename T>
bool is_aligned(const Heads<T>& x) {
  return tim::is_aligned(x.data.q, x.b, x.n, x.h) && tim::is_aligned(x.data.k);
}
bool is_aligned(const Both<AnyRow>& rows) {
  return tim::is_aligned(rows.q.data, rows.q.s) && tim::is_aligned(rows.k.data, rows.k.s);
}

Places places_of(
    const Maybe& positions, int64_t divisor, const Maybe& divisors, const Maybe& freq) {
  Places places = {nullptr, nullptr, 0, static_cast<int>(divisor), pointer<int32_t>(divisors), 0,
                   pointer<float>(freq)};
  if (divisors.has_value()) places.divisors_s = divisors->stride(0);
  if (!positions.has_value()) return places;
  STD_TORCH_CHECK(positions->is_contiguous(), "tim_kernels_cuda: positions have gaps");
  if (positions->dim() == 3) places.b = positions->stride(0);
  if (positions->scalar_type() == ScalarType::Int)
    places.positions = pointer<int32_t>(positions);
  else
    places.wide_positions = pointer<int64_t>(positions);
  return places;
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
  of.tokens = TOKENS * of.slots, of.rows = of.tokens * of.heads;
  of.stride = of.chunks | 1, of.pairs = of.chunks * CHUNK / 2;
  of.pairs_inverse = UINT32_MAX / static_cast<unsigned>(of.pairs) + 1;
  of.per_channel = 1.f / static_cast<float>(of.D), of.eps = static_cast<float>(eps);
  of.heads_at = 4 * of.rows * of.stride;  // the chunks are first
  of.tile_at = of.heads_at + 4 * of.rows;
  of.cos_at = of.tile_at + static_cast<int>(sizeof(Tile) / sizeof(float));
  of.sin_at = of.cos_at + of.tokens * of.pairs;
  of.kept_at = of.sin_at + of.tokens * of.pairs;
  of.along_at = of.kept_at + 2 * CHUNK * of.lanes;
  of.a_at = of.along_at + of.rows * of.stride;
  of.size = std::max(of.a_at + of.rows, of.slots * of.lanes * CHUNK);
  return of;
}

template <typename Kernel, typename In>
void run(
    const Stream& stream, Kernel kernel, int64_t blocks, const In& in, const Places& places,
    const Layout& layout, const Grid& grid) {
  const int threads = (layout.slots * layout.lanes + WARP - 1) / WARP * WARP;
  launch(
      stream, kernel, blocks * layout.columns, threads, layout.size * sizeof(float), in, places,
      layout, grid);
}

void forward(
    Tensor q, Maybe k, Maybe q_weight, Maybe q_bias, Maybe k_weight, Maybe k_bias, Maybe q_shift,
    Maybe k_shift, Maybe positions, int64_t divisor, Maybe divisors, Maybe freq, Tensor q_out,
    Maybe k_out, double eps, Maybe cu, int64_t max_length, int64_t rows, int64_t heads,
    int64_t slots) {
  const Stream stream(q);
  const Grid grid = grid_of(q, cu, max_length, rows);
  const Layout layout = layout_of(q, k.has_value() ? 2 : 1, eps, heads, slots);
  const Places places = places_of(positions, divisor, divisors, freq);
  const int64_t blocks = samples_of(q, cu) * grid.tiles;
  with_dtype(q.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const Forward<T> in{
        heads_of<const T>(q, k, cu.has_value()), heads_of<T>(q_out, k_out, cu.has_value()),
        rows_of(q_weight, k_weight), rows_of(q_bias, k_bias), rows_of(q_shift, k_shift)};
    const bool is_fast = layout.D % CHUNK == 0 && is_aligned(in.x) && is_aligned(in.y) &&
                         is_aligned(in.weight) && is_aligned(in.bias) && is_aligned(in.shift);
    run(stream, is_fast ? forward_heads<true, T> : forward_heads<false, T>, blocks, in, places,
        layout, grid);
  });
}

void backward(
    Maybe dq_out, Maybe dk_out, Tensor q, Maybe k, Maybe q_weight, Maybe k_weight, Maybe q_shift,
    Maybe k_shift, Maybe positions, int64_t divisor, Maybe divisors, Maybe freq, Maybe dq, Maybe dk,
    Maybe shifts, Maybe affine, double eps, Maybe cu, int64_t max_length, int64_t rows,
    int64_t heads, int64_t slots) {
  const Stream stream(q);
  const Grid grid = grid_of(q, cu, max_length, rows);
  const bool has_q = dq_out.has_value(), has_k = dk_out.has_value();
  const Layout layout = layout_of(q, int64_t(has_q) + int64_t(has_k), eps, heads, slots);
  const Places places = places_of(positions, divisor, divisors, freq);
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
        rows_of(q_weight, k_weight, has_q), rows_of(q_shift, k_shift, has_q),
        halves(shifts, shift_size), halves(affine, affine_size)};
    const bool is_fast = layout.D % CHUNK == 0 && is_aligned(in.dy) && is_aligned(in.x) &&
                         is_aligned(in.dx) && is_aligned(in.weight) && is_aligned(in.shift);
    run(stream, is_fast ? backward_heads<true, T> : backward_heads<false, T>, blocks, in, places,
        layout, grid);
  });
}

}  // namespace
}  // namespace tim

TIM_IMPLEMENT(library) {
  library.impl("qk_norm_rope_forward", TORCH_BOX(&tim::forward));
  library.impl("qk_norm_rope_backward", TORCH_BOX(&tim::backward));
}
