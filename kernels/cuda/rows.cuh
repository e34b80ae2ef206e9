// Whole rows at a time, a block a row: norms, float32 made halves, the index of the largest, embeddings.
#pragma once
#include "product.cuh"

ON_GPU float sum_of_warp(float v) {
#pragma unroll
    for (int bit = 16; bit; bit /= 2) v += from_lane_xor(v, bit);
    return v;
}
ON_GPU float max_of_warp(float v) {
#pragma unroll
    for (int bit = 16; bit; bit /= 2) v = fmaxf(v, from_lane_xor(v, bit));
    return v;
}
// The same of all eight warps, in every thread. `room`: eight floats that nothing else uses; it may be used again after it.
template <bool MAX> ON_GPU float of_block(float v, float* room) {
    v = MAX ? max_of_warp(v) : sum_of_warp(v);
    sync_block();
    if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = v;
    sync_block();
    v = room[0];
#pragma unroll
    for (int i = 1; i < 8; i++) v = MAX ? fmaxf(v, room[i]) : v + room[i];
    return v;
}

// The half nearest to x, of those that are numbers: what is too large for one is the largest of them.
ON_GPU u16 to_finite_half(float x) { return to_half(x > 65504.0f ? 65504.0f : x < -65504.0f ? -65504.0f : x); }
template <class T> ON_GPU void write_finite(T* p, float v) {
    if constexpr (sizeof(T) == 2) *p = to_finite_half(v);
    else *p = v;
}

struct Norm {
    const void* x;        // [rows, x_stride]
    const void* add;      // like x, added first; or none
    void* sum;            // like x: x + add is kept here; or none
    const float* weight;  // [cols]
    const float* bias;    // [cols], or none
    void* out;            // [rows, out_stride]; may be x
    int cols;
    int x_stride;
    int out_stride;
    float eps;
};

// (x - mean) / sqrt(variance + eps) · weight + bias; without LAYER the mean counts as 0. IN, OUT: u16 (halves) or float.
template <class IN, bool LAYER, class OUT> ON_GPU void norm(const Norm& p) {
    float* room = shared<float>(0);
    const long long at = static_cast<long long>(blockIdx.x) * p.x_stride;
    const IN* x = static_cast<const IN*>(p.x) + at;
    const IN* add = p.add ? static_cast<const IN*>(p.add) + at : nullptr;
    auto value = [&](int i) { return add ? read(x + i) + read(add + i) : read(x + i); };
    float mean = 0.0f;
    if constexpr (LAYER) {
        for (int i = threadIdx.x; i < p.cols; i += 256) mean += value(i);
        mean = of_block<false>(mean, room) / p.cols;
    }
    float squares = 0.0f;
    for (int i = threadIdx.x; i < p.cols; i += 256) squares += (value(i) - mean) * (value(i) - mean);
    const float factor = reciprocal_root(of_block<false>(squares, room) / p.cols + p.eps);
    for (int i = threadIdx.x; i < p.cols; i += 256) {
        float v = value(i);
        if (p.sum) write(static_cast<IN*>(p.sum) + at + i, v);  // may lie where x or add does: each value is read by the thread that writes it
        float y = (v - mean) * factor * p.weight[i];
        write_finite(static_cast<OUT*>(p.out) + static_cast<long long>(blockIdx.x) * p.out_stride + i, p.bias ? y + p.bias[i] : y);
    }
}

struct Halve {
    const float* x;      // [rows, x_stride]
    const float* other;  // like x, or none: what the activation's result is multiplied with
    u16* out;            // halves [rows, out_stride]
    float* scale;        // [rows], powers of two: activation(x) · other = out · scale
    int cols;
    int x_stride;
    int out_stride;
    int activation;      // as Product
};

