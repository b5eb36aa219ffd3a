// What tch lacks, as plain C. Every exception becomes a string that the caller frees with hr_free; null is success.
// Compiles without CUDA headers and links nothing of libtorch_cuda.

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>

#include <cstdlib>
#include <memory>
#include <vector>

#include "guarded.h"

namespace {

std::vector<at::Tensor> list(at::Tensor* const* tensors, size_t n) {
  std::vector<at::Tensor> out;
  out.reserve(n);
  for (size_t i = 0; i < n; ++i) out.push_back(*tensors[i]);
  return out;
}

using Callback = void (*)(void*);

// Owns the Rust closure `context`; `call` must not unwind.
struct GradReady final : torch::autograd::PostAccumulateGradHook {
  GradReady(void* context, Callback call, Callback drop) : context_(context), call_(call), drop_(drop) {}
  ~GradReady() override { drop_(context_); }
  void operator()(const at::Tensor&) override { call_(context_); }

 private:
  void* context_;
  Callback call_;
  Callback drop_;
};

}  // namespace

extern "C" {

void hr_free(char* text) { std::free(text); }

// Takes `context` over in every case, failure included.
char* hr_set_grad_hook(at::Tensor* leaf, void* context, Callback call, Callback drop) {
  std::unique_ptr<GradReady> hook;
  return guarded([&] {
    hook = std::make_unique<GradReady>(context, call, drop);
    TORCH_CHECK(leaf->is_leaf() && leaf->requires_grad(), "a gradient hook needs a leaf that requires a gradient");
    torch::autograd::impl::set_post_acc_grad_hooks(*leaf, std::move(hook));
  });
}

char* hr_clear_grad_hook(at::Tensor* leaf) {
  return guarded([&] { torch::autograd::impl::set_post_acc_grad_hooks(*leaf, nullptr); });
}

char* hr_set_grad(at::Tensor* leaf, at::Tensor* grad) {
  return guarded([&] {
    TORCH_CHECK(leaf->sizes() == grad->sizes() && leaf->scalar_type() == grad->scalar_type(),
                "gradient of shape ", grad->sizes(), " for a parameter of shape ", leaf->sizes());
    leaf->mutable_grad() = *grad;
  });
}

// adamw: decoupled weight decay. The five lists have n entries; steps counts this step already.
char* hr_fused_adam(int adamw, at::Tensor* const* params, at::Tensor* const* grads, at::Tensor* const* exp_avgs,
                    at::Tensor* const* exp_avg_sqs, at::Tensor* const* steps, size_t n, double lr, double beta1,
                    double beta2, double weight_decay, double eps) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    auto p = list(params, n), g = list(grads, n), m = list(exp_avgs, n), v = list(exp_avg_sqs, n), s = list(steps, n);
    if (adamw) {
      at::_fused_adamw_(p, g, m, v, {}, s, lr, beta1, beta2, weight_decay, eps, false, false);
    } else {
      at::_fused_adam_(p, g, m, v, {}, s, lr, beta1, beta2, weight_decay, eps, false, false);
    }
  });
}

// momentum 0: no buffers are read or written.
char* hr_fused_sgd(at::Tensor* const* params, at::Tensor* const* grads, at::Tensor* const* buffers, size_t n, double lr,
                   double momentum, double weight_decay, int nesterov, int first_step) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    auto p = list(params, n), g = list(grads, n);
    std::vector<at::Tensor> b;
    if (momentum != 0) b = list(buffers, n);
    at::_fused_sgd_(p, g, b, weight_decay, momentum, lr, 0.0, nesterov != 0, false, first_step != 0);
  });
}

// Two-norm of every tensor, then of these norms: a scalar tensor that the caller owns.
char* hr_total_norm(at::Tensor* const* tensors, size_t n, at::Tensor** out) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    auto norms = at::_foreach_norm(list(tensors, n), 2.0);
    *out = new at::Tensor(at::linalg_vector_norm(at::stack(norms), 2.0));
  });
}

// device: 0 CPU, 1 CUDA. dtype: ScalarType of the narrow type. Sets this thread's state, returns the former one.
char* hr_autocast_enter(int device, int enabled, int dtype, int* was_enabled, int* was_dtype) {
  return guarded([&] {
    auto type = static_cast<at::DeviceType>(device);
    *was_enabled = at::autocast::is_autocast_enabled(type);
    *was_dtype = static_cast<int>(at::autocast::get_autocast_dtype(type));
    at::autocast::set_autocast_dtype(type, static_cast<at::ScalarType>(dtype));
    at::autocast::set_autocast_enabled(type, enabled != 0);
    at::autocast::increment_nesting();
  });
}

char* hr_autocast_leave(int device, int was_enabled, int was_dtype) {
  return guarded([&] {
    auto type = static_cast<at::DeviceType>(device);
    if (at::autocast::decrement_nesting() == 0) at::autocast::clear_cache();
    at::autocast::set_autocast_enabled(type, was_enabled != 0);
    at::autocast::set_autocast_dtype(type, static_cast<at::ScalarType>(was_dtype));
  });
}

// Threads inside one operator and between operators; 0 leaves a number as it is.
char* hr_set_threads(int intra_op, int inter_op) {
  return guarded([&] {
    if (intra_op > 0) at::set_num_threads(intra_op);
    if (inter_op > 0) at::set_num_interop_threads(inter_op);
  });
}

int hr_set_flush_denormal(int on) {
  try {
    return at::globalContext().setFlushDenormal(on != 0);
  } catch (...) {
    return 0;
  }
}

char* hr_set_deterministic(int on) {
  return guarded([&] { at::globalContext().setDeterministicAlgorithms(on != 0, /*warn_only=*/true); });
}

// A contiguous CPU tensor over foreign memory. Takes `owner` over in every case; drops it with the last view.
char* hr_from_memory(void* data, const int64_t* dims, size_t ndims, int dtype, void* owner, Callback drop,
                     at::Tensor** out) {
  std::shared_ptr<void> keep;
  return guarded([&] {
    keep = std::shared_ptr<void>(owner, drop);
    auto options = at::TensorOptions().dtype(static_cast<at::ScalarType>(dtype));
    *out = new at::Tensor(at::from_blob(data, at::IntArrayRef(dims, ndims), [keep](void*) {}, options));
    keep.reset();
  });
}

}  // extern "C"
