// Streams, events, allocator statistics and copies of a CUDA device, through libtorch's device-neutral interfaces: they
// reach CUDA when libtorch_cuda.so has been loaded, and throw when it has not. No CUDA header is needed.

#include <ATen/ATen.h>
#include <ATen/DeviceAccelerator.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/Event.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <cstdlib>
#include <optional>
#include <vector>

#include "guarded.h"

namespace {

c10::Device cuda(int index) { return c10::Device(c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(index)); }

c10::Stream stream_of(int device, int64_t id) {
  return c10::Stream(c10::Stream::UNSAFE, cuda(device), static_cast<c10::StreamId>(id));
}

std::vector<at::Tensor> list(at::Tensor* const* tensors, size_t n) {
  std::vector<at::Tensor> out;
  out.reserve(n);
  for (size_t i = 0; i < n; ++i) out.push_back(*tensors[i]);
  return out;
}

}  // namespace

extern "C" {

char* hr_device_count(int* out) {
  return guarded([&] { *out = at::accelerator::deviceCount(); });
}

char* hr_set_device(int device) {
  return guarded([&] { at::accelerator::setDeviceIndex(static_cast<c10::DeviceIndex>(device)); });
}

// A stream of libtorch's pool, which lives as long as the process.
char* hr_stream_new(int device, int high_priority, int64_t* id) {
  return guarded([&] {
    c10::impl::VirtualGuardImpl impl(c10::DeviceType::CUDA);
    *id = impl.getStreamFromGlobalPool(cuda(device), high_priority != 0).id();
  });
}

char* hr_stream_current(int device, int64_t* id) {
  return guarded([&] {
    c10::impl::VirtualGuardImpl impl(c10::DeviceType::CUDA);
    *id = impl.getStream(cuda(device)).id();
  });
}

// Makes it this thread's current stream; the former one comes back in `was`.
char* hr_stream_set(int device, int64_t id, int64_t* was) {
  return guarded([&] {
    c10::impl::VirtualGuardImpl impl(c10::DeviceType::CUDA);
    *was = impl.exchangeStream(stream_of(device, id)).id();
  });
}

char* hr_stream_native(int device, int64_t id, void** out) {
  return guarded([&] { *out = stream_of(device, id).native_handle(); });
}

char* hr_stream_sync(int device, int64_t id) {
  return guarded([&] { stream_of(device, id).synchronize(); });
}

char* hr_event_new(int timing, c10::Event** out) {
  return guarded([&] {
    auto flag = timing ? c10::EventFlag::BACKEND_DEFAULT : c10::EventFlag::PYTORCH_DEFAULT;
    *out = new c10::Event(c10::DeviceType::CUDA, flag);
  });
}

void hr_event_free(c10::Event* event) {
  char* error = guarded([&] { delete event; });
  std::free(error);
}

char* hr_event_record(c10::Event* event, int device, int64_t id) {
  return guarded([&] { event->record(stream_of(device, id)); });
}

char* hr_event_block(const c10::Event* event, int device, int64_t id) {
  return guarded([&] { event->block(stream_of(device, id)); });
}

char* hr_event_query(const c10::Event* event, int* done) {
  return guarded([&] { *done = event->query(); });
}

char* hr_event_sync(const c10::Event* event) {
  return guarded([&] { event->synchronize(); });
}

char* hr_event_elapsed(const c10::Event* from, const c10::Event* to, double* ms) {
  return guarded([&] { *ms = from->elapsedTime(*to); });
}

// Copies `bytes` of host memory to byte `start` of the contiguous `dst`, on a stream, and returns before it is done where
// the memory is page-locked: it must stay as it is until then.
char* hr_upload(at::Tensor* dst, size_t start, const void* src, size_t bytes, int device, int64_t id) {
  return guarded([&] {
    TORCH_CHECK(dst->is_contiguous() && start <= dst->nbytes() && bytes <= dst->nbytes() - start, bytes,
                " bytes from byte ", start, " for a tensor of ", dst->nbytes());
    if (bytes == 0) return;
    at::NoGradGuard no_grad;
    const auto count = static_cast<int64_t>(bytes);
    auto to = dst->detach().view({-1}).view(at::kByte).narrow(0, static_cast<int64_t>(start), count);
    auto host = at::from_blob(const_cast<void*>(src), {count}, at::TensorOptions().dtype(at::kByte));
    if (to.is_cpu()) {
      to.copy_(host);
      return;
    }
    c10::StreamGuard on(stream_of(device, id));
    to.copy_(host, /*non_blocking=*/true);
  });
}

// On the current stream; returns before it is done where host memory is page-locked.
char* hr_copy(at::Tensor* dst, at::Tensor* src) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    dst->copy_(*src, /*non_blocking=*/true);
  });
}

