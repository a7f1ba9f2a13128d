/* A CUDA runtime, cuBLAS and driver without a GPU: memory is the host's, and a kernel's launch is counted and computes nothing.
 *
 * ONNX Runtime's CUDA provider loads on it, takes the nodes of a graph that it has kernels for, and runs them, so that a
 * machine without a GPU can tell whether a graph is all the provider's (or can be captured as a CUDA graph) and how many
 * kernels a request launches. What it answers is meaningless. `tests.gpu.fake_cuda` compiles this file once for each library,
 * and adds a function that returns 0 for every other symbol that the provider wants. Signatures are those of CUDA 13's
 * headers. */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef libcudart
#define DEVICE_TO_HOST 2
#define HOST_TO_DEVICE 1

/* kernels, copies to the device, copies from it, graphs launched */
uint64_t fake_cuda_counts[4];

/* cudaDeviceProp as far as multiProcessorCount; the struct has some 1000 bytes */
struct Properties {
    char name[256], uuid[16], luid[8];
    unsigned luidDeviceNodeMask;
    size_t totalGlobalMem, sharedMemPerBlock;
    int regsPerBlock, warpSize;
    size_t memPitch;
    int maxThreadsPerBlock, maxThreadsDim[3], maxGridSize[3];
    size_t totalConstMem;
    int major, minor;
    size_t textureAlignment, texturePitchAlignment;
    int multiProcessorCount;
};

int cudaGetDeviceProperties(struct Properties *found, int device) {
    memset(found, 0, sizeof *found);
    strcpy(found->name, "no GPU");
    found->totalGlobalMem = (size_t)64 << 30;
    found->sharedMemPerBlock = 48 << 10;
    found->regsPerBlock = 65536;
    found->warpSize = 32;
    found->maxThreadsPerBlock = 1024;
    for (int axis = 0; axis < 3; axis++) found->maxThreadsDim[axis] = found->maxGridSize[axis] = 65535;
    found->major = 9;
    found->multiProcessorCount = 132;
    return 0;
}

int cudaGetDeviceCount(int *count) { return *count = 1, 0; }
int cudaGetDevice(int *device) { return *device = 0, 0; }
int cudaRuntimeGetVersion(int *version) { return *version = 13000, 0; }
int cudaDriverGetVersion(int *version) { return *version = 13000, 0; }
int cudaDeviceGetAttribute(int *value, int attribute, int device) { return *value = attribute == 75 ? 9 : 0, 0; }
int cudaMemGetInfo(size_t *available, size_t *total) { return *available = *total = (size_t)64 << 30, 0; }
const char *cudaGetErrorString(int error) { return "no GPU"; }
const char *cudaGetErrorName(int error) { return "no GPU"; }

static int take(void **memory, size_t bytes) {
    /* calloc: what a kernel would have written is read as indices by the next one's host code */
    *memory = calloc(1, bytes ? bytes : 1);
    return *memory ? 0 : 2;
}
int cudaMalloc(void **memory, size_t bytes) { return take(memory, bytes); }
int cudaMallocHost(void **memory, size_t bytes, unsigned flags) { return take(memory, bytes); }
int cudaHostAlloc(void **memory, size_t bytes, unsigned flags) { return take(memory, bytes); }
int cudaFree(void *memory) { return free(memory), 0; }
int cudaFreeHost(void *memory) { return free(memory), 0; }

static int copy(void *target, const void *source, size_t bytes, int kind) {
    if (kind == HOST_TO_DEVICE) fake_cuda_counts[1]++;
    if (kind == DEVICE_TO_HOST) fake_cuda_counts[2]++;
    memmove(target, source, bytes);
    return 0;
}
int cudaMemcpy(void *target, const void *source, size_t bytes, int kind) { return copy(target, source, bytes, kind); }
int cudaMemcpyAsync(void *target, const void *source, size_t bytes, int kind, void *stream) {
    return copy(target, source, bytes, kind);
}

struct Pointer {
    int type, device;
    void *devicePointer, *hostPointer;
};
int cudaPointerGetAttributes(struct Pointer *found, const void *memory) {
    *found = (struct Pointer){2, 0, (void *)memory, NULL};
    return 0;
}

static int handle(void **target) { return *target = (void *)target, 0; }
int cudaStreamCreate(void **stream) { return handle(stream); }
int cudaStreamCreateWithFlags(void **stream, unsigned flags) { return handle(stream); }
int cudaEventCreate(void **event) { return handle(event); }
int cudaEventCreateWithFlags(void **event, unsigned flags) { return handle(event); }
int cudaStreamIsCapturing(void *stream, int *status) { return *status = 0, 0; }
int cudaStreamEndCapture(void *stream, void **graph) { return handle(graph); }
int cudaGraphInstantiate(void **executable, void *graph, unsigned long long flags) { return handle(executable); }
int cudaGraphLaunch(void *executable, void *stream) { return fake_cuda_counts[3]++, 0; }

int cudaLaunchKernel() { return fake_cuda_counts[0]++, 0; }
int __cudaLaunchKernel() { return fake_cuda_counts[0]++, 0; }
int cudaLaunchKernelExC() { return fake_cuda_counts[0]++, 0; }
int cudaLaunchCooperativeKernel() { return fake_cuda_counts[0]++, 0; }
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks) { return *blocks = 1, 0; }
void **__cudaRegisterFatBinary(void *code) { return (void **)&fake_cuda_counts; }
int __cudaGetKernel(void **kernel, const void *function) { return *kernel = (void *)function, 0; }
struct Function {
    size_t sharedSizeBytes, constSizeBytes, localSizeBytes;
    int maxThreadsPerBlock, numRegs;
};
int cudaFuncGetAttributes(struct Function *found, const void *function) {
    *found = (struct Function){0, 0, 0, 1024, 32};
    return 0;
}
#endif

static int created(void **handle) { return *handle = (void *)handle, 0; }
#ifdef libcublas
int cublasCreate_v2(void **handle) { return created(handle); }
#endif
#ifdef libcublasLt
int cublasLtCreate(void **handle) { return created(handle); }
#endif
#ifdef libcudnn
int cudnnCreate(void **handle) { return created(handle); }
/* From 9.3 on ONNX Runtime takes cuDNN's attention, of which no plan can be made here. */
size_t fake_cudnn_version;
size_t cudnnGetVersion(void) { return fake_cudnn_version; }
#endif
#ifdef libcuda
int cuInit(unsigned flags) { return 0; }
int cuDeviceGetCount(int *count) { return *count = 1, 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { return *value = attribute == 75 ? 9 : 0, 0; }
#endif
