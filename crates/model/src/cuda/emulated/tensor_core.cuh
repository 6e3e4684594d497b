// What the file of this name beside the kernels has, for the emulation.
#pragma once

#include "common.cuh"

#define DYNAMIC_SHARED(NAME) unsigned char *NAME = place_of_thread.memory

inline uint32_t shared_address(const void *at) {
    return uint32_t(static_cast<const unsigned char *>(at) - place_of_thread.memory);
}

// Copies arrive at once, which is within what a kernel may expect: it may not look before it has waited.
inline void copy_ahead(uint32_t to, const void *from, bool there) {
    if (to % 16 || (there && uintptr_t(from) % 16)) fail("a copy of 16 bytes from or to an address between them");
    if (there) memcpy(place_of_thread.memory + to, from, 16);
    else memset(place_of_thread.memory + to, 0, 16);
}
inline void end_of_copies() {}
template <int N> inline void await_copies() {}

inline uint32_t word_at(uint32_t low, uint32_t high) {
    uint16_t halves[2];
    memcpy(&halves[0], place_of_thread.memory + low, 2);
    memcpy(&halves[1], place_of_thread.memory + high, 2);
    return halves[0] | uint32_t(halves[1]) << 16;
}

inline void fetch(uint32_t (&to)[4], uint32_t from) {
    if (from % 16) fail("a fetch from an address between 16 bytes");
    auto &words = of_warp();
    words[lane()][0] = from;
    meet_warp();
    const unsigned group = lane() / 4, member = lane() % 4;
    for (int i = 0; i < 4; i++) {
        const uint32_t line = words[8 * i + group][0] + 4 * member;
        to[i] = word_at(line, line + 2);
    }
    meet_warp();
}

inline void fetch_turned(uint32_t (&to)[4], uint32_t from) {
    if (from % 16) fail("a fetch from an address between 16 bytes");
    auto &words = of_warp();
    words[lane()][0] = from;
    meet_warp();
    const unsigned group = lane() / 4, member = lane() % 4;
    for (int i = 0; i < 4; i++)
        to[i] = word_at(words[8 * i + 2 * member][0] + 2 * group, words[8 * i + 2 * member + 1][0] + 2 * group);
    meet_warp();
}

// Shows the two values of a word, in f32.
template <typename T> inline void show(uint32_t word, uint32_t *to) {
    T values[2];
    memcpy(values, &word, 4);
    for (int i = 0; i < 2; i++) to[i] = __float_as_uint(wide(values[i]));
}

template <typename T> inline void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    auto &words = of_warp();
    for (int i = 0; i < 4; i++) show<T>(a[i], words[lane()] + 2 * i);
    show<T>(b0, words[lane()] + 8);
    show<T>(b1, words[lane()] + 10);
    meet_warp();
    for (int i = 0; i < 4; i++) {
        const int row = lane() / 4 + i / 2 * 8, column = lane() % 4 * 2 + i % 2;
        double added = sum[i];
        for (int k = 0; k < 16; k++) {
            const uint32_t left = words[row % 8 * 4 + k % 8 / 2][row / 8 * 2 + k / 8 * 4 + k % 2];
            const uint32_t right = words[column * 4 + k % 8 / 2][8 + k / 8 * 2 + k % 2];
            added += double(__uint_as_float(left)) * __uint_as_float(right);
        }
        sum[i] = float(added);
    }
    meet_warp();
}

template <typename T> inline uint32_t pair(float low, float high) {
    const T both[2] = {narrow<T>(low), narrow<T>(high)};
    uint32_t word;
    memcpy(&word, both, 4);
    return word;
}