// Page-locked host memory of libtorch's own pool.
char* hr_pinned(const int64_t* dims, size_t ndims, int dtype, at::Tensor** out) {
  return guarded([&] {
    auto options = at::TensorOptions().dtype(static_cast<at::ScalarType>(dtype)).pinned_memory(true);
    *out = new at::Tensor(at::empty(at::IntArrayRef(dims, ndims), options));
  });
}

// allocated, peak allocated, reserved, peak reserved (bytes), then counts: device allocations, retries, out of memory.
char* hr_device_stats(int device, int64_t* out) {
  return guarded([&] {
    auto stats = at::accelerator::getDeviceStats(static_cast<c10::DeviceIndex>(device));
    const auto all = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
    out[0] = stats.allocated_bytes[all].current;
    out[1] = stats.allocated_bytes[all].peak;
    out[2] = stats.reserved_bytes[all].current;
    out[3] = stats.reserved_bytes[all].peak;
    out[4] = stats.num_device_alloc;
    out[5] = stats.num_alloc_retries;
    out[6] = stats.num_ooms;
  });
}

char* hr_device_free(int device, size_t* free_bytes, size_t* total_bytes) {
  return guarded([&] {
    auto [free_now, total] = at::accelerator::getMemoryInfo(static_cast<c10::DeviceIndex>(device));
    *free_bytes = free_now;
    *total_bytes = total;
  });
}

char* hr_empty_cache() {
  return guarded([] { at::accelerator::emptyCache(); });
}

char* hr_reset_peak(int device) {
  return guarded([&] { at::accelerator::resetPeakStats(static_cast<c10::DeviceIndex>(device)); });
}

char* hr_device_sync(int device) {
  return guarded([&] { at::accelerator::synchronizeDevice(static_cast<c10::DeviceIndex>(device)); });
}

char* hr_update_scale(at::Tensor* scale, at::Tensor* tracker, at::Tensor* found, double growth, double backoff,
                      int64_t interval) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    at::_amp_update_scale_(*scale, *tracker, *found, growth, backoff, interval);
  });
}

// As hr_fused_adam with the rate in a tensor; nothing changes where `found` holds 1. Gradients are divided by `divisor` on
// the way, where it is not null.
char* hr_fused_adam_unless(int adamw, at::Tensor* const* params, at::Tensor* const* grads,
                           at::Tensor* const* exp_avgs, at::Tensor* const* exp_avg_sqs, at::Tensor* const* steps,
                           size_t n, at::Tensor* lr, double beta1, double beta2, double weight_decay, double eps,
                           at::Tensor* found, at::Tensor* divisor) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    auto p = list(params, n), g = list(grads, n), m = list(exp_avgs, n), v = list(exp_avg_sqs, n), s = list(steps, n);
    std::optional<at::Tensor> skip(*found), scale = divisor ? std::optional<at::Tensor>(*divisor) : std::nullopt;
    if (adamw) {
      at::_fused_adamw_(p, g, m, v, {}, s, *lr, beta1, beta2, weight_decay, eps, false, false, scale, skip);
    } else {
      at::_fused_adam_(p, g, m, v, {}, s, *lr, beta1, beta2, weight_decay, eps, false, false, scale, skip);
    }
  });
}

char* hr_fused_sgd_unless(at::Tensor* const* params, at::Tensor* const* grads, at::Tensor* const* buffers, size_t n,
                          at::Tensor* lr, double momentum, double weight_decay, int nesterov, int first_step,
                          at::Tensor* found, at::Tensor* divisor) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    auto p = list(params, n), g = list(grads, n);
    std::vector<at::Tensor> b;
    if (momentum != 0) b = list(buffers, n);
    std::optional<at::Tensor> skip(*found), scale = divisor ? std::optional<at::Tensor>(*divisor) : std::nullopt;
    at::_fused_sgd_(p, g, b, weight_decay, momentum, *lr, 0.0, nesterov != 0, false, first_step != 0, scale, skip);
  });
}

}  // extern "C"
