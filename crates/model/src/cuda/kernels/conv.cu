// Causal convolution over time, rows and columns: a product of the weights with the unfolded input, which is never
// made. Edges are repeated and the input is upsampled by looking up where a position reads from, so there is no padded
// copy either.
#include <tensor_core.cuh> // of `card`, or of the emulation

namespace {

// Outputs and positions of a block, and how many channels of one tap it takes at a time.
constexpr int OUTPUTS = 128, POSITIONS = 128, DEPTH = 32;
constexpr int THREADS = 256;
// Values between two lines in shared memory: lines whole powers of two apart would share banks.
constexpr int LINE = DEPTH + 8;

// What the caller knows of a convolution. `sources` holds, for time, rows and columns in this order, the input's index
// for each tap and output position: kernel · out of each.
struct Shape {
    int inp, out, kernel;
    int size[3], outs[3];
};

// One output position, with the input's offset for each tap to be looked up.
struct Position {
    const int *times, *rows, *columns;
    bool there;

    __device__ Position(const Shape &shape, const int *sources, long long at, long long volume) {
        there = at < volume;
        const long long own = there ? at : 0;
        const int wide = shape.outs[2], high = shape.outs[1];
        columns = sources + shape.kernel * (shape.outs[0] + high) + own % wide;
        rows = sources + shape.kernel * shape.outs[0] + own / wide % high;
        times = sources + own / wide / high;
    }

    __device__ size_t offset(const Shape &shape, int tap) const {
        const int n = shape.kernel, t = times[tap / (n * n) * shape.outs[0]];
        const int h = rows[tap / n % n * shape.outs[1]], w = columns[tap % n * shape.outs[2]];
        return (size_t(t) * shape.size[1] + h) * shape.size[2] + w;
    }
};

template <typename T>
__device__ __forceinline__ void store(const T *bias, const T *residual, T *y, int output, long long at,
                                      const Shape &shape, long long volume, float value) {
    if (output >= shape.out || at >= volume) return;
    const size_t place = size_t(output) * volume + at;
    value += wide(bias[output]);
    if (residual) value += wide(residual[place]);
    y[place] = narrow<T>(value);
}

// x: (B, C, T, H, W); weight: (O, taps, C); y, residual: (B, O, T', H', W'). A block's warps take 64 x 32 each.
template <typename T>
__device__ void convolve(const T *x, const T *weight, const T *bias, const T *residual, const int *sources, T *y,
                         const Shape &shape, long long volume) {
    __shared__ __align__(16) T near_w[OUTPUTS * LINE], near_x[POSITIONS * LINE];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / 4, member = lane % 4;
    const int first_output = blockIdx.y * OUTPUTS;
    const long long first = (long long)blockIdx.x * POSITIONS;
    const size_t plane = size_t(shape.size[0]) * shape.size[1] * shape.size[2];
    x += size_t(blockIdx.z) * shape.inp * plane;
    y += size_t(blockIdx.z) * shape.out * volume;
    if (residual) residual += size_t(blockIdx.z) * shape.out * volume;
    const int taps = shape.kernel * shape.kernel * shape.kernel;

    // A thread unfolds half the depth of one position, and brings half the depth of one line of weights.
    const int line = threadIdx.x % POSITIONS, part = threadIdx.x / POSITIONS * (DEPTH / 2);
    const Position position(shape, sources, first + line, volume);
    const int output = first_output + line;
    const T *own = weight + size_t(output < shape.out ? output : 0) * taps * shape.inp;

    // What comes next is on its way while what is there is multiplied.
    using Eight = Pack<T, 8>;
    Eight values[2], weights[2];
    int tap = 0, channel = 0;
    const T *from = x + position.offset(shape, 0);
    const auto load = [&] {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int c = channel + part + half * 8;
            const T *w = own + size_t(tap) * shape.inp + c;
            const bool whole = shape.inp % 8 == 0;
            if (whole && c < shape.inp && output < shape.out) weights[half] = *reinterpret_cast<const Eight *>(w);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const bool there = c + i < shape.inp;
                values[half].values[i] = there && position.there ? from[(c + i) * plane] : narrow<T>(0.f);
                if (!there || output >= shape.out) weights[half].values[i] = narrow<T>(0.f);
                else if (!whole) weights[half].values[i] = w[i];
            }
        }
        channel += DEPTH;
        if (channel < shape.inp) return;
        channel = 0;
        if (++tap < taps) from = x + position.offset(shape, tap);
    };

    float sum[4][4][4] = {};
    load();
    while (true) {
        const bool last = tap == taps;
        __syncthreads();
        auto *to_x = reinterpret_cast<Eight *>(near_x + line * LINE + part);
        auto *to_w = reinterpret_cast<Eight *>(near_w + line * LINE + part);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            to_x[half] = values[half];
            to_w[half] = weights[half];
        }
        __syncthreads();
        if (!last) load();
