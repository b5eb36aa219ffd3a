// CUDA graphs: the one part of the shim with types of CUDA. A shared object of its own, loaded after libtorch_cuda.so.

#include <ATen/core/CachingHostAllocator.h>
#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDACachingAllocator.h>

#include <cstdlib>

#include "guarded.h"

namespace {

// libtorch 2.11 leaves its allocators and random generators as in a recording when beginning or ending one throws: the
// next dropout would throw as well, where the step is to run as it is written.
struct Graph : at::cuda::CUDAGraph {
  void give_up() noexcept {
    if (capture_ended_ || capture_dev_ == UNDEFINED_DEVICE) return;
    for (auto& [generator, increment] : captured_generator_states_) generator->capturing_ = false;
    // Each throws where it was not begun, which is what is wanted.
    attempt([&] { c10::cuda::CUDACachingAllocator::endAllocateToPool(capture_dev_, mempool_id_); });
    attempt([&] { c10::cuda::CUDACachingAllocator::releasePool(capture_dev_, mempool_id_); });
    attempt([&] { at::getHostAllocator(at::kCUDA)->end_allocate_to_pool(mempool_id_); });
    attempt([&] { at::getHostAllocator(at::kCUDA)->release_pool(mempool_id_); });
  }

 private:
  template <typename F>
  static void attempt(F&& body) noexcept {
    std::free(guarded(body));
  }
};

}  // namespace

extern "C" {

void hr_graph_text_free(char* text) { std::free(text); }

char* hr_graph_new(Graph** out) {
  return guarded([&] { *out = new Graph(); });
}

void hr_graph_delete(Graph* graph) {
  char* error = guarded([&] { delete graph; });
  std::free(error);
}

// What this thread's current stream is given from here on is recorded, not run. Calls of other threads that CUDA holds
// for unsafe while recording (the loader's copies) stay allowed.
char* hr_graph_begin(Graph* graph) {
  char* error = guarded([&] { graph->capture_begin({0, 0}, cudaStreamCaptureModeThreadLocal); });
  if (error) graph->give_up();
  return error;
}

char* hr_graph_end(Graph* graph) {
  char* error = guarded([&] { graph->capture_end(); });
  if (error) graph->give_up();
  return error;
}

char* hr_graph_replay(Graph* graph) {
  return guarded([&] { graph->replay(); });
}

}  // extern "C"
