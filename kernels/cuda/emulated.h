// machine.cuh for a CPU: the threads of a block are fibers that run one at a time and change at every barrier, shuffle and matrix product, all
// in turn, or (a seed above 1) warp by warp in an order drawn from the seed, each as far as it comes. Asynchronous copies happen as late as they
// may, with odd seeds as early as they may. Device memory ends at a page that cannot be read; shared memory holds garbage when a block begins.
// What it finds: wrong indices, missing barriers and waits, diverging warps. What it does not: speed.
#pragma once
#define EMULATED 1
#include <csetjmp>
#include <csignal>
#include <cstdint>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <vector>
#include <algorithm>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>
#include "words.cuh"

struct Index { u32 x, y, z; };

#define ON_GPU inline
#define ENTRY(name, threads, args, ...) \
    extern "C" void name(const void* p) { __VA_ARGS__(*static_cast<const args*>(p)); }
using std::max;
using std::min;
#define __device__
#define __restrict__

namespace emulated {

constexpr size_t STACK = 1 << 16;

struct Copy { void* to; const void* from; int bytes; int group; };
struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    bool done = false;
    long block_waits = 0, warp_waits = 0;  // barriers that it has come to
    std::vector<Copy> copies;
    int groups = 0;
};
struct Warp {
    long arrived = 0;  // in all: 32 for each barrier passed
    const char* what = nullptr;
    u32 slots[2][32][8];
};
struct State {
    Index thread{}, block{}, grid{}, size{};
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    long block_arrived = 0;
    int now = 0;
    u8* shared = nullptr;
    bool early = false;  // asynchronous copies happen when they are asked for, not when they are waited for
    ucontext_t main;
    void (*kernel)(const void*) = nullptr;
    const void* args = nullptr;
    const char* fault = nullptr;
};
inline State state;
inline sigjmp_buf escape;
inline char message[256];

inline void yield() { swapcontext(&state.fibers[state.now].context, &state.main); }
inline void stop(const char* why) { if (!state.fault) state.fault = why; while (true) yield(); }

inline void sync_warp(const char* what) {
    Fiber& f = state.fibers[state.now];
    Warp& w = state.warps[state.now / 32];
    if (w.arrived % 32 == 0) w.what = what;
    else if (w.what != what) stop("the lanes of a warp are at different operations");
    w.arrived++;
    f.warp_waits++;
    while (w.arrived < 32 * f.warp_waits) yield();
}
// Every lane gives its words and sees those of all.
template <int N> inline u32 (*exchange(const char* what, const u32 (&mine)[N]))[8] {
    Warp& w = state.warps[state.now / 32];
    auto* slots = w.slots[state.fibers[state.now].warp_waits & 1];
    std::memcpy(slots[state.now % 32], mine, sizeof mine);
    sync_warp(what);
    return slots;
}
inline void start() { state.kernel(state.args); state.fibers[state.now].done = true; while (true) yield(); }

inline void on_fault(int) { siglongjmp(escape, 1); }

