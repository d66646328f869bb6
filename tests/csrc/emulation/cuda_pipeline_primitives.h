// Copies from global to shared memory on the side, for the emulation: they happen when the thread
// waits for them, as late as a GPU may, so what is read too early is not yet there.
#pragma once

#include <cuda_runtime.h>

#include <deque>
#include <map>

namespace emulation {

struct Copy {
  void* to;
  const void* from;
  size_t size;
};
struct Copies {
  std::vector<Copy> open;  // of no group yet
  std::deque<std::vector<Copy>> groups;
};

inline Copies& copies() {  // of the thread
  static thread_local std::map<unsigned, Copies> of_thread;
  return of_thread[block().current];
}

}  // namespace emulation

inline void __pipeline_memcpy_async(void* to, const void* from, size_t size) {
  if (reinterpret_cast<uintptr_t>(to) % size || reinterpret_cast<uintptr_t>(from) % size)
    emulation::fail("a copy is not aligned");
  emulation::copies().open.push_back({to, from, size});
}
inline void __pipeline_commit() {
  emulation::Copies& copies = emulation::copies();
  copies.groups.push_back(std::move(copies.open));
  copies.open.clear();
}
inline void __pipeline_wait_prior(size_t left) {
  auto& groups = emulation::copies().groups;
  for (; groups.size() > left; groups.pop_front())
    for (const emulation::Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, copy.size);
}
