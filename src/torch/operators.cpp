// Operators of libtorch that tch does not offer, and switches of its CUDA libraries.

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/core/grad_mode.h>

#include <optional>
#include <tuple>
#include <vector>

#include "guarded.h"

namespace {

std::vector<at::Tensor> list(at::Tensor* const* tensors, size_t n) {
  std::vector<at::Tensor> out;
  out.reserve(n);
  for (size_t i = 0; i < n; ++i) out.push_back(*tensors[i]);
  return out;
}

}  // namespace

extern "C" {

char* hr_leaky_relu(at::Tensor* out, at::Tensor* x, double slope) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    at::leaky_relu_out(*out, *x, slope);
  });
}

// One LSTM cell without biases: gates of the input and of the last output `[B, 4H]` in PyTorch's order, cell `[B, H]`.
// Gives the output, the cell and the activated gates. One kernel on CUDA; spelt out elsewhere.
char* hr_lstm_cell(at::Tensor* input, at::Tensor* hidden, at::Tensor* cell, at::Tensor** out) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    at::Tensor h, c, gates;
    if (cell->is_cuda()) {
      std::tie(h, c, gates) = at::_thnn_fused_lstm_cell(*input, *hidden, *cell);
    } else {
      auto parts = (*input + *hidden).chunk(4, 1);
      auto i = parts[0].sigmoid(), f = parts[1].sigmoid(), g = parts[2].tanh(), o = parts[3].sigmoid();
      c = f * *cell + i * g;
      h = o * c.tanh();
      gates = at::cat({i, f, g, o}, 1);
    }
    out[0] = new at::Tensor(h);
    out[1] = new at::Tensor(c);
    out[2] = new at::Tensor(gates);
  });
}

// The gradients of the gates and of the cell before. `grad_cell` may be null.
char* hr_lstm_cell_backward(at::Tensor* grad_out, at::Tensor* grad_cell, at::Tensor* before, at::Tensor* after,
                            at::Tensor* gates, at::Tensor** out) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    at::Tensor grad_gates, grad_before;
    auto given = grad_cell ? std::optional<at::Tensor>(*grad_cell) : std::nullopt;
    if (before->is_cuda()) {
      std::tie(grad_gates, grad_before, std::ignore) = at::_thnn_fused_lstm_cell_backward_impl(
          *grad_out, given, *before, *after, *gates, /*has_bias=*/false);
    } else {
      auto parts = gates->chunk(4, 1);
      auto i = parts[0], f = parts[1], g = parts[2], o = parts[3], t = after->tanh();
      auto grad = *grad_out * o * (1 - t * t);
      if (given) grad = grad + *given;
      grad_gates = at::cat({grad * g * i * (1 - i), grad * *before * f * (1 - f), grad * i * (1 - g * g),
                            *grad_out * t * o * (1 - o)}, 1);
      grad_before = grad * f;
    }
    out[0] = new at::Tensor(grad_gates);
    out[1] = new at::Tensor(grad_before);
  });
}

// Moves each tensor of `from` towards its partner by `weight`: a kernel or two on CUDA, however many there are.
char* hr_lerp(at::Tensor* const* from, at::Tensor* const* to, size_t n, double weight) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    at::_foreach_lerp_(list(from, n), list(to, n), weight);
  });
}

// TF32 in products of f32, and cuDNN's choice of algorithms by trial. Convolutions use TF32 by libtorch's own default.
char* hr_set_backends(int tf32, int benchmark) {
  return guarded([&] {
    auto& context = at::globalContext();
    context.setAllowTF32CuBLAS(tf32 != 0);
    context.setBenchmarkCuDNN(benchmark != 0);
  });
}

}  // extern "C"
