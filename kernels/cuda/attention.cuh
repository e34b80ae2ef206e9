// Attention over cached keys and values, and what puts them there.
//
// `attend` reads caches of its own, which `keep` fills on the GPU; `look` (look.cuh) those that a sequence runtime keeps. Such a cache is [batch, kv_heads, capacity, D] of halves, of bytes (codes - 128), or of half bytes (codes - 8, the first of two in the low half), the
// last two with scales, halves [batch, kv_heads, capacity, (D + 31) / 32]. Position n lies in slot n % capacity: a ring, if it ever wraps.
#pragma once
#include "rows.cuh"

template <int FORMAT, int D> struct Cache {
    static constexpr int bytes = D * FORMAT / 8;  // of a vector
    static constexpr int groups = (D + 31) / 32;
};

// Eight neighbouring numbers of a vector, as they are stored.
template <int FORMAT> struct Eight { u32 v[FORMAT / 4]; };

template <int FORMAT> ON_GPU Eight<FORMAT> load_eight(const u8* p) {
    Eight<FORMAT> e;
    if constexpr (FORMAT == 16) { Words4 w = load(reinterpret_cast<const Words4*>(p)); e = {{w.v[0], w.v[1], w.v[2], w.v[3]}}; }
    else if constexpr (FORMAT == 32) {
        Words4 a = load(reinterpret_cast<const Words4*>(p)), b = load(reinterpret_cast<const Words4*>(p) + 1);
        e = {{a.v[0], a.v[1], a.v[2], a.v[3], b.v[0], b.v[1], b.v[2], b.v[3]}};
    }
    else if constexpr (FORMAT == 8) { Words2 w = load(reinterpret_cast<const Words2*>(p)); e = {{w.v[0], w.v[1]}}; }
    else e.v[0] = load(reinterpret_cast<const u32*>(p));
    return e;
}
template <int FORMAT> ON_GPU float number(const Eight<FORMAT>& e, int i) {
    if constexpr (FORMAT == 32) return from_bits(e.v[i]);
    else if constexpr (FORMAT == 16) return from_half(static_cast<u16>(e.v[i / 2] >> 16 * (i % 2)));
    else if constexpr (FORMAT == 8) return static_cast<float>(static_cast<int>(e.v[i / 4] >> 8 * (i % 4) & 255) - 128);
    else return static_cast<float>(static_cast<int>(e.v[0] >> 4 * i & 15) - 8);
}

struct Attend {
    const u16* q;          // halves [batch · tokens, heads, D]
    const void* k;
    const void* v;
    const u16* k_scale;
    const u16* v_scale;
    const int* positions;  // [batch]
    u16* out;              // halves [batch · tokens, heads, D]
    float* partial;        // [batch · tokens, kv_heads, splits, HEADS, D + 2]: the sums, the largest score, the sum of weights
    int* arrived;          // [batch · tokens, kv_heads], 0 before and after
    int kv_heads;
    int capacity;
    int window;            // positions that a query sees at most; 0: all
    int tokens;            // queries of a sequence, at neighbouring positions
    int ahead;             // query i sees the positions below positions[b] + ahead + i; -1: below positions[b], every query
    float scale;           // of scores, times log2(e)
};

