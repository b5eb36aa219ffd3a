// CUDA graphs: the one part of the shim with types of CUDA. A shared object of its own, loaded after libtorch_cuda.so.

#include <ATen/cuda/CUDAGraph.h>

#include <cstdlib>

#include "guarded.h"

using Graph = at::cuda::CUDAGraph;

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
  return guarded([&] { graph->capture_begin({0, 0}, cudaStreamCaptureModeThreadLocal); });
}

char* hr_graph_end(Graph* graph) {
  return guarded([&] { graph->capture_end(); });
}

char* hr_graph_replay(Graph* graph) {
  return guarded([&] { graph->replay(); });
}

}  // extern "C"
