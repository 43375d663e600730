/* A driver that does nothing, for benchmarks/gate.py: what is left is what the shim costs. */
#include <stddef.h>
#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))
static int thing;

EXPORT int cuInit(unsigned f) { (void)f; return 0; }
EXPORT int cuCtxGetCurrent(void **c) { *c = &thing; return 0; }
EXPORT int cuStreamIsCapturing(void *s, int *status) { (void)s; *status = 0; return 0; }
EXPORT int cuMemHostRegister_v2(void *at, size_t n, unsigned f) { (void)at, (void)n, (void)f; return 0; }
EXPORT int cuMemHostGetDevicePointer_v2(uint64_t *d, void *at, unsigned f) { (void)f; *d = (uint64_t)at; return 0; }
EXPORT int cuStreamWriteValue32_v2(void *s, uint64_t at, uint32_t v, unsigned f)
{
    (void)s, (void)f;
    *(volatile uint32_t *)at = v;
    return 0;
}
EXPORT int cuStreamQuery(void *s) { (void)s; return 0; }
EXPORT int cuEventCreate(void **e, unsigned f) { (void)f; *e = &thing; return 0; }
EXPORT int cuEventRecord(void *e, void *s) { (void)e, (void)s; return 0; }
EXPORT int cuEventQuery(void *e) { (void)e; return 0; }
EXPORT int cuEventElapsedTime(float *ms, void *a, void *b) { (void)a, (void)b; *ms = 0.001f; return 0; }
EXPORT int cuLaunchKernel(void *f, unsigned a, unsigned b, unsigned c, unsigned d, unsigned e, unsigned g, unsigned h,
                          void *s, void **p, void **x)
{
    (void)f, (void)a, (void)b, (void)c, (void)d, (void)e, (void)g, (void)h, (void)s, (void)p, (void)x;
    return 0;
}
EXPORT int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t n, void *s)
{
    (void)to, (void)from, (void)n, (void)s;
    return 0;
}
EXPORT int cuMemAlloc_v2(uint64_t *at, size_t n) { static uint64_t last; (void)n; *at = last += 4096; return 0; }
EXPORT int cuMemFree_v2(uint64_t at) { (void)at; return 0; }
