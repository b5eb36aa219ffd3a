// Streams, events, and what is captured of a stream.

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdlib>

#include "model.h"

using namespace fake;

namespace {

cudaError_t error(cudaError_t code) { return static_cast<cudaError_t>(fail(code)); }
Event& event_of(cudaEvent_t event) { return *reinterpret_cast<Event*>(event); }

void later_than(Stream& stream, const Clock& clock, long needs) {
  for (int i = 0; i < kStreams; ++i) stream.clock[i] = std::max(stream.clock[i], clock[i]);
  stream.needs = std::max(stream.needs, needs);
}

void host_saw(const Clock& clock) {
  Clock& known = state().known;
  for (int i = 0; i < kStreams; ++i) known[i] = std::max(known[i], clock[i]);
}

// A wait of the host for work that is only captured makes the capture invalid.
bool captured(Event& event) {
  if (event.capture == nullptr || event.capture->ended) return false;
  event.capture->invalid = true;
  state().problems.push_back("the host asks for an event that is captured");
  return true;
}

}  // namespace

FAKE_EXPORT cudaError_t cudaStreamCreateWithPriority(cudaStream_t* out, unsigned, int) {
  makes_context("cudaStreamCreateWithPriority");
  *out = static_cast<cudaStream_t>(malloc(8));
  stream_of(*out);
  return cudaSuccess;
}
FAKE_EXPORT cudaError_t cudaStreamCreate(cudaStream_t* out) { return cudaStreamCreateWithPriority(out, 0, 0); }
FAKE_EXPORT cudaError_t cudaStreamCreateWithFlags(cudaStream_t* out, unsigned flags) {
  return cudaStreamCreateWithPriority(out, flags, 0);
}
FAKE_EXPORT cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }

FAKE_EXPORT cudaError_t cudaStreamQuery(cudaStream_t stream) {
  Lock hold(state().lock);
  return is_done(stream_of(stream).needs) ? cudaSuccess : error(cudaErrorNotReady);
}

FAKE_EXPORT cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  makes_context("cudaStreamSynchronize");
  long needs = 0;
  {
    Lock hold(state().lock);
    Stream& waited = stream_of(stream);
    if (waited.capture != nullptr) {
      waited.capture->invalid = true;
      state().problems.push_back("cudaStreamSynchronize of a captured stream");
      return error(cudaErrorStreamCaptureUnsupported);
    }
    if (forbidden_now("cudaStreamSynchronize")) return error(cudaErrorStreamCaptureUnsupported);
    state().now.syncs++;
    state().counts["cudaStreamSynchronize"]++;
    needs = waited.needs;
  }
  wait_for(needs);
  Lock hold(state().lock);
  host_saw(stream_of(stream).clock);
  return cudaSuccess;
}

FAKE_EXPORT cudaError_t cudaDeviceSynchronize() {
  makes_context("cudaDeviceSynchronize");
  long needs = 0;
  {
    Lock hold(state().lock);
    if (forbidden_now("cudaDeviceSynchronize")) return error(cudaErrorStreamCaptureUnsupported);
    state().now.syncs++;
    state().counts["cudaDeviceSynchronize"]++;
    for (const auto& [handle, stream] : state().streams) needs = std::max(needs, stream->needs);
  }
  wait_for(needs);
  Lock hold(state().lock);
  for (const auto& [handle, stream] : state().streams) host_saw(stream->clock);
  return cudaSuccess;
}

FAKE_EXPORT cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t call, void* data, unsigned) {
  call(stream, cudaSuccess, data);
  return cudaSuccess;
}

FAKE_EXPORT cudaError_t cudaEventCreateWithFlags(cudaEvent_t* out, unsigned flags) {
  makes_context("cudaEventCreateWithFlags");
  auto* event = new Event;
  event->timing = (flags & cudaEventDisableTiming) == 0;
  Lock hold(state().lock);
  state().counts["cudaEventCreate"]++;
  state().now.events++;
  *out = reinterpret_cast<cudaEvent_t>(event);
  return cudaSuccess;
}
FAKE_EXPORT cudaError_t cudaEventCreate(cudaEvent_t* out) { return cudaEventCreateWithFlags(out, 0); }
FAKE_EXPORT cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete &event_of(event);
  return cudaSuccess;
}

