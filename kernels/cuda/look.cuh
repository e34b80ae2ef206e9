// Heads of queries, keys and values, and attention over keys and values as a sequence runtime keeps them: slots in 32, 16, 8 or 4 bits, the newest
// ones beside them in float32, a mask over all.
#pragma once
#include "attention.cuh"

struct Heads {
    const float* x;       // [batch · n, x_stride]
    const float* weight;  // [size] of an RMS norm of each head, or none
    const float* cosines; // [batch · n, size / 2], or none: nothing is turned
    const float* sines;
    float* out;           // [batch, heads, n, size]
    int x_stride;
    int n;
    int heads;
    int size;
    float eps;
    float scale;
};

// Queries, keys and values in one launch.
struct HeadsOfThree {
    Heads part[3];
};

// A warp a head: its norm, the first half of its numbers turned against the second, a scale.
ON_GPU void heads(const HeadsOfThree& all) {
    const Heads& p = all.part[blockIdx.z];
    const int lane = threadIdx.x, row = blockIdx.x, head = blockIdx.y, half = p.size / 2;
    if (head >= p.heads) return;
    const float* x = p.x + static_cast<long long>(row) * p.x_stride + head * p.size;
    float* out = p.out + ((static_cast<long long>(row / p.n) * p.heads + head) * p.n + row % p.n) * p.size;
    float factor = p.scale;
    if (p.weight) {
        float squares = 0.0f;
        for (int i = lane; i < p.size; i += 32) squares += x[i] * x[i];
        factor *= reciprocal_root(sum_of_warp(squares) / p.size + p.eps);
    }
    auto value = [&](int i) { return x[i] * factor * (p.weight ? p.weight[i] : 1.0f); };
    if (!p.cosines) {
        for (int i = lane; i < p.size; i += 32) out[i] = value(i);
        return;
    }
    for (int i = lane; i < half; i += 32) {
        const float a = value(i), c = value(i + half);
        const float cosine = p.cosines[static_cast<long long>(row) * half + i], sine = p.sines[static_cast<long long>(row) * half + i];
        out[i] = a * cosine - c * sine;
        out[i + half] = c * cosine + a * sine;
    }
}

struct Look {
    const float* q;             // [batch, kv_heads · shared, n, D], scaled
    const void* keys;           // [batch, kv_heads, slots, D]: float32, halves, int8, or half bytes (columns below D / 2 are low, the others high)
    const void* values;
    const void* key_scales;     // of int8 float32 [batch, kv_heads, slots]; of half bytes halves, a scale and the least of each group of columns
    const void* value_scales;
    const float* new_keys;      // [batch, kv_heads, tokens, D]
    const float* new_values;
    const float* mask;          // added to the scores [slots + tokens]; what is hidden by -5000 and more is not read
    u16* out;                   // halves [batch · n, out_stride], heads side by side
    float* partial;             // [batch, blocks of queries, kv_heads, splits, ROWS, D + 2]
    int* arrived;               // [batch, blocks of queries, kv_heads], 0 before and after
    int slots;
    int tokens;
    int n;
    int kv_heads;
    int shared;                 // query heads a key head
    int mask_batch;             // numbers from one batch, head and row of the mask to the next
    int mask_head;
    int mask_row;
    int out_stride;
};

// How slots of FORMAT bits are read: the numbers as `number` takes them, and the scale that they are multiplied with later.
template <int FORMAT, int D> struct Slots {
    static constexpr int held = FORMAT == 4 ? 32 : FORMAT;                 // bits of what is kept in registers
    static constexpr int bytes = D * FORMAT / 8;                           // of a vector
    static constexpr int groups = FORMAT == 4 && D % 64 == 0 ? D / 64 : 1;  // of columns with a scale of their own
    static constexpr int beside = FORMAT == 8 ? 4 : FORMAT == 4 ? 4 * groups : 0;  // bytes of a vector's scales

    ON_GPU static Eight<held> load(const u8* vectors, const u8* scales, int position, int part, float& scale) {
        scale = 1.0f;
        const u8* vector = vectors + static_cast<long long>(position) * bytes;
        if constexpr (FORMAT == 8) {
            scale = reinterpret_cast<const float*>(scales)[position];
            const Eight<8> e = load_eight<8>(vector + part * 8);
            return {{e.v[0] ^ 0x80808080u, e.v[1] ^ 0x80808080u}};  // codes + 128
        } else if constexpr (FORMAT == 4) {
            const u16* pair = reinterpret_cast<const u16*>(scales) + (static_cast<long long>(position) * groups + (groups > 1 ? part / 8 : 0)) * 2;
            const float unit = from_half(pair[0]), least = from_half(pair[1]);
            Eight<32> out;
            auto number_of = [&](int i, u32 code) { out.v[i] = bits_of(unit * static_cast<float>(code & 15) + least); };
            if constexpr (D % 16 == 0) {  // a lane's columns are all low or all high
                const bool high = part * 8 >= D / 2;
                const Eight<8> e = load_eight<8>(vector + part * 8 - (high ? D / 2 : 0));
#pragma unroll
                for (int i = 0; i < 8; i++) number_of(i, e.v[i / 4] >> (8 * (i % 4) + (high ? 4 : 0)));
            } else {
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    const int column = part * 8 + i;
                    number_of(i, column < D / 2 ? vector[column] : vector[column - D / 2] >> 4);
                }
            }
            return out;
        } else {
            return load_eight<FORMAT>(vector + part * FORMAT);
        }
    }
};

