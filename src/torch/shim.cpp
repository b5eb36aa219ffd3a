// What tch lacks, as plain C. Every exception becomes a string that the caller frees with hr_free; null is success.
// Compiles without CUDA headers and links nothing of libtorch_cuda.

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/ivalue.h>
#include <c10/core/Allocator.h>
#include <c10/util/ThreadLocalDebugInfo.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>

#include <atomic>
#include <cstdlib>
#include <memory>
#include <stdexcept>
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

// Owns the Rust closure `context`, and the hook that the leaf had before; `call` must not unwind.
struct GradReady final : torch::autograd::PostAccumulateGradHook {
  GradReady(void* context, Callback call, Callback drop) : context_(context), call_(call), drop_(drop) {}
  ~GradReady() override { drop_(context_); }
  void operator()(const at::Tensor& leaf) override {
    if (before) (*before)(leaf);
    call_(context_);
  }

  std::unique_ptr<torch::autograd::PostAccumulateGradHook> before;

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
    auto& slot = torch::autograd::impl::post_acc_grad_hooks(*leaf);
    auto* ours = dynamic_cast<GradReady*>(slot.get());
    hook->before = ours ? std::move(ours->before) : std::move(slot);
    torch::autograd::impl::set_post_acc_grad_hooks(*leaf, std::move(hook));
  });
}

char* hr_clear_grad_hook(at::Tensor* leaf) {
  return guarded([&] {
    auto* ours = dynamic_cast<GradReady*>(torch::autograd::impl::post_acc_grad_hooks(*leaf).get());
    if (ours == nullptr) return;
    auto before = std::move(ours->before);
    torch::autograd::impl::set_post_acc_grad_hooks(*leaf, std::move(before));
  });
}

// The same tensor by its TensorImpl, which somebody else holds too.
char* hr_from_handle(void* impl, at::Tensor** out) {
  return guarded([&] {
    auto held = c10::intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>::unsafe_reclaim_from_nonowning(
        static_cast<c10::TensorImpl*>(impl));
    *out = new at::Tensor(at::Tensor::wrap_tensor_impl(std::move(held)));
  });
}

void* hr_handle(at::Tensor* tensor) { return tensor->unsafeGetTensorImpl(); }

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

namespace {

// Runs a Rust closure: takes the input tensors over, gives one tensor of ours; not 0: it failed, `why` says how.
using Body = int (*)(void* context, at::Tensor* const* inputs, size_t n, at::Tensor** out, char* why, size_t room);

struct AutocastState {
  bool enabled;
  at::ScalarType dtype;
};

constexpr at::DeviceType kAutocastDevices[] = {at::kCPU, at::kCUDA};

// This thread's autocast set to `states`, as one level of nesting and without its cache: a weight cast under no_grad
// must not be found again by the pass that needs its gradient.
class AutocastScope {
 public:
  explicit AutocastScope(const AutocastState* states) : was_cached_(at::autocast::is_autocast_cache_enabled()) {
    read(was_);
    write(states);
    at::autocast::set_autocast_cache_enabled(false);
    at::autocast::increment_nesting();
  }
  ~AutocastScope() {
    if (at::autocast::decrement_nesting() == 0) at::autocast::clear_cache();
    at::autocast::set_autocast_cache_enabled(was_cached_);
    write(was_);
  }
  static void read(AutocastState* states) {
    for (auto device : kAutocastDevices) {
      *states++ = {at::autocast::is_autocast_enabled(device), at::autocast::get_autocast_dtype(device)};
    }
  }

 private:
  static void write(const AutocastState* states) {
    for (auto device : kAutocastDevices) {
      at::autocast::set_autocast_enabled(device, states->enabled);
      at::autocast::set_autocast_dtype(device, states->dtype);
      ++states;
    }
  }
  AutocastState was_[2];
  bool was_cached_;
};

// A Rust closure that is run in forward and once more in backward, under the same autocast.
struct Replay final : torch::CustomClassHolder {
  Replay(void* context, Body run, Callback drop) : context_(context), run_(run), drop_(drop) {
    AutocastScope::read(autocast_);
  }
  ~Replay() override { drop_(context_); }

