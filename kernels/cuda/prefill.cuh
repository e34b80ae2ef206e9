// y = x · Wᵀ for many rows of x. A block computes 128 rows of W by 16 · EIGHTS tokens: eight warps, four along W and two along the tokens, each
// 32 rows by 8 · EIGHTS tokens. Codes and x come by asynchronous copies, a slice of columns ahead; codes become halves, times their scale,
// in the registers of the warp that multiplies them.
#pragma once
#include "product.cuh"

template <int BITS, int EIGHTS, bool TABLE> struct Slice {
    using F = Form<BITS>;
    static constexpr int columns = F::step > 64 ? F::step : 64;
    static constexpr int blocks = columns / 32, steps = columns / F::step;
    static constexpr int chunks = columns / 8;  // of x: 16 bytes
    static constexpr int tokens = 16 * EIGHTS;
    static constexpr int codes_at = 0, high_at = 8 * steps * 512, x_at = high_at + (BITS == 3 ? 8 * steps * 256 : 0);
    static constexpr int bytes = x_at + tokens * columns * 2;
    static constexpr int tables_at = 2 * bytes;  // behind two slices
};

// Neighbouring rows of x keep their chunks in different halves of 128 bytes, so that eight lanes never ask one bank for two things.
ON_GPU int swizzled(int token, int chunk) { return chunk ^ (token & 1) * 4; }

// The chunks of 16 bytes that a thread copies of every slice: the same places, one slice further along.
template <int BITS, int EIGHTS, bool TABLE> struct Copies {
    using S = Slice<BITS, EIGHTS, TABLE>;
    static constexpr int threads = 256, across = threads / S::chunks;  // tokens that the threads take at a time
    static constexpr int turns = S::tokens / across;
    const u8* codes[S::steps];
    const u8* high;
    const u16* x[turns];
    bool token[turns];

    ON_GPU Copies(const Product& p, int first_tile, int tiles, int first_token) {
        const int i = threadIdx.x;
#pragma unroll
        for (int s = 0; s < S::steps; s++) {  // a tile's steps lie one behind the other, here and there
            const int chunk = s * threads + i;
            const long long tile = min(first_tile + chunk / (S::steps * 32), tiles - 1);
            codes[s] = static_cast<const u8*>(p.codes) + (tile * p.steps * 32 + chunk % (S::steps * 32)) * 16;
        }
        high = static_cast<const u8*>(p.high) + (static_cast<long long>(min(first_tile + i / 16, tiles - 1)) * p.steps * 16 + i % 16) * 16;
#pragma unroll
        for (int n = 0; n < turns; n++) {
            const int row = first_token + n * across + i / S::chunks;
            token[n] = row < p.tokens;
            x[n] = p.x + static_cast<long long>(token[n] ? row : 0) * p.x_stride + i % S::chunks * 8;
        }
    }
    ON_GPU void start(const Product& p, int slice, int at) const {
        const int i = threadIdx.x, chunk = i % S::chunks;
#pragma unroll
        for (int s = 0; s < S::steps; s++) copy_async(shared<u8>(at + S::codes_at + (s * threads + i) * 16), codes[s] + slice * S::steps * 512, 16);
        if constexpr (BITS == 3)
            if (i < 128) copy_async(shared<u8>(at + S::high_at + i * 16), high + slice * 256, 16);
        const int left = max(0, min(8, p.cols - slice * S::columns - chunk * 8)) * 2;
#pragma unroll
        for (int n = 0; n < turns; n++) {
            const int row = n * across + i / S::chunks, bytes = token[n] ? left : 0;
            const u16* from = x[n] + (bytes ? slice * S::columns : 0);
            copy_async(shared<u8>(at + S::x_at + (row * S::chunks + swizzled(row, chunk)) * 16), bytes ? from : p.x, bytes);
        }
    }
};

// Scales and zeros of a slice, on their way while the slice before is computed.
template <int BITS, int FLUSH, bool ZEROS, int BLOCKS> struct Groups {
    u32 scales[2][BLOCKS];
    u16 zeros[2][BLOCKS];
    ON_GPU void load(const Product& p, int slice, int first_tile, int tiles, int g) {
#pragma unroll
        for (int r = 0; r < 2; r++)
#pragma unroll
            for (int b = 0; b < BLOCKS; b++) {
                const long long tile = min(first_tile + r, tiles - 1);
                const int group = FLUSH == 0 ? 0 : (slice * BLOCKS + b) * 32 >> p.group_shift;
                const long long at = (tile * p.groups + group) * 8 + g;
                if (FLUSH) scales[r][b] = p.scales[at];
                if (ZEROS) zeros[r][b] = p.zeros[at];
            }
    }
};