// ROWS queries that see the same keys, in one block. A vector of D takes LANES lanes, eight numbers each; a warp takes 32 / LANES positions at a time.
template <int D, int ROWS> struct Queries {
    static constexpr int LANES = D <= 32 ? 4 : D <= 64 ? 8 : D <= 128 ? 16 : 32, SLOTS = 32 / LANES, WARPS = 4;
    static constexpr int AT_ONCE = ROWS <= 4 ? 4 : 2;            // positions in flight of a lane
    static constexpr int TURN = WARPS * SLOTS * AT_ONCE;         // positions that the block takes at a time
    static constexpr float NONE = -1e30f, HIDDEN = 0.5f * NONE;  // a score that does not count, and one that is above it
    const int lane, warp, part, slot;
    const bool inside;
    float q[ROWS][8], o[ROWS][8], top[ROWS], weight[ROWS];

    ON_GPU Queries() : lane(threadIdx.x % 32), warp(threadIdx.x / 32), part(lane % LANES), slot(lane / LANES), inside(part * 8 < D) {
#pragma unroll
        for (int h = 0; h < ROWS; h++) {
            top[h] = NONE;
            weight[h] = 0.0f;
#pragma unroll
            for (int i = 0; i < 8; i++) o[h][i] = 0.0f;
        }
    }
    ON_GPU int position(int start, int u) const { return start + (u * WARPS + warp) * SLOTS + slot; }

    // Keys and values of AT_ONCE positions with their scales. `bias(h, u)` is added to a score; NONE: the position does not count.
    template <int FORMAT, class BIAS>
    ON_GPU void see(const Eight<FORMAT> (&k)[AT_ONCE], const Eight<FORMAT> (&v)[AT_ONCE], const float (&ks)[AT_ONCE], const float (&vs)[AT_ONCE], BIAS bias) {
#pragma unroll
        for (int h = 0; h < ROWS; h++) {
            float score[AT_ONCE], most = top[h];
#pragma unroll
            for (int u = 0; u < AT_ONCE; u++) {
                float sum = 0.0f;
#pragma unroll
                for (int i = 0; i < 8; i++) sum += q[h][i] * number(k[u], i);
                sum *= ks[u];
#pragma unroll
                for (int bit = LANES / 2; bit; bit /= 2) sum += from_lane_xor(sum, bit);
                const float add = bias(h, u);
                score[u] = add > HIDDEN ? sum + add : NONE;
                most = fmaxf(most, score[u]);
            }
            const float less = exp2f(top[h] - most);
            top[h] = most;
            weight[h] *= less;
#pragma unroll
            for (int i = 0; i < 8; i++) o[h][i] *= less;
#pragma unroll
            for (int u = 0; u < AT_ONCE; u++) {
                const float w = score[u] > HIDDEN ? exp2f(score[u] - most) : 0.0f;
                weight[h] += w;
#pragma unroll
                for (int i = 0; i < 8; i++) o[h][i] += w * vs[u] * number(v[u], i);
            }
        }
    }

    // Vector d of query h of `count` that lie ROWS · (D + 2) apart: their weighted mean's sum, the largest score, the sum of weights.
    ON_GPU float merged(const float* from, int count, int h, int d, bool fresh, float& most, float& w) const {
        auto at = [&](int i, int what) { const float* x = from + (i * ROWS + h) * (D + 2) + what; return fresh ? load_fresh(x) : *x; };
        most = NONE;
        for (int i = 0; i < count; i++) most = fmaxf(most, at(i, D));
        float sum = 0.0f;
        w = 0.0f;
        for (int i = 0; i < count; i++) {
            const float less = exp2f(at(i, D) - most);
            sum += less * at(i, d);
            w += less * at(i, D + 1);
        }
        return sum;
    }

    // The slots of a warp become one, then the warps, then the gridDim.y blocks of a `group`; `write(h, d, value)` takes what comes out.
    template <class WRITE> ON_GPU void finish(float* partial, int* arrived, long long group, WRITE write) {
        float* room = shared<float>(0);  // [WARPS, ROWS, D + 2]
#pragma unroll
        for (int h = 0; h < ROWS; h++) {
            float most = top[h];
#pragma unroll
            for (int bit = LANES; bit < 32; bit *= 2) most = fmaxf(most, from_lane_xor(most, bit));
            const float less = exp2f(top[h] - most);
            float w = weight[h] * less;
#pragma unroll
            for (int bit = LANES; bit < 32; bit *= 2) w += from_lane_xor(w, bit);
            float* mine = room + (warp * ROWS + h) * (D + 2);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                float sum = o[h][i] * less;
#pragma unroll
                for (int bit = LANES; bit < 32; bit *= 2) sum += from_lane_xor(sum, bit);
                if (slot == 0 && inside) mine[part * 8 + i] = sum;
            }
            if (lane == 0) { mine[D] = most; mine[D + 1] = w; }
        }
        sync_block();
        const int parts = gridDim.y;
        float* all = partial + group * parts * ROWS * (D + 2);
        for (int i = threadIdx.x; i < ROWS * D; i += 32 * WARPS) {
            float most, w, sum = merged(room, WARPS, i / D, i % D, false, most, w);
            if (parts == 1) write(i / D, i % D, w > 0.0f ? sum / w : 0.0f);
            else {
                float* mine = all + (static_cast<long long>(blockIdx.y) * ROWS + i / D) * (D + 2);
                mine[i % D] = sum;
                if (i % D == 0) { mine[D] = most; mine[D + 1] = w; }
            }
        }
        if (parts == 1) return;
        fence();
        sync_block();
        int* last = shared<int>(0);
        if (threadIdx.x == 0) *last = count_up(arrived + group) == parts - 1;
        sync_block();
        if (!*last) return;
        fence();
        for (int i = threadIdx.x; i < ROWS * D; i += 32 * WARPS) {
            float most, w, sum = merged(all, parts, i / D, i % D, true, most, w);
            write(i / D, i % D, w > 0.0f ? sum / w : 0.0f);
        }
        if (threadIdx.x == 0) arrived[group] = 0;
    }
};