  at::Tensor operator()(const torch::autograd::variable_list& inputs) const {
    AutocastScope scope(autocast_);
    std::vector<at::Tensor*> owned;
    owned.reserve(inputs.size());
    for (const auto& input : inputs) owned.push_back(new at::Tensor(input));
    char why[1024] = "";
    at::Tensor* out = nullptr;
    if (run_(context_, owned.data(), owned.size(), &out, why, sizeof why) != 0) throw std::runtime_error(why);
    std::unique_ptr<at::Tensor> keep(out);
    return *keep;
  }
  std::atomic<bool> replayed{false};

 private:
  void* context_;
  Body run_;
  Callback drop_;
  AutocastState autocast_[2];
};

struct Recompute : torch::autograd::Function<Recompute> {
  // `anchor` makes a node even where only parameters inside the closure need gradients.
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, c10::intrusive_ptr<Replay> replay,
                            const at::Tensor& anchor, at::TensorList inputs) {
    ctx->save_for_backward(inputs.vec());
    ctx->saved_data["replay"] = c10::IValue::make_capsule(replay);
    return (*replay)(inputs.vec());
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    auto replay = c10::static_intrusive_pointer_cast<Replay>(ctx->saved_data["replay"].toCapsule());
    TORCH_CHECK(!replay->replayed.exchange(true), "a recomputed part can be differentiated once only");
    torch::autograd::variable_list leaves;
    for (const auto& saved : ctx->get_saved_variables()) {
      leaves.push_back(saved.detach().set_requires_grad(saved.requires_grad()));
    }
    {
      at::AutoGradMode with_grad(true);
      auto out = (*replay)(leaves);
      if (out.requires_grad()) torch::autograd::backward({out}, {grads[0]});
    }
    torch::autograd::variable_list result(2);
    for (const auto& leaf : leaves) result.push_back(leaf.grad());
    return result;
  }
};

// Bytes that this thread's tensors hold, counted from the start of the watch.
struct LiveBytes final : c10::MemoryReportingInfoBase {
  void reportMemoryUsage(void*, int64_t alloc_size, size_t, size_t, c10::Device) override {
    int64_t now = live.fetch_add(alloc_size) + alloc_size;
    if (now > peak.load()) peak.store(now);
  }
  bool memoryProfilingEnabled() const override { return true; }
  std::atomic<int64_t> live{0};
  std::atomic<int64_t> peak{0};
};

struct Watch {
  std::shared_ptr<LiveBytes> bytes = std::make_shared<LiveBytes>();
  c10::DebugInfoGuard guard{c10::DebugInfoKind::PROFILER_STATE, bytes};
};

}  // namespace

extern "C" {

// Takes `context` over in every case.
char* hr_recompute(at::Tensor* const* inputs, size_t n, void* context, Body run, Callback drop, at::Tensor** out) {
  c10::intrusive_ptr<Replay> replay;
  return guarded([&] {
    replay = c10::make_intrusive<Replay>(context, run, drop);
    auto anchor = at::empty({0}).set_requires_grad(at::GradMode::is_enabled());
    // Only a TensorList is seen as a list of differentiable arguments, a vector is not.
    auto tensors = list(inputs, n);
    *out = new at::Tensor(Recompute::apply(replay, anchor, at::TensorList(tensors)));
  });
}

char* hr_watch_start(Watch** out) {
  return guarded([&] { *out = new Watch(); });
}

void hr_watch_read(const Watch* watch, int64_t* live, int64_t* peak) {
  *live = watch->bytes->live.load();
  *peak = watch->bytes->peak.load();
}

// On the thread that started it.
char* hr_watch_stop(Watch* watch) {
  return guarded([&] { delete watch; });
}

}  // extern "C"
