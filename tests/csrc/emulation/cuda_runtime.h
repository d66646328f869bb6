// CUDA on a CPU, for tests: a thread block at a time, a fiber a thread.
//
// It stands in for NVIDIA's header of the same name when g++ compiles csrc/. A fiber runs until a
// barrier or a warp operation, then the next one does: forwards in even blocks, backwards in odd
// ones, so that a missing barrier lets somebody read what is not yet there. Shared memory is as
// large as asked for, on the heap, and starts as NaN; AddressSanitizer sees every access. A
// barrier that not all threads reach, or a warp operation that not all its lanes reach, aborts.
// Launches are noted in the file TIM_KERNELS_EMULATED_LAUNCHES, if there is one.
#pragma once

#include <math.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <memory>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define EMULATION_SWITCH_FROM(keep, bottom, size) __sanitizer_start_switch_fiber(keep, bottom, size)
#define EMULATION_SWITCHED(kept, bottom, size) __sanitizer_finish_switch_fiber(kept, bottom, size)
#else
#define EMULATION_SWITCH_FROM(keep, bottom, size) (void)(keep), (void)(bottom), (void)(size)
#define EMULATION_SWITCHED(kept, bottom, size) (void)(kept), (void)(bottom), (void)(size)
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __shared__ static

struct uint3 {
  unsigned x = 0, y = 0, z = 0;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline float __fdividef(float x, float y) { return x / y; }
inline float __uint_as_float(uint32_t x) {
  float result;
  std::memcpy(&result, &x, sizeof(result));
  return result;
}
inline int __double2loint(double x) {
  int32_t low;
  std::memcpy(&low, &x, sizeof(low));
  return low;
}
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};
inline const char* cudaGetErrorString(cudaError_t) { return "invalid value"; }

namespace emulation {

constexpr unsigned WARP = 32;
constexpr size_t STACK = 128 * 1024;  // bytes of a fiber
constexpr size_t MOST_SHARED = 227 * 1024, SHARED_WITHOUT_ASKING = 48 * 1024;

inline size_t& allowed_shared() {
  static thread_local size_t bytes = SHARED_WITHOUT_ASKING;
  return bytes;
}

enum class State { READY, AT_BARRIER, IN_WARP, DONE };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[STACK]};
  void* kept = nullptr;  // what AddressSanitizer keeps of a fiber that is not running
  State state = State::DONE;
  unsigned mask = 0;  // the lanes that take part in the warp operation
  unsigned operations = 0;
  uint64_t value[2];  // what this lane gives, in turns: a slow reader still finds the last
};

// All there is of the one thread block that runs.
struct Block {
  std::vector<Fiber> fibers;
  ucontext_t scheduler;
  void* kept = nullptr;
  const void* bottom = nullptr;
  size_t bottom_size = 0;
  unsigned current = 0, threads = 0;
  std::function<void()> kernel;
  std::vector<char> shared;
};

inline Block& block() {
  static thread_local Block the_block;
  return the_block;
}

}  // namespace emulation

inline thread_local uint3 threadIdx, blockIdx;
inline thread_local dim3 blockDim, gridDim;

namespace emulation {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulation: %s (block %u, thread %u)\n", what, blockIdx.x, block().current);
  std::abort();
}

inline void* dynamic_shared() { return block().shared.data(); }

// Back to the scheduler, until it comes back to this fiber.
inline void wait(State state) {
  Block& b = block();
  Fiber& fiber = b.fibers[b.current];
  fiber.state = state;
  EMULATION_SWITCH_FROM(state == State::DONE ? nullptr : &fiber.kept, b.bottom, b.bottom_size);
  swapcontext(&fiber.context, &b.scheduler);
  EMULATION_SWITCHED(fiber.kept, &b.bottom, &b.bottom_size);
}

inline void run_fiber() {
  Block& b = block();
  EMULATION_SWITCHED(nullptr, &b.bottom, &b.bottom_size);
  b.kernel();
  wait(State::DONE);
}

inline void resume(unsigned thread) {
  Block& b = block();
  Fiber& fiber = b.fibers[thread];
  b.current = thread;
  threadIdx.x = thread;
  EMULATION_SWITCH_FROM(&b.kept, fiber.stack.get(), STACK);
  swapcontext(&b.scheduler, &fiber.context);
  EMULATION_SWITCHED(b.kept, nullptr, nullptr);
}

