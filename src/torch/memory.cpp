// Memory that libtorch and the C library keep to themselves. Nothing here throws into Rust.

#include <ATen/DeviceAccelerator.h>
#include <ATen/core/grad_mode.h>

#include <malloc.h>

#include <cstdint>

namespace {

// The allocator of the accelerator in use; null where there is none, or none that was used yet.
at::DeviceAllocator* device_allocator() {
  auto type = at::accelerator::getAccelerator(/*checked=*/false);
  if (!type.has_value()) return nullptr;
  auto* allocator = at::getDeviceAllocator(*type);
  return allocator != nullptr && allocator->initialized() ? allocator : nullptr;
}

}  // namespace

extern "C" {

// 1 where some memory went back to the system.
int hr_trim_host() { return malloc_trim(0); }

// 1: emptied; 0: there is no device; -1: the device refused.
int hr_empty_device_cache() {
  try {
    auto* allocator = device_allocator();
    if (allocator == nullptr) return 0;
    allocator->emptyCache();
    return 1;
  } catch (...) {
    return -1;
  }
}

// Allocated, reserved and peak allocated bytes of device `index`; 1 on success, 0 where there is no device.
int hr_device_memory(int index, int64_t* out) {
  try {
    auto* allocator = device_allocator();
    if (allocator == nullptr) return 0;
    auto stats = allocator->getDeviceStats(static_cast<c10::DeviceIndex>(index));
    out[0] = stats.allocated_bytes[0].current;
    out[1] = stats.reserved_bytes[0].current;
    out[2] = stats.allocated_bytes[0].peak;
    return 1;
  } catch (...) {
    return 0;
  }
}

int hr_grad_enabled() { return at::GradMode::is_enabled(); }

void hr_set_grad_enabled(int on) { at::GradMode::set_enabled(on != 0); }

}  // extern "C"
