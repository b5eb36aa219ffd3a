// Memory of devices and hosts, and copies. Device memory is host memory that nobody else knows.

#include <cuda_runtime_api.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdlib>
#include <cstring>

#include "model.h"

using namespace fake;

namespace {

constexpr size_t kTotal = size_t{140} << 30;
constexpr size_t kContext = size_t{600} << 20;

cudaError_t error(cudaError_t code) { return static_cast<cudaError_t>(fail(code)); }

cudaError_t refused_in_capture(const char* call) {
  return forbidden_now(call) ? error(cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}

// The end of a step: the copy of its numbers to the host, by their size.
void step_ends(void* numbers, size_t bytes) {
  State& s = state();
  s.steps.push_back(s.now);
  s.now = Step{};
  for (const auto& [name, count] : s.in_step) s.counts["last step: " + name] = count;
  s.in_step.clear();
  // Kernels wrote nothing: a good step of loss 0.
  memset(numbers, 0, bytes);
  long step = static_cast<long>(s.steps.size());
  // Places of the numbers: see `src/train/device.rs`.
  if (fault("nonfinite", step)) static_cast<float*>(numbers)[bytes / sizeof(float) - 3] = 1.0F;
  if (fault("kill", step)) raise(SIGKILL);
  if (fault("stop", step)) raise(SIGSTOP);
}

cudaError_t copy(void* to, const void* from, size_t bytes, Stream& on) {
  State& s = state();
  std::string name = std::string("copy ") + kind_of(from) + ">" + kind_of(to);
  for (const void* host : {static_cast<const void*>(to), from}) {
    const char* last = static_cast<const char*>(host) + (bytes > 0 ? bytes - 1 : 0);
    if (is_locked(host) && !is_locked(last)) {
      s.problems.push_back(name + " crosses the end of a registration");
      return error(cudaErrorInvalidValue);
    }
  }
  work(on, name);
  touch(on, from, bytes, false, name);
  touch(on, to, bytes, true, name);
  bool pageable = name.find('H') != std::string::npos;
  if (pageable) s.now.pageable++;
  if (on.capture != nullptr) {
    if (pageable) {
      s.problems.push_back(name + " of pageable memory is captured");
      on.capture->invalid = true;
      return error(cudaErrorStreamCaptureUnsupported);
    }
    return cudaSuccess;
  }
  deliver();
  memmove(to, from, bytes);
  // A number that kernels would have written reads as 0.
  bool result = kind_of(from) == 'D' && kind_of(to) != 'D' && bytes <= 8;
  if (result && s.delivered.count(static_cast<const char*>(from)) == 0) memset(to, 0, bytes);
  if (kind_of(from) == 'D' && kind_of(to) == 'P' && static_cast<long>(bytes) == env_number("FAKE_CUDA_STEP_BYTES", -1)) {
    step_ends(to, bytes);
  }
  return cudaSuccess;
}

}  // namespace

FAKE_EXPORT cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total) {
  makes_context("cudaMemGetInfo");
  Lock hold(state().lock);
  *total = kTotal;
  *free_bytes = kTotal - kContext - state().device_bytes;
  return cudaSuccess;
}

FAKE_EXPORT cudaError_t cudaMalloc(void** out, size_t bytes) {
  makes_context("cudaMalloc");
  State& s = state();
  Lock hold(s.lock);
  s.now.mallocs++;
  long number = ++s.counts["cudaMalloc"];
  if (cudaError_t refused = refused_in_capture("cudaMalloc")) return refused;
  if (fault("alloc", number) || s.device_bytes + bytes > kTotal - kContext) return error(cudaErrorMemoryAllocation);
  size_t whole = (bytes + 4095) & ~size_t{4095};
  void* at = mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) return error(cudaErrorMemoryAllocation);
  s.device[static_cast<char*>(at)] = whole;
  s.device_bytes += whole;
  s.most_device_bytes = std::max(s.most_device_bytes, s.device_bytes);
  *out = at;
  return cudaSuccess;
}

FAKE_EXPORT cudaError_t cudaFree(void* at) {
  if (at == nullptr) return cudaSuccess;
  State& s = state();
  Lock hold(s.lock);
  s.counts["cudaFree"]++;
  if (cudaError_t refused = refused_in_capture("cudaFree")) return refused;
  auto it = s.device.find(static_cast<char*>(at));
  if (it == s.device.end()) return error(cudaErrorInvalidValue);
  munmap(at, it->second);
  s.device_bytes -= it->second;
  s.histories.erase(it->first);
  s.device.erase(it);
  return cudaSuccess;
}

