// Forward: one task is NV * W queries of one head. Scores lie transposed, queries in lanes and keys in rows, so that
// maximum, sum and rescaling need no step across lanes.
template <class F, class In, int NV>
struct Forward {
    static constexpr int64_t LANES = NV * W;
    static constexpr float SLACK = 8;  // sums are rescaled only where the maximum grew by more than 2^SLACK

    struct Scratch {
        alignas(64) uint32_t q[(MAX_WIDTH + W) * LANES];
        alignas(64) float scores[(MAX_BLOCK + ROWS) * LANES];
        alignas(64) uint32_t p[(MAX_BLOCK + ROWS) * LANES];
        alignas(64) float sums[(MAX_WIDTH + W) * LANES];
        alignas(64) float bias[MAX_BLOCK + ROWS];
        alignas(64) float top[LANES], total[LANES], factor[LANES];
        KeyRows<F> keys;
    };

    const Call& c;
    int64_t num_q, num_k, tiles;
    uint32_t *columns, *copies;  // v of every block by columns; k where it cannot be read in place, else null
    Scratch* scratch;

    int64_t k_words() const { return round_up(words_of<F>(c.width), W); }
    int64_t block_words() const { return round_up(c.v_width, W) * (c.block_k / F::PACK); }

    static Status run(const Call& c) {
        Forward f{c, ceil_div(c.q_len, c.block_q), ceil_div(c.kv_len, c.block_k), ceil_div(c.q_len, LANES), {}, {}, {}};
        const int64_t heads = c.batch * c.kv_heads;
        f.columns = static_cast<uint32_t*>(allocate(heads * f.num_k * f.block_words() * 4));
        f.scratch = static_cast<Scratch*>(allocate(c.threads * sizeof(Scratch)));
        const bool copy = !in_place<F, In>(c.width);
        f.copies = copy ? static_cast<uint32_t*>(allocate(heads * c.kv_len * f.k_words() * 4)) : nullptr;
        const bool ready = f.columns && f.scratch && (f.copies || !copy);
        if (ready) {
            run_parallel(heads * f.num_k, c.threads,
                         [](void* x, int64_t i, int64_t) { static_cast<Forward*>(x)->prepare(i); }, &f);
            run_parallel(c.batch * c.heads * f.tiles, c.threads,
                         [](void* x, int64_t i, int64_t worker) { static_cast<Forward*>(x)->tile(i, worker); }, &f);
        }
        release(f.columns), release(f.scratch), release(f.copies);
        return ready ? OK : NO_MEMORY;
    }

    // Keys and values of one block and head, i = (batch, kv head, block)
    void prepare(int64_t i) const {
        const int64_t block = i % num_k, kv_head = i / num_k % c.kv_heads, batch = i / num_k / c.kv_heads;
        const int64_t begin = block * c.block_k, end = begin + keys_in(c, block);
        pack_columns<F>(columns + i * block_words(), head_of<In>(c.v, batch, kv_head), begin, end, c.v_width,
                        c.block_k / F::PACK);
        if (copies)
            copy_rows<F>(copies + (i / num_k * c.kv_len + begin) * k_words(), head_of<In>(c.k, batch, kv_head),
                         begin, end, c.width);
    }

    WordRows<F> keys_of(int64_t batch, int64_t kv_head) const {
        const int64_t before = (batch * c.kv_heads + kv_head) * c.kv_len * k_words();
        if (copies) return {reinterpret_cast<const char*>(copies + before), k_words() * 4};
        const auto k = head_of<In>(c.k, batch, kv_head);
        return {reinterpret_cast<const char*>(k.data), k.stride * static_cast<int64_t>(sizeof(In))};
    }

    // i = (batch, head, tile)
    void tile(int64_t i, int64_t worker) const {
        const int64_t begin = i % tiles * LANES, head = i / tiles % c.heads, batch = i / tiles / c.heads;
        const int64_t kv_head = head / (c.heads / c.kv_heads), end = begin + LANES < c.q_len ? begin + LANES : c.q_len;
        Scratch& s = scratch[worker];
        pack_lanes<F, NV>(s.q, head_of<In>(c.q, batch, head), begin, end, c.width);
        for (int64_t lane = 0; lane < LANES; ++lane) s.top[lane] = -__builtin_inff(), s.total[lane] = 0;

        const int64_t list = (c.list_batch > 1 ? batch : 0) * c.list_heads + (c.list_heads > 1 ? head : 0);
        const int64_t row = list * num_q + begin / c.block_q;
        const WordRows<F> keys = keys_of(batch, kv_head);
        bool started = false;
        for (int64_t n = 0; n < c.kv_num[row]; ++n) {
            const int64_t block = c.kv_idx[row * c.list_max + n], num = keys_in(c, block);
            if (num <= 0) continue;
            s.keys.set({keys.row(block * c.block_k), keys.stride}, num, words_of<F>(c.width));
            log2_bias(s.bias, c, batch, head, block, num, s.keys.padded);
            const uint32_t* values = columns + ((batch * c.kv_heads + kv_head) * num_k + block) * block_words();
            const bool rescale = score(s, values);
            const bool last = n + 1 == c.kv_num[row];
            exponentiate(s, {keys.row((last ? block : c.kv_idx[row * c.list_max + n + 1]) * c.block_k), keys.stride});
            add_values(s, values,
                       !started ? ZERO : rescale ? RESCALE : KEEP);
            started = true;
        }
        finish(s, batch, head, begin, end, started);
    }

