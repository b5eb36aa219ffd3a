// Functions whose backward pass is a Rust closure. Compiles without CUDA headers.

#include <ATen/ATen.h>
#include <ATen/core/ivalue.h>
#include <torch/csrc/autograd/custom_function.h>

#include <memory>
#include <stdexcept>

#include "guarded.h"

namespace {

using Drop = void (*)(void*);
// Takes `grad` over; writes n tensors that the caller owns, or nulls. Not 0: it failed, `why` says how.
using Backward = int (*)(void* context, at::Tensor* grad, at::Tensor** out, size_t n, char* why, size_t room);

// A closure that runs once at most, and the result that forward gives. What the closure holds is freed with it.
struct Once final : torch::CustomClassHolder {
  Once(void* context, Backward run, Drop drop) : context_(context), run_(run), drop_(drop) {}
  ~Once() override { done(); }

  torch::autograd::variable_list operator()(const at::Tensor& grad, size_t n) {
    TORCH_CHECK(context_ != nullptr, "the function can be differentiated once only");
    std::vector<at::Tensor*> out(n, nullptr);
    char why[1024] = "";
    int failed = run_(context_, new at::Tensor(grad), out.data(), n, why, sizeof why);
    done();
    torch::autograd::variable_list grads;
    for (auto* tensor : out) {
      std::unique_ptr<at::Tensor> keep(tensor);
      grads.push_back(keep ? *keep : at::Tensor());
    }
    if (failed != 0) throw std::runtime_error(why);
    return grads;
  }

  at::Tensor result;

 private:
  void done() {
    if (context_ != nullptr) drop_(context_);
    context_ = nullptr;
  }
  void* context_;
  Backward run_;
  Drop drop_;
};

struct Custom : torch::autograd::Function<Custom> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, c10::intrusive_ptr<Once> once,
                            at::TensorList inputs) {
    ctx->saved_data["once"] = c10::IValue::make_capsule(once);
    ctx->saved_data["inputs"] = static_cast<int64_t>(inputs.size());
    return std::move(once->result);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    auto once = c10::static_intrusive_pointer_cast<Once>(ctx->saved_data["once"].toCapsule());
    auto n = static_cast<size_t>(ctx->saved_data["inputs"].toInt());
    at::NoGradGuard no_grad;
    torch::autograd::variable_list result(1);
    for (auto& grad : (*once)(grads[0], n)) result.push_back(grad);
    return result;
  }
};

}  // namespace

extern "C" {

// Takes `context` over in every case.
char* hr_with_backward(at::Tensor* const* inputs, size_t n, at::Tensor* result, void* context, Backward run, Drop drop,
                       at::Tensor** out) {
  c10::intrusive_ptr<Once> once;
  return guarded([&] {
    once = c10::make_intrusive<Once>(context, run, drop);
    once->result = result->detach();
    std::vector<at::Tensor> list;
    for (size_t i = 0; i < n; ++i) list.push_back(*inputs[i]);
    // Only a TensorList is seen as a list of differentiable arguments, a vector is not.
    *out = new at::Tensor(Custom::apply(once, at::TensorList(list)));
  });
}

}  // extern "C"
