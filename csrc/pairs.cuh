// Two floats at a time: an instruction of sm_100, two of others. Rounded as one at a time is.
#pragma once

#include "common.cuh"

namespace tim {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
__device__ __forceinline__ float2 add2(float2 a, float2 b) { return __fadd2_rn(a, b); }
__device__ __forceinline__ float2 mul2(float2 a, float2 b) { return __fmul2_rn(a, b); }
__device__ __forceinline__ float2 fma2(float2 a, float2 b, float2 c) { return __ffma2_rn(a, b, c); }
#else
__device__ __forceinline__ float2 add2(float2 a, float2 b) {
  return make_float2(a.x + b.x, a.y + b.y);
}
__device__ __forceinline__ float2 mul2(float2 a, float2 b) {
  return make_float2(a.x * b.x, a.y * b.y);
}
__device__ __forceinline__ float2 fma2(float2 a, float2 b, float2 c) {
  return make_float2(a.x * b.x + c.x, a.y * b.y + c.y);
}
#endif
__device__ __forceinline__ float2 fms2(float2 a, float2 b, float2 c) {  // a·b − c
  return fma2(a, b, make_float2(-c.x, -c.y));
}

// Of an array, from i on.
template <int N>
__device__ __forceinline__ float2 at(const float (&x)[N], int i) {
  return make_float2(x[i], x[i + 1]);
}
template <int N>
__device__ __forceinline__ void set(float (&x)[N], int i, float2 to) {
  x[i] = to.x, x[i + 1] = to.y;
}

}  // namespace tim
