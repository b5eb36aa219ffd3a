// Communicators by the rules of NCCL 2.28: non-blocking calls, asynchronous errors, an abort that waits for recorded
// collectives. Ranks meet in a file: a collective is done once every rank has begun it.

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "model.h"

using namespace fake;

namespace {

constexpr int kMost = 8;              // ranks
constexpr size_t kSlot = 256 << 10;   // bytes of a collective that others read
constexpr long kSlots = 32;
constexpr int kSuccess = 0, kInternal = 3, kRemote = 6, kInProgress = 7;

struct Rank {
  std::atomic<long> here;
  std::atomic<long> begun;
  char slots[kSlots][kSlot];
};
struct Meeting {
  Rank ranks[kMost];
};

// Results that wait for the other ranks.
struct Pending {
  long number;
  bool gathers;
  char* to;
  size_t bytes;
  int type;
};

struct Comm {
  Meeting* meeting;
  int size, rank;
  bool blocking;
  std::atomic<long> recorded{0};  // collectives in live graphs
  std::atomic<bool> aborted{false};
  std::atomic<int> pending{0};
  long begun = 0;
  std::vector<Pending> waiting;
};

Comm* current = nullptr;  // the latest: a process works with one at a time

size_t width(int type) {
  static const size_t widths[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2};
  return widths[type];
}

template <typename T>
void add(char* to, const char* from, size_t bytes) {
  for (size_t i = 0; i < bytes / sizeof(T); ++i) reinterpret_cast<T*>(to)[i] += reinterpret_cast<const T*>(from)[i];
}

// Kinds of results besides NCCL's sums, by their `type`: a broadcast from rank r is -1 - r.
void put(const Comm& comm, const Pending& one) {
  auto slot = [&](int rank) { return comm.meeting->ranks[rank].slots[(one.number - 1) % kSlots]; };
  if (one.type < 0) {
    memcpy(one.to, slot(-1 - one.type), one.bytes);
    return;
  }
  for (int rank = 0; rank < comm.size; ++rank) {
    if (one.gathers || rank == 0) {
      memcpy(one.to + static_cast<size_t>(rank) * one.bytes, slot(rank), one.bytes);
    } else if (one.type == 7) {
      add<float>(one.to, slot(rank), one.bytes);
    } else if (one.type == 8) {
      add<double>(one.to, slot(rank), one.bytes);
    } else if (one.type == 4) {
      add<int64_t>(one.to, slot(rank), one.bytes);
    }
  }
}

long least(const Comm& comm) {
  long met = LONG_MAX;
  for (int rank = 0; rank < comm.size; ++rank) met = std::min(met, comm.meeting->ranks[rank].begun.load());
  return met;
}

int begin(const char* name, const void* from, void* to, size_t count, int type, Comm* comm, void* handle, bool gathers) {
  State& s = state();
  Lock hold(s.lock);
  if (comm->aborted) return kInternal;
  Stream& on = stream_of(handle);
  size_t bytes = count * width(type);
  s.now.collectives++;
  work(on, name);
  touch(on, from, bytes, false, name);
  touch(on, to, gathers ? bytes * static_cast<size_t>(comm->size) : bytes, true, name);
  if (on.capture != nullptr) {
    comm->recorded++;
    on.capture->collectives++;
    on.capture->on_destroy.push_back([comm] { comm->recorded--; });
  } else {
    deliver();
    if (bytes <= kSlot) {
      memcpy(comm->meeting->ranks[comm->rank].slots[comm->begun % kSlots], from, bytes);
      comm->waiting.push_back({comm->begun + 1, gathers, static_cast<char*>(to), bytes, type});
    }
    enqueued(on, 1);
  }
  comm->pending = 2;
  return comm->blocking ? kSuccess : kInProgress;
}

}  // namespace

long fake::met() { return current == nullptr || current->aborted ? LONG_MAX : least(*current); }

void fake::enqueued(Stream& on, long collectives) {
  if (collectives == 0 || current == nullptr) return;
  current->begun += collectives;
  on.needs = current->begun;
  // A broken connection: this rank's part never arrives.
  if (fault_since("nccl", current->begun) || fault_since("lost", current->begun)) return;
  current->meeting->ranks[current->rank].begun.store(current->begun);
}

void fake::deliver() {
  Lock hold(state().lock);
  if (current == nullptr || current->waiting.empty()) return;
  long met = least(*current);
  std::vector<Pending> later;
  for (const Pending& one : current->waiting) {
    if (one.number > met) {
      later.push_back(one);
      continue;
    }
    if (!is_device(one.to)) continue;
    put(*current, one);
    state().delivered.insert(one.to);
  }
  current->waiting = later;
}