// The largest of a row comes to lie between 2^14 and 2^15, so that no value is too large for a half and few are too small.
ON_GPU void halve(const Halve& p) {
    float* room = shared<float>(0);
    const long long at = static_cast<long long>(blockIdx.x) * p.x_stride;
    auto value = [&](int i) {
        const float v = activated(p.x[at + i], p.activation);
        return p.other ? v * p.other[at + i] : v;
    };
    float largest = 0.0f;
    for (int i = threadIdx.x; i < p.cols; i += 256) largest = fmaxf(largest, fabsf(value(i)));
    largest = of_block<true>(largest, room);
    int exponent = static_cast<int>(bits_of(largest) >> 23 & 255) - 127;
    exponent = largest == 0.0f || exponent == 128 ? 14 : max(exponent, -100);
    const float up = from_bits(static_cast<u32>(127 + 14 - exponent) << 23);
    for (int i = threadIdx.x; i < p.cols; i += 256) p.out[static_cast<long long>(blockIdx.x) * p.out_stride + i] = to_half(value(i) * up);
    if (threadIdx.x == 0) p.scale[blockIdx.x] = from_bits(static_cast<u32>(127 - 14 + exponent) << 23);
}

struct Argmax {
    const void* x;   // [rows, stride]
    int* out;        // [rows]
    int* count;      // [rows], or none: grows by 1
    int* history;    // [rows, history_stride], or none: out is written at the count before
    int cols;
    int stride;
    int history_stride;
};

// The first of the largest values of a row; NaNs are passed over.
template <class IN> ON_GPU void argmax(const Argmax& p) {
    const IN* x = static_cast<const IN*>(p.x) + static_cast<long long>(blockIdx.x) * p.stride;
    float best = 0.0f;
    int place = -1;
    auto take = [&](float v, int i) {
        if (i >= 0 && v == v && (place < 0 || v > best || (v == best && i < place))) { best = v; place = i; }
    };
    for (int i = threadIdx.x; i < p.cols; i += 256) take(read(x + i), i);
#pragma unroll
    for (int bit = 16; bit; bit /= 2) {
        float v = from_lane_xor(best, bit);
        int i = from_lane_xor(place, bit);
        take(v, i);
    }
    float* values = shared<float>(0);
    int* places = shared<int>(32);
    if (threadIdx.x % 32 == 0) { values[threadIdx.x / 32] = best; places[threadIdx.x / 32] = place; }
    sync_block();
    if (threadIdx.x) return;
    for (int w = 1; w < 8; w++) take(values[w], places[w]);
    place = max(place, 0);
    p.out[blockIdx.x] = place;
    if (!p.count) return;
    int before = p.count[blockIdx.x];
    if (p.history && before < p.history_stride) p.history[static_cast<long long>(blockIdx.x) * p.history_stride + before] = place;
    p.count[blockIdx.x] = before + 1;
}

struct Embed {
    const u32* codes;        // as Product
    const u32* high;
    const u16* scales;
    const u8* zeros;
    const u16* tables;
    const float* row_scale;
    const int* ids;          // [tokens], `id_words` apart
    const float* places;     // [positions, row_stride], or none: row at[token] + offset is added
    const int* at;           // [tokens], `id_words` apart
    void* out;               // [tokens, out_stride]; zeros for ids that are no row
    float factor;            // of the row
    int id_words;            // 1, or 2 of whole numbers of 64 bits
    int offset;
    int row_stride;          // of places, and of a table of float32
    int rows;
    int cols;
    int steps;
    int groups;
    int group_shift;
    int out_stride;
    int row_tables;
};

// The row that a token asks for, of `rows`; 0 and not `known` where there is none.
ON_GPU int row_of(const Embed& p, bool& known) {
    const int id = p.ids[static_cast<long long>(blockIdx.x) * p.id_words];
    known = id >= 0 && id < p.rows;
    return known ? id : 0;
}

ON_GPU float placed(const Embed& p, float v, int col) {
    v *= p.factor;
    if (!p.places) return v;
    const int at = p.at[static_cast<long long>(blockIdx.x) * p.id_words] + p.offset;
    return v + p.places[static_cast<long long>(at) * p.row_stride + col];
}

