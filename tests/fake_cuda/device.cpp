// Devices, kernels and errors: what is neither memory nor a stream.

#include <cuda_runtime_api.h>
#include <cxxabi.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <unordered_map>

#include "model.h"

using namespace fake;

namespace {

thread_local cudaError_t last_error = cudaSuccess;
cudaError_t error(cudaError_t code) { return static_cast<cudaError_t>(fail(code)); }

std::unordered_map<const void*, std::string>& kernels() {
  static auto* names = new std::unordered_map<const void*, std::string>;
  return *names;
}

// Names of kernels in a few words: the function, and the functor that it is made for.
std::string short_name(const char* mangled) {
  int status = 0;
  char* text = abi::__cxa_demangle(mangled, nullptr, nullptr, &status);
  std::string name = status == 0 ? text : mangled;
  free(text);
  for (const char* noise : {"at::native::", "(anonymous namespace)::", "void ", "c10::"}) {
    for (size_t at; (at = name.find(noise)) != std::string::npos;) name.erase(at, strlen(noise));
  }
  return name.substr(0, 110);
}

int devices() {
  const char* visible = getenv("CUDA_VISIBLE_DEVICES");
  int all = static_cast<int>(env_number("FAKE_CUDA_GPUS", 1));
  if (visible == nullptr) return all;
  int count = 0;
  std::string text(visible);
  for (size_t at = 0; at < text.size();) {
    size_t comma = std::min(text.find(',', at), text.size());
    std::string one = text.substr(at, comma - at);
    bool number = !one.empty() && one.find_first_not_of("0123456789 ") == std::string::npos;
    if (number ? atoi(one.c_str()) >= all : one.rfind("GPU-", 0) != 0 && one.rfind("MIG-", 0) != 0) break;
    ++count;
    at = comma + 1;
  }
  return count;
}

// The observer of operators needs libtorch: it comes when libtorch asks for devices, never in a launcher.
void observe_operators() {
  static bool loaded = [] {
    const char* path = getenv("FAKE_CUDA_OPERATORS");
    if (path == nullptr) return false;
    if (dlopen(path, RTLD_NOW | RTLD_GLOBAL) == nullptr) {
      fprintf(stderr, "fake_cuda: %s\n", dlerror());
      abort();
    }
    return true;
  }();
  (void)loaded;
}

cudaError_t launch(const void* kernel, cudaStream_t stream) {
  State& s = state();
  Lock hold(s.lock);
  auto name = kernels().find(kernel);
  std::string what = name == kernels().end() ? "kernel" : name->second;
  Stream& on = stream_of(stream);
  work(on, what);
  if (on.capture != nullptr && on.capture->invalid) return error(cudaErrorStreamCaptureInvalidated);
  return cudaSuccess;
}

}  // namespace

int fake::fail(int code) {
  if (code != cudaSuccess) last_error = static_cast<cudaError_t>(code);
  return code;
}

FAKE_EXPORT bool fake_cuda_captures(void* handle) { return stream_of(handle).capture != nullptr; }

FAKE_EXPORT void fake_cuda_touch(void* handle, const void* at, size_t bytes, bool write, const char* what) {
  Lock hold(state().lock);
  touch(stream_of(handle), at, bytes, write, what);
}

FAKE_EXPORT cudaError_t cudaGetDeviceCount(int* count) {
  *count = devices();
  observe_operators();
  return *count > 0 ? cudaSuccess : error(cudaErrorNoDevice);
}
FAKE_EXPORT cudaError_t cudaGetDevice(int* device) {
  *device = current_device();
  return cudaSuccess;
}
// Makes a context at once, as CUDA does since version 12.
FAKE_EXPORT cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= devices()) return error(cudaErrorInvalidDevice);
  current_device() = device;
  makes_context("cudaSetDevice");
  return cudaSuccess;
}
FAKE_EXPORT cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
FAKE_EXPORT cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
FAKE_EXPORT cudaError_t cudaGetLastError() {
  cudaError_t code = last_error;
  last_error = cudaSuccess;
  return code;
}
FAKE_EXPORT cudaError_t cudaPeekAtLastError() { return last_error; }

FAKE_EXPORT const char* cudaGetErrorName(cudaError_t) { return "cudaErrorOfTheModel"; }
FAKE_EXPORT const char* cudaGetErrorString(cudaError_t code) {
  switch (code) {
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorNotReady: return "device not ready";
    case cudaErrorStreamCaptureInvalidated: return "operation failed due to a previous error during capture";
    case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
    case cudaErrorHostMemoryAlreadyRegistered: return "part or all of the requested memory range is already mapped";
    case cudaErrorLaunchFailure: return "unspecified launch failure";
    default: return "an error of the model";
  }
}