FAKE_EXPORT cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  Lock hold(state().lock);
  Stream& on = stream_of(stream);
  Event& marked = event_of(event);
  marked = Event{marked.timing, true, on.clock, on.needs, on.number, on.capture, false};
  return cudaSuccess;
}
FAKE_EXPORT cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, 0);
}

FAKE_EXPORT cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
  Lock hold(state().lock);
  Stream& waits = stream_of(stream);
  Event& marked = event_of(event);
  if (!marked.recorded) return cudaSuccess;
  Graph* graph = marked.capture != nullptr && !marked.capture->ended ? marked.capture : nullptr;
  if (graph != nullptr && waits.capture == nullptr) {
    waits.capture = graph;
    waits.origin = false;
  } else if (graph != nullptr && waits.capture != graph) {
    waits.capture->invalid = true;
    return error(cudaErrorStreamCaptureMerge);
  } else if (graph == nullptr && waits.capture != nullptr && (flags & cudaEventWaitExternal) == 0) {
    waits.capture->invalid = true;
    state().problems.push_back("a captured stream waits for an event from outside");
    return error(cudaErrorStreamCaptureIsolation);
  }
  later_than(waits, marked.clock, marked.needs);
  return cudaSuccess;
}

FAKE_EXPORT cudaError_t cudaEventQuery(cudaEvent_t event) {
  Lock hold(state().lock);
  if (captured(event_of(event))) return error(cudaErrorCapturedEvent);
  if (forbidden_now("cudaEventQuery")) return error(cudaErrorStreamCaptureUnsupported);
  if (!is_done(event_of(event).needs)) return error(cudaErrorNotReady);
  event_of(event).seen_done = true;
  host_saw(event_of(event).clock);
  return cudaSuccess;
}

FAKE_EXPORT cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  long needs = 0;
  {
    Lock hold(state().lock);
    if (captured(event_of(event))) return error(cudaErrorCapturedEvent);
    if (forbidden_now("cudaEventSynchronize")) return error(cudaErrorStreamCaptureUnsupported);
    // One that is known to be done keeps nobody waiting, and one with work behind it leaves the device at work.
    const Event& marked = event_of(event);
    bool drains = false;
    for (const auto& [handle, stream] : state().streams) {
      drains = drains || (stream->number == marked.stream && stream->clock[stream->number] == marked.clock[stream->number]);
    }
    if (marked.recorded && !marked.seen_done && drains) {
      state().now.syncs++;
      state().counts["cudaEventSynchronize"]++;
    }
    needs = event_of(event).needs;
  }
  wait_for(needs);
  Lock hold(state().lock);
  host_saw(event_of(event).clock);
  return cudaSuccess;
}

FAKE_EXPORT cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t from, cudaEvent_t to) {
  if (!event_of(from).timing || !event_of(to).timing) return error(cudaErrorInvalidResourceHandle);
  *ms = 1.0F;
  return cudaSuccess;
}

FAKE_EXPORT cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  int was = capture_mode();
  capture_mode() = *mode;
  *mode = static_cast<cudaStreamCaptureMode>(was);
  return cudaSuccess;
}

namespace {

cudaStreamCaptureStatus status(const Graph* graph) {
  if (graph == nullptr) return cudaStreamCaptureStatusNone;
  return graph->invalid ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
}

}  // namespace

FAKE_EXPORT cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* out) {
  Lock hold(state().lock);
  *out = status(stream_of(stream).capture);
  return cudaSuccess;
}

