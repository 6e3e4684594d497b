// Stored weights as numbers: one byte a value with scales beside it, and GGUF's blocks.
#include "common.cuh"

namespace {

__device__ __forceinline__ float half_at(const uint8_t *block) {
    const unsigned short bits = block[0] | block[1] << 8;
    return __half2float(__ushort_as_half(bits));
}

// 1 sign, 4 exponent (bias 7) and 3 mantissa bits; no infinities.
__device__ __forceinline__ float e4m3(uint8_t byte) {
    const unsigned magnitude = byte & 0x7f;
    float value;
    if (magnitude == 0x7f) value = __uint_as_float(0x7fc00000u);
    else if (magnitude >= 8) value = __uint_as_float((magnitude << 20) + (120u << 23));
    else value = float(magnitude) / 512.f;
    return byte & 0x80 ? -value : value;
}

// `d·s` and `e·m` of the 32 values number `k` of a block of 256; see the clear version for the packing.
__device__ __forceinline__ void scale_and_low(const uint8_t *block, int k, float &scale, float &low) {
    const int i = k % 4;
    const int s = block[4 + i], m = block[8 + i], both = block[12 + i];
    scale = half_at(block) * float(k < 4 ? s & 63 : (both & 15) | s >> 6 << 4);
    low = half_at(block + 2) * float(k < 4 ? m & 63 : both >> 4 | m >> 6 << 4);
}

struct Q8 {
    static constexpr int VALUES = 32, BYTES = 34;
    static __device__ float value(const uint8_t *block, int i) { return float(int8_t(block[2 + i])) * half_at(block); }
};

struct Q4 {
    static constexpr int VALUES = 32, BYTES = 18;
    static __device__ float value(const uint8_t *block, int i) {
        const int byte = block[2 + i % 16];
        return float((i < 16 ? byte & 15 : byte >> 4) - 8) * half_at(block);
    }
};

struct Q4K {
    static constexpr int VALUES = 256, BYTES = 144;
    static __device__ float value(const uint8_t *block, int i) {
        const int k = i / 32;
        float scale, low;
        scale_and_low(block, k, scale, low);
        const int quant = block[16 + 32 * (k / 2) + i % 32] >> (4 * (k % 2)) & 15;
        return __fsub_rn(__fmul_rn(scale, float(quant)), low);
    }
};

struct Q5K {
    static constexpr int VALUES = 256, BYTES = 176;
    static __device__ float value(const uint8_t *block, int i) {
        const int k = i / 32;
        float scale, low;
        scale_and_low(block, k, scale, low);
        const int lower = block[48 + 32 * (k / 2) + i % 32] >> (4 * (k % 2)) & 15;
        const int upper = block[16 + i % 32] >> k & 1;
        return __fsub_rn(__fmul_rn(scale, float(lower | upper << 4)), low);
    }
};

struct Q6K {
    static constexpr int VALUES = 256, BYTES = 210;
    static __device__ float value(const uint8_t *block, int i) {
        const int group = i / 128, k = i / 32 % 4, at = i % 32;
        const int lower = block[64 * group + 32 * (k % 2) + at] >> (4 * (k / 2)) & 15;
        const int upper = block[128 + 32 * group + at] >> (2 * k) & 3;
        const float scale = half_at(block + 208) * float(int8_t(block[192 + 8 * group + 2 * k + at / 16]));
        return scale * float((lower | upper << 4) - 32);
    }
};

template <typename F, typename T> __device__ void blocks(const uint8_t *bytes, T *out, long long count) {
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) out[i] = narrow<T>(F::value(bytes + i / F::VALUES * F::BYTES, int(i % F::VALUES)));
}

// A value is rounded to bf16 as the published checkpoint's own loader does.
struct Fp8 {
    static __device__ float scale(float scale) { return wide(narrow<bf16>(scale)); }
    static __device__ float value(uint8_t byte, float scale) { return wide(narrow<bf16>(e4m3(byte) * scale)); }
};

struct Int8 {
    static __device__ float scale(float scale) { return scale; }
    static __device__ float value(uint8_t byte, float scale) { return float(int8_t(byte)) * scale; }
};

template <typename F, typename T, int N>
__device__ void row_of(const uint8_t *bytes, const float *scales, T *out, int columns, int by_row) {
    const size_t row = size_t(blockIdx.x) * columns;
    const float scale = F::scale(scales[by_row ? blockIdx.x : 0]);
    const auto *from = reinterpret_cast<const Pack<uint8_t, N> *>(bytes + row);
    auto *to = reinterpret_cast<Pack<T, N> *>(out + row);
    for (int i = threadIdx.x; i < columns / N; i += blockDim.x) {
        const Pack<uint8_t, N> pack = from[i];
        Pack<T, N> values;
#pragma unroll
        for (int j = 0; j < N; j++) values.values[j] = narrow<T>(F::value(pack.values[j], scale));
        to[i] = values;
    }
}

// One block takes one row. scales: one, or one for each row where `by_row` is set.
template <typename F, typename T>
__device__ void rows(const uint8_t *bytes, const float *scales, T *out, int columns, int by_row) {
    if (columns % 4 == 0) row_of<F, T, 4>(bytes, scales, out, columns, by_row);
    else row_of<F, T, 1>(bytes, scales, out, columns, by_row);
}

} // namespace

#define DECODE(T, NAME)                                                                                                \
    extern "C" __global__ void decode_fp8_##NAME(const uint8_t *bytes, const float *scales, T *out, int columns,       \
                                                 int by_row) {                                                        \
        rows<Fp8>(bytes, scales, out, columns, by_row);                                                                \
    }                                                                                                                  \
    extern "C" __global__ void decode_int8_##NAME(const uint8_t *bytes, const float *scales, T *out, int columns,      \
                                                  int by_row) {                                                       \
        rows<Int8>(bytes, scales, out, columns, by_row);                                                               \
    }                                                                                                                  \
    extern "C" __global__ void decode_q8_0_##NAME(const uint8_t *b, T *out, long long n) { blocks<Q8>(b, out, n); }    \
    extern "C" __global__ void decode_q4_0_##NAME(const uint8_t *b, T *out, long long n) { blocks<Q4>(b, out, n); }    \
    extern "C" __global__ void decode_q4_k_##NAME(const uint8_t *b, T *out, long long n) { blocks<Q4K>(b, out, n); }   \
    extern "C" __global__ void decode_q5_k_##NAME(const uint8_t *b, T *out, long long n) { blocks<Q5K>(b, out, n); }   \
    extern "C" __global__ void decode_q6_k_##NAME(const uint8_t *b, T *out, long long n) { blocks<Q6K>(b, out, n); }

FOR_EACH_TYPE(DECODE)
