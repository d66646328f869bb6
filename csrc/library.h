// The torch library that the operators belong to. Its namespace is the build's, so that two builds
// can live in one process: torch.ops.tim_kernels_cuda if setup.py does not say otherwise.
#pragma once

#include <torch/csrc/stable/library.h>

#ifndef TIM_KERNELS_NAMESPACE
#define TIM_KERNELS_NAMESPACE tim_kernels_cuda
#endif

// Where the kernels run; the tests compile them for the CPU.
#ifndef TIM_DISPATCH_KEY
#define TIM_DISPATCH_KEY CUDA
#endif

// The macros of torch paste their arguments: these expand them first.
#define TIM_DEFINE(library) TIM_DEFINE_IN(TIM_KERNELS_NAMESPACE, library)
#define TIM_DEFINE_IN(name, library) STABLE_TORCH_LIBRARY(name, library)
#define TIM_IMPLEMENT(library) TIM_IMPLEMENT_IN(TIM_KERNELS_NAMESPACE, TIM_DISPATCH_KEY, library)
#define TIM_IMPLEMENT_IN(name, key, library) STABLE_TORCH_LIBRARY_IMPL(name, key, library)
