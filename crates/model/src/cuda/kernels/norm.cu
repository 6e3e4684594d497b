// Norms of lines. One block takes one line, which stays in its first cache between the passes.
#include "common.cuh"

namespace {

// `(x - mean) / sqrt(variance + eps) · weight + bias`; a modulated norm has this form too.
template <typename T, int N>
__device__ void layer(const T *x, const float *weight, const float *bias, T *out, int width, float eps) {
    __shared__ float room[33];
    const auto *line = reinterpret_cast<const Pack<T, N> *>(x + size_t(blockIdx.x) * width);
    auto *to = reinterpret_cast<Pack<T, N> *>(out + size_t(blockIdx.x) * width);
    const int packs = width / N;
    float sum = 0.f;
    for (int i = threadIdx.x; i < packs; i += blockDim.x) {
        const Pack<T, N> pack = line[i];
#pragma unroll
        for (int j = 0; j < N; j++) sum += wide(pack.values[j]);
    }
    const float mean = block_sum(sum, room) / width;
    float squares = 0.f;
    for (int i = threadIdx.x; i < packs; i += blockDim.x) {
        const Pack<T, N> pack = line[i];
#pragma unroll
        for (int j = 0; j < N; j++) {
            const float v = wide(pack.values[j]) - mean;
            squares += v * v;
        }
    }
    const float scale = 1.f / sqrtf(block_sum(squares, room) / width + eps);
    for (int i = threadIdx.x; i < packs; i += blockDim.x) {
        Pack<T, N> pack = line[i];
#pragma unroll
        for (int j = 0; j < N; j++) {
            const float v = (wide(pack.values[j]) - mean) * scale;
            pack.values[j] = narrow<T>(fmaf(v, weight[i * N + j], bias[i * N + j]));
        }
        to[i] = pack;
    }
}

// `x / sqrt(mean(x²) + eps) · weight`.
template <typename T, int N>
__device__ void rms(const T *x, const float *weight, T *out, int width, float eps) {
    __shared__ float room[33];
    const auto *line = reinterpret_cast<const Pack<T, N> *>(x + size_t(blockIdx.x) * width);
    auto *to = reinterpret_cast<Pack<T, N> *>(out + size_t(blockIdx.x) * width);
    const int packs = width / N;
    float squares = 0.f;
    for (int i = threadIdx.x; i < packs; i += blockDim.x) {
        const Pack<T, N> pack = line[i];
#pragma unroll
        for (int j = 0; j < N; j++) squares += wide(pack.values[j]) * wide(pack.values[j]);
    }
    const float scale = 1.f / sqrtf(block_sum(squares, room) / width + eps);
    for (int i = threadIdx.x; i < packs; i += blockDim.x) {
        Pack<T, N> pack = line[i];
#pragma unroll
        for (int j = 0; j < N; j++) pack.values[j] = narrow<T>(wide(pack.values[j]) * scale * weight[i * N + j]);
        to[i] = pack;
    }
}

} // namespace

// One value at a time where lines are not whole packs.
#define NORMS(T, NAME)                                                                                                 \
    extern "C" __global__ void layer_norm_##NAME(const T *x, const float *weight, const float *bias, T *out,           \
                                                 int width, float eps) {                                              \
        if (width % PACK<T> == 0) layer<T, PACK<T>>(x, weight, bias, out, width, eps);                                 \
        else layer<T, 1>(x, weight, bias, out, width, eps);                                                            \
    }                                                                                                                  \
    extern "C" __global__ void rms_norm_##NAME(const T *x, const float *weight, T *out, int width, float eps) {        \
        if (width % PACK<T> == 0) rms<T, PACK<T>>(x, weight, out, width, eps);                                         \
        else rms<T, 1>(x, weight, out, width, eps);                                                                    \
    }

FOR_EACH_TYPE(NORMS)
