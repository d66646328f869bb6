// The operators of the library: each fills the tensors marked (a!) that its caller made, for the
// operator of the same name in Python. `rows` is tokens a block.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(tim_kernels_cuda, library) {
  library.def(
      "ada_layer_norm_forward(Tensor x, Tensor? branch, Tensor? gate, Tensor? bias, Tensor? shift, "
      "Tensor? scale, Tensor(a!)? out, Tensor(b!)? y, float eps, Tensor? cu_seqlens, "
      "int max_length, int rows) -> ()");
  library.def(
      "ada_layer_norm_backward(Tensor? dout, Tensor? dy, Tensor x, Tensor? branch, Tensor? gate, "
      "Tensor? bias, Tensor? scale, Tensor(a!) dx, Tensor(b!)? dbranch, Tensor(c!) partial, "
      "float eps, Tensor? cu_seqlens, int max_length, int rows) -> ()");
}