template <int BITS, bool TABLE, int FLUSH, bool ZEROS, int EIGHTS, class OUT> ON_GPU void prefill(const Product& p) {
    using F = Form<BITS>;
    using S = Slice<BITS, EIGHTS, TABLE>;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int rows_of = warp % 4 * 2, tokens_of = warp / 4 * 8 * EIGHTS;  // this warp's tiles and tokens within the block
    const int tiles = (p.rows + 15) / 16, first_tile = blockIdx.x * 8, first_token = blockIdx.y * S::tokens;
    const int slices = p.steps / S::steps;
    u16* tables = shared<u16>(S::tables_at);  // [128, 16]
    if constexpr (TABLE)
        for (int i = threadIdx.x; i < 128 * 16; i += 256)
            tables[i] = p.tables[p.row_tables ? min(first_tile * 16 + i / 16, tiles * 16 - 1) * 16 + i % 16 : i % 16];
    float sums[2][EIGHTS][4] = {};
    Groups<BITS, FLUSH, ZEROS, S::blocks> now, next;
    const Copies<BITS, EIGHTS, TABLE> copies(p, first_tile, tiles, first_token);
    copies.start(p, 0, 0);
    copies_commit();
    now.load(p, 0, first_tile + rows_of, tiles, g);
    for (int slice = 0; slice < slices; slice++) {
        const int at = slice % 2 * S::bytes;
        if (slice + 1 < slices) {
            copies.start(p, slice + 1, S::bytes - at);
            next.load(p, slice + 1, first_tile + rows_of, tiles, g);
        }
        copies_commit();
        copies_wait<1>();
        sync_block();
        Codes<BITS> codes[2][S::steps];
#pragma unroll
        for (int r = 0; r < 2; r++)
#pragma unroll
            for (int s = 0; s < S::steps; s++) {
                int place = ((rows_of + r) * S::steps + s) * 32 + lane;
                codes[r][s].low = shared<Words4>(at + S::codes_at)[place];
                if constexpr (BITS == 3) codes[r][s].high = shared<Words2>(at + S::high_at)[place];
            }
#pragma unroll
        for (int b = 0; b < S::blocks; b++) {
            u32 a[2][2][4];
#pragma unroll
            for (int r = 0; r < 2; r++)
#pragma unroll
                for (int j = 0; j < 2; j++)
#pragma unroll
                    for (int q = 0; q < 4; q++) {
                        const int pair = (b % F::blocks * 2 + j) * 4 + q;
                        const Codes<BITS>& c = codes[r][b / F::blocks];
                        u32 zero = twice_1024(ZEROS ? now.zeros[r][b] >> 8 * (q % 2) & 255 : 1 << (BITS - 1));
                        if constexpr (TABLE) a[r][j][q] = looked_up(c, pair, tables + ((rows_of + r) * 16 + g + 8 * (q % 2)) * 16);
                        else a[r][j][q] = centred(c, pair, zero);
                        if (FLUSH) {
                            u32 scale = now.scales[r][b] >> 16 * (q % 2) & 0xffff;
                            a[r][j][q] = half2_mul(a[r][j][q], scale | scale << 16);
                        }
                    }
#pragma unroll
            for (int e = 0; e < EIGHTS; e++) {
                int token = tokens_of + 8 * e + g;
                Words4 x = shared<Words4>(at + S::x_at)[token * S::chunks + swizzled(token, 4 * b + t)];
#pragma unroll
                for (int j = 0; j < 2; j++)
#pragma unroll
                    for (int r = 0; r < 2; r++) mma(sums[r][e], a[r][j], x.v[2 * j], x.v[2 * j + 1]);
            }
        }
        now = next;
        sync_block();
    }
    // Eight tokens at a time change from the order of the products to whole rows of out.
    constexpr int PITCH = 36;
    float* mine = shared<float>(warp * 8 * PITCH * 4);
#pragma unroll
    for (int e = 0; e < EIGHTS; e++) {
#pragma unroll
        for (int r = 0; r < 2; r++)
#pragma unroll
            for (int k = 0; k < 4; k++) mine[(2 * t + k % 2) * PITCH + r * 16 + g + k / 2 * 8] = sums[r][e][k];
        sync_warp();
#pragma unroll 1
        for (int i = 0; i < 8; i++)
            finish<OUT>(p, (first_tile + rows_of) * 16 + lane, first_token + tokens_of + 8 * e + i, mine[i * PITCH + lane]);
        sync_warp();
    }
}