// One query of every head of a group. FORMAT 16, 8 or 4 bits; HEADS: query heads that share a key head.
template <int FORMAT, int D, int HEADS> ON_GPU void attend(const Attend& p) {
    using C = Cache<FORMAT, D>;
    using Q = Queries<D, HEADS>;
    Q mine;
    const int head = blockIdx.x, query = blockIdx.z, b = query / p.tokens;
    const int end = p.ahead < 0 ? p.positions[b] : p.positions[b] + p.ahead + query % p.tokens;
    int first = max(0, end - p.capacity);
    if (p.window) first = max(first, end - p.window);
    const long long count = max(0, end - first);
    const int from = first + static_cast<int>(count * blockIdx.y / gridDim.y), to = first + static_cast<int>(count * (blockIdx.y + 1) / gridDim.y);
    const long long base = (static_cast<long long>(b) * p.kv_heads + head) * p.capacity;
    const long long group = static_cast<long long>(query) * p.kv_heads + head, of_q = group * HEADS;
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
        Words4 w = {{0, 0, 0, 0}};
        if (mine.inside) w = load(reinterpret_cast<const Words4*>(p.q + (of_q + h) * D + mine.part * 8));
#pragma unroll
        for (int i = 0; i < 8; i++) mine.q[h][i] = from_half(static_cast<u16>(w.v[i / 2] >> 16 * (i % 2))) * p.scale;
    }
    for (int start = from; start < to; start += Q::TURN) {
        Eight<FORMAT> k[Q::AT_ONCE], v[Q::AT_ONCE];
        float ks[Q::AT_ONCE], vs[Q::AT_ONCE];
        bool there[Q::AT_ONCE];
#pragma unroll
        for (int u = 0; u < Q::AT_ONCE; u++) {
            const int position = mine.position(start, u);
            there[u] = position < to;
            const long long vector = base + (there[u] ? position : from) % p.capacity;
            const long long at = vector * C::bytes + (mine.inside ? mine.part : 0) * FORMAT;
            const long long scale = vector * C::groups + (mine.inside ? mine.part : 0) / 4;
            k[u] = load_eight<FORMAT>(static_cast<const u8*>(p.k) + at);
            v[u] = load_eight<FORMAT>(static_cast<const u8*>(p.v) + at);
            ks[u] = !mine.inside ? 0.0f : FORMAT == 16 ? 1.0f : from_half(p.k_scale[scale]);
            vs[u] = FORMAT == 16 ? 1.0f : from_half(p.v_scale[scale]);
        }
        mine.template see<FORMAT>(k, v, ks, vs, [&](int, int u) { return there[u] ? 0.0f : Q::NONE; });
    }
    mine.finish(p.partial, p.arrived, group, [&](int h, int d, float value) { p.out[(of_q + h) * D + d] = to_half(value); });
}

