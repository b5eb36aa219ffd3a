// Sums and broadcasts between nodes by c10d's ProcessGroupGloo, which libtorch_cpu holds. Functions as in shim.cpp.

#define USE_C10D_GLOO

#include <ATen/ATen.h>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>

#include <dirent.h>
#include <linux/filter.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "guarded.h"

namespace {

using Bytes = std::vector<uint8_t>;
// Takes bytes of one node over.
using Take = void (*)(void* into, const uint8_t* bytes, size_t n);
// Gives this node's bytes to all nodes and theirs to `take`, one call each; not 0: it failed. Must not unwind.
using Exchange = int (*)(void* context, const uint8_t* own, size_t n, Take take, void* into);

// Longer than any run: who waits for a collective looks at its own clock.
constexpr auto kForever = std::chrono::hours(24 * 365);
// libtorch's recorder of collectives takes up a new group without a lock: threads with a group each must not begin at once.
std::mutex beginning;
// Gloo needs one round per context; more is a fault.
constexpr int kMostRounds = 16;

void put(Bytes& to, const std::string& key, const Bytes& value) {
  for (const Bytes& part : {Bytes(key.begin(), key.end()), value}) {
    for (int shift = 0; shift < 32; shift += 8) to.push_back(static_cast<uint8_t>(part.size() >> shift));
    to.insert(to.end(), part.begin(), part.end());
  }
}

Bytes next_part(const Bytes& from, size_t& at) {
  TORCH_CHECK(from.size() - at >= 4, "a node's addresses are cut off");
  size_t length = 0;
  for (int shift = 0; shift < 32; shift += 8) length |= static_cast<size_t>(from[at++]) << shift;
  TORCH_CHECK(from.size() - at >= length, "a node's addresses are cut off");
  Bytes part(from.begin() + at, from.begin() + at + length);
  at += length;
  return part;
}

// A store without a server: what nodes set travels when one of them asks for what it does not have.
class Meeting final : public c10d::Store {
 public:
  Meeting(void* context, Exchange exchange) : context_(context), exchange_(exchange) {}

  c10::intrusive_ptr<c10d::Store> clone() override {
    return c10::intrusive_ptr<Meeting>::unsafe_reclaim_from_nonowning(this);
  }
  void set(const std::string& key, const Bytes& value) override {
    known_[key] = value;
    put(own_, key, value);
  }
  Bytes get(const std::string& key) override {
    ask_for({key});
    return known_.at(key);
  }
  bool check(const std::vector<std::string>& keys) override {
    for (const auto& key : keys) {
      if (known_.count(key) == 0) return false;
    }
    return true;
  }
  void wait(const std::vector<std::string>& keys) override { ask_for(keys); }
  void wait(const std::vector<std::string>& keys, const std::chrono::milliseconds&) override { ask_for(keys); }
  int64_t getNumKeys() override { return static_cast<int64_t>(known_.size()); }
  int64_t add(const std::string&, int64_t) override { TORCH_CHECK(false, "this store does not count"); }
  bool deleteKey(const std::string& key) override { return known_.erase(key) > 0; }

  // The nodes have met: what lies behind `context` is not asked any more.
  void close() { exchange_ = nullptr; }

 private:
  void ask_for(const std::vector<std::string>& keys) {
    while (!check(keys)) {
      TORCH_CHECK(exchange_ != nullptr && rounds_++ < kMostRounds, "no node has ", keys.front());
      Bytes own;
      own.swap(own_);
      const int failed = exchange_(context_, own.data(), own.size(), &Meeting::take, this);
      TORCH_CHECK(failed == 0, "the nodes did not exchange their addresses");
    }
  }
  static void take(void* into, const uint8_t* bytes, size_t n) {
    auto* self = static_cast<Meeting*>(into);
    self->heard_.emplace_back(bytes, bytes + n);
    // Exceptions must not pass through the caller: a message that is cut off is left out, and missed.
    try {
      const Bytes& message = self->heard_.back();
      for (size_t at = 0; at < message.size();) {
        Bytes key = next_part(message, at);
        self->known_[std::string(key.begin(), key.end())] = next_part(message, at);
      }
    } catch (const c10::Error&) {
    }
    self->heard_.clear();
  }

  void* context_;
  Exchange exchange_;
  int rounds_ = 0;
  Bytes own_;
  std::vector<Bytes> heard_;
  std::map<std::string, Bytes> known_;
};

// Sockets of TCP that listen in this process.
std::set<int> listeners() {
  std::set<int> found;
  DIR* folder = opendir("/proc/self/fd");
  if (folder == nullptr) return found;
  while (const dirent* entry = readdir(folder)) {
    const int fd = std::atoi(entry->d_name);
    int listens = 0;
    socklen_t size = sizeof listens;
    if (fd <= 2 || getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listens, &size) != 0 || listens == 0) continue;
    sockaddr_storage address{};
    socklen_t length = sizeof address;
    if (getsockname(fd, reinterpret_cast<sockaddr*>(&address), &length) != 0) continue;
    if (address.ss_family == AF_INET || address.ss_family == AF_INET6) found.insert(fd);
  }
  closedir(folder);
  return found;
}

