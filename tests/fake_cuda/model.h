// State that the parts of the model share: streams with vector clocks, captures, ranges of memory, faults, counts.
//
// One lock guards all of it. Everything is leaked on purpose: libraries call into the model while a process ends.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#define FAKE_EXPORT extern "C" __attribute__((visibility("default")))

namespace fake {

constexpr int kStreams = 64;
using Clock = std::array<long, kStreams>;

// Bytes that a stream reads or writes.
struct Access {
  char* from;
  size_t bytes;
  bool write;
  std::string what;
  int stream;
  Clock clock;  // of its stream at that moment, this access included
};

// Accesses to one allocation that may still race with later ones.
class History {
 public:
  // The text of the earlier access that `next` races with; empty: none.
  std::string add(const Access& next);

 private:
  std::map<char*, std::vector<Access>> by_end_;
  size_t longest_ = 0;
};
using Histories = std::map<char*, History>;  // by start of the allocation

struct Graph {
  int number = 0;
  bool invalid = false;
  bool ended = false;
  int mode = 0;
  long owner = 0;  // thread that began it
  long nodes = 0;
  long collectives = 0;
  std::map<std::string, long> kinds;
  std::vector<Access> accesses;
  Histories histories;
  std::vector<std::function<void()>> on_destroy;
};

struct Stream {
  int number = 0;
  int device = 0;
  Clock clock{};
  long needs = 0;  // collectives that must have met before its work is done
  Graph* capture = nullptr;
  bool origin = false;
};

struct Event {
  bool timing = false;
  bool recorded = false;
  Clock clock{};
  long needs = 0;
  int stream = 0;
  Graph* capture = nullptr;
  bool seen_done = false;  // the host knows that it is done
};

// What a step did, as seen by its end.
struct Step {
  long launches = 0, graph_launches = 0, syncs = 0, pageable = 0, mallocs = 0, collectives = 0, events = 0;
};

struct Fault {
  std::string kind;
  int rank = -1;  // -1: every rank
  long at = 0;
  long times = 1;
};

struct State {
  std::recursive_mutex lock;
  std::map<void*, Stream*> streams;
  std::map<char*, size_t> device, host;  // start → bytes
  Histories histories;
  std::set<const char*> delivered;  // results of collectives
  Clock known{};  // work that the host knows to be done: all that it gives from here on comes after
  std::set<Graph*> capturing;
  std::set<int> contexts;
  std::map<std::string, long> counts;
  std::map<std::string, long> in_step;  // launches by name since the last step
  std::vector<Step> steps;
  Step now;
  std::vector<Graph*> captures;
  std::vector<std::string> hazards, problems;
  std::vector<Fault> faults;
  size_t device_bytes = 0, most_device_bytes = 0;
  long inits = 0, finalized = 0, destroyed = 0, aborted = 0;
  int rank = 0;
};

State& state();
using Lock = std::lock_guard<std::recursive_mutex>;

Stream& stream_of(void* handle);
long thread_id();
int& current_device();
int& capture_mode();
// Error kept for cudaGetLastError; returns it.
int fail(int code);
void makes_context(const char* call);

// True: the call may not be made now, since some capture forbids it; that capture is invalid from here on.
bool forbidden_now(const char* call);
// Something that the device does, in order, on a stream: a node while it is captured.
void work(Stream& on, const std::string& name);
void touch(Stream& on, const void* at, size_t bytes, bool write, const std::string& what);
void replay(Stream& on, const Graph& graph);

bool is_device(const void* at);
bool is_locked(const void* at);
// 'D'evice, 'P'age-locked or pageable 'H'ost memory.
char kind_of(const void* at);

// The fault of this kind that is due, with `count` of what it counts; each is taken `times` times.
bool fault(const char* kind, long count);
// As `fault`, but for good once it is due.
bool fault_since(const char* kind, long count);
long env_number(const char* name, long otherwise);

// Collectives that all ranks have begun so far. See `nccl.cpp`.
long met();
// Gives `on` some more of them.
void enqueued(Stream& on, long collectives);
// Brings the results of those that have met to their places.
void deliver();
// Waits on the host as CUDA does: without a limit.
void wait_for(long needs);
bool is_done(long needs);

}  // namespace fake
