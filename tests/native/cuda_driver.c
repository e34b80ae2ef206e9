/* A libcuda.so.1 without a GPU: memory is the host's, launches and graphs are only written to standard error. What reaches it has gone through
 * the real Python bindings, so that a test sees every argument as a driver would. */
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SAY(...) fprintf(stderr, "driver: " __VA_ARGS__)
#define HANDLE(n) ((void *)(uintptr_t)(n))

int cuInit(unsigned flags) { return flags != 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGet(int *device, int index) { *device = index; return 0; }
int cuDeviceGetName(char *name, int size, int device) { (void)device; snprintf(name, size, "No GPU"); return 0; }
int cuDeviceGetAttribute(int *value, int which, int device) { (void)device; *value = which == 75 ? 9 : which == 16 ? 132 : 0; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { (void)device; *context = HANDLE(1); return 0; }
int cuCtxSetCurrent(void *context) { return context != HANDLE(1); }
int cuStreamCreate(void **stream, unsigned flags) { *stream = HANDLE(2); return flags != 1; }
int cuStreamSynchronize(void *stream) { return stream != HANDLE(2); }
int cuMemAlloc_v2(uint64_t *address, size_t size) { *address = (uint64_t)aligned_alloc(256, (size + 255) / 256 * 256); return 0; }
int cuMemFree_v2(uint64_t address) { free((void *)address); return 0; }
int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t size, void *stream) { memcpy((void *)to, from, size); return stream != HANDLE(2); }
int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t size, void *stream) { memcpy(to, (void *)from, size); return stream != HANDLE(2); }
int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t size, void *stream) { memcpy((void *)to, (void *)from, size); return stream != HANDLE(2); }
int cuMemcpyAsync(uint64_t to, uint64_t from, size_t size, void *stream) { memcpy((void *)to, (void *)from, size); return stream != HANDLE(2); }
int cuMemHostAlloc(void **address, size_t size, unsigned flags) { *address = aligned_alloc(256, (size + 255) / 256 * 256); return flags != 2; }
int cuMemHostGetDevicePointer_v2(uint64_t *address, void *host, unsigned flags) { *address = (uint64_t)host; return flags; }
int cuMemFreeHost(void *address) { free(address); return 0; }
int cuModuleUnload(void *module) { SAY("unload\n"); return module != HANDLE(3); }
int cuStreamDestroy_v2(void *stream) { SAY("close\n"); return stream != HANDLE(2); }
int cuModuleLoadData(void **module, const char *image) { SAY("module %.3s\n", image + 1); *module = HANDLE(3); return 0; }
int cuModuleGetFunction(void **function, void *module, const char *name) {
    SAY("function %s\n", name);
    *function = HANDLE(4);
    return module != HANDLE(3);
}
int cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz, unsigned shared, void *stream, void **args, void **extra) {
    const int *numbers = (const int *)((void **)args[0] + 4); /* of a struct of four addresses */
    SAY("launch %u %u %u, %u %u %u, shared %u, numbers %d %d\n", x, y, z, bx, by, bz, shared, numbers[0], numbers[1]);
    return function != HANDLE(4) || stream != HANDLE(2) || extra;
}
int cuStreamBeginCapture_v2(void *stream, int mode) { SAY("capture %d\n", mode); return stream != HANDLE(2); }
int cuStreamEndCapture(void *stream, void **graph) { *graph = HANDLE(5); return stream != HANDLE(2); }
int cuGraphInstantiateWithFlags(void **ready, void *graph, unsigned long long flags) { *ready = HANDLE(6); return graph != HANDLE(5) || flags; }
int cuGraphLaunch(void *ready, void *stream) { SAY("graph\n"); return ready != HANDLE(6) || stream != HANDLE(2); }
int cuGraphExecDestroy(void *ready) { return ready != HANDLE(6); }
int cuGraphDestroy(void *graph) { return graph != HANDLE(5); }
int cuEventCreate(void **event, unsigned flags) { *event = HANDLE(7); return flags; }
int cuEventRecord(void *event, void *stream) { return event != HANDLE(7) || stream != HANDLE(2); }
int cuEventSynchronize(void *event) { return event != HANDLE(7); }
int cuEventElapsedTime(float *ms, void *first, void *last) { *ms = 3; return first != HANDLE(7) || last != HANDLE(7); }
int cuEventElapsedTime_v2(float *ms, void *first, void *last) { return cuEventElapsedTime(ms, first, last); }
int cuEventDestroy_v2(void *event) { return event != HANDLE(7); }

/* The bindings ask for every function of the driver by name; those that are not here stay null. */
int cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags, int *status) {
    (void)version, (void)flags, (void)status;
    void *self = dlopen("libcuda.so.1", RTLD_NOLOAD | RTLD_LAZY);
    char second[128];
    snprintf(second, sizeof second, strcmp(name, "cuGraphInstantiate") ? "%s_v2" : "%sWithFlags", name);
    *function = dlsym(self, second);
    if (!*function) *function = dlsym(self, name);
    return 0;
}
int cuGetProcAddress(const char *name, void **function, int version, uint64_t flags) { return cuGetProcAddress_v2(name, function, version, flags, 0); }
