// NVML with FAKE_CUDA_GPUS devices, in the order of the bus. FAKE_NVML_MIG=1: the first is divided.

#include <cstdio>
#include <cstdlib>
#include <cstring>

#define FAKE_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

unsigned count() {
  const char* text = getenv("FAKE_CUDA_GPUS");
  return text != nullptr ? static_cast<unsigned>(atoi(text)) : 1;
}
unsigned index_of(void* device) { return static_cast<unsigned>(reinterpret_cast<size_t>(device)) - 1; }

constexpr unsigned long long kTotal = 140ULL << 30, kUsed = 1ULL << 30;

}  // namespace

FAKE_EXPORT int nvmlInit_v2() { return 0; }
FAKE_EXPORT int nvmlInitWithFlags(unsigned) { return 0; }
FAKE_EXPORT int nvmlShutdown() { return 0; }
FAKE_EXPORT const char* nvmlErrorString(int) { return "an error of the model"; }
FAKE_EXPORT int nvmlDeviceGetCount_v2(unsigned* out) {
  *out = count();
  return 0;
}
FAKE_EXPORT int nvmlDeviceGetHandleByIndex_v2(unsigned index, void** out) {
  if (index >= count()) return 2;
  *out = reinterpret_cast<void*>(static_cast<size_t>(index) + 1);
  return 0;
}
FAKE_EXPORT int nvmlDeviceGetMemoryInfo(void*, unsigned long long* out) {
  out[0] = kTotal;
  out[1] = kTotal - kUsed;
  out[2] = kUsed;
  return 0;
}
struct Memory2 {
  unsigned version;
  unsigned long long total, reserved, free, used;
};
FAKE_EXPORT int nvmlDeviceGetMemoryInfo_v2(void*, Memory2* out) {
  out->total = kTotal;
  out->reserved = 0;
  out->free = kTotal - kUsed;
  out->used = kUsed;
  return 0;
}
FAKE_EXPORT int nvmlDeviceGetName(void*, char* to, unsigned room) {
  snprintf(to, room, "Model H200");
  return 0;
}
FAKE_EXPORT int nvmlDeviceGetUUID(void* device, char* to, unsigned room) {
  snprintf(to, room, "GPU-%08x-0000-0000-0000-000000000000", index_of(device) + 1);
  return 0;
}
// By the end of its digits: GPU-0000000N-… or, of a divided one, MIG-0000000N-….
FAKE_EXPORT int nvmlDeviceGetHandleByUUID(const char* uuid, void** out) {
  if (strncmp(uuid, "GPU-", 4) != 0 && strncmp(uuid, "MIG-", 4) != 0) return 6;
  unsigned long number = strtoul(uuid + 4, nullptr, 16);
  if (number < 1 || number > count()) return 6;
  *out = reinterpret_cast<void*>(number);
  return 0;
}
// What libtorch's allocator asks for when memory runs out.
FAKE_EXPORT int nvmlDeviceGetHandleByPciBusId_v2(const char*, void** out) {
  *out = reinterpret_cast<void*>(1);
  return 0;
}
FAKE_EXPORT int nvmlDeviceGetComputeRunningProcesses(void*, unsigned* n, void*) {
  *n = 0;
  return 0;
}
FAKE_EXPORT int nvmlDeviceGetNvLinkRemoteDeviceType(void*, unsigned, int*) { return 3; }
FAKE_EXPORT int nvmlDeviceGetNvLinkRemotePciInfo_v2(void*, unsigned, void*) { return 3; }
FAKE_EXPORT int nvmlSystemGetCudaDriverVersion_v2(int* version) {
  *version = 13000;
  return 0;
}
FAKE_EXPORT int nvmlDeviceGetCount(unsigned* out) {
  *out = count();
  return 0;
}
FAKE_EXPORT int nvmlDeviceGetGpuFabricInfoV(void*, void*) { return 3; }

struct Pci {
  char legacy[16];
  unsigned domain, bus, device, vendor, subsystem;
  char bus_id[32];
};
FAKE_EXPORT int nvmlDeviceGetPciInfo_v3(void* device, Pci* out) {
  memset(out, 0, sizeof *out);
  out->bus = index_of(device) + 1;
  snprintf(out->bus_id, sizeof out->bus_id, "00000000:%02X:00.0", out->bus);
  snprintf(out->legacy, sizeof out->legacy, "0000:%02X:00.0", out->bus);
  return 0;
}
FAKE_EXPORT int nvmlDeviceGetMigMode(void* device, unsigned* now, unsigned* later) {
  *now = *later = getenv("FAKE_NVML_MIG") != nullptr && index_of(device) == 0 ? 1 : 0;
  return 0;
}
