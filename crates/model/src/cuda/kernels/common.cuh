// What the kernels share. Sums are f32 whatever the tensors' type; a result is rounded once, when it is stored.
#pragma once

#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

using bf16 = __nv_bfloat16;
using f16 = __half;

__device__ __forceinline__ float wide(float v) { return v; }
__device__ __forceinline__ float wide(bf16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float wide(f16 v) { return __half2float(v); }

template <typename T> __device__ __forceinline__ T narrow(float v);
template <> __device__ __forceinline__ float narrow<float>(float v) { return v; }
template <> __device__ __forceinline__ bf16 narrow<bf16>(float v) { return __float2bfloat16_rn(v); }
template <> __device__ __forceinline__ f16 narrow<f16>(float v) { return __float2half_rn(v); }

// N values that are read and written at once; their address is a multiple of their size.
template <typename T, int N> struct alignas(sizeof(T) * N) Pack {
    T values[N];
};

// Values of 16 bytes.
template <typename T> constexpr int PACK = 16 / sizeof(T);

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
    for (int step = 16; step > 0; step >>= 1) v += __shfl_xor_sync(0xffffffffu, v, step);
    return v;
}

// Sum over a block of whole warps, for every thread. `room` holds 33 values.
__device__ __forceinline__ float block_sum(float v, float *room) {
    v = warp_sum(v);
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
    if (threadIdx.x % 32 == 0) room[warp] = v;
    __syncthreads();
    if (warp == 0) {
        float all = int(threadIdx.x) < warps ? room[threadIdx.x] : 0.f;
        all = warp_sum(all);
        if (threadIdx.x == 0) room[32] = all;
    }
    __syncthreads();
    v = room[32];
    __syncthreads();
    return v;
}

// As `Activation` of the project numbers them.
enum { NONE, GELU_TANH, GELU_ERF, QUICK_GELU, SILU, RELU };

__device__ __forceinline__ float activate(float x, int activation) {
    switch (activation) {
    case GELU_TANH: {
        const float u = 0.7978845608f * (x + 0.044715f * x * x * x);
        return x / (1.f + expf(-2.f * u)); // (1 + tanh u)/2 is the logistic function of 2u.
    }
    case GELU_ERF: return 0.5f * x * (1.f + erff(x * 0.7071067812f));
    case QUICK_GELU: return x / (1.f + expf(-1.702f * x));
    case SILU: return x / (1.f + expf(-x));
    case RELU: return x < 0.f ? 0.f : x; // Not `fmaxf`, which would make a zero of a NaN.
    default: return x;
    }
}

// A kernel for each type: `name_f32`, `name_bf16`, `name_f16`.
#define FOR_EACH_TYPE(KERNEL) KERNEL(float, f32) KERNEL(bf16, bf16) KERNEL(f16, f16)