// Free the fibers whose barrier or warp operation everybody has reached; whether there were any.
inline bool release() {
  Block& b = block();
  unsigned waiting = 0, done = 0;
  for (unsigned i = 0; i < b.threads; i++) {
    waiting += b.fibers[i].state == State::AT_BARRIER;
    done += b.fibers[i].state == State::DONE;
  }
  if (waiting == b.threads) {
    for (unsigned i = 0; i < b.threads; i++) b.fibers[i].state = State::READY;
    return true;
  }
  bool is_any = false;
  for (unsigned first = 0; first < b.threads; first += WARP) {
    for (unsigned lane = 0; lane < WARP && first + lane < b.threads; lane++) {
      Fiber& fiber = b.fibers[first + lane];
      if (fiber.state != State::IN_WARP) continue;
      bool is_complete = true;
      for (unsigned other = 0; other < WARP; other++) {
        if (!(fiber.mask >> other & 1)) continue;
        const unsigned i = first + other;
        is_complete &=
            i < b.threads && b.fibers[i].state == State::IN_WARP && b.fibers[i].mask == fiber.mask;
      }
      if (!is_complete) continue;
      const unsigned mask = fiber.mask;
      for (unsigned other = 0; other < WARP; other++)
        if (mask >> other & 1) b.fibers[first + other].state = State::READY;
      is_any = true;
    }
  }
  if (!is_any && done != b.threads)
    fail(
        waiting ? "a barrier is not reached by all threads"
                : "a warp operation is not reached by all its lanes");
  return is_any;
}

inline void run_block(bool is_forwards) {
  Block& b = block();
  for (unsigned i = 0; i < b.threads; i++) {
    Fiber& fiber = b.fibers[i];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_fiber, 0);
    fiber.state = State::READY;
    fiber.operations = 0;
  }
  do {
    for (unsigned k = 0; k < b.threads; k++) {
      const unsigned i = is_forwards ? k : b.threads - 1 - k;
      if (b.fibers[i].state == State::READY) resume(i);
    }
  } while (release());
}

// Exchange a value of up to 8 bytes with a lane of the warp, itself if there is no such lane.
template <typename T>
T exchange(unsigned mask, T value, unsigned source) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  Block& b = block();
  const unsigned first = b.current / WARP * WARP;
  Fiber& fiber = b.fibers[b.current];
  if (!(mask >> (b.current - first) & 1)) fail("a lane is not in its own mask");
  const unsigned turn = fiber.operations++ % 2;
  std::memcpy(&fiber.value[turn], &value, sizeof(T));
  fiber.mask = mask;
  wait(State::IN_WARP);
  if (source >= WARP) return value;
  if (!(mask >> source & 1)) fail("a lane reads one that is not in the mask");
  T result;
  std::memcpy(&result, &b.fibers[first + source].value[turn], sizeof(T));
  return result;
}

inline unsigned lane() { return block().current % WARP; }

}  // namespace emulation

inline void __syncthreads() { emulation::wait(emulation::State::AT_BARRIER); }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  emulation::exchange(mask, 0, emulation::WARP);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  const unsigned lane = emulation::lane(), source = lane ^ unsigned(lanes);
  return emulation::exchange(mask, value, source / width == lane / width ? source : lane);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const unsigned lane = emulation::lane(), source = lane + delta;
  return emulation::exchange(mask, value, source / width == lane / width ? source : lane);
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const unsigned lane = emulation::lane();
  return emulation::exchange(mask, value, lane / width * width + unsigned(source) % width);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  unsigned votes = 0;
  for (unsigned source = 0; source < emulation::WARP; source++) {
    const unsigned from = mask >> source & 1 ? source : emulation::lane();
    const int vote = emulation::exchange(mask, predicate, from);
    if (mask >> source & 1 && vote) votes |= 1u << source;
  }
  return votes;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate) == mask;
}

inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int value) {
  if (size_t(value) > emulation::MOST_SHARED) return cudaErrorInvalidValue;
  emulation::allowed_shared() = value;
  return cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(
    const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
  emulation::Block& b = emulation::block();
  const unsigned threads = config->blockDim.x;
  if (config->gridDim.x == 0 || threads == 0 || threads > 1024) return cudaErrorInvalidValue;
  if (config->dynamicSmemBytes > emulation::allowed_shared()) return cudaErrorInvalidValue;
  emulation::allowed_shared() = emulation::SHARED_WITHOUT_ASKING;
  if (const char* path = std::getenv("TIM_KERNELS_EMULATED_LAUNCHES")) {
    std::ofstream(path, std::ios::app)
        << config->gridDim.x << ' ' << threads << ' ' << config->dynamicSmemBytes << ' '
        << __PRETTY_FUNCTION__ << '\n';
  }
  if (b.fibers.size() < threads) b.fibers = std::vector<emulation::Fiber>(threads);
  b.threads = threads;
  b.kernel = [=] { kernel(arguments...); };
  gridDim = config->gridDim, blockDim = config->blockDim;
  for (unsigned i = 0; i < config->gridDim.x; i++) {
    blockIdx.x = i;
    b.shared = std::vector<char>(config->dynamicSmemBytes, char(0xff));  // NaN
    emulation::run_block(i % 2 == 0);
  }
  b.kernel = nullptr;
  return cudaSuccess;
}