FAKE_EXPORT cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* out,
                                                 unsigned long long* id, cudaGraph_t* graph,
                                                 const cudaGraphNode_t** nodes, const cudaGraphEdgeData** edges,
                                                 size_t* count) {
  Lock hold(state().lock);
  Graph* capture = stream_of(stream).capture;
  *out = status(capture);
  if (id != nullptr) *id = capture != nullptr ? capture->number : 0;
  if (graph != nullptr) *graph = reinterpret_cast<cudaGraph_t>(capture);
  if (nodes != nullptr) *nodes = nullptr;
  if (edges != nullptr) *edges = nullptr;
  if (count != nullptr) *count = 0;
  return cudaSuccess;
}

FAKE_EXPORT cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  State& s = state();
  Lock hold(s.lock);
  Stream& on = stream_of(stream);
  if (stream == nullptr || on.capture != nullptr) return error(cudaErrorStreamCaptureUnsupported);
  auto* graph = new Graph;
  graph->number = static_cast<int>(s.captures.size()) + 1;
  graph->mode = mode;
  graph->owner = thread_id();
  on.capture = graph;
  on.origin = true;
  s.capturing.insert(graph);
  s.captures.push_back(graph);
  return cudaSuccess;
}

FAKE_EXPORT cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* out) {
  State& s = state();
  Lock hold(s.lock);
  Stream& origin = stream_of(stream);
  Graph* graph = origin.capture;
  if (graph == nullptr) return error(cudaErrorIllegalState);
  bool unjoined = false;
  for (const auto& [handle, other] : s.streams) {
    if (other->capture != graph) continue;
    if (other != &origin && origin.clock[other->number] < other->clock[other->number]) {
      unjoined = true;
      s.problems.push_back("stream " + std::to_string(other->number) + " joined a capture and did not come back");
    }
    other->capture = nullptr;
    other->origin = false;
  }
  graph->ended = true;
  s.capturing.erase(graph);
  *out = nullptr;
  if (graph->invalid || unjoined) {
    graph->invalid = true;
    for (auto& call : graph->on_destroy) call();
    graph->on_destroy.clear();
    return error(unjoined ? cudaErrorStreamCaptureUnjoined : cudaErrorStreamCaptureInvalidated);
  }
  *out = reinterpret_cast<cudaGraph_t>(graph);
  return cudaSuccess;
}

FAKE_EXPORT cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* out, cudaGraph_t graph, unsigned long long) {
  *out = reinterpret_cast<cudaGraphExec_t>(graph);
  return cudaSuccess;
}
FAKE_EXPORT cudaError_t cudaGraphInstantiate(cudaGraphExec_t* out, cudaGraph_t graph, unsigned long long flags) {
  return cudaGraphInstantiateWithFlags(out, graph, flags);
}

FAKE_EXPORT cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* count) {
  *count = static_cast<size_t>(reinterpret_cast<Graph*>(graph)->nodes);
  return cudaSuccess;
}
FAKE_EXPORT cudaError_t cudaGraphDestroy(cudaGraph_t) { return cudaSuccess; }

FAKE_EXPORT cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  Lock hold(state().lock);
  auto* graph = reinterpret_cast<Graph*>(exec);
  state().counts["cudaGraphExecDestroy"]++;
  for (auto& call : graph->on_destroy) call();
  graph->on_destroy.clear();
  return cudaSuccess;
}

FAKE_EXPORT cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
  State& s = state();
  Lock hold(s.lock);
  auto* graph = reinterpret_cast<Graph*>(exec);
  Stream& on = stream_of(stream);
  if (cudaError_t code = fault("replay", static_cast<long>(s.steps.size())) ? cudaErrorLaunchFailure : cudaSuccess) {
    return error(code);
  }
  work(on, "graph");
  s.now.graph_launches++;
  replay(on, *graph);
  enqueued(on, graph->collectives);
  return cudaSuccess;
}

FAKE_EXPORT cudaError_t cudaGraphDebugDotPrint(cudaGraph_t, const char*, unsigned) { return cudaSuccess; }
FAKE_EXPORT cudaError_t cudaGraphNodeGetDependencies(cudaGraphNode_t, cudaGraphNode_t*, cudaGraphEdgeData*, size_t* n) {
  *n = 0;
  return cudaSuccess;
}
