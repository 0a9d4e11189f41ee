// The operators that PyTorch gets to know by kernels.py.

#include <torch/library.h>

#include "attention.h"
#include "products.h"
#include "training.h"

TORCH_LIBRARY(basis_select, m) {
  m.def("product(Tensor x, Tensor packed, int[] layout, Tensor? bias) -> Tensor");
  m.def("attention(Tensor query, Tensor key, Tensor value, Tensor? used, float scale) -> Tensor");
  m.def("rounded_weight(Tensor weight, Tensor scale, float lowest, float highest, bool in_bfloat16) -> Tensor");
  m.def("rounded_weight_backward(Tensor weight, Tensor scale, Tensor grad, float lowest, float highest) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(basis_select, CPU, m) {
  m.impl("product", &product);
  m.impl("attention", &attention);
  m.impl("rounded_weight", &rounded_weight);
  m.impl("rounded_weight_backward", &rounded_weight_backward);
}
