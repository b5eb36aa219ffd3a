// Streams, clocks, ranges and the report at the end of a process.

#include "model.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sstream>

namespace fake {

long env_number(const char* name, long otherwise) {
  const char* text = getenv(name);
  return text != nullptr && *text != 0 ? atol(text) : otherwise;
}

namespace {

// FAKE_CUDA_FAULT: `kind:rank:at[:times]`, with semicolons between; rank `*` means all.
std::vector<Fault> read_faults() {
  std::vector<Fault> faults;
  // Of ranks alone: not of a helper that measures the model.
  if (getenv("RANK") == nullptr) return faults;
  std::stringstream all(getenv("FAKE_CUDA_FAULT") ? getenv("FAKE_CUDA_FAULT") : "");
  for (std::string one; std::getline(all, one, ';');) {
    std::stringstream parts(one);
    std::string kind, rank, at, times;
    std::getline(parts, kind, ':');
    std::getline(parts, rank, ':');
    std::getline(parts, at, ':');
    if (!std::getline(parts, times)) times = "1";
    faults.push_back({kind, rank == "*" ? -1 : atoi(rank.c_str()), atol(at.c_str()), atol(times.c_str())});
  }
  return faults;
}

void quoted(FILE* to, const std::string& text) {
  fputc('"', to);
  for (char c : text) {
    if (c == '"' || c == '\\') fputc('\\', to);
    fputc(static_cast<unsigned char>(c) < 32 ? ' ' : c, to);
  }
  fputc('"', to);
}

void list(FILE* to, const char* name, const std::vector<std::string>& lines) {
  fprintf(to, ",\n\"%s\": [", name);
  for (size_t i = 0; i < lines.size() && i < 20; ++i) {
    if (i > 0) fputc(',', to);
    quoted(to, lines[i]);
  }
  fputc(']', to);
}

void numbers(FILE* to, const char* name, const std::map<std::string, long>& values) {
  fprintf(to, ",\n\"%s\": {", name);
  const char* comma = "";
  for (const auto& [key, value] : values) {
    fputs(comma, to);
    quoted(to, key);
    fprintf(to, ": %ld", value);
    comma = ", ";
  }
  fputc('}', to);
}

// The report, in FAKE_CUDA_OUT/rankR.PID.json.
void report() {
  const char* folder = getenv("FAKE_CUDA_OUT");
  State& s = state();
  Lock hold(s.lock);
  if (folder == nullptr || s.contexts.empty()) return;
  std::string path = std::string(folder) + "/rank" + std::to_string(s.rank) + "." + std::to_string(getpid()) + ".json";
  FILE* to = fopen(path.c_str(), "w");
  if (to == nullptr) return;
  fprintf(to, "{\"rank\": %d, \"most_device_bytes\": %zu, \"device_bytes\": %zu", s.rank, s.most_device_bytes,
          s.device_bytes);
  fprintf(to, ", \"inits\": %ld, \"finalized\": %ld, \"destroyed\": %ld, \"aborted\": %ld", s.inits, s.finalized,
          s.destroyed, s.aborted);
  const char* order = getenv("CUDA_DEVICE_ORDER");
  fprintf(to, ", \"device_order\": \"%s\"", order != nullptr ? order : "");
  fprintf(to, ",\n\"contexts\": [");
  const char* comma = "";
  for (int device : s.contexts) fprintf(to, "%s%d", comma, device), comma = ", ";
  fprintf(to, "],\n\"steps\": [");
  comma = "\n";
  for (const Step& step : s.steps) {
    fprintf(to,
            "%s{\"launches\": %ld, \"graph_launches\": %ld, \"syncs\": %ld, \"pageable\": %ld, \"mallocs\": %ld, "
            "\"collectives\": %ld, \"events\": %ld}",
            comma, step.launches, step.graph_launches, step.syncs, step.pageable, step.mallocs, step.collectives,
            step.events);
    comma = ",\n";
  }
  fprintf(to, "],\n\"captures\": [");
  comma = "";
  for (const Graph* graph : s.captures) {
    fprintf(to, "%s{\"nodes\": %ld, \"collectives\": %ld, \"valid\": %s", comma, graph->nodes, graph->collectives,
            graph->invalid ? "false" : "true");
    numbers(to, "kinds", graph->kinds);
    fputc('}', to);
    comma = ", ";
  }
  fprintf(to, "]");
  list(to, "hazards", s.hazards);
  list(to, "problems", s.problems);
  numbers(to, "counts", s.counts);
  fprintf(to, "}\n");
  fclose(to);
}

}  // namespace

State& state() {
  static State* state = [] {
    auto* made = new State;
    made->rank = static_cast<int>(env_number("RANK", 0));
    made->faults = read_faults();
    atexit(report);
    return made;
  }();
  return *state;
}

bool fault(const char* kind, long count) {
  State& s = state();
  Lock hold(s.lock);
  for (Fault& fault : s.faults) {
    bool due = fault.kind == kind && (fault.rank < 0 || fault.rank == s.rank) && count >= fault.at && fault.times > 0;
    if (due) return fault.times--, true;
  }
  return false;
}

bool fault_since(const char* kind, long count) {
  State& s = state();
  Lock hold(s.lock);
  for (const Fault& fault : s.faults) {
    if (fault.kind == kind && (fault.rank < 0 || fault.rank == s.rank) && count >= fault.at) return true;
  }
  return false;
}

long thread_id() { return syscall(SYS_gettid); }

int& current_device() {
  static thread_local int device = 0;
  return device;
}

int& capture_mode() {
  static thread_local int mode = 0;
  return mode;
}

void makes_context(const char* call) {
  State& s = state();
  Lock hold(s.lock);
  if (s.contexts.insert(current_device()).second) {
    s.counts["context on device " + std::to_string(current_device()) + " by " + call]++;
  }
}

Stream& stream_of(void* handle) {
  State& s = state();
  Lock hold(s.lock);
  Stream*& stream = s.streams[handle];
  if (stream == nullptr) {
    stream = new Stream;
    stream->number = static_cast<int>(s.streams.size()) % kStreams;
    stream->device = current_device();
  }
  return *stream;
}

bool forbidden_now(const char* call) {
  State& s = state();
  Lock hold(s.lock);
  // 0 global, 1 of the thread, 2 relaxed.
  if (capture_mode() == 2) return false;
  for (Graph* graph : s.capturing) {
    bool mine = graph->owner == thread_id();
    if ((graph->mode == 0 && capture_mode() == 0) || (graph->mode == 1 && mine)) {
      graph->invalid = true;
      s.problems.push_back(std::string(call) + " while a stream is captured");
      return true;
    }
  }
  return false;
}

std::string History::add(const Access& next) {
  std::string race;
  char* end = next.from + next.bytes;
  longest_ = std::max(longest_, next.bytes);
  for (auto it = by_end_.upper_bound(next.from); it != by_end_.end() && it->first < end + longest_;) {
    auto& list = it->second;
    for (size_t i = 0; i < list.size();) {
      const Access& old = list[i];
      bool overlaps = old.from < end && next.from < old.from + old.bytes;
      bool before = old.stream == next.stream || next.clock[old.stream] >= old.clock[old.stream];
      if (overlaps && (old.write || next.write) && !before && race.empty()) {
        race = old.what + (old.write ? " writes" : " reads") + " on stream " + std::to_string(old.stream);
      }
      // Later accesses that are ordered after `next` are ordered after this one too.
      bool covered = before && next.from <= old.from && old.from + old.bytes <= end;
      if (covered && (next.write || !old.write)) {
        list[i] = list.back();
        list.pop_back();
      } else {
        ++i;
      }
    }
    it = list.empty() ? by_end_.erase(it) : std::next(it);
  }
  by_end_[end].push_back(next);
  return race;
}

namespace {

std::map<char*, size_t>::iterator range(std::map<char*, size_t>& ranges, const void* at) {
  char* place = static_cast<char*>(const_cast<void*>(at));
  auto it = ranges.upper_bound(place);
  if (it == ranges.begin()) return ranges.end();
  --it;
  return place < it->first + it->second ? it : ranges.end();
}

}  // namespace

namespace {

// What the host knows to be done comes before all that it gives from here on.
void after_known(Stream& on) {
  if (on.capture != nullptr) return;
  for (int i = 0; i < kStreams; ++i) on.clock[i] = std::max(on.clock[i], state().known[i]);
}

}  // namespace

void touch(Stream& on, const void* at, size_t bytes, bool write, const std::string& what) {
  State& s = state();
  Lock hold(s.lock);
  if (bytes == 0) return;
  auto block = range(s.device, at);
  // What the host does to its own memory is not seen.
  if (block == s.device.end()) return;
  after_known(on);
  Access access{static_cast<char*>(const_cast<void*>(at)), bytes, write, what, on.number, on.clock};
  if (on.capture != nullptr) on.capture->accesses.push_back(access);
  Histories& histories = on.capture != nullptr ? on.capture->histories : s.histories;
  std::string other = histories[block->first].add(access);
  if (other.empty()) return;
  s.hazards.push_back(what + (write ? " writes" : " reads") + " on stream " + std::to_string(on.number) + " while " + other);
}

void replay(Stream& on, const Graph& graph) {
  for (const Access& access : graph.accesses) touch(on, access.from, access.bytes, access.write, access.what);
}

void work(Stream& on, const std::string& name) {
  State& s = state();
  Lock hold(s.lock);
  s.now.launches++;
  s.in_step[name]++;
  after_known(on);
  on.clock[on.number]++;
  Graph* graph = on.capture;
  if (graph == nullptr) return;
  graph->nodes++;
  graph->kinds[name]++;
  if (fault("capture", graph->nodes)) graph->invalid = true;
}

bool is_device(const void* at) {
  Lock hold(state().lock);
  return range(state().device, at) != state().device.end();
}

bool is_locked(const void* at) {
  Lock hold(state().lock);
  return range(state().host, at) != state().host.end();
}

char kind_of(const void* at) { return is_device(at) ? 'D' : is_locked(at) ? 'P' : 'H'; }

bool is_done(long needs) {
  bool ended = met() == LONG_MAX && state().inits > 0;  // an abort makes kernels leave
  if (!ended && fault_since("event", static_cast<long>(state().steps.size()))) return false;
  if (met() < needs) return false;
  deliver();
  return true;
}

void wait_for(long needs) {
  while (!is_done(needs)) usleep(200);
}

}  // namespace fake
