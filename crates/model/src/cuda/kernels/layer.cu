// What stands around a matrix product: bias, activation, gate and residual in one pass.
#include "common.cuh"

namespace {

// One block takes one row.
//
// y: (L, width), the product; bias, gate: (width) or nothing; residual: (L, width) or nothing.
template <typename T, int N>
__device__ void finish(const T *y, const float *bias, const T *residual, const float *gate, T *out, int width,
                       int activation) {
    const size_t row = size_t(blockIdx.x) * width;
    const auto *from = reinterpret_cast<const Pack<T, N> *>(y + row);
    const auto *beside = reinterpret_cast<const Pack<T, N> *>(residual + row);
    auto *to = reinterpret_cast<Pack<T, N> *>(out + row);
    for (int i = threadIdx.x; i < width / N; i += blockDim.x) {
        Pack<T, N> pack = from[i], added{};
        if (residual) added = beside[i];
#pragma unroll
        for (int j = 0; j < N; j++) {
            const int column = i * N + j;
            float v = wide(pack.values[j]);
            if (bias) v += bias[column];
            v = activate(v, activation);
            if (gate) v *= gate[column];
            if (residual) v += wide(added.values[j]);
            pack.values[j] = narrow<T>(v);
        }
        to[i] = pack;
    }
}

// A product with few lines, where the weight is all that is to be read: one warp takes one output of one line.
//
// x: (L, inp), f32; weight: (out, inp), stored as it is; bias: (out) or nothing; out: (L, outputs), f32.
template <typename T, int N>
__device__ void thin(const float *x, const T *weight, const float *bias, float *out, int inp, int outputs,
                     int activation) {
    const int lane = threadIdx.x % 32, output = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (output >= outputs) return;
    const auto *own = reinterpret_cast<const Pack<T, N> *>(weight + size_t(output) * inp);
    const float *line = x + size_t(blockIdx.y) * inp;
    float sum = 0.f;
    for (int i = lane; i < inp / N; i += 32) {
        const Pack<T, N> pack = own[i];
#pragma unroll
        for (int j = 0; j < N; j++) sum = fmaf(wide(pack.values[j]), line[i * N + j], sum);
    }
    sum = warp_sum(sum);
    if (bias) sum += bias[output];
    if (lane == 0) out[size_t(blockIdx.y) * outputs + output] = activate(sum, activation);
}

} // namespace

// One value at a time where rows are not whole packs.
#define LAYERS(T, NAME)                                                                                                \
    extern "C" __global__ void finish_##NAME(const T *y, const float *bias, const T *residual, const float *gate,      \
                                             T *out, int width, int activation) {                                     \
        if (width % PACK<T> == 0) finish<T, PACK<T>>(y, bias, residual, gate, out, width, activation);                 \
        else finish<T, 1>(y, bias, residual, gate, out, width, activation);                                            \
    }                                                                                                                  \
    extern "C" __global__ void thin_##NAME(const float *x, const T *weight, const float *bias, float *out, int inp,    \
                                           int outputs, int activation) {                                             \
        if (inp % PACK<T> == 0) thin<T, PACK<T>>(x, weight, bias, out, inp, outputs, activation);                      \
        else thin<T, 1>(x, weight, bias, out, inp, outputs, activation);                                               \
    }

FOR_EACH_TYPE(LAYERS)
