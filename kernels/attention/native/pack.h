// Rows in memory brought into the orders that the tile reads.

// One head's rows: element (i, d) at data + i * stride + d.
template <class In>
struct Head {
    In* data;
    int64_t stride;

    In* row(int64_t i) const { return data + i * stride; }
};

template <class In>
inline Head<In> head_of(const Rows& x, int64_t batch, int64_t head) {
    return {static_cast<In*>(x.data) + batch * x.batch + head * x.head, x.row};
}

template <int N>
struct Vectors {
    static constexpr int NUM = N;
};

template <class F>
inline int64_t words_of(int64_t width) {
    return ceil_div(width, F::PACK);
}

// Rows [begin, end), at most NV * W, as lanes: to [words rounded up to W][NV * W], zeros in the lanes past the end
template <class F, int NV, class In>
void pack_lanes(uint32_t* to, Head<In> x, int64_t begin, int64_t end, int64_t width) {
    for (int64_t p = 0; p < words_of<F>(width); p += W) {
        for (int64_t i = 0; i < NV * W; i += W) {
            Vec part[W];
            for (int64_t j = 0; j < W; ++j)
                part[j] = begin + i + j < end ? F::along(x.row(begin + i + j), p * F::PACK, width) : zero();
            transpose(part);
            for (int64_t j = 0; j < W; ++j) store(floats(to) + (p + j) * NV * W + i, part[j]);
        }
    }
}

// Rows [begin, end) contracted, columns broadcast: for each panel of W columns [num][W] words; rows and columns past
// the end are zeros
template <class F, class In>
void pack_columns(uint32_t* to, Head<In> x, int64_t begin, int64_t end, int64_t width, int64_t num) {
    for (int64_t p = 0; p < num; ++p) {
        const int64_t i = begin + p * F::PACK;
        const In* second = F::PACK > 1 && i + 1 < end ? x.row(i + 1) : nullptr;
        for (int64_t d = 0; d < width; d += W)
            store(floats(to) + d * num + p * W, i < end ? F::across(x.row(i), second, d, width) : zero());
    }
}

// how pack_columns lays its words out
inline Broadcast columns_of(const uint32_t* packed, int64_t num) { return {packed, num * W * 4, 4, W * 4}; }

// Calls visit(integral constant N, d) for the columns [d, d + N * W) of ever narrower groups: N = NV, NV / 2, ..., 1
template <int NV, class Visit>
void each_group(int64_t width, Visit visit, int64_t d = 0) {
    for (; d + (NV - 1) * W < width; d += NV * W) visit(Vectors<NV>{}, d);
    if constexpr (NV > 1) each_group<NV / 2>(width, visit, d);
}

// Rows [begin, end) contracted, columns as lanes: for each group of columns [num][N * W] words
template <class F, int NV, class In>
void pack_contracted(uint32_t* to, Head<In> x, int64_t begin, int64_t end, int64_t width, int64_t num) {
    each_group<NV>(width, [&](auto group, int64_t d0) {
        for (int64_t p = 0; p < num; ++p) {
            const int64_t i = begin + p * F::PACK;
            const In* second = F::PACK > 1 && i + 1 < end ? x.row(i + 1) : nullptr;
            for (int64_t d = d0; d < d0 + group.NUM * W; d += W, to += W)
                store(floats(to), i < end ? F::across(x.row(i), second, d, width) : zero());
        }
    });
}

// Rows [begin, end) as they are, words: to [end - begin][words rounded up to W], zeros past the width
template <class F, class In>
void copy_rows(uint32_t* to, Head<In> x, int64_t begin, int64_t end, int64_t width) {
    for (int64_t i = begin; i < end; ++i) {
        for (int64_t p = 0; p < words_of<F>(width); p += W)
            store(floats(to) + p, F::along(x.row(i), p * F::PACK, width));
        to += round_up(words_of<F>(width), W);
    }
}

// Sums [width rounded up to W][lanes], times a factor per lane, as rows [0, num) of x
template <int NV, class In>
void unpack_lanes(Head<In> x, const float* sums, int64_t num, int64_t width, const float* factor) {
    for (int64_t d = 0; d < width; d += W) {
        for (int64_t i = 0; i < num; i += W) {
            Vec part[W];
            const Vec scale = load(factor + i);
            for (int64_t j = 0; j < W; ++j) part[j] = mul(load(sums + (d + j) * NV * W + i), scale);
            transpose(part);
            for (int64_t j = 0; j < W && i + j < num; ++j) store_first(x.row(i + j) + d, part[j], width - d);
        }
    }
}

// Rows as a broadcast operand. Where the tensor's own rows are words they are read in place, else a copy is.
template <class F>
struct WordRows {
    const char* data;
    int64_t stride;  // bytes

    const char* row(int64_t i) const { return data + i * stride; }
};

template <class F, class In>
constexpr bool in_place(int64_t width) {
    return __is_same(In, typename F::Element) && width % F::PACK == 0;
}

// The keys of one block that may be read, a multiple of ROWS: those of the last group from a padded copy.
template <class F>
struct KeyRows {
    WordRows<F> rows;
    int64_t whole;   // rows in whole groups
    int64_t padded;  // rows with the last group completed
    alignas(64) uint32_t last[ROWS * (MAX_WIDTH + W)];
    int64_t last_stride;  // bytes

    void set(WordRows<F> block, int64_t num, int64_t words) {
        rows = block, whole = num / ROWS * ROWS, padded = round_up(num, ROWS), last_stride = words * 4;
        for (int64_t r = 0; r < ROWS && whole < padded; ++r) {
            char* to = reinterpret_cast<char*>(last) + r * last_stride;
            if (whole + r < num)
                __builtin_memcpy(to, rows.row(whole + r), last_stride);
            else
                __builtin_memset(to, 0, last_stride);
        }
    }

    Broadcast group(int64_t r0) const {
        if (r0 < whole) return {rows.row(r0), W * rows.stride, rows.stride, 4};
        return {last, W * last_stride, last_stride, 4};
    }
};

inline int64_t keys_in(const Call& c, int64_t block) {
    int64_t num = c.kv_len - block * c.block_k;
    if (num > c.block_k) num = c.block_k;
    if (c.kv_valid && c.kv_valid[block] < num) num = c.kv_valid[block];
    return num;
}

constexpr float LOG2E = 1.44269504088896f, LN2 = 0.693147180559945f;

// The keys' bias in units of log2, -inf for those that complete the last group
inline void log2_bias(float* to, const Call& c, int64_t batch, int64_t head, int64_t block, int64_t num,
                      int64_t padded) {
    const float* bias = c.bias ? c.bias + batch * c.bias_batch + head * c.bias_head + block * c.block_k : nullptr;
    for (int64_t i = 0; i < num; ++i) to[i] = bias ? bias[i] * LOG2E : 0.f;
    for (int64_t i = num; i < padded; ++i) to[i] = -__builtin_inff();
}