    // scores of one block, in units of log2, and the new maximum; whether any lane's changed
    bool score(Scratch& s, const uint32_t* values) const {
        const int64_t share = block_words() / c.block_k * ROWS;  // of the values that come next, for each step
        Vec top[NV];
        for (int v = 0; v < NV; ++v) top[v] = all(-__builtin_inff());
        const Vec scale = all(c.scale * LOG2E);
        for (int64_t r0 = 0; r0 < s.keys.padded; r0 += ROWS) {
            Vec sum[ROWS][NV];
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
                for (int v = 0; v < NV; ++v) sum[r][v] = zero();
            const Broadcast k = s.keys.group(r0);
            prefetch(values + r0 / ROWS * share, share * 4);
            multiply<F, NV>(sum, static_cast<const char*>(k.data), k.row, 4, s.q, words_of<F>(c.width));
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; ++r) {
                const Vec bias = all(s.bias[r0 + r]);
#pragma GCC unroll 8
                for (int v = 0; v < NV; ++v) {
                    sum[r][v] = fma(sum[r][v], scale, bias);
                    store(s.scores + (r0 + r) * LANES + v * W, sum[r][v]);
                    top[v] = max(sum[r][v], top[v]);
                }
            }
        }
        bool changed = false;
        for (int v = 0; v < NV; ++v) {
            const Vec before = load(s.top + v * W), bound = add(before, all(SLACK));
            const Vec after = where_greater(top[v], bound, top[v], before);
            const Vec factor = exp2<5>(sub(before, finite(after)));
            changed |= any_greater(top[v], bound);
            store(s.factor + v * W, factor);
            store(s.total + v * W, mul(load(s.total + v * W), factor));
            store(s.top + v * W, after);
        }
        return changed;
    }

    // a lane without any key so far is shifted by nothing
    static Vec finite(Vec top) { return where_greater(top, all(-__builtin_inff()), top, zero()); }

    // scores to probabilities, words for the product with v; adds to the totals, before any rounding
    void exponentiate(Scratch& s, WordRows<F> next) const {
        Vec top[NV], total[NV];
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) top[v] = finite(load(s.top + v * W)), total[v] = load(s.total + v * W);
        for (int64_t r = 0; r < s.keys.padded; r += F::PACK) {
            for (int64_t i = r; i < r + F::PACK; ++i) prefetch(next.row(i), words_of<F>(c.width) * 4);
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) {
                const float* from = s.scores + r * LANES + v * W;
                Vec p = exp2<F::DEGREE>(sub(load(from), top[v]));
                total[v] = add(total[v], p);
                if constexpr (F::PACK == 2) {
                    const Vec second = exp2<F::DEGREE>(sub(load(from + LANES), top[v]));
                    total[v] = add(total[v], second);
                    p = F::pair(p, second);
                }
                store(floats(s.p) + r / F::PACK * LANES + v * W, p);
            }
        }
        for (int v = 0; v < NV; ++v) store(s.total + v * W, total[v]);
    }

    void add_values(Scratch& s, const uint32_t* block, Start start) const {
        const int64_t rows = round_up(c.v_width, ROWS), num = s.keys.padded / F::PACK;
        const Broadcast v = columns_of(block, c.block_k / F::PACK);
        if (start == ZERO) accumulate<F, NV, ZERO>(s.sums, LANES, rows, v, s.p, num);
        if (start == KEEP) accumulate<F, NV, KEEP>(s.sums, LANES, rows, v, s.p, num);
        if (start == RESCALE) accumulate<F, NV, RESCALE>(s.sums, LANES, rows, v, s.p, num, s.factor);
    }

    void finish(Scratch& s, int64_t batch, int64_t head, int64_t begin, int64_t end, bool started) const {
        float* lse = c.lse + (batch * c.heads + head) * c.q_len;
        if (!started) __builtin_memset(s.sums, 0, round_up(c.v_width, W) * LANES * 4);
        for (int64_t lane = 0; lane < LANES; ++lane) {
            const bool empty = s.total[lane] == 0;
            s.factor[lane] = empty ? 0 : 1 / s.total[lane];
            if (begin + lane >= end) continue;
            lse[begin + lane] = empty ? -__builtin_inff() : LN2 * (s.top[lane] + log2f(s.total[lane]));
        }
        auto o = head_of<In>(c.o, batch, head);
        unpack_lanes<NV>(Head<In>{o.row(begin), o.stride}, s.sums, end - begin, c.v_width, s.factor);
    }
};
