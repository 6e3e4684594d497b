// Queries, keys and values of a block: split into heads, normalised and turned in one pass.
#include "common.cuh"

namespace {

// One warp takes one head of one token.
//
// x: (L, 3, heads, d); out: (3, heads, L, d); weights: (d) of queries, then of keys; cos, sin: (at least L, d/2), or
// nothing where nothing turns. Values of a lane are pairs of adjacent channels.
template <typename T>
__device__ void split(const T *x, const float *norms, const float *cos, const float *sin, T *out, int length,
                      int heads, int d, float eps) {
    const int lane = threadIdx.x % 32;
    const int part = blockIdx.y * (blockDim.x / 32) + threadIdx.x / 32;
    if (part >= 3 * heads) return;
    const int token = blockIdx.x;
    const auto *from = reinterpret_cast<const Pack<T, 2> *>(x + (size_t(token) * 3 * heads + part) * d);
    auto *to = reinterpret_cast<Pack<T, 2> *>(out + (size_t(part) * length + token) * d);
    const int pairs = d / 2, kind = part / heads;
    if (kind == 2) {
        for (int i = lane; i < pairs; i += 32) to[i] = from[i];
        return;
    }
    float squares = 0.f;
    for (int i = lane; i < pairs; i += 32) {
        const Pack<T, 2> pair = from[i];
        const float a = wide(pair.values[0]), b = wide(pair.values[1]);
        squares += a * a + b * b;
    }
    const float scale = 1.f / sqrtf(warp_sum(squares) / d + eps);
    const float *weight = norms + kind * d;
    for (int i = lane; i < pairs; i += 32) {
        Pack<T, 2> pair = from[i];
        const float a = wide(pair.values[0]) * scale * weight[2 * i];
        const float b = wide(pair.values[1]) * scale * weight[2 * i + 1];
        const float c = cos ? cos[size_t(token) * pairs + i] : 1.f, s = cos ? sin[size_t(token) * pairs + i] : 0.f;
        pair.values[0] = narrow<T>(a * c - b * s);
        pair.values[1] = narrow<T>(b * c + a * s);
        to[i] = pair;
    }
}

// x: (heads, L, d), turned in place of the pairs; one warp takes one line.
template <typename T>
__device__ void turn(const T *x, const float *cos, const float *sin, T *out, long long lines, int length, int d) {
    const int lane = threadIdx.x % 32, pairs = d / 2;
    const long long line = (long long)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (line >= lines) return;
    const size_t at = size_t(line % length) * pairs;
    const auto *from = reinterpret_cast<const Pack<T, 2> *>(x + size_t(line) * d);
    auto *to = reinterpret_cast<Pack<T, 2> *>(out + size_t(line) * d);
    for (int i = lane; i < pairs; i += 32) {
        Pack<T, 2> pair = from[i];
        const float a = wide(pair.values[0]), b = wide(pair.values[1]);
        const float c = cos[at + i], s = sin[at + i];
        pair.values[0] = narrow<T>(a * c - b * s);
        pair.values[1] = narrow<T>(b * c + a * s);
        to[i] = pair;
    }
}

} // namespace

#define HEADS(T, NAME)                                                                                                 \
    extern "C" __global__ void heads_##NAME(const T *x, const float *norms, const float *cos, const float *sin,        \
                                            T *out, int length, int heads, int d, float eps) {                        \
        split(x, norms, cos, sin, out, length, heads, d, eps);                                                         \
    }                                                                                                                  \
    extern "C" __global__ void turn_##NAME(const T *x, const float *cos, const float *sin, T *out, long long lines,    \
                                           int length, int d) {                                                       \
        turn(x, cos, sin, out, lines, length, d);                                                                      \
    }

FOR_EACH_TYPE(HEADS)