struct Keep {
    const u16* q;          // halves [batch · tokens, q_stride]
    const u16* k;          // halves [batch · tokens, k_stride]
    const u16* v;
    const float* cosines;  // [positions, D / 2], or none: nothing is turned
    const float* sines;
    const int* positions;  // [batch]: of the first token
    u16* q_out;            // halves [batch · tokens, heads, D]
    void* k_cache;
    void* v_cache;
    u16* k_scale;
    u16* v_scale;
    int heads;
    int kv_heads;
    int capacity;
    int tokens;
    int q_stride;
    int k_stride;
    int v_stride;
};

// Rotary positions on q and k (the first half of D against the second), and k and v into their caches: a warp a vector.
template <int FORMAT, int D> ON_GPU void keep(const Keep& p) {
    using C = Cache<FORMAT, D>;
    const int lane = threadIdx.x, which = blockIdx.x, row = blockIdx.y, b = row / p.tokens, position = p.positions[b] + row % p.tokens;
    const bool is_q = which < p.heads, is_k = !is_q && which < p.heads + p.kv_heads;
    const int head = is_q ? which : is_k ? which - p.heads : which - p.heads - p.kv_heads;
    const u16* x = (is_q ? p.q + static_cast<long long>(row) * p.q_stride : is_k ? p.k + static_cast<long long>(row) * p.k_stride
                                                                              : p.v + static_cast<long long>(row) * p.v_stride) + head * D;
    float* turned = shared<float>(0);  // [D]
    const bool turn = p.cosines && (is_q || is_k);
    for (int i = lane; i < D / 2; i += 32) {
        float a = from_half(x[i]), c = from_half(x[i + D / 2]);
        float cosine = turn ? p.cosines[static_cast<long long>(position) * (D / 2) + i] : 1.0f;
        float sine = turn ? p.sines[static_cast<long long>(position) * (D / 2) + i] : 0.0f;
        turned[i] = a * cosine - c * sine;
        turned[i + D / 2] = c * cosine + a * sine;
    }
    sync_warp();
    const long long vector = (static_cast<long long>(b) * p.kv_heads + head) * p.capacity + position % p.capacity;
    u8* cache = static_cast<u8*>(is_k ? p.k_cache : p.v_cache) + vector * C::bytes;
#pragma unroll
    for (int group = 0; group < C::groups; group++) {
        const int d = group * 32 + lane;
        const float value = d < D ? turned[d] : 0.0f;
        if (is_q) {
            if (d < D) p.q_out[(static_cast<long long>(row) * p.heads + head) * D + d] = to_half(value);
        } else if constexpr (FORMAT == 16) {
            if (d < D) reinterpret_cast<u16*>(cache)[d] = to_half(value);
        } else {
            constexpr int most = (1 << (FORMAT - 1)) - 1;
            const u16 scale = to_half(max_of_warp(fabsf(value)) / most);
            const float unit = from_half(scale);
            const int code = unit > 0.0f ? max(-most, min(most, nearest(value / unit))) + most + 1 : most + 1;
            if constexpr (FORMAT == 8) {
                if (d < D) cache[d] = static_cast<u8>(code);
            } else {
                const int other = from_lane_xor(code, 1);
                if (d < D && lane % 2 == 0) cache[d / 2] = static_cast<u8>(code | other << 4);
            }
            if (lane == 0) (is_k ? p.k_scale : p.v_scale)[vector * C::groups + group] = scale;
        }
    }
}
