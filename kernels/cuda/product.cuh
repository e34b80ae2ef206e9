// y = x · Wᵀ for one to sixteen rows of x: every weight is read once. A block has eight warps and TILES tiles of 16 rows; its warps take turns
// along the columns, and blocks of the same rows (gridDim.y) share the columns out. Products are those of the tensor cores: halves, summed in
// float32; the codes are whole numbers, exact in half precision, and scales are applied to sums in float32.
#pragma once
#include "weights.cuh"

// The last step of every product: y = activation(scale · sum + bias) · factor + residual.
struct Product {
    const void* codes;
    const void* high;         // 3 bits: the plane of high bits
    const u32* scales;        // two halves: rows g, g + 8 [tile, group, g], of at most 1; not of whole rows
    const u16* zeros;         // two bytes: rows g, g + 8 [tile, group, g]
    const u16* tables;        // halves [1 or rows of whole tiles, 16]
    const float* row_scale;   // [rows]
    const u16* x;             // halves [tokens, x_stride]
    const float* x_scale;     // [tokens], or none
    const float* bias;        // [rows], or none
    const void* factor;       // like out, or none
    const void* residual;     // like out, or none
    void* out;                // [tokens, out_stride], halves or float32
    float* partial;           // [splits, blocks, rows of a block · tokens of a block]
    int* arrived;             // [blocks], 0 before and after
    int rows;
    int cols;
    int tokens;
    int steps;                // of a tile
    int groups;               // of a row
    int group_shift;          // log2 of the columns of a group
    int x_stride;
    int out_stride;
    int activation;           // 0 none, 1 silu, 2 gelu, 3 gelu by tanh, 4 relu
    int row_tables;           // 1: a table a row
};

ON_GPU float activated(float v, int which) {
    switch (which) {
        case 1: return v / (1.0f + expf(-v));
        case 2: return 0.5f * v * (1.0f + erff(v * 0.70710678f));
        case 3: return 0.5f * v * (1.0f + tanhf(0.79788456f * (v + 0.044715f * v * v * v)));
        case 4: return v > 0.0f ? v : 0.0f;
        default: return v;
    }
}

template <class T> ON_GPU float read(const T* p) {
    if constexpr (sizeof(T) == 2) return from_half(*p);
    else return *p;
}
template <class T> ON_GPU void write(T* p, float v) {
    if constexpr (sizeof(T) == 2) *p = to_half(v);
    else *p = v;
}

template <class OUT> ON_GPU void finish(const Product& p, int row, int token, float sum) {
    if (row >= p.rows || token >= p.tokens) return;
    float v = sum * p.row_scale[row];
    if (p.x_scale) v *= p.x_scale[token];
    if (p.bias) v += p.bias[row];
    v = activated(v, p.activation);
    long long at = static_cast<long long>(token) * p.out_stride + row;
    if (p.factor) v *= read(static_cast<const OUT*>(p.factor) + at);
    if (p.residual) v += read(static_cast<const OUT*>(p.residual) + at);
    write(static_cast<OUT*>(p.out) + at, v);
}

// Of eight columns of x only the first `left` count: what stands behind the last column must not matter.
ON_GPU Words4 first_of(Words4 w, int left) {
#pragma unroll
    for (int i = 0; i < 4; i++) w.v[i] &= left >= 2 * i + 2 ? 0xffffffffu : left == 2 * i + 1 ? 0x0000ffffu : 0u;
    return w;
}

// Where a lane reads from: its tiles' codes, scales and zeros, and its columns of x.
template <int EIGHTS, int TILES> struct Sources {
    const Words4* codes[TILES];
    const Words2* high[TILES];
    const u32* scales[TILES];
    const u16* zeros[TILES];
    const u16* x[EIGHTS];
    bool token[EIGHTS];  // whether there is one

    ON_GPU Sources(const Product& p, int first_tile, int lane) {
        const int tiles = (p.rows + 15) / 16;
#pragma unroll
        for (int r = 0; r < TILES; r++) {
            const long long tile = min(first_tile + r, tiles - 1);  // the rows of a tile too many are not written
            codes[r] = static_cast<const Words4*>(p.codes) + tile * p.steps * 32 + lane;
            high[r] = static_cast<const Words2*>(p.high) + tile * p.steps * 32 + lane;
            scales[r] = p.scales + tile * p.groups * 8 + lane / 4;
            zeros[r] = p.zeros + tile * p.groups * 8 + lane / 4;
        }
#pragma unroll
        for (int e = 0; e < EIGHTS; e++) {
            token[e] = e * 8 + lane / 4 < p.tokens;
            x[e] = p.x + static_cast<long long>(token[e] ? e * 8 + lane / 4 : 0) * p.x_stride + lane % 4 * 8;
        }
    }
};