struct Group {
  c10::intrusive_ptr<c10d::ProcessGroupGloo> gloo;
  std::set<int> listening;
};

struct Done {
  std::mutex mutex;
  std::condition_variable changed;
  bool done = false;
};

struct Pending {
  c10::intrusive_ptr<c10d::Work> work;
  std::shared_ptr<Done> state = std::make_shared<Done>();
};

Pending* pending(c10::intrusive_ptr<c10d::Work> work) {
  auto out = std::make_unique<Pending>();
  out->work = std::move(work);
  auto state = out->state;
  out->work->getFuture()->addCallback([state](c10::ivalue::Future&) {
    std::lock_guard<std::mutex> lock(state->mutex);
    state->done = true;
    state->changed.notify_all();
  });
  return out.release();
}

// By its table of functions: named directly it would be compiled here and ask for a function of Gloo that libtorch_cuda, which is not
// linked, holds as well.
__attribute__((noinline, optimize("O0"))) void set_timeout(c10d::Backend& group, std::chrono::milliseconds timeout) {
  group.setTimeout(timeout);
}

void must_be_moved(const at::Tensor& tensor) {
  TORCH_CHECK(tensor.device().is_cpu() && tensor.is_contiguous(), "Gloo moves contiguous tensors of the CPU");
}

}  // namespace

extern "C" {

// `host`: this node's own address; `interface`, where it is not empty, wins. `limit_ms` bounds the connecting.
char* hr_gloo_connect(int node, int nodes, const char* host, const char* interface, int64_t limit_ms, void* context,
                      Exchange exchange, Group** out) {
  return guarded([&] {
    auto group = std::make_unique<Group>();
    const auto before = listeners();
    auto options = c10d::ProcessGroupGloo::Options::create(std::chrono::milliseconds(limit_ms));
    options->threads = 1;
    options->devices.push_back(*interface != 0
                                   ? c10d::ProcessGroupGloo::createDeviceForInterface(interface, /*lazyInit=*/false)
                                   : c10d::ProcessGroupGloo::createDeviceForHostname(host, /*lazyInit=*/false));
    for (int fd : listeners()) {
      if (before.count(fd) == 0) group->listening.insert(fd);
    }
    auto store = c10::make_intrusive<Meeting>(context, exchange);
    group->gloo = c10::make_intrusive<c10d::ProcessGroupGloo>(store, node, nodes, options);
    store->close();
    set_timeout(*group->gloo, kForever);
    *out = group.release();
  });
}

// Nobody can connect any more. How many listening sockets were closed to others; connections that are there stay.
int hr_gloo_seal(Group* group) {
  sock_filter nothing[] = {BPF_STMT(BPF_RET | BPF_K, 0)};
  const sock_fprog program = {1, nothing};
  int sealed = 0;
  for (int fd : group->listening) {
    sealed += setsockopt(fd, SOL_SOCKET, SO_ATTACH_FILTER, &program, sizeof program) == 0;
  }
  return sealed;
}

char* hr_gloo_sum(Group* group, at::Tensor* tensor, Pending** out) {
  return guarded([&] {
    must_be_moved(*tensor);
    std::vector<at::Tensor> tensors{tensor->detach().view({-1})};
    c10d::AllreduceOptions options;
    options.timeout = kForever;
    std::lock_guard<std::mutex> alone(beginning);
    *out = pending(group->gloo->allreduce(tensors, options));
  });
}

// The bytes of any type.
char* hr_gloo_broadcast(Group* group, at::Tensor* tensor, int root, Pending** out) {
  return guarded([&] {
    must_be_moved(*tensor);
    std::vector<at::Tensor> tensors{tensor->detach().view({-1}).view(at::kByte)};
    c10d::BroadcastOptions options;
    options.rootRank = root;
    options.timeout = kForever;
    std::lock_guard<std::mutex> alone(beginning);
    *out = pending(group->gloo->broadcast(tensors, options));
  });
}

// Waits at most so long; an error is that of the collective, which is over then.
char* hr_gloo_wait(Pending* pending, int64_t limit_us, int* done) {
  return guarded([&] {
    {
      std::unique_lock<std::mutex> lock(pending->state->mutex);
      auto is_done = [&] { return pending->state->done; };
      *done = pending->state->changed.wait_for(lock, std::chrono::microseconds(limit_us), is_done);
    }
    if (*done != 0) pending->work->wait();
  });
}

void hr_gloo_forget(Pending* pending) {
  // Nothing that goes out of scope here can throw on its way.
  delete pending;
}

// Only after the last collective has ended: waits for Gloo's threads.
char* hr_gloo_free(Group* group) {
  return guarded([&] { delete group; });
}

}  // extern "C"
