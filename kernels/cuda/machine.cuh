// What the kernels need of a GPU (compute capability 8.0 or later), under plain names. Two numbers in half precision stand in one u32, the
// first in the low half. `emulated.h` has the same functions for a CPU, where EMULATED is defined.
#pragma once
#include "words.cuh"
#ifndef EMULATED

#define ON_GPU __device__ __forceinline__
// A kernel of its own: `args` is the one value that it takes.
#define ENTRY(name, threads, args, ...) \
    extern "C" __global__ void __launch_bounds__(threads, 1) name(const __grid_constant__ args p) { __VA_ARGS__(p); }

// ---- two halves at a time

ON_GPU u32 half2_fma(u32 a, u32 b, u32 c) { u32 d; asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c)); return d; }
ON_GPU u32 half2_sub(u32 a, u32 b) { u32 d; asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b)); return d; }
ON_GPU u32 half2_mul(u32 a, u32 b) { u32 d; asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b)); return d; }
ON_GPU u32 and_or(u32 a, u32 mask, u32 also) { u32 d; asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(a), "r"(mask), "r"(also)); return d; }
ON_GPU u32 to_half2(float low, float high) { u32 d; asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low)); return d; }
ON_GPU u16 to_half(float x) { u16 d; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(d) : "f"(x)); return d; }
ON_GPU float from_half(u16 h) { float x; asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h)); return x; }

// c [16, 8] += a [16, 16] · b [16, 8], sums in float32. Lane 4g + t holds of c: (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1); of a, two
// columns each: rows g, g+8, g, g+8 at columns 2t, 2t, 2t+8, 2t+8; of b, two rows each: rows 2t and 2t+8 of column g.
ON_GPU void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- memory

ON_GPU Words4 load_once16(const void* p) {  // weights: read once, not worth a place in the first cache
    Words4 w;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(w.v[0]), "=r"(w.v[1]), "=r"(w.v[2]), "=r"(w.v[3]) : "l"(p));
    return w;
}
ON_GPU Words2 load_once8(const void* p) {
    Words2 w;
    asm("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(w.v[0]), "=r"(w.v[1]) : "l"(p));
    return w;
}
template <class T> ON_GPU T load(const T* p) { return *p; }
ON_GPU float load_fresh(const float* p) { float x; asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(x) : "l"(p)); return x; }

extern __shared__ __align__(16) u8 shared_memory[];
template <class T> ON_GPU T* shared(int byte) { return reinterpret_cast<T*>(shared_memory + byte); }

// 16 bytes to shared memory, the first `bytes` (0 to 16) of them from `from`, the others 0; there after `copies_wait`.
ON_GPU void copy_async(void* to, const void* from, int bytes) {
    u32 address = static_cast<u32>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
}
ON_GPU void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT> ON_GPU void copies_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory"); }

// ---- threads

ON_GPU void sync_block() { __syncthreads(); }
ON_GPU void sync_warp() { __syncwarp(); }
ON_GPU void fence() { __threadfence(); }
ON_GPU int count_up(int* p) { return atomicAdd(p, 1); }  // the count before
ON_GPU float from_lane_xor(float x, int bits) { return __shfl_xor_sync(0xffffffffu, x, bits); }
ON_GPU int from_lane_xor(int x, int bits) { return __shfl_xor_sync(0xffffffffu, x, bits); }
ON_GPU u32 bits_of(float x) { return __float_as_uint(x); }
ON_GPU float from_bits(u32 x) { return __uint_as_float(x); }
ON_GPU int nearest(float x) { return __float2int_rn(x); }
ON_GPU float reciprocal_root(float x) { return rsqrtf(x); }

#endif
