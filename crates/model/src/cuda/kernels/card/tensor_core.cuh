// Products of 16-bit values on tensor cores, sums in f32, and what brings operands there. Compute capability 8.0 and newer.
#pragma once

#include "../common.cuh"

// The shared memory that a launch asks for, as bytes.
#define DYNAMIC_SHARED(NAME) extern __shared__ __align__(128) unsigned char NAME[]

__device__ __forceinline__ uint32_t shared_address(const void *at) { return uint32_t(__cvta_generic_to_shared(at)); }

// Copies 16 bytes from device memory past the registers; zeros where `there` is false.
__device__ __forceinline__ void copy_ahead(uint32_t to, const void *from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0));
}
__device__ __forceinline__ void end_of_copies() { asm volatile("cp.async.commit_group;"); }
// Waits until at most `N` of the groups of copies are under way.
template <int N> __device__ __forceinline__ void await_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(N)); }

// Fetches four 8 x 8 matrices of 16-bit values; lanes 8i to 8i + 7 give the lines of matrix i. Lane 4·g + t gets columns
// 2t, 2t + 1 of row g of each.
__device__ __forceinline__ void fetch(uint32_t (&to)[4], uint32_t from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(from));
}
// The same, each matrix transposed.
__device__ __forceinline__ void fetch_turned(uint32_t (&to)[4], uint32_t from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(from));
}

// sum (16, 8) += a (16, 16) · b (16, 8).
//
// With lane = 4·g + t: values 0 and 1 of `sum` are columns 2t, 2t + 1 of row g, values 2 and 3 those of row g + 8. Of `a`,
// registers 0 to 3 are columns 2t, 2t + 1 of rows g and g + 8, then columns 2t + 8, 2t + 9 of the same rows. Of `b`, they
// are rows 2t, 2t + 1 of column g, then rows 2t + 8, 2t + 9.
template <typename T>
__device__ __forceinline__ void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void multiply<bf16>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                 "{%0,%1,%2,%3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void multiply<f16>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                 "{%0,%1,%2,%3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two values in one register, the first in its lower half.
template <typename T> __device__ __forceinline__ uint32_t pair(float low, float high);
template <> __device__ __forceinline__ uint32_t pair<bf16>(float low, float high) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t *>(&both);
}
template <> __device__ __forceinline__ uint32_t pair<f16>(float low, float high) {
    const __half2 both = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t *>(&both);
}