// What a warp needs for one step, on its way from memory while the step before is computed.
template <int BITS, int FLUSH, bool ZEROS, int EIGHTS, int TILES> struct Step {
    using F = Form<BITS>;
    static constexpr int groups = FLUSH == 0 || FLUSH >= F::step ? 1 : F::step / FLUSH;  // at most so many in a step
    Codes<BITS> codes[TILES];
    u32 scales[TILES][groups];
    u16 zeros[TILES][groups];
    Words4 x[F::blocks][EIGHTS];

    // TAIL: a step that goes beyond the last column.
    template <bool TAIL> ON_GPU void load(const Product& p, const Sources<EIGHTS, TILES>& from, int step, int lane) {
#pragma unroll
        for (int r = 0; r < TILES; r++) {
            codes[r].low = load_once16(from.codes[r] + step * 32);
            if constexpr (BITS == 3) codes[r].high = load_once8(from.high[r] + step * 32);
#pragma unroll
            for (int i = 0; i < groups; i++) {
                const int group = FLUSH == 0 ? 0 : FLUSH < F::step ? step * groups + i : step * F::step >> p.group_shift;
                if (FLUSH) scales[r][i] = from.scales[r][group * 8];
                if (ZEROS) zeros[r][i] = from.zeros[r][group * 8];
            }
        }
        const int left = TAIL ? p.cols - step * F::step - lane % 4 * 8 : 0;  // columns from the lane's first one on
#pragma unroll
        for (int b = 0; b < F::blocks; b++)
#pragma unroll
            for (int e = 0; e < EIGHTS; e++) {
                x[b][e] = {{0, 0, 0, 0}};
                if (from.token[e] && (!TAIL || left > b * 32)) x[b][e] = *reinterpret_cast<const Words4*>(from.x[e] + step * F::step + b * 32);
                if (TAIL) x[b][e] = first_of(x[b][e], left - b * 32);
            }
    }
};

// The products of a step, added to `sums` [TILES, EIGHTS, 4], and with scales to `total`.
template <int BITS, bool TABLE, int FLUSH, bool ZEROS, int EIGHTS, int TILES, class SUMS>
ON_GPU void multiply(const Step<BITS, FLUSH, ZEROS, EIGHTS, TILES>& now, const u16* tables, int g, SUMS& sums, SUMS& total) {
    using F = Form<BITS>;
#pragma unroll
    for (int b = 0; b < F::blocks; b++) {
        const int i = FLUSH == 0 || FLUSH >= F::step ? 0 : b * 32 / (FLUSH ? FLUSH : 1);  // group within the step
        const bool flush = FLUSH != 0 && ((b + 1) * 32 % (FLUSH ? FLUSH : 1) == 0 || b + 1 == F::blocks);
#pragma unroll
        for (int r = 0; r < TILES; r++) {
            u32 zero[2];
#pragma unroll
            for (int h = 0; h < 2; h++) zero[h] = twice_1024(ZEROS ? now.zeros[r][i] >> 8 * h & 255 : 1 << (BITS - 1));
#pragma unroll
            for (int j = 0; j < 2; j++) {
                u32 a[4];
#pragma unroll
                for (int q = 0; q < 4; q++) {
                    if constexpr (TABLE) a[q] = looked_up(now.codes[r], (2 * b + j) * 4 + q, tables + (16 * r + g + 8 * (q % 2)) * 16);
                    else a[q] = centred(now.codes[r], (2 * b + j) * 4 + q, zero[q % 2]);
                }
#pragma unroll
                for (int e = 0; e < EIGHTS; e++) mma(sums[r][e], a, now.x[b][e].v[2 * j], now.x[b][e].v[2 * j + 1]);
            }
            if (!flush) continue;
            const float scale[2] = {from_half(now.scales[r][i] & 0xffff), from_half(now.scales[r][i] >> 16)};
#pragma unroll
            for (int e = 0; e < EIGHTS; e++)
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    total[r][e][k] += scale[k / 2] * sums[r][e][k];
                    sums[r][e][k] = 0.0f;
                }
        }
    }
}

