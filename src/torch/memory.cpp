// Memory that libtorch and the C library keep to themselves. Nothing here throws into Rust.

#include <ATen/DeviceAccelerator.h>
#include <ATen/core/grad_mode.h>

#include <malloc.h>

#include <array>
#include <cstdint>
#include <string>

namespace {

// The allocator of the accelerator in use; null where there is none, or none that was used yet.
at::DeviceAllocator* device_allocator() {
  auto type = at::accelerator::getAccelerator(/*checked=*/false);
  if (!type.has_value()) return nullptr;
  auto* allocator = at::getDeviceAllocator(*type);
  return allocator != nullptr && allocator->initialized() ? allocator : nullptr;
}

using c10::CachingAllocator::Stat;
using c10::CachingAllocator::StatArray;

using Put = void (*)(void* into, const char* name, int64_t value);

void put_stat(Put put, void* into, const std::string& name, const Stat& stat) {
  put(into, (name + ".current").c_str(), stat.current);
  put(into, (name + ".peak").c_str(), stat.peak);
  put(into, (name + ".allocated").c_str(), stat.allocated);
  put(into, (name + ".freed").c_str(), stat.freed);
}

void put_pools(Put put, void* into, const std::string& name, const StatArray& stats) {
  static const std::array<const char*, 3> pools = {".all", ".small_pool", ".large_pool"};
  for (size_t pool = 0; pool < pools.size(); ++pool) put_stat(put, into, name + pools[pool], stats[pool]);
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

// Every statistic of device `index`, by the names of torch.cuda.memory_stats; 1 on success, 0 where there is no device.
// With -1 the names come with zeros, device or not.
int hr_device_statistics(int index, Put put, void* into) {
  try {
    c10::CachingDeviceAllocator::DeviceStats stats;
    if (index >= 0) {
      auto* allocator = device_allocator();
      if (allocator == nullptr) return 0;
      stats = allocator->getDeviceStats(static_cast<c10::DeviceIndex>(index));
    }
    put_pools(put, into, "allocation", stats.allocation);
    put_pools(put, into, "segment", stats.segment);
    put_pools(put, into, "active", stats.active);
    put_pools(put, into, "inactive_split", stats.inactive_split);
    put_pools(put, into, "allocated_bytes", stats.allocated_bytes);
    put_pools(put, into, "reserved_bytes", stats.reserved_bytes);
    put_pools(put, into, "active_bytes", stats.active_bytes);
    put_pools(put, into, "inactive_split_bytes", stats.inactive_split_bytes);
    put_pools(put, into, "requested_bytes", stats.requested_bytes);
    put_stat(put, into, "oversize_allocations", stats.oversize_allocations);
    put_stat(put, into, "oversize_segments", stats.oversize_segments);
    put(into, "num_alloc_retries", stats.num_alloc_retries);
    put(into, "num_ooms", stats.num_ooms);
    put(into, "num_sync_all_streams", stats.num_sync_all_streams);
    put(into, "num_device_alloc", stats.num_device_alloc);
    put(into, "num_device_free", stats.num_device_free);
    put(into, "max_split_size", stats.max_split_size);
    return 1;
  } catch (...) {
    return 0;
  }
}

int hr_grad_enabled() { return at::GradMode::is_enabled(); }

void hr_set_grad_enabled(int on) { at::GradMode::set_enabled(on != 0); }

}  // extern "C"
