// Group normalisation over all positions of a group of channels, with `x·σ(x)` behind it where that is wanted.
//
// Three kernels, as a group is too much for one block and blocks do not wait for each other: statistics of slices,
// statistics of groups out of them, values. Nothing depends on the order in which blocks run.
#include "common.cuh"

namespace {

// Mean and sum of squared differences from it, in two passes, so that a large mean costs no digits.
//
// x: (groups, count); out: (groups, slices, 2); a slice is `each` values, the last one what is left.
template <typename T> __device__ void slices(const T *x, float *out, long long count, int each) {
    __shared__ float room[33];
    const long long first = (long long)blockIdx.x * each;
    const int length = int(count - first < each ? count - first : each);
    const T *part = x + size_t(blockIdx.y) * count + first;
    float sum = 0.f;
    for (int i = threadIdx.x; i < length; i += blockDim.x) sum += wide(part[i]);
    const float mean = block_sum(sum, room) / length;
    float squares = 0.f;
    for (int i = threadIdx.x; i < length; i += blockDim.x) {
        const float v = wide(part[i]) - mean;
        squares += v * v;
    }
    squares = block_sum(squares, room);
    if (threadIdx.x == 0) {
        float *to = out + (size_t(blockIdx.y) * gridDim.x + blockIdx.x) * 2;
        to[0] = mean;
        to[1] = squares;
    }
}

// x: (lines, positions), a line one channel of one picture; out the same.
template <typename T>
__device__ void apply(const T *x, const float *statistics, const float *weight, const float *bias, T *out,
                      long long positions, int channels, int per_group, int silu) {
    const int line = blockIdx.y, channel = line % channels;
    const float *own = statistics + size_t(line / per_group) * 2;
    const float scale = own[1] * weight[channel], mean = own[0], shift = bias[channel];
    const T *from = x + size_t(line) * positions;
    T *to = out + size_t(line) * positions;
    const long long step = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < positions; i += step) {
        const float v = (wide(from[i]) - mean) * scale + shift;
        to[i] = narrow<T>(silu ? v / (1.f + expf(-v)) : v);
    }
}

} // namespace

// Mean and `1 / sqrt(variance + eps)` of each group, its slices taken in order. One thread for each group: they are few.
extern "C" __global__ void group_merge(const float *parts, float *out, int groups, int count_of_slices,
                                       long long count, int each, double eps) {
    const int group = blockIdx.x * blockDim.x + threadIdx.x;
    if (group >= groups) return;
    const float *own = parts + size_t(group) * count_of_slices * 2;
    double mean = 0., squares = 0., seen = 0.;
    for (int i = 0; i < count_of_slices; i++) {
        const double length = double(i + 1 < count_of_slices ? each : count - (long long)i * each);
        const double apart = own[2 * i] - mean, all = seen + length;
        squares += own[2 * i + 1] + apart * apart * seen * length / all;
        mean += apart * length / all;
        seen = all;
    }
    out[2 * group] = float(mean);
    out[2 * group + 1] = float(1. / sqrt(squares / double(count) + eps));
}

#define GROUPS(T, NAME)                                                                                                \
    extern "C" __global__ void group_slices_##NAME(const T *x, float *out, long long count, int each) {                \
        slices(x, out, count, each);                                                                                   \
    }                                                                                                                  \
    extern "C" __global__ void group_apply_##NAME(const T *x, const float *statistics, const float *weight,            \
                                                  const float *bias, T *out, long long positions, int channels,       \
                                                  int per_group, int silu) {                                          \
        apply(x, statistics, weight, bias, out, positions, channels, per_group, silu);                                 \
    }

FOR_EACH_TYPE(GROUPS)