FAKE_EXPORT int ncclGetVersion(int* version) {
  *version = 22809;
  return kSuccess;
}

FAKE_EXPORT int ncclGetUniqueId(char* id) {
  const char* folder = getenv("FAKE_CUDA_OUT");
  static int made = 0;
  memset(id, 0, 128);
  snprintf(id, 128, "%s/meeting.%d.%d", folder != nullptr ? folder : "/tmp", getpid(), made++);
  return kSuccess;
}

struct Id {
  char path[128];
};

FAKE_EXPORT int ncclCommInitRankConfig(Comm** out, int size, Id id, int rank, const void* config) {
  if (size > kMost || strnlen(id.path, 128) == 128) return kInternal;
  int file = open(id.path, O_RDWR | O_CREAT, 0600);
  if (file < 0 || ftruncate(file, sizeof(Meeting)) != 0) return kInternal;
  void* at = mmap(nullptr, sizeof(Meeting), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  if (at == MAP_FAILED) return kInternal;
  auto* comm = new Comm;
  comm->meeting = static_cast<Meeting*>(at);
  comm->size = size;
  comm->rank = rank;
  comm->blocking = static_cast<const int*>(config)[4] != 0;
  comm->pending = 3;
  comm->meeting->ranks[rank].here.store(1);
  Lock hold(state().lock);
  state().inits++;
  // Collectives are counted on from those of an earlier communicator, which has ended its work by now.
  if (current != nullptr) comm->begun = current->begun;
  comm->meeting->ranks[rank].begun.store(comm->begun);
  current = *out = comm;
  return comm->blocking ? kSuccess : kInProgress;
}

FAKE_EXPORT int ncclCommGetAsyncError(Comm* comm, int* result) {
  Lock hold(state().lock);
  *result = kSuccess;
  bool all = true;
  for (int rank = 0; rank < comm->size; ++rank) all = all && comm->meeting->ranks[rank].here.load() != 0;
  if (!all || comm->pending > 0) {
    comm->pending--;
    *result = kInProgress;
  } else if (fault_since("nccl", comm->begun)) {
    *result = kRemote;
  }
  return kSuccess;
}

FAKE_EXPORT const char* ncclGetErrorString(int code) {
  return code == kRemote ? "remote process exited or there was a network error" : "an error of the model";
}
FAKE_EXPORT const char* ncclGetLastError(void*) { return ""; }

FAKE_EXPORT int ncclAllReduce(const void* from, void* to, size_t n, int type, int, Comm* comm, void* stream) {
  return begin("ncclAllReduce", from, to, n, type, comm, stream, false);
}
FAKE_EXPORT int ncclAllGather(const void* from, void* to, size_t n, int type, Comm* comm, void* stream) {
  return begin("ncclAllGather", from, to, n, type, comm, stream, true);
}
FAKE_EXPORT int ncclReduceScatter(const void* from, void* to, size_t n, int type, int, Comm* comm, void* stream) {
  return begin("ncclReduceScatter", from, to, n, type, comm, stream, false);
}

FAKE_EXPORT int ncclBroadcast(const void* from, void* to, size_t n, int type, int root, Comm* comm, void* stream) {
  int code = begin("ncclBroadcast", from, to, n, type, comm, stream, false);
  Lock hold(state().lock);
  if (comm->waiting.empty() || comm->waiting.back().number != comm->begun) return code;
  // Only the root's slot counts.
  comm->waiting.back().type = -1 - root;
  return code;
}

namespace {

// `commDestroySync` of NCCL 2.26 and newer: recorded collectives hold the communicator, an abort included.
void wait_for_graphs(Comm* comm) {
  while (comm->recorded != 0) usleep(1000);
}

}  // namespace

FAKE_EXPORT int ncclCommFinalize(Comm* comm) {
  Lock hold(state().lock);
  state().finalized++;
  comm->pending = 2;
  return kInProgress;
}

FAKE_EXPORT int ncclCommDestroy(Comm* comm) {
  wait_for_graphs(comm);
  Lock hold(state().lock);
  state().destroyed++;
  return kSuccess;
}

FAKE_EXPORT int ncclCommAbort(Comm* comm) {
  // First: what waits on a device leaves.
  comm->aborted = true;
  {
    Lock hold(state().lock);
    state().aborted++;
    // It leaves the device that it found current; on a new thread that is device 0.
    makes_context("ncclCommAbort");
  }
  wait_for_graphs(comm);
  return kSuccess;
}
