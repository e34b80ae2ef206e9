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

struct Norm {
    const void* x;        // [rows, x_stride]
    const void* add;      // like x, added first; or none
    void* sum;            // like x: x + add is kept here; or none
    const float* weight;  // [cols]
    const float* bias;    // [cols], or none
    u16* out;             // halves [rows, out_stride]
    int cols;
    int x_stride;
    int out_stride;
    float eps;
};

// (x - mean) / sqrt(variance + eps) · weight + bias; without LAYER the mean counts as 0. IN: u16 (halves) or float.
template <class IN, bool LAYER> ON_GPU void norm(const Norm& p) {
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
        p.out[static_cast<long long>(blockIdx.x) * p.out_stride + i] = to_half(p.bias ? y + p.bias[i] : y);
    }
}

struct Halve {
    const float* x;  // [rows, x_stride]
    u16* out;        // halves [rows, out_stride]
    float* scale;    // [rows], powers of two: x = out · scale
    int cols;
    int x_stride;
    int out_stride;
};

// The largest of a row comes to lie between 2^14 and 2^15, so that no value is too large for a half and few are too small.
ON_GPU void halve(const Halve& p) {
    float* room = shared<float>(0);
    const float* x = p.x + static_cast<long long>(blockIdx.x) * p.x_stride;
    float largest = 0.0f;
    for (int i = threadIdx.x; i < p.cols; i += 256) largest = fmaxf(largest, fabsf(x[i]));
    largest = of_block<true>(largest, room);
    int exponent = static_cast<int>(bits_of(largest) >> 23 & 255) - 127;
    exponent = largest == 0.0f || exponent == 128 ? 14 : max(exponent, -100);
    const float up = from_bits(static_cast<u32>(127 + 14 - exponent) << 23);
    for (int i = threadIdx.x; i < p.cols; i += 256) p.out[static_cast<long long>(blockIdx.x) * p.out_stride + i] = to_half(x[i] * up);
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
    const int* ids;          // [tokens]
    void* out;               // [tokens, out_stride]; zeros for ids that are no row
    int rows;
    int cols;
    int steps;
    int groups;
    int group_shift;
    int out_stride;
    int row_tables;
};

// Rows of the weights that the product kernels read, so that tied embeddings are stored once. FLUSH: 0 where rows have one scale.
template <int BITS, bool TABLE, int FLUSH, bool ZEROS, class OUT> ON_GPU void embed(const Embed& p) {
    using F = Form<BITS>;
    const int id = p.ids[blockIdx.x];
    OUT* out = static_cast<OUT*>(p.out) + static_cast<long long>(blockIdx.x) * p.out_stride;
    const bool known = id >= 0 && id < p.rows;
    const int row = known ? id : 0;
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
        write(out + col, known ? v * whole : 0.0f);
    }
}