FAKE_EXPORT cudaError_t cudaGetDeviceProperties(cudaDeviceProp* out, int device) {
  memset(out, 0, sizeof *out);
  snprintf(out->name, sizeof out->name, "Model H200 number %d", device);
  out->totalGlobalMem = size_t{140} << 30;
  out->major = 9;
  out->multiProcessorCount = 132;
  out->warpSize = 32;
  out->maxThreadsPerBlock = out->maxThreadsDim[0] = out->maxThreadsDim[1] = 1024;
  out->maxThreadsDim[2] = 64;
  out->maxGridSize[0] = 2147483647;
  out->maxGridSize[1] = out->maxGridSize[2] = 65535;
  out->maxThreadsPerMultiProcessor = 2048;
  out->maxBlocksPerMultiProcessor = 32;
  out->regsPerBlock = out->regsPerMultiprocessor = 65536;
  out->sharedMemPerBlock = 49152;
  out->sharedMemPerBlockOptin = 232448;
  out->sharedMemPerMultiprocessor = 233472;
  out->totalConstMem = 65536;
  out->l2CacheSize = 60 << 20;
  out->textureAlignment = 512;
  out->concurrentKernels = out->unifiedAddressing = out->cooperativeLaunch = 1;
  return cudaSuccess;
}

FAKE_EXPORT cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    case cudaDevAttrMultiProcessorCount: *value = 132; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 232448; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 49152; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrMaxGridDimX: *value = 2147483647; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    default: *value = 1;
  }
  return cudaSuccess;
}

FAKE_EXPORT cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}
FAKE_EXPORT cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = 1;
  return cudaSuccess;
}
FAKE_EXPORT cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return cudaSuccess; }
FAKE_EXPORT cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int) {
  *pool = reinterpret_cast<cudaMemPool_t>(16);
  return cudaSuccess;
}
FAKE_EXPORT cudaError_t cudaDeviceGetPCIBusId(char* to, int room, int device) {
  snprintf(to, static_cast<size_t>(room), "0000:%02x:00.0", device + 1);
  return cudaSuccess;
}

FAKE_EXPORT cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* out, const void*) {
  memset(out, 0, sizeof *out);
  out->maxThreadsPerBlock = 1024;
  out->numRegs = 32;
  out->binaryVersion = out->ptxVersion = 90;
  return cudaSuccess;
}
FAKE_EXPORT cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
FAKE_EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  *blocks = 2;
  return cudaSuccess;
}
FAKE_EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t,
                                                                               unsigned) {
  *blocks = 2;
  return cudaSuccess;
}

FAKE_EXPORT cudaError_t cudaLaunchKernel(const void* kernel, dim3, dim3, void**, size_t, cudaStream_t stream) {
  return launch(kernel, stream);
}
FAKE_EXPORT cudaError_t cudaLaunchCooperativeKernel(const void* kernel, dim3, dim3, void**, size_t, cudaStream_t stream) {
  return launch(kernel, stream);
}
FAKE_EXPORT cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void**) {
  return launch(kernel, config->stream);
}
FAKE_EXPORT cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3, dim3, void**, size_t, cudaStream_t stream) {
  return launch(reinterpret_cast<const void*>(kernel), stream);
}
FAKE_EXPORT cudaError_t __cudaGetKernel(cudaKernel_t* out, const void* function) {
  *out = static_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}

FAKE_EXPORT char __cudaInitModule(void**) { return 1; }
FAKE_EXPORT void** __cudaRegisterFatBinary(void*) {
  static void* handle[4];
  return handle;
}
FAKE_EXPORT void __cudaRegisterFatBinaryEnd(void**) {}
FAKE_EXPORT void __cudaUnregisterFatBinary(void**) {}
FAKE_EXPORT void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
FAKE_EXPORT void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*,
                                        void*, int*) {
  // A hundred thousand of them: names are read where they are wanted.
  kernels()[host] = env_number("FAKE_CUDA_NAMES", 0) != 0 ? short_name(name) : "kernel";
}

namespace {
thread_local struct {
  dim3 grid, block;
  size_t shared;
  void* stream;
} configuration;
}  // namespace

FAKE_EXPORT unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  configuration = {grid, block, shared, stream};
  return 0;
}
FAKE_EXPORT cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = configuration.grid;
  *block = configuration.block;
  *shared = configuration.shared;
  *static_cast<void**>(stream) = configuration.stream;
  return cudaSuccess;
}

// Of the driver: asked by libtorch before it asks whether a stream is captured.
FAKE_EXPORT int cuDevicePrimaryCtxGetState(int device, unsigned* flags, int* active) {
  Lock hold(state().lock);
  if (flags != nullptr) *flags = 0;
  *active = state().contexts.count(device) > 0 ? 1 : 0;
  return 0;
}
FAKE_EXPORT int cuGetErrorString(int, const char** text) {
  *text = "an error of the model";
  return 0;
}

namespace {

int nothing() { return 0; }

}  // namespace

FAKE_EXPORT cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** out, unsigned, unsigned long long,
                                                         cudaDriverEntryPointQueryResult* result) {
  bool context = strcmp(name, "cuDevicePrimaryCtxGetState") == 0;
  *out = context ? reinterpret_cast<void*>(cuDevicePrimaryCtxGetState) : reinterpret_cast<void*>(nothing);
  if (result != nullptr) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

FAKE_EXPORT void fake_cuda_stub(const char* name) {
  Lock hold(state().lock);
  state().counts[std::string("stub ") + name]++;
}