// Rows of float32: `row_scale` is the table.
template <class OUT> ON_GPU void lookup(const Embed& p) {
    bool known;
    const long long row = row_of(p, known);
    OUT* out = static_cast<OUT*>(p.out) + static_cast<long long>(blockIdx.x) * p.out_stride;
    for (int col = threadIdx.x; col < p.cols; col += 256) write(out + col, known ? placed(p, p.row_scale[row * p.row_stride + col], col) : 0.0f);
}

// Rows of the weights that the product kernels read, so that tied embeddings are stored once. FLUSH: 0 where rows have one scale.
template <int BITS, bool TABLE, int FLUSH, bool ZEROS, class OUT> ON_GPU void embed(const Embed& p) {
    using F = Form<BITS>;
    OUT* out = static_cast<OUT*>(p.out) + static_cast<long long>(blockIdx.x) * p.out_stride;
    bool known;
    const int row = row_of(p, known);
    const long long tile = row / 16;
    const float whole = p.row_scale[row];
    for (int col = threadIdx.x; col < p.cols; col += 256) {
        const Place<BITS> at(row % 16, col);
        const long long lane = (tile * p.steps + at.step) * 32 + at.lane;
        u32 code = p.codes[lane * 4 + at.pair / F::per_word] >> (F::plane * (at.pair % F::per_word) + 16 * at.second) & ((1u << F::plane) - 1);
        if constexpr (BITS == 3) code |= (p.high[lane * 2 + at.pair / 16] >> (at.pair % 16 + 16 * at.second) & 1) << 2;
        const long long group = ((tile * p.groups + (FLUSH ? col >> p.group_shift : 0)) * 8 + row % 8) * 2 + row % 16 / 8;
        float v;
        if constexpr (TABLE) v = from_half(p.tables[(p.row_tables ? row * 16 : 0) + code]);
        else v = static_cast<float>(static_cast<int>(code) - (ZEROS ? p.zeros[group] : 1 << (BITS - 1)));
        if (FLUSH) v *= from_half(p.scales[group]);
        write(out + col, known ? placed(p, v * whole, col) : 0.0f);
    }
}

struct Pick {
    const float* x;   // [batch · n, x_stride]
    const int* last;  // [batch], `last_words` apart
    float* out;       // [batch, out_stride]: row last[b] of each n
    int n;
    int cols;
    int x_stride;
    int out_stride;
    int last_words;
};

ON_GPU void pick(const Pick& p) {
    const long long row = static_cast<long long>(blockIdx.x) * p.n + p.last[static_cast<long long>(blockIdx.x) * p.last_words];
    for (int i = threadIdx.x; i < p.cols; i += 256) p.out[static_cast<long long>(blockIdx.x) * p.out_stride + i] = p.x[row * p.x_stride + i];
}

struct Sparse {
    const u16* x;          // halves [tokens, x_stride]
    const float* x_scale;  // [tokens], or none
    const int* starts;     // [rows + 1]
    const int* columns;
    const float* values;
    float* out;            // [tokens, out_stride], added to
    int rows;
    int x_stride;
    int out_stride;
};

// Single weights beside a matrix, in compressed rows: a warp a row, gridDim.y tokens.
ON_GPU void sparse(const Sparse& p) {
    const int lane = threadIdx.x % 32, row = blockIdx.x * 8 + threadIdx.x / 32;
    if (row >= p.rows) return;
    const u16* x = p.x + static_cast<long long>(blockIdx.y) * p.x_stride;
    float sum = 0.0f;
    for (int i = p.starts[row] + lane; i < p.starts[row + 1]; i += 32) sum += p.values[i] * from_half(x[p.columns[i]]);
    sum = sum_of_warp(sum);
    if (lane == 0) p.out[static_cast<long long>(blockIdx.y) * p.out_stride + row] += p.x_scale ? sum * p.x_scale[blockIdx.y] : sum;
}