FAKE_EXPORT cudaError_t cudaMallocAsync(void** out, size_t bytes, cudaStream_t) { return cudaMalloc(out, bytes); }
FAKE_EXPORT cudaError_t cudaFreeAsync(void* at, cudaStream_t) { return cudaFree(at); }

FAKE_EXPORT cudaError_t cudaHostAlloc(void** out, size_t bytes, unsigned) {
  makes_context("cudaHostAlloc");
  State& s = state();
  Lock hold(s.lock);
  s.counts["cudaHostAlloc"]++;
  void* at = aligned_alloc(4096, (bytes + 4095) & ~size_t{4095});
  if (at == nullptr) return error(cudaErrorMemoryAllocation);
  s.host[static_cast<char*>(at)] = bytes;
  *out = at;
  return cudaSuccess;
}

FAKE_EXPORT cudaError_t cudaFreeHost(void* at) {
  Lock hold(state().lock);
  if (state().host.erase(static_cast<char*>(at)) == 0) return error(cudaErrorInvalidValue);
  free(at);
  return cudaSuccess;
}

FAKE_EXPORT cudaError_t cudaHostRegister(void* at, size_t bytes, unsigned) {
  makes_context("cudaHostRegister");
  State& s = state();
  Lock hold(s.lock);
  long number = ++s.counts["cudaHostRegister"];
  if (fault("register", number)) return error(cudaErrorMemoryAllocation);
  char* from = static_cast<char*>(at);
  auto next = s.host.lower_bound(from);
  if (is_locked(at) || (next != s.host.end() && next->first < from + bytes)) {
    return error(cudaErrorHostMemoryAlreadyRegistered);
  }
  s.host[from] = bytes;
  return cudaSuccess;
}

FAKE_EXPORT cudaError_t cudaHostUnregister(void* at) {
  State& s = state();
  Lock hold(s.lock);
  s.counts["cudaHostUnregister"]++;
  return s.host.erase(static_cast<char*>(at)) > 0 ? cudaSuccess : error(cudaErrorHostMemoryNotRegistered);
}

FAKE_EXPORT cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* out, const void* at) {
  memset(out, 0, sizeof *out);
  Lock hold(state().lock);
  char kind = kind_of(at);
  out->type = kind == 'D' ? cudaMemoryTypeDevice : kind == 'P' ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
  out->device = current_device();
  if (kind == 'D') out->devicePointer = const_cast<void*>(at);
  if (kind == 'P') out->hostPointer = const_cast<void*>(at);
  return cudaSuccess;
}

FAKE_EXPORT cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  makes_context("cudaMemcpyAsync");
  Lock hold(state().lock);
  return copy(to, from, bytes, stream_of(stream));
}

FAKE_EXPORT cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  if (cudaError_t refused = refused_in_capture("cudaMemcpy")) return refused;
  wait_for(stream_of(nullptr).needs);
  Lock hold(state().lock);
  state().now.syncs++;
  return copy(to, from, bytes, stream_of(nullptr));
}

FAKE_EXPORT cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                                          size_t height, cudaMemcpyKind, cudaStream_t stream) {
  Lock hold(state().lock);
  for (size_t row = 0; row < height; ++row) {
    cudaError_t code = copy(static_cast<char*>(to) + row * to_pitch, static_cast<const char*>(from) + row * from_pitch,
                            width, stream_of(stream));
    if (code != cudaSuccess) return code;
  }
  return cudaSuccess;
}

FAKE_EXPORT cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes, cudaStream_t stream) {
  Lock hold(state().lock);
  return copy(to, from, bytes, stream_of(stream));
}

FAKE_EXPORT cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t stream) {
  Lock hold(state().lock);
  Stream& on = stream_of(stream);
  work(on, "memset");
  touch(on, at, bytes, true, "memset");
  if (on.capture == nullptr) memset(at, value, bytes);
  return cudaSuccess;
}

FAKE_EXPORT cudaError_t cudaMemset(void* at, int value, size_t bytes) { return cudaMemsetAsync(at, value, bytes, nullptr); }
FAKE_EXPORT cudaError_t cudaMemcpyToSymbol(const void*, const void*, size_t, size_t, cudaMemcpyKind) { return cudaSuccess; }

FAKE_EXPORT cudaError_t cudaGetSymbolAddress(void** out, const void*) {
  static char room[1 << 16];
  *out = room;
  return cudaSuccess;
}
