// Holds what Headroom declares of NCCL and CUDA to the headers: it compiles or says what differs. The names are those of
// src/comm/nccl/sys.rs and src/torch/device/pin.rs; tests/it/fake_cuda writes the first as nccl_abi.h.

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "nccl_abi.h"  // written by the test from sys.rs

#if __has_include(<nccl.h>)
#include <nccl.h>
#define SAME(field, theirs) static_assert(offsetof(Config, field) == offsetof(ncclConfig_t, theirs), #field)
SAME(blocking, blocking);
SAME(cga_cluster_size, cgaClusterSize);
SAME(min_ctas, minCTAs);
SAME(max_ctas, maxCTAs);
SAME(net_name, netName);
SAME(split_share, splitShare);
static_assert(UINT8 == ncclUint8 && INT64 == ncclInt64 && FLOAT16 == ncclFloat16 && FLOAT32 == ncclFloat32);
static_assert(FLOAT64 == ncclFloat64 && BFLOAT16 == ncclBfloat16 && SUM == ncclSum && IN_PROGRESS == ncclInProgress);
static_assert(UNIQUE_ID_BYTES == NCCL_UNIQUE_ID_BYTES);
ncclResult_t (*all_reduce)(const void*, void*, size_t, ncclDataType_t, ncclRedOp_t, ncclComm_t, cudaStream_t) = ncclAllReduce;
ncclResult_t (*broadcast)(const void*, void*, size_t, ncclDataType_t, int, ncclComm_t, cudaStream_t) = ncclBroadcast;
ncclResult_t (*all_gather)(const void*, void*, size_t, ncclDataType_t, ncclComm_t, cudaStream_t) = ncclAllGather;
ncclResult_t (*init)(ncclComm_t*, int, ncclUniqueId, int, ncclConfig_t*) = ncclCommInitRankConfig;
ncclResult_t (*async_error)(ncclComm_t, ncclResult_t*) = ncclCommGetAsyncError;
#endif

// `ncclConfig_v22800` as the header of 2.28.9 lays it out.
static_assert(sizeof(Config) == 80 && offsetof(Config, blocking) == 16 && offsetof(Config, net_name) == 32);
static_assert(offsetof(Config, comm_name) == 48 && offsetof(Config, nvlink_centric_sched) == 76);
static_assert(UINT8 == 1 && INT64 == 4 && FLOAT16 == 6 && FLOAT32 == 7 && FLOAT64 == 8 && BFLOAT16 == 9 && SUM == 0);
static_assert(SUCCESS == 0 && IN_PROGRESS == 7 && UNIQUE_ID_BYTES == 128);

cudaError_t (*register_host)(void*, size_t, unsigned) = cudaHostRegister;
cudaError_t (*unregister_host)(void*) = cudaHostUnregister;
cudaError_t (*last_error)() = cudaGetLastError;
const char* (*error_text)(cudaError_t) = cudaGetErrorString;
cudaError_t (*bus_id)(char*, int, int) = cudaDeviceGetPCIBusId;
static_assert(sizeof(cudaError_t) == 4 && cudaHostRegisterPortable == 1);