#pragma unroll
        for (int step = 0; step < DEPTH; step += 16) {
            uint32_t a[4][4];
#pragma unroll
            for (int m = 0; m < 4; m++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int row = warp / 4 * 64 + m * 16 + i % 2 * 8 + group;
                    a[m][i] = *reinterpret_cast<const uint32_t *>(near_w + row * LINE + step + i / 2 * 8 + member * 2);
                }
            }
#pragma unroll
            for (int n = 0; n < 4; n++) {
                const T *column = near_x + (warp % 4 * 32 + n * 8 + group) * LINE + step + member * 2;
                const uint32_t b0 = *reinterpret_cast<const uint32_t *>(column);
                const uint32_t b1 = *reinterpret_cast<const uint32_t *>(column + 8);
#pragma unroll
                for (int m = 0; m < 4; m++) multiply<T>(sum[m][n], a[m], b0, b1);
            }
        }
        if (last) break;
    }
#pragma unroll
    for (int m = 0; m < 4; m++) {
#pragma unroll
        for (int n = 0; n < 4; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int row = first_output + warp / 4 * 64 + m * 16 + i / 2 * 8 + group;
                const long long at = first + warp % 4 * 32 + n * 8 + member * 2 + i % 2;
                store(bias, residual, y, row, at, shape, volume, sum[m][n][i]);
            }
        }
    }
}

// The same in f32: tiles of 64 x 64 with 16 channels, 4 x 4 sums for each thread.
constexpr int SIDE = 64, CHANNELS = 16;

__device__ void convolve_f32(const float *x, const float *weight, const float *bias, const float *residual,
                             const int *sources, float *y, const Shape &shape, long long volume) {
    __shared__ float near_w[CHANNELS][SIDE + 4], near_x[CHANNELS][SIDE + 4];
    const int first_output = blockIdx.y * SIDE;
    const long long first = (long long)blockIdx.x * SIDE;
    const size_t plane = size_t(shape.size[0]) * shape.size[1] * shape.size[2];
    x += size_t(blockIdx.z) * shape.inp * plane;
    y += size_t(blockIdx.z) * shape.out * volume;
    if (residual) residual += size_t(blockIdx.z) * shape.out * volume;
    const int taps = shape.kernel * shape.kernel * shape.kernel;
    const int line = threadIdx.x % SIDE, part = threadIdx.x / SIDE * (CHANNELS / 4);
    const Position position(shape, sources, first + line, volume);
    const int output = first_output + line;
    const float *own = weight + size_t(output < shape.out ? output : 0) * taps * shape.inp;
    const int down = threadIdx.x / 16 * 4, across = threadIdx.x % 16 * 4;
    float sum[4][4] = {};
    for (int tap = 0; tap < taps; tap++) {
        const float *from = x + position.offset(shape, tap);
        for (int channel = 0; channel < shape.inp; channel += CHANNELS) {
            __syncthreads();
#pragma unroll
            for (int i = 0; i < CHANNELS / 4; i++) {
                const int c = channel + part + i;
                const bool there = c < shape.inp;
                near_x[part + i][line] = there && position.there ? from[c * plane] : 0.f;
                near_w[part + i][line] = there && output < shape.out ? own[size_t(tap) * shape.inp + c] : 0.f;
            }
            __syncthreads();
#pragma unroll
            for (int k = 0; k < CHANNELS; k++) {
                float a[4], b[4];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    a[i] = near_w[k][down + i];
                    b[i] = near_x[k][across + i];
                }
#pragma unroll
                for (int i = 0; i < 4; i++) {
#pragma unroll
                    for (int j = 0; j < 4; j++) sum[i][j] = fmaf(a[i], b[j], sum[i][j]);
                }
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++)
            store(bias, residual, y, first_output + down + i, first + across + j, shape, volume, sum[i][j]);
    }
}

__device__ __forceinline__ Shape shape_of(int inp, int out, int kernel, int t, int h, int w, int to, int ho, int wo) {
    return {inp, out, kernel, {t, h, w}, {to, ho, wo}};
}

} // namespace

#define CONVOLUTION(T, NAME, FUNCTION)                                                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
        conv_##NAME(const T *x, const T *weight, const T *bias, const T *residual, const int *sources, T *y, int inp,  \
                    int out, int kernel, int t, int h, int w, int to, int ho, int wo) {                               \
        FUNCTION(x, weight, bias, residual, sources, y, shape_of(inp, out, kernel, t, h, w, to, ho, wo),               \
                 (long long)to *ho *wo);                                                                               \
    }

CONVOLUTION(float, f32, convolve_f32)
CONVOLUTION(bf16, bf16, convolve<bf16>)
CONVOLUTION(f16, f16, convolve<f16>)
