// Attention that streams over the keys: scores of a tile at a time, never queries x keys.
//
// `flash_*`: tensor cores, 16-bit values, heads of 64 or 128, no mask. `plain_*`: any type, a mask, heads of 32 to
// 1024, for few keys. Both keep a running maximum and sum for each query.
#include <tensor_core.cuh> // of `card`, or of the emulation

namespace {

constexpr float LOG2_E = 1.4426950408889634f;

// --- Tensor cores ---------------------------------------------------------------------------------------------------

constexpr int WARPS = 4;
// Queries of a warp: two tiles of 16. Each value of a key that a warp fetches then serves two products.
constexpr int QUERIES = 32 * WARPS;
// Keys of a tile: as many as leave scores, sums and what is fetched in a thread's registers.
template <int D> constexpr int TILE_KEYS = D > 64 ? 32 : 64;

// Lines of D values lie one after the other in shared memory, their 16-byte chunks exchanged by the line's number, so
// that the eight lines that a fetch reads lie in different banks.
template <int D> __device__ __forceinline__ uint32_t place(int line, int chunk) {
    return uint32_t(line * D + ((chunk ^ (line & 7)) << 3)) * 2;
}

// Brings `LINES` lines, from line `first` of `count` on; those past the end are zeros.
template <typename T, int D, int LINES>
__device__ __forceinline__ void bring(uint32_t to, const T *from, int first, int count) {
    constexpr int CHUNKS = D / 8;
    static_assert(LINES * CHUNKS % (32 * WARPS) == 0, "every thread copies as many chunks");
#pragma unroll
    for (int i = 0; i < LINES * CHUNKS / (32 * WARPS); i++) {
        const int number = i * 32 * WARPS + threadIdx.x, line = number / CHUNKS, chunk = number % CHUNKS;
        const bool there = first + line < count;
        copy_ahead(to + place<D>(line, chunk), from + size_t(there ? first + line : 0) * D + chunk * 8, there);
    }
}

// q: (heads, queries, D); k, v: (heads, keys, D); out: (batch, queries, heads of one, D).
//
// While scores are multiplied the values of the tile come in, and while these are multiplied the next keys.
template <typename T, int D>
__device__ __forceinline__ void flash(const T *q, const T *k, const T *v, T *out, int queries, int keys, int heads,
                                      float scale) {
    constexpr int KEYS = TILE_KEYS<D>;
    DYNAMIC_SHARED(memory);
    const uint32_t q_at = shared_address(memory), k_at = q_at + QUERIES * D * 2, v_at = k_at + KEYS * D * 2;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int first = blockIdx.x * QUERIES;
    q += size_t(blockIdx.y) * queries * D;
    k += size_t(blockIdx.y) * keys * D;
    v += size_t(blockIdx.y) * keys * D;
    bring<T, D, QUERIES>(q_at, q, first, queries);
    bring<T, D, KEYS>(k_at, k, 0, keys);
    end_of_copies();

    float sum[2][D / 8][4] = {};
    float most[2][2], total[2][2] = {};
#pragma unroll
    for (int m = 0; m < 2; m++) most[m][0] = most[m][1] = -INFINITY;
    const float scale2 = scale * LOG2_E;
    // What a lane addresses of the four matrices of a fetch: of queries and turned values two below each other, then two
    // beside; of keys the other way round. A step goes two chunks on, which exchanges chunks by its own bits.
    const int below = lane % 16, key_below = lane % 8 + lane / 16 * 8;
    const uint32_t q_line = q_at + (warp * 32 + below) * D * 2, k_line = k_at + key_below * D * 2;
    const uint32_t v_line = v_at + below * D * 2;
    uint32_t beside = (lane / 16 ^ lane % 8) << 4, key_beside = (lane / 8 % 2 ^ lane % 8) << 4;

    for (int start = 0; start < keys; start += KEYS) {
        // Addresses are cheaper made anew than held in registers for the whole loop.
        asm volatile("" : "+r"(beside), "+r"(key_beside));
        await_copies<0>();
        __syncthreads();
        bring<T, D, KEYS>(v_at, v, start, keys);
        end_of_copies();

        float scores[2][KEYS / 8][4] = {};
#pragma unroll
        for (int step = 0; step < D / 16; step++) {
            uint32_t a[2][4];
#pragma unroll
            for (int m = 0; m < 2; m++) fetch(a[m], q_line + m * 16 * D * 2 + (step * 32 ^ beside));
#pragma unroll
            for (int n = 0; n < KEYS / 16; n++) {
                uint32_t b[4];
                fetch(b, k_line + n * 16 * D * 2 + (step * 32 ^ key_beside));
#pragma unroll
                for (int m = 0; m < 2; m++) {
                    multiply<T>(scores[m][2 * n], a[m], b[0], b[1]);
                    multiply<T>(scores[m][2 * n + 1], a[m], b[2], b[3]);
                }
            }
        }
        if (start + KEYS > keys) {
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const bool past = start + n * 8 + lane % 4 * 2 + i % 2 >= keys;
                    if (past) scores[0][n][i] = scores[1][n][i] = -INFINITY;
                }
            }
        }