// BITS of a code; TABLE: codes are looked up; FLUSH: columns after which a scale is applied (0: none but that of the row);
// ZEROS: groups have zeros of their own; EIGHTS: tokens / 8; OUT: u16 (halves) or float.
template <int BITS, bool TABLE, int FLUSH, bool ZEROS, int EIGHTS, int TILES, class OUT> ON_GPU void product(const Product& p) {
    using F = Form<BITS>;
    constexpr int WARPS = 8, ROWS = 16 * TILES, TOKENS = 8 * EIGHTS;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int tiles = (p.rows + 15) / 16, first_tile = blockIdx.x * TILES;
    const Sources<EIGHTS, TILES> sources(p, first_tile, lane);
    const int from = static_cast<int>(static_cast<long long>(p.steps) * blockIdx.y / gridDim.y);
    const int to = static_cast<int>(static_cast<long long>(p.steps) * (blockIdx.y + 1) / gridDim.y);
    u16* tables = shared<u16>(0);  // [ROWS, 16]
    if constexpr (TABLE) {
        for (int i = threadIdx.x; i < ROWS * 16; i += blockDim.x)
            tables[i] = p.tables[p.row_tables ? min(first_tile * 16 + i / 16, tiles * 16 - 1) * 16 + i % 16 : i % 16];
        sync_block();
    }
    float total[TILES][EIGHTS][4] = {};
    float sums[TILES][EIGHTS][4] = {};  // since the last scale
    using S = Step<BITS, FLUSH, ZEROS, EIGHTS, TILES>;
    S now, next;
    const int whole = min(to, p.cols / F::step);
    int step = from + warp;
    if (step < whole) now.template load<false>(p, sources, step, lane);
#pragma unroll 2
    for (; step < whole; step += WARPS) {
        if (step + WARPS < whole) next.template load<false>(p, sources, step + WARPS, lane);
        multiply<BITS, TABLE>(now, tables, g, sums, total);
        now = next;
    }
    for (; step < to; step += WARPS) {
        now.template load<true>(p, sources, step, lane);
        multiply<BITS, TABLE>(now, tables, g, sums, total);
    }
    // The warps' sums become one.
    float* mine = shared<float>(TABLE ? ROWS * 32 : 0);  // [WARPS, TOKENS, ROWS]
#pragma unroll
    for (int r = 0; r < TILES; r++)
#pragma unroll
        for (int e = 0; e < EIGHTS; e++)
#pragma unroll
            for (int k = 0; k < 4; k++)
                mine[(warp * TOKENS + e * 8 + 2 * t + k % 2) * ROWS + r * 16 + g + k / 2 * 8] = FLUSH ? total[r][e][k] : sums[r][e][k];
    sync_block();
    const bool alone = gridDim.y == 1;
    for (int i = threadIdx.x; i < ROWS * TOKENS; i += blockDim.x) {
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += mine[w * ROWS * TOKENS + i];
        if (alone) finish<OUT>(p, first_tile * 16 + i % ROWS, i / ROWS, sum);
        else p.partial[(static_cast<long long>(blockIdx.y) * gridDim.x + blockIdx.x) * ROWS * TOKENS + i] = sum;
    }
    if (alone) return;
    // The last block of these rows adds up what all have left, always in the same order.
    fence();
    sync_block();
    int* last = shared<int>(0);
    if (threadIdx.x == 0) *last = count_up(p.arrived + blockIdx.x) == static_cast<int>(gridDim.y) - 1;
    sync_block();
    if (!*last) return;
    fence();
    for (int i = threadIdx.x; i < ROWS * TOKENS; i += blockDim.x) {
        float sum = 0.0f;
        for (int s = 0; s < static_cast<int>(gridDim.y); s++)
            sum += load_fresh(p.partial + (static_cast<long long>(s) * gridDim.x + blockIdx.x) * ROWS * TOKENS + i);
        finish<OUT>(p, first_tile * 16 + i % ROWS, i / ROWS, sum);
    }
    if (threadIdx.x == 0) p.arrived[blockIdx.x] = 0;
}
