// A card on a processor, as far as the kernels need one: blocks run one after the other, the threads of a block in turns
// that end where they wait for each other. It is slow and exact, and shows on any machine whether a kernel computes
// what it should.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

using std::fmaf;
using std::fmaxf;

struct Index {
    unsigned x, y, z;
};

// Where the running thread is, and its block's shared memory besides what kernels declare.
struct Place {
    Index thread, block, threads, blocks;
    unsigned char *memory;
};
extern Place place_of_thread;

#define threadIdx (place_of_thread.thread)
#define blockIdx (place_of_thread.block)
#define blockDim (place_of_thread.threads)
#define gridDim (place_of_thread.blocks)
#define __device__
#define __global__
#define __forceinline__ inline
#define __shared__ static
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)

// Waits for all other threads of the block, or of the warp, that still run.
void meet_block();
void meet_warp();
#define __syncthreads meet_block

[[noreturn]] inline void fail(const char *reason) {
    fprintf(stderr, "%s, in block (%u, %u, %u), thread %u\n", reason, blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x);
    exit(1);
}

// Words that the lanes of a warp show each other.
extern uint32_t shown[32][32][12];
inline uint32_t (&of_warp())[32][12] { return shown[threadIdx.x / 32]; }
inline unsigned lane() { return threadIdx.x % 32; }

inline float __uint_as_float(unsigned bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
inline unsigned __float_as_uint(float value) {
    unsigned bits;
    memcpy(&bits, &value, 4);
    return bits;
}

inline float __shfl_xor_sync(unsigned, float value, int other) {
    auto &words = of_warp();
    words[lane()][0] = __float_as_uint(value);
    meet_warp();
    const float seen = __uint_as_float(words[lane() ^ other][0]);
    meet_warp();
    return seen;
}

struct __nv_bfloat16 {
    uint16_t bits;
};
struct __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
struct __half {
    _Float16 value;
};
struct __half2 {
    __half x, y;
};

inline float __bfloat162float(__nv_bfloat16 value) { return __uint_as_float(unsigned(value.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
    const unsigned bits = __float_as_uint(value);
    if (value != value) return {0x7fff};
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline float __half2float(__half value) { return float(value.value); }
inline __half __float2half_rn(float value) { return {_Float16(value)}; }
inline __half __ushort_as_half(unsigned short bits) {
    __half value;
    memcpy(&value, &bits, 2);
    return value;
}
inline __nv_bfloat162 __floats2bfloat162_rn(float low, float high) {
    return {__float2bfloat16_rn(low), __float2bfloat16_rn(high)};
}
inline __half2 __floats2half2_rn(float low, float high) { return {__float2half_rn(low), __float2half_rn(high)}; }

// Compiled without contraction, these are what they say.
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fsub_rn(float a, float b) { return a - b; }