        // Values 0 and 1 of a lane belong to line `lane / 4` of a tile, values 2 and 3 to the one eight below.
#pragma unroll
        for (int m = 0; m < 2; m++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float now = most[m][half];
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++)
                    now = fmaxf(now, fmaxf(scores[m][n][2 * half], scores[m][n][2 * half + 1]));
                now = fmaxf(now, __shfl_xor_sync(0xffffffffu, now, 1));
                now = fmaxf(now, __shfl_xor_sync(0xffffffffu, now, 2));
                // The first tile has a key, so from here on the maximum is a number.
                const float shrink = exp2f((most[m][half] - now) * scale2);
                most[m][half] = now;
                const float offset = now * scale2;
                float part = 0.f;
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        const float weight = exp2f(fmaf(scores[m][n][2 * half + i], scale2, -offset));
                        scores[m][n][2 * half + i] = weight;
                        part += weight;
                    }
                }
                total[m][half] = total[m][half] * shrink + part;
#pragma unroll
                for (int n = 0; n < D / 8; n++) {
                    sum[m][n][2 * half] *= shrink;
                    sum[m][n][2 * half + 1] *= shrink;
                }
            }
        }

        await_copies<0>();
        __syncthreads();
        if (start + KEYS < keys) bring<T, D, KEYS>(k_at, k, start + KEYS, keys);
        end_of_copies();
#pragma unroll
        for (int step = 0; step < KEYS / 16; step++) {
            // Two tiles of weights, as the product left them, are one operand of the next product.
            uint32_t a[2][4];
#pragma unroll
            for (int m = 0; m < 2; m++) {
                a[m][0] = pair<T>(scores[m][2 * step][0], scores[m][2 * step][1]);
                a[m][1] = pair<T>(scores[m][2 * step][2], scores[m][2 * step][3]);
                a[m][2] = pair<T>(scores[m][2 * step + 1][0], scores[m][2 * step + 1][1]);
                a[m][3] = pair<T>(scores[m][2 * step + 1][2], scores[m][2 * step + 1][3]);
            }
#pragma unroll
            for (int n = 0; n < D / 16; n++) {
                uint32_t b[4];
                fetch_turned(b, v_line + step * 16 * D * 2 + (n * 32 ^ beside));
#pragma unroll
                for (int m = 0; m < 2; m++) {
                    multiply<T>(sum[m][2 * n], a[m], b[0], b[1]);
                    multiply<T>(sum[m][2 * n + 1], a[m], b[2], b[3]);
                }
            }
        }
    }

    const size_t item = blockIdx.y / heads, own = blockIdx.y % heads;
#pragma unroll
    for (int m = 0; m < 2; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float all = total[m][half];
            all += __shfl_xor_sync(0xffffffffu, all, 1);
            all += __shfl_xor_sync(0xffffffffu, all, 2);
            const float inverse = 1.f / all;
            const int query = first + warp * 32 + m * 16 + half * 8 + lane / 4;
            if (query >= queries) continue;
            T *line = out + ((item * queries + query) * heads + own) * D + lane % 4 * 2;
#pragma unroll
            for (int n = 0; n < D / 8; n++)
                *reinterpret_cast<uint32_t *>(line + n * 8) =
                    pair<T>(sum[m][n][2 * half] * inverse, sum[m][n][2 * half + 1] * inverse);
        }
    }
}

