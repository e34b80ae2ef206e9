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

// Eight columns of a row of x from `col`, 0 beyond the last.
ON_GPU Words4 load_x(const Product& p, int token, int col) {
    Words4 w = {{0, 0, 0, 0}};
    if (token >= p.tokens || col >= p.cols) return w;
    const u16* at = p.x + static_cast<long long>(token) * p.x_stride + col;
    if (col + 8 <= p.cols) return *reinterpret_cast<const Words4*>(at);
#pragma unroll
    for (int i = 0; i < 7; i++)
        if (i < p.cols - col) w.v[i / 2] |= static_cast<u32>(at[i]) << (i % 2 * 16);
    return w;
}

// What a warp needs for one step, on its way from memory while the step before is computed.
template <int BITS, int FLUSH, bool ZEROS, int EIGHTS, int TILES> struct Step {
    using F = Form<BITS>;
    static constexpr int groups = FLUSH == 0 || FLUSH >= F::step ? 1 : F::step / FLUSH;  // at most so many in a step
    Codes<BITS> codes[TILES];
    u32 scales[TILES][groups];
    u16 zeros[TILES][groups];
    Words4 x[F::blocks][EIGHTS];

    ON_GPU void load(const Product& p, int first_tile, int tiles, int step, int lane) {
#pragma unroll
        for (int r = 0; r < TILES; r++) {
            long long tile = min(first_tile + r, tiles - 1);  // the rows of a tile too many are not written
            codes[r] = load_codes<BITS>(p.codes, p.high, tile * p.steps + step, lane);
#pragma unroll
            for (int i = 0; i < groups; i++) {
                int group = FLUSH == 0 ? 0 : min((step * F::step + i * FLUSH) >> p.group_shift, p.groups - 1);
                long long at = (tile * p.groups + group) * 8 + lane / 4;
                if (FLUSH) scales[r][i] = p.scales[at];
                if (ZEROS) zeros[r][i] = p.zeros[at];
            }
        }
#pragma unroll
        for (int b = 0; b < F::blocks; b++)
#pragma unroll
            for (int e = 0; e < EIGHTS; e++) x[b][e] = load_x(p, e * 8 + lane / 4, step * F::step + b * 32 + lane % 4 * 8);
    }
};

// BITS of a code; TABLE: codes are looked up; FLUSH: columns after which a scale is applied (0: none but that of the row);
// ZEROS: groups have zeros of their own; EIGHTS: tokens / 8; OUT: u16 (halves) or float.
template <int BITS, bool TABLE, int FLUSH, bool ZEROS, int EIGHTS, int TILES, class OUT> ON_GPU void product(const Product& p) {
    using F = Form<BITS>;
    constexpr int WARPS = 8, ROWS = 16 * TILES, TOKENS = 8 * EIGHTS;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int tiles = (p.rows + 15) / 16, first_tile = blockIdx.x * TILES;
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
    if (from + warp < to) now.load(p, first_tile, tiles, from + warp, lane);
    for (int step = from + warp; step < to; step += WARPS) {
        if (step + WARPS < to) next.load(p, first_tile, tiles, step + WARPS, lane);
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
                if (flush) {
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
        now = next;
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