// Positions `first` to `last` of keys and values in FORMAT, masked from `mask` on.
template <int FORMAT, int D, int ROWS>
ON_GPU void look_over(Queries<D, ROWS>& mine, const u8* keys, const u8* values, const u8* key_scales, const u8* value_scales,
                      const float* const (&mask)[ROWS], int first, int last) {
    using Q = Queries<D, ROWS>;
    using S = Slots<FORMAT, D>;
    constexpr float BASE = 1.44269504f;
    for (int start = first; start < last; start += Q::TURN) {
        Eight<S::held> k[Q::AT_ONCE] = {}, v[Q::AT_ONCE] = {};
        float ks[Q::AT_ONCE] = {}, vs[Q::AT_ONCE] = {}, bias[ROWS][Q::AT_ONCE];
#pragma unroll
        for (int u = 0; u < Q::AT_ONCE; u++) {
            const int position = mine.position(start, u);
            bool seen = false;
#pragma unroll
            for (int h = 0; h < ROWS; h++) {
                const float add = position < last && mask[h] ? mask[h][position] : Q::NONE;
                bias[h][u] = add > -5000.0f ? add * BASE : Q::NONE;
                seen = seen || add > -5000.0f;
            }
            if (!seen || !mine.inside) continue;
            k[u] = S::load(keys, key_scales, position, mine.part, ks[u]);
            v[u] = S::load(values, value_scales, position, mine.part, vs[u]);
        }
        mine.template see<S::held>(k, v, ks, vs, [&](int h, int u) { return bias[h][u]; });
    }
}

// Queries of a key head, ROWS at a time: query r is token r / shared of head r % shared. Blocks of a row of the grid share the positions out.
template <int FORMAT, int D, int ROWS> ON_GPU void look(const Look& p) {
    using Q = Queries<D, ROWS>;
    Q mine;
    const int rows = p.n * p.shared, chunks = (rows + ROWS - 1) / ROWS, b = blockIdx.z / chunks, r = blockIdx.z % chunks * ROWS, kv = blockIdx.x;
    const long long cache = static_cast<long long>(b) * p.kv_heads + kv;
    const float* mask[ROWS];
#pragma unroll
    for (int h = 0; h < ROWS; h++) {
        const bool there = r + h < rows;
        const int token = there ? (r + h) / p.shared : 0, head = kv * p.shared + (there ? (r + h) % p.shared : 0);
        mask[h] = there ? p.mask + static_cast<long long>(b) * p.mask_batch + static_cast<long long>(head) * p.mask_head + static_cast<long long>(token) * p.mask_row : nullptr;
        const float* q = p.q + ((static_cast<long long>(b) * p.kv_heads * p.shared + head) * p.n + token) * D + mine.part * 8;
#pragma unroll
        for (int i = 0; i < 8; i++) mine.q[h][i] = mine.inside ? q[i] * 1.44269504f : 0.0f;
    }
    const long long all = p.slots + p.tokens;
    const int from = static_cast<int>(all * blockIdx.y / gridDim.y), to = static_cast<int>(all * (blockIdx.y + 1) / gridDim.y);
    using S = Slots<FORMAT, D>;
    auto of = [&](const void* all_slots, int bytes) { return static_cast<const u8*>(all_slots) + cache * p.slots * bytes; };
    if (from < p.slots)
        look_over<FORMAT>(mine, of(p.keys, S::bytes), of(p.values, S::bytes), of(p.key_scales, S::beside), of(p.value_scales, S::beside), mask, from, min(to, p.slots));
    if (to > p.slots) {
        const long long at = cache * p.tokens * D;
#pragma unroll
        for (int h = 0; h < ROWS; h++) mask[h] = mask[h] ? mask[h] + p.slots : nullptr;
        look_over<32>(mine, reinterpret_cast<const u8*>(p.new_keys + at), reinterpret_cast<const u8*>(p.new_values + at), nullptr, nullptr, mask, max(from, p.slots) - p.slots, to - p.slots);
    }
    mine.finish(p.partial, p.arrived, static_cast<long long>(blockIdx.z) * p.kv_heads + kv, [&](int h, int d, float value) {
        if (r + h >= rows) return;
        const int token = (r + h) / p.shared, head = kv * p.shared + (r + h) % p.shared;
        p.out[(static_cast<long long>(b) * p.n + token) * p.out_stride + head * D + d] = to_finite_half(value);
    });
}