// A page that cannot be touched follows at once behind the `size` bytes (rounded up to 16).
inline u8* guarded(size_t size) {
    size_t page = sysconf(_SC_PAGESIZE), room = (size + 15) / 16 * 16, whole = (room + page - 1) / page * page + page;
    u8* base = static_cast<u8*>(mmap(nullptr, whole + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(base + whole, page, PROT_NONE);
    mprotect(base, page, PROT_NONE);
    return base + whole - room;
}

inline const char* run_block(std::mt19937& random, size_t shared_bytes, bool shuffled) {
    int count = state.size.x;
    state.warps.assign((count + 31) / 32, Warp{});
    state.block_arrived = 0;
    for (size_t i = 0; i < shared_bytes; i++) state.shared[i] = u8(random() | 0x7c);  // infinities and NaNs in either precision
    std::vector<int> order(count);
    for (int i = 0; i < count; i++) {
        Fiber& f = state.fibers[i];
        f.done = false; f.block_waits = f.warp_waits = 0; f.copies.clear(); f.groups = 0; f.stack.resize(STACK);
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.data();
        f.context.uc_stack.ss_size = STACK;
        f.context.uc_link = &state.main;
        makecontext(&f.context, start, 0);
        order[i] = i;
    }
    std::vector<int> turns(state.warps.size());
    for (size_t w = 0; w < turns.size(); w++) turns[w] = int(w);
    int left = count;
    auto progress = [&] {
        long sum = state.block_arrived - left;
        for (Warp& w : state.warps) sum += w.arrived;
        return sum;
    };
    for (int quiet = 0; left > 0;) {
        if (shuffled) std::shuffle(turns.begin(), turns.end(), random);
        const long before = progress();
        for (int w : turns) {
            const auto first = order.begin() + w * 32, last = order.begin() + std::min(count, w * 32 + 32);
            for (long at = -1 - count; at != progress();) {  // a warp runs as far as it comes, or, in order, one step
                at = shuffled ? progress() : at;
                if (shuffled) std::shuffle(first, last, random);
                for (auto i = first; i != last; i++) {
                    if (state.fibers[*i].done) continue;
                    state.now = *i;
                    state.thread = {u32(*i), 0, 0};
                    swapcontext(&state.main, &state.fibers[*i].context);
                    if (state.fault) return state.fault;
                    left -= state.fibers[*i].done;
                }
                if (!shuffled) break;
            }
        }
        quiet = before == progress() ? quiet + 1 : 0;
        if (quiet > 2) return "threads wait for others that never come";
    }
    return nullptr;
}

// Null, or what went wrong.
inline const char* launch(void (*kernel)(const void*), const void* args, const int* grid, int threads, size_t shared_bytes, u32 seed) {
    std::mt19937 random(seed);
    state.kernel = kernel; state.args = args; state.fault = nullptr; state.early = seed % 2;
    state.size = {u32(threads), 1, 1};
    state.grid = {u32(grid[0]), u32(grid[1]), u32(grid[2])};
    state.fibers.resize(threads);
    static std::map<size_t, u8*> rooms;
    u8*& room = rooms[(shared_bytes + 15) / 16];
    if (!room) room = guarded(shared_bytes);
    state.shared = room;
    char spare[1 << 14];
    stack_t other{}, old_stack;
    other.ss_sp = spare; other.ss_size = sizeof spare;
    sigaltstack(&other, &old_stack);
    struct sigaction act{}, segv, bus;
    act.sa_handler = on_fault; act.sa_flags = SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &act, &segv); sigaction(SIGBUS, &act, &bus);
    const char* wrong = nullptr;
    if (sigsetjmp(escape, 1)) wrong = "memory is touched outside what was allocated";
    else
        for (int i = 0; i < grid[0] * grid[1] * grid[2] && !wrong; i++) {
            int b = seed % 2 ? grid[0] * grid[1] * grid[2] - 1 - i : i;
            state.block = {u32(b % grid[0]), u32(b / grid[0] % grid[1]), u32(b / grid[0] / grid[1])};
            wrong = run_block(random, shared_bytes, seed > 1);
        }
    sigaction(SIGSEGV, &segv, nullptr); sigaction(SIGBUS, &bus, nullptr);
    sigaltstack(&old_stack, nullptr);
    if (!wrong) return nullptr;
    std::snprintf(message, sizeof message, "%s (block %u, %u, %u, thread %d)", wrong, state.block.x, state.block.y, state.block.z, state.now);
    return message;
}

inline double half_value(u16 h) {
    int e = h >> 10 & 31, m = h & 1023;
    double v = e == 31 ? (m ? NAN : INFINITY) : e ? std::ldexp(1024 + m, e - 25) : std::ldexp(m, -24);
    return h & 0x8000 ? -v : v;
}
inline u16 to_half(double x) {
    u16 sign = std::signbit(x) ? 0x8000 : 0;
    double v = std::fabs(x);
    if (std::isnan(v)) return 0x7fff;
    if (v >= 65520) return sign | 0x7c00;
    if (v == 0) return sign;
    int e = std::max(std::ilogb(v), -14);
    u32 m = u32(std::nearbyint(std::ldexp(v, 10 - e)));  // 0 … 2048, ties to even
    return sign | u16((u32(e + 14) << 10) + m);  // m has the leading 1, which adds 1 to the exponent; a carry goes the same way
}
template <class F> inline u32 both(F f) { return to_half(f(0)) | u32(to_half(f(16))) << 16; }
inline double part(u32 x, int at) { return half_value(u16(x >> at)); }

}  // namespace emulated

#define threadIdx emulated::state.thread
#define blockIdx emulated::state.block
#define gridDim emulated::state.grid
#define blockDim emulated::state.size