// --- Any type, any mask ---------------------------------------------------------------------------------------------

constexpr int PLAIN_WARPS = 8;
// Bytes of keys, and of values, that a block holds at a time.
constexpr int PLAIN_TILE = 16384;

// One warp takes one query; a lane holds `D / 32` values of it and of the sum.
//
// mask: added to the scores, (batch or 1, queries or 1, keys) by its strides, or nothing.
template <typename T, int D>
__device__ void plain(const T *q, const T *k, const T *v, const float *mask, T *out, long long queries, long long keys,
                      int heads, float scale, long long mask_item, long long mask_query) {
    constexpr int EACH = D / 32, TILE = PLAIN_TILE / (D * int(sizeof(T)));
    __shared__ __align__(16) T near_k[TILE * D], near_v[TILE * D];
    const int lane = threadIdx.x % 32;
    const long long head = blockIdx.y, query = (long long)blockIdx.x * PLAIN_WARPS + threadIdx.x / 32;
    const long long item = head / heads;
    const bool there = query < queries;
    const float *masked = mask ? mask + item * mask_item + query * mask_query : nullptr;
    float own[EACH], sum[EACH], most = -INFINITY, total = 0.f;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        own[i] = there ? wide(q[(head * queries + query) * D + i * 32 + lane]) * scale : 0.f;
        sum[i] = 0.f;
    }
    for (long long start = 0; start < keys; start += TILE) {
        const int count = int(keys - start < TILE ? keys - start : TILE);
        const T *from_k = k + (head * keys + start) * D, *from_v = v + (head * keys + start) * D;
        __syncthreads();
        for (int i = threadIdx.x; i < count * D; i += blockDim.x) {
            near_k[i] = from_k[i];
            near_v[i] = from_v[i];
        }
        __syncthreads();
        if (!there) continue;
        for (int key = 0; key < count; key++) {
            float score = 0.f;
#pragma unroll
            for (int i = 0; i < EACH; i++) score = fmaf(own[i], wide(near_k[key * D + i * 32 + lane]), score);
            score = warp_sum(score);
            if (masked) score += masked[start + key];
            if (score == -INFINITY) continue;
            if (score > most) {
                const float shrink = expf(most - score);
                total *= shrink;
#pragma unroll
                for (int i = 0; i < EACH; i++) sum[i] *= shrink;
                most = score;
            }
            const float weight = expf(score - most);
            total += weight;
#pragma unroll
            for (int i = 0; i < EACH; i++) sum[i] = fmaf(weight, wide(near_v[key * D + i * 32 + lane]), sum[i]);
        }
    }
    if (!there) return;
    T *line = out + ((item * queries + query) * heads + head % heads) * D;
    const float inverse = 1.f / total;
#pragma unroll
    for (int i = 0; i < EACH; i++) line[i * 32 + lane] = narrow<T>(sum[i] * inverse);
}

} // namespace

#define FLASH(T, NAME, D)                                                                                              \
    extern "C" __global__ void __launch_bounds__(32 * WARPS, 2)                                                        \
        flash_##D##_##NAME(const T *q, const T *k, const T *v, T *out, int queries, int keys, int heads, float scale) { \
        flash<T, D>(q, k, v, out, queries, keys, heads, scale);                                                        \
    }

FLASH(bf16, bf16, 64)
FLASH(bf16, bf16, 128)
FLASH(f16, f16, 64)
FLASH(f16, f16, 128)

#define PLAIN(T, NAME, D)                                                                                              \
    extern "C" __global__ void __launch_bounds__(32 * PLAIN_WARPS)                                                     \
        plain_##D##_##NAME(const T *q, const T *k, const T *v, const float *mask, T *out, long long queries,           \
                           long long keys, int heads, float scale, long long mask_item, long long mask_query) {       \
        plain<T, D>(q, k, v, mask, out, queries, keys, heads, scale, mask_item, mask_query);                           \
    }

#define PLAINS(T, NAME)                                                                                                \
    PLAIN(T, NAME, 32) PLAIN(T, NAME, 64) PLAIN(T, NAME, 128) PLAIN(T, NAME, 512) PLAIN(T, NAME, 1024)

FOR_EACH_TYPE(PLAINS)
