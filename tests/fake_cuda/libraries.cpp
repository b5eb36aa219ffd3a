// The calls of cuBLAS and cuDNN that the tasks make. All others are stubs that the build generates.
//
// cuDNN is asked by its older interface (TORCH_CUDNN_V8_API_DISABLED=1): one call is one convolution.

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "model.h"

using namespace fake;

namespace {

struct Handle {
  void* stream;
  int math;
  int pointers;
};

int product(void* handle, const char* name) {
  Lock hold(state().lock);
  work(stream_of(static_cast<Handle*>(handle)->stream), name);
  return 0;
}

// As the head of cudnnConvolution*AlgoPerf_t lies in memory.
struct Algorithm {
  int number, status;
  float ms;
  size_t memory;
  int determinism, math, reserved[3];
};

int one_algorithm(int* found, void* to) {
  auto* algorithm = static_cast<Algorithm*>(to);
  memset(algorithm, 0, sizeof *algorithm);
  algorithm->number = 1;
  algorithm->math = 3;  // CUDNN_FMA_MATH
  *found = 1;
  return 0;
}

void count_tf32(bool used) {
  Lock hold(state().lock);
  if (used) state().counts["TF32"]++;
}

int convolution(void* handle, const char* name) { return product(handle, name); }

}  // namespace

FAKE_EXPORT int cublasCreate_v2(void** out) { return *out = calloc(1, sizeof(Handle)), 0; }
FAKE_EXPORT int cublasDestroy_v2(void* handle) { return free(handle), 0; }
FAKE_EXPORT int cublasSetStream_v2(void* handle, void* stream) { return static_cast<Handle*>(handle)->stream = stream, 0; }
FAKE_EXPORT int cublasSetWorkspace_v2(void*, void*, size_t) { return 0; }
FAKE_EXPORT int cublasGetMathMode(void* handle, int* mode) { return *mode = static_cast<Handle*>(handle)->math, 0; }
FAKE_EXPORT int cublasSetMathMode(void* handle, int mode) {
  count_tf32(mode == 3);  // CUBLAS_TF32_TENSOR_OP_MATH
  return static_cast<Handle*>(handle)->math = mode, 0;
}
FAKE_EXPORT int cublasGetPointerMode_v2(void* handle, int* m) { return *m = static_cast<Handle*>(handle)->pointers, 0; }
FAKE_EXPORT int cublasSetPointerMode_v2(void* handle, int m) { return static_cast<Handle*>(handle)->pointers = m, 0; }

#define PRODUCT(name) \
  FAKE_EXPORT int name(void* handle) { return product(handle, #name); }
PRODUCT(cublasSgemm_v2)
PRODUCT(cublasDgemm_v2)
PRODUCT(cublasGemmEx)
PRODUCT(cublasSgemmEx)
PRODUCT(cublasSgemmStridedBatched)
PRODUCT(cublasDgemmStridedBatched)
PRODUCT(cublasGemmStridedBatchedEx)
PRODUCT(cublasSgemv_v2)
PRODUCT(cublasDgemv_v2)
PRODUCT(cublasSdot_v2)
PRODUCT(cublasDdot_v2)
PRODUCT(cublasDotEx)

FAKE_EXPORT int cublasLtMatmulDescCreate(void** out, int compute, int) {
  count_tf32(compute == 77);  // CUBLAS_COMPUTE_32F_FAST_TF32
  return *out = malloc(64), 0;
}
FAKE_EXPORT int cublasLtMatmulDescDestroy(void* at) { return free(at), 0; }
FAKE_EXPORT int cublasLtMatrixLayoutCreate(void** out, int, uint64_t, uint64_t, int64_t) { return *out = malloc(64), 0; }
FAKE_EXPORT int cublasLtMatrixLayoutDestroy(void* at) { return free(at), 0; }
FAKE_EXPORT int cublasLtMatmulPreferenceCreate(void** out) { return *out = malloc(64), 0; }
FAKE_EXPORT int cublasLtMatmulPreferenceDestroy(void* at) { return free(at), 0; }
FAKE_EXPORT int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void* out, int* n) {
  memset(out, 0, 96);
  *n = 1;
  return 0;
}
FAKE_EXPORT int cublasLtMatmul(void*, void*, const void*, const void*, void*, const void*, void*, const void*, const void*,
                               void*, void*, void*, const void*, void*, size_t, void* stream) {
  Lock hold(state().lock);
  work(stream_of(stream), "cublasLtMatmul");
  return 0;
}

FAKE_EXPORT size_t cudnnGetVersion() { return 91900; }
FAKE_EXPORT size_t cudnnGetCudartVersion() { return 13000; }
FAKE_EXPORT int cudnnCreate(void** out) { return *out = calloc(1, sizeof(Handle)), 0; }
FAKE_EXPORT int cudnnSetStream(void* handle, void* stream) { return static_cast<Handle*>(handle)->stream = stream, 0; }
FAKE_EXPORT const char* cudnnGetErrorString(int) { return "an error of the model"; }
FAKE_EXPORT int cudnnCreateTensorDescriptor(void** out) { return *out = calloc(1, 64), 0; }
FAKE_EXPORT int cudnnCreateFilterDescriptor(void** out) { return *out = calloc(1, 64), 0; }
FAKE_EXPORT int cudnnCreateConvolutionDescriptor(void** out) { return *out = calloc(1, 64), 0; }
FAKE_EXPORT int cudnnDestroyTensorDescriptor(void* at) { return free(at), 0; }
FAKE_EXPORT int cudnnDestroyFilterDescriptor(void* at) { return free(at), 0; }
FAKE_EXPORT int cudnnDestroyConvolutionDescriptor(void* at) { return free(at), 0; }

#define ALGORITHM(pass)                                                                                              \
  FAKE_EXPORT int cudnnGetConvolution##pass##Algorithm_v7(void*, void*, void*, void*, void*, int, int* n, void* to) { \
    return one_algorithm(n, to);                                                                                     \
  }                                                                                                                  \
  FAKE_EXPORT int cudnnGetConvolution##pass##WorkspaceSize(void*, void*, void*, void*, void*, int, size_t* bytes) {  \
    return *bytes = 0, 0;                                                                                            \
  }                                                                                                                  \
  FAKE_EXPORT int cudnnConvolution##pass(void* handle) { return convolution(handle, "cudnnConvolution" #pass); }
ALGORITHM(Forward)
ALGORITHM(BackwardData)
ALGORITHM(BackwardFilter)

#define FOUND(pass)                                                                                           \
  FAKE_EXPORT int cudnnFindConvolution##pass##AlgorithmEx(void*, void*, const void*, void*, const void*, void*, void*, \
                                                          void*, int, int* n, void* to, void*, size_t) {      \
    Lock hold(state().lock);                                                                                  \
    state().counts["cudnnFindConvolution"]++;                                                                 \
    return one_algorithm(n, to);                                                                              \
  }
FOUND(Forward)
FOUND(BackwardData)
FOUND(BackwardFilter)
