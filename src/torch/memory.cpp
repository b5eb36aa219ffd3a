// Memory that libtorch and the C library keep to themselves. Nothing here throws into Rust.

#include <ATen/DeviceAccelerator.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/CPUAllocator.h>

#include <malloc.h>

#include <array>
#include <atomic>
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

std::atomic<int64_t> tensors_now{0};
std::atomic<int64_t> tensors_most{0};
at::DeleterFnPtr free_uncounted = nullptr;

void count(int64_t bytes) {
  int64_t now = tensors_now.fetch_add(bytes, std::memory_order_relaxed) + bytes;
  int64_t most = tensors_most.load(std::memory_order_relaxed);
  while (now > most && !tensors_most.compare_exchange_weak(most, now, std::memory_order_relaxed)) {
  }
}

void free_counted(void* data) {
  count(-static_cast<int64_t>(malloc_usable_size(data)));
  free_uncounted(data);
}

// Counts what another allocator hands out, as the C library rounds it.
class Counting final : public at::Allocator {
 public:
  explicit Counting(at::Allocator* base) : base_(base) {}
  at::DataPtr allocate(size_t bytes) override {
    auto data = base_->allocate(bytes);
    if (data.compare_exchange_deleter(free_uncounted, &free_counted)) {
      count(static_cast<int64_t>(malloc_usable_size(data.get())));
    }
    return data;
  }
  at::DeleterFnPtr raw_deleter() const override { return &free_counted; }
  void copy_data(void* to, const void* from, size_t bytes) const override { base_->copy_data(to, from, bytes); }

 private:
  at::Allocator* base_;
};

}  // namespace

extern "C" {

// From now on CPU tensors are counted; those that are there already are not. 1: counted, 0: this allocator cannot be.
int hr_count_tensors() {
  static const bool counted = [] {
    auto* base = c10::GetCPUAllocator();
    free_uncounted = base->raw_deleter();
    if (free_uncounted == nullptr) return false;
    // Lives as long as the process: tensors point to it.
    c10::SetCPUAllocator(new Counting(base), /*priority=*/1);
    return true;
  }();
  return counted;
}

// The most that CPU tensors held at once since this was last called, bytes.
int64_t hr_most_tensor_bytes() {
  int64_t now = tensors_now.load(std::memory_order_relaxed);
  int64_t most = tensors_most.exchange(now, std::memory_order_relaxed);
  return most > now ? most : now;
}

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