inline u32 half2_fma(u32 a, u32 b, u32 c) { using namespace emulated; return both([&](int s) { return part(a, s) * part(b, s) + part(c, s); }); }
inline u32 half2_sub(u32 a, u32 b) { using namespace emulated; return both([&](int s) { return part(a, s) - part(b, s); }); }
inline u32 half2_mul(u32 a, u32 b) { using namespace emulated; return both([&](int s) { return part(a, s) * part(b, s); }); }
inline u32 and_or(u32 a, u32 mask, u32 also) { return (a & mask) | also; }
inline u32 to_half2(float low, float high) { return emulated::to_half(low) | u32(emulated::to_half(high)) << 16; }
inline u16 to_half(float x) { return emulated::to_half(x); }
inline float from_half(u16 h) { return float(emulated::half_value(h)); }

inline void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    using namespace emulated;
    auto* all = exchange<6>("mma", {a[0], a[1], a[2], a[3], b0, b1});
    int lane = state.now % 32, g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; i++) {
        double sum = c[i];
        for (int k = 0; k < 16; k++) {
            const u32* of_a = all[4 * g + k % 8 / 2];
            const u32* of_b = all[4 * (2 * t + i % 2) + k % 8 / 2];
            sum += part(of_a[i / 2 + 2 * (k / 8)], 16 * (k & 1)) * part(of_b[4 + k / 8], 16 * (k & 1));
        }
        c[i] = float(sum);
    }
}

inline Words4 load_once16(const void* p) { return *static_cast<const Words4*>(p); }
inline Words2 load_once8(const void* p) { return *static_cast<const Words2*>(p); }
template <class T> inline T load(const T* p) { return *p; }
inline float load_fresh(const float* p) { return *p; }
template <class T> inline T* shared(int byte) { return reinterpret_cast<T*>(emulated::state.shared + byte); }

namespace emulated {
inline void copy(const Copy& c) {
    std::memset(c.to, 0, 16);
    std::memcpy(c.to, c.from, c.bytes);
}
}  // namespace emulated
inline void copy_async(void* to, const void* from, int bytes) {
    auto& f = emulated::state.fibers[emulated::state.now];
    emulated::Copy c{to, from, bytes, f.groups};
    if (emulated::state.early) emulated::copy(c);
    else f.copies.push_back(c);
}
inline void copies_commit() { emulated::state.fibers[emulated::state.now].groups++; }
template <int LEFT> inline void copies_wait() {
    auto& f = emulated::state.fibers[emulated::state.now];
    std::vector<emulated::Copy> later;
    for (auto& c : f.copies) {
        if (c.group >= f.groups - LEFT) { later.push_back(c); continue; }
        emulated::copy(c);
    }
    f.copies = later;
}

inline void sync_block() {
    using namespace emulated;
    Fiber& f = state.fibers[state.now];
    state.block_arrived++;
    f.block_waits++;
    while (state.block_arrived < state.size.x * f.block_waits) yield();
}
inline void sync_warp() { emulated::sync_warp("barrier"); }
inline void fence() {}
inline int count_up(int* p) { return (*p)++; }
inline float from_lane_xor(float x, int bits) {
    u32 mine[1]; std::memcpy(mine, &x, 4);
    auto* all = emulated::exchange<1>("shuffle", mine);
    float y; std::memcpy(&y, all[(emulated::state.now % 32) ^ bits], 4); return y;
}
inline int from_lane_xor(int x, int bits) {
    u32 mine[1] = {u32(x)};
    return int(emulated::exchange<1>("shuffle", mine)[(emulated::state.now % 32) ^ bits][0]);
}
inline u32 bits_of(float x) { u32 y; std::memcpy(&y, &x, 4); return y; }
inline float from_bits(u32 x) { float y; std::memcpy(&y, &x, 4); return y; }
inline int nearest(float x) { return int(std::nearbyint(x)); }
inline float reciprocal_root(float x) { return 1.0f / std::sqrt(x); }

extern "C" const char* emulated_launch(void (*kernel)(const void*), const void* args, const int* grid, int threads, size_t shared_bytes, u32 seed) {
    return emulated::launch(kernel, args, grid, threads, shared_bytes, seed);
}
extern "C" void* emulated_memory(size_t size) { return emulated::guarded(size); }
