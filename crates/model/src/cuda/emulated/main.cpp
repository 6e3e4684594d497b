// Runs one kernel: a launch comes in by standard input, and what the kernel has written goes out.
//
// A launch is, as numbers of 8 bytes: the length of the kernel's name, the name, blocks along x, y and z, threads of a
// block, bytes of shared memory, the count of arguments; then each argument as its kind, its length and its bytes. Kinds:
// 0 a null pointer, 1 a buffer that is read, 2 one that is written, of which only the length comes, 3 a number.
#include <csetjmp>
#include <functional>
#include <memory>
#include <string>
#include <ucontext.h>
#include <utility>
#include <vector>

#include "attention.cu"
#include "conv.cu"
#include "decode.cu"
#include "group.cu"
#include "heads.cu"
#include "layer.cu"
#include "norm.cu"

Place place_of_thread;
uint32_t shown[32][32][12];

namespace {

enum class State { RUNS, AT_BLOCK, AT_WARP, ENDED };

struct Thread {
    // Where it begins, on a stack of its own, and where it goes on: a jump asks nothing of the system.
    ucontext_t start;
    jmp_buf here;
    bool begun;
    State state;
};

jmp_buf scheduler;
std::vector<Thread> threads;
unsigned current;
const std::function<void()> *body;

void begin() {
    (*body)();
    threads[current].state = State::ENDED;
    _longjmp(scheduler, 1);
}

void wait(State state) {
    threads[current].state = state;
    if (!_setjmp(threads[current].here)) _longjmp(scheduler, 1);
}

// Runs the current thread until it waits or ends.
void go_on() {
    Thread &thread = threads[current];
    if (_setjmp(scheduler)) return;
    if (thread.begun) _longjmp(thread.here, 1);
    thread.begun = true;
    setcontext(&thread.start);
}

// Lets threads go on that have all come to the same place; says whether there were any.
bool release(unsigned first, unsigned count, State state) {
    unsigned here = 0, running = 0;
    for (unsigned i = first; i < first + count; i++) {
        running += threads[i].state != State::ENDED;
        here += threads[i].state == state;
    }
    if (here == 0 || here < running) return false;
    for (unsigned i = first; i < first + count; i++)
        if (threads[i].state == state) threads[i].state = State::RUNS;
    return true;
}

constexpr size_t STACK = 64 << 10;

void run_block(char *stacks) {
    for (unsigned i = 0; i < threads.size(); i++) {
        threads[i].state = State::RUNS;
        threads[i].begun = false;
        getcontext(&threads[i].start);
        threads[i].start.uc_stack.ss_sp = stacks + i * STACK;
        threads[i].start.uc_stack.ss_size = STACK;
        makecontext(&threads[i].start, begin, 0);
    }
    for (bool goes_on = true; goes_on;) {
        goes_on = false;
        for (current = 0; current < threads.size(); current++) {
            if (threads[current].state != State::RUNS) continue;
            goes_on = true;
            place_of_thread.thread = {current, 0, 0};
            go_on();
        }
        for (unsigned first = 0; first < threads.size(); first += 32)
            goes_on |= release(first, 32, State::AT_WARP);
        goes_on |= release(0, unsigned(threads.size()), State::AT_BLOCK);
    }
    for (const Thread &thread : threads)
        if (thread.state != State::ENDED) fail("threads wait for each other at different places");
}

struct Argument {
    uint64_t kind;
    std::vector<unsigned char> bytes;
};

using Call = std::function<void(std::vector<Argument> &)>;

template <typename T> T take(Argument &argument) {
    if constexpr (std::is_pointer_v<T>) {
        return argument.kind == 0 ? nullptr : reinterpret_cast<T>(argument.bytes.data());
    } else {
        if (argument.kind != 3 || argument.bytes.size() != sizeof(T)) fail("a number of another type");
        T value;
        memcpy(&value, argument.bytes.data(), sizeof(T));
        return value;
    }
}

template <typename... A, size_t... I> Call callable(void (*kernel)(A...), std::index_sequence<I...>) {
    return [kernel](std::vector<Argument> &arguments) {
        if (arguments.size() != sizeof...(A)) fail("another number of arguments");
        kernel(take<A>(arguments[I])...);
    };
}

template <typename... A> Call callable(void (*kernel)(A...)) { return callable(kernel, std::index_sequence_for<A...>()); }

#define KERNEL(NAME) {#NAME, callable(NAME)},
#define OF_TYPE(T, TYPE)                                                                                               \
    KERNEL(layer_norm_##TYPE) KERNEL(rms_norm_##TYPE) KERNEL(heads_##TYPE) KERNEL(turn_##TYPE) KERNEL(finish_##TYPE)   \
    KERNEL(thin_##TYPE) KERNEL(group_slices_##TYPE) KERNEL(group_apply_##TYPE) KERNEL(conv_##TYPE)                     \
    KERNEL(decode_fp8_##TYPE) KERNEL(decode_int8_##TYPE) KERNEL(decode_q8_0_##TYPE) KERNEL(decode_q4_0_##TYPE)         \
    KERNEL(decode_q4_k_##TYPE) KERNEL(decode_q5_k_##TYPE) KERNEL(decode_q6_k_##TYPE) KERNEL(plain_32_##TYPE)           \
    KERNEL(plain_64_##TYPE) KERNEL(plain_128_##TYPE) KERNEL(plain_512_##TYPE) KERNEL(plain_1024_##TYPE)

const std::pair<const char *, Call> KERNELS[] = {
    FOR_EACH_TYPE(OF_TYPE) KERNEL(group_merge) KERNEL(flash_64_bf16) KERNEL(flash_64_f16) KERNEL(flash_128_bf16)
    KERNEL(flash_128_f16)};

void read(void *to, size_t length) {
    if (fread(to, 1, length, stdin) != length) fail("the launch ends too early");
}

uint64_t number() {
    uint64_t value;
    read(&value, sizeof value);
    return value;
}

} // namespace

void meet_block() { wait(State::AT_BLOCK); }
void meet_warp() { wait(State::AT_WARP); }

int main() {
    std::string name(number(), ' ');
    read(name.data(), name.size());
    const unsigned x = unsigned(number()), y = unsigned(number()), z = unsigned(number());
    threads.resize(number());
    // Shared memory and buffers begin as 0xff bytes, which are no numbers: what is read before it was written shows.
    std::vector<unsigned char> memory(number() + 128, 0xff);
    std::vector<Argument> arguments(number());
    for (Argument &argument : arguments) {
        argument.kind = number();
        argument.bytes.resize(number(), 0xff);
        if (argument.kind != 2) read(argument.bytes.data(), argument.bytes.size());
    }
    const Call *call = nullptr;
    for (const auto &[known, own] : KERNELS)
        if (name == known) call = &own;
    if (!call) fail("no such kernel");

    place_of_thread.threads = {unsigned(threads.size()), 1, 1};
    place_of_thread.blocks = {x, y, z};
    place_of_thread.memory = memory.data() + (128 - uintptr_t(memory.data()) % 128) % 128;
    const std::function<void()> run = [&] { (*call)(arguments); };
    body = &run;
    // Not cleared: most of it is never touched.
    const std::unique_ptr<char[]> stacks(new char[threads.size() * STACK]);
    for (unsigned k = 0; k < z; k++)
        for (unsigned j = 0; j < y; j++)
            for (unsigned i = 0; i < x; i++) {
                place_of_thread.block = {i, j, k};
                run_block(stacks.get());
            }
    for (const Argument &argument : arguments)
        if (argument.kind == 2) fwrite(argument.bytes.data(), 1, argument.bytes.size(), stdout);
    return 0;
}
