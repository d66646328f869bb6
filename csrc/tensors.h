// From torch's tensors to the kernels' views, on the stable ABI. Shapes, dtypes and devices were
// checked by the public function in Python; what is asserted here is what the kernels rely on.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <type_traits>

#include "common.cuh"
#include "library.h"

namespace tim {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

template <typename T>
struct DType;
template <>
struct DType<float> {
  static constexpr ScalarType value = ScalarType::Float;
};
template <>
struct DType<double> {
  static constexpr ScalarType value = ScalarType::Double;
};
template <>
struct DType<__nv_bfloat16> {
  static constexpr ScalarType value = ScalarType::BFloat16;
};
template <>
struct DType<__half> {
  static constexpr ScalarType value = ScalarType::Half;
};
template <>
struct DType<int32_t> {
  static constexpr ScalarType value = ScalarType::Int;
};
template <>
struct DType<int64_t> {
  static constexpr ScalarType value = ScalarType::Long;
};

// The first element, or nullptr of a tensor that is not there; its dtype must be T's.
template <typename T>
T* pointer(const Tensor& x) {
  STD_TORCH_CHECK(
      x.scalar_type() == DType<std::remove_const_t<T>>::value,
      "tim_kernels_cuda: unexpected dtype");
  return static_cast<T*>(x.data_ptr());
}

template <typename T>
T* pointer(const Maybe& x) {
  return x.has_value() ? pointer<T>(*x) : nullptr;
}

// (B, N, …) or packed (T, …), whose dimensions after the tokens have no gaps.
template <typename T>
Tokens<T> tokens(const Maybe& x, bool is_packed) {
  if (!x.has_value()) return {nullptr, 0, 0};
  STD_TORCH_CHECK(
      x->stride(x->dim() - 1) == 1 || x->size(x->dim() - 1) <= 1,
      "tim_kernels_cuda: channels must have no gaps");
  if (is_packed) return {pointer<T>(x), 0, x->stride(0)};
  return {pointer<T>(x), x->stride(0), x->stride(1)};
}

// (samples, …, C), or (1, …, C) for all samples.
template <typename T>
PerSample<T> per_sample(const Maybe& x) {
  if (!x.has_value()) return {nullptr, 0};
  STD_TORCH_CHECK(
      x->stride(x->dim() - 1) == 1 || x->size(x->dim() - 1) <= 1,
      "tim_kernels_cuda: channels must have no gaps");
  return {pointer<const T>(x), x->size(0) == 1 ? 0 : x->stride(0)};
}

// Whether 16-byte accesses are possible at every multiple of 8 channels.
template <typename T>
bool is_aligned(const T* data) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0;
}
template <typename T, typename... Strides>
bool is_aligned(const T* data, Strides... strides) {
  return is_aligned(data) && ((strides % CHUNK == 0) && ...);
}
template <typename T>
bool is_aligned(const Tokens<T>& x) {
  return is_aligned(x.data, x.b, x.n);
}
template <typename T>
bool is_aligned(const PerSample<T>& x) {
  return is_aligned(x.data, x.s);
}

// Blocks of so many tokens, or of so many positions of latents.
inline Grid grid_of(int64_t length, int64_t tokens_per_block, const int32_t* cu = nullptr) {
  const int64_t tiles = (length + tokens_per_block - 1) / tokens_per_block;
  return {cu, length, static_cast<unsigned>(tiles), tokens_per_block};
}
inline Grid grid_of(
    const Tensor& x, const Maybe& cu, int64_t max_length, int64_t tokens_per_block) {
  const int64_t length = cu.has_value() ? max_length : x.size(1);
  return grid_of(length, tokens_per_block, pointer<int32_t>(cu));
}

inline int64_t samples_of(const Tensor& x, const Maybe& cu) {
  return cu.has_value() ? cu->size(0) - 1 : x.size(0);
}

// The current stream of a tensor's device, with that device current.
struct Stream {
  cudaStream_t stream = nullptr;
#ifdef __CUDACC__
  torch::stable::accelerator::DeviceGuard guard;

  explicit Stream(const Tensor& x) : guard(x.get_device_index()) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }
#else
  explicit Stream(const Tensor&) {}
#endif
};

inline void check(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "tim_kernels_cuda: ", cudaGetErrorString(error));
}

// Run a kernel on `blocks` blocks of `threads`; nothing happens when there are no blocks.
template <typename... Parameters, typename... Arguments>
void launch(
    const Stream& stream, void (*kernel)(Parameters...), int64_t blocks, int threads,
    size_t shared_bytes, Arguments... arguments) {
  if (blocks == 0) return;
  STD_TORCH_CHECK(blocks < (int64_t(1) << 31), "tim_kernels_cuda: too many blocks: ", blocks);
  if (shared_bytes > 48 * 1024) {
    check(cudaFuncSetAttribute(
        reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
        static_cast<int>(shared_bytes)));
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream.stream;
  check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}

// A type as a value, so that a generic lambda can be called with it.
template <typename T>
struct Type {
  using type = T;
};

// Call f(Type<T>) with the element type of a token tensor.
template <typename F>
void with_dtype(ScalarType dtype, F f) {
  switch (dtype) {
    case ScalarType::Float: return f(Type<float>{});
    case ScalarType::BFloat16: return f(Type<__nv_bfloat16>{});
    case ScalarType::Half: return f(Type<__half>{});
    default: STD_TORCH_CHECK(false, "tim_kernels_cuda: unexpected dtype");
  }
}

// Call f(Type<T>, Type<S>) with the element types of tokens and of their conditioning, or of a
// network's outputs and of its data: S is T or float.
template <typename F>
void with_dtypes(ScalarType dtype, ScalarType other, F f) {
  with_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (other == DType<T>::value) return f(type, type);
    STD_TORCH_CHECK(
        other == ScalarType::Float,
        "tim_kernels_cuda: the second dtype must be float32 or the first");
    if constexpr (!std::is_same_v<T, float>) f(type, Type<float>{});
  });
}

// Call f(integral_constant<int, W>): 8 if every chunk of these views has 16-byte accesses, else 1.
template <typename F, typename... Views>
void with_width(int64_t size, F f, const Views&... views) {
  if (size % CHUNK == 0 && (is_aligned(views) && ...))
    return f(std::integral_constant<int, CHUNK>{});
  f(std::integral_constant<int, 1>{});
}

}  // namespace tim
