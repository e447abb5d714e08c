// Backward: one task is a range of key blocks of one kv head, one key block after the other, so that d_k and d_v stay
// in the cache while the queries that see the block pass by; d_q is summed in memory, one copy for each range. Ranges
// depend on the problem alone and every sum has one order: the result is the same for any number of threads.
template <class F, class In, int NV>
struct Backward {
    static constexpr int64_t LANES = NV * W, CONTRACTED = LANES / F::PACK;
    static constexpr int64_t TASKS = 4;  // ranges per head are made until there are as many tasks
    static constexpr int64_t STRIP = 32;  // keys at a time, so that the queries' words stay in the first cache

    struct Scratch {
        alignas(64) uint32_t k_copy[MAX_BLOCK * (MAX_WIDTH + W)], v_copy[MAX_BLOCK * (MAX_WIDTH + W)];
        alignas(64) uint32_t k_columns[MAX_BLOCK * MAX_WIDTH];
        alignas(64) float d_k[(MAX_BLOCK + ROWS) * MAX_WIDTH], d_v[(MAX_BLOCK + ROWS) * MAX_WIDTH];
        alignas(64) uint32_t p_rows[(MAX_BLOCK + ROWS) * MAX_BLOCK], ds_rows[(MAX_BLOCK + ROWS) * MAX_BLOCK];
        alignas(64) uint32_t ds[(MAX_BLOCK + ROWS) * LANES];
        alignas(64) float p[STRIP * LANES];
        alignas(64) float bias[MAX_BLOCK + ROWS];
        KeyRows<F> k, v;
    };

    // LANES queries, packed for the scores
    struct Tile {
        uint32_t *q_lanes, *g_lanes;
        float *lse, *delta;  // [LANES], in log2; +inf where a query sees nothing. delta = d_o . o - d_lse
    };

    const Call& c;
    const QueryLists& lists;
    int64_t num_q, num_k, tiles, group, splits;  // tiles: of a head, in whole query blocks
    int64_t head0, wave;  // the kv heads now at work, counted over the batch
    uint32_t* packed;
    float* sums;           // of d_q: [splits][wave * group][tiles][columns][LANES]
    uint8_t* touched;      // [splits][wave * group][tiles]
    Scratch* scratch;

    static int64_t columns(int64_t width) { return round_up(width, W); }
    static int64_t lane_words(int64_t width) { return round_up(words_of<F>(width), W) * LANES; }
    int64_t tile_words() const { return lane_words(c.width) + lane_words(c.v_width) + 2 * LANES; }
    int64_t block_words() const {
        return c.block_q / LANES * tile_words() + (columns(c.width) + columns(c.v_width)) * block_rows();
    }
    int64_t block_rows() const { return c.block_q / F::PACK; }
    int64_t slot(int64_t split, int64_t head, int64_t tile) const {
        return (split * wave * group + head) * tiles + tile;
    }

    Tile tile_at(int64_t head, int64_t block, int64_t tile) const {
        Tile t;
        t.q_lanes = packed + (head * num_q + block) * block_words() + tile * tile_words();
        t.g_lanes = t.q_lanes + lane_words(c.width);
        t.lse = floats(t.g_lanes + lane_words(c.v_width));
        t.delta = t.lse + LANES;
        return t;
    }

    // a block's queries, contracted for d_k, and their d_o, for d_v
    uint32_t* q_rows(int64_t head, int64_t block) const {
        return tile_at(head, block, c.block_q / LANES).q_lanes;
    }
    uint32_t* g_rows(int64_t head, int64_t block) const {
        return q_rows(head, block) + columns(c.width) * block_rows();
    }

    static Status run(const Call& c, const QueryLists& lists) {
        const int64_t heads = c.batch * c.kv_heads, num_k = ceil_div(c.kv_len, c.block_k);
        int64_t splits = ceil_div(TASKS, heads);
        if (splits > num_k) splits = num_k;
        int64_t wave = ceil_div(2 * c.threads, splits);
        if (wave > heads) wave = heads;
        const int64_t num_q = ceil_div(c.q_len, c.block_q), tiles_of_head = num_q * (c.block_q / LANES);
        Backward b{c, lists, num_q, num_k, tiles_of_head, c.heads / c.kv_heads, splits, 0, wave, {}, {}, {}, {}};
        const int64_t local_heads = wave * b.group, slots = splits * local_heads * b.tiles;
        b.packed = static_cast<uint32_t*>(allocate(local_heads * b.num_q * b.block_words() * 4));
        b.sums = static_cast<float*>(allocate(slots * columns(c.width) * LANES * 4));
        b.touched = static_cast<uint8_t*>(allocate(slots));
        b.scratch = static_cast<Scratch*>(allocate(c.threads * sizeof(Scratch)));
        const bool ready = b.packed && b.sums && b.touched && b.scratch;
        for (; ready && b.head0 < heads; b.head0 += wave) b.run_wave(heads - b.head0 < wave ? heads - b.head0 : wave);
        release(b.packed), release(b.sums), release(b.touched), release(b.scratch);
        return ready ? OK : NO_MEMORY;
    }

    void run_wave(int64_t heads) {
        __builtin_memset(touched, 0, splits * wave * group * tiles);
        run_parallel(heads * group * num_q, c.threads,
                     [](void* x, int64_t i, int64_t) { static_cast<Backward*>(x)->prepare(i); }, this);
        run_parallel(heads * splits, c.threads,
                     [](void* x, int64_t i, int64_t worker) { static_cast<Backward*>(x)->range(i, worker); }, this);
        run_parallel(heads * group * tiles, c.threads,
                     [](void* x, int64_t i, int64_t) { static_cast<Backward*>(x)->finish(i); }, this);
    }

    // i = (head of the wave, query block)
    void prepare(int64_t i) const {
        const int64_t all_heads = head0 * group + i / num_q, batch = all_heads / c.heads, head = all_heads % c.heads;
        const int64_t begin = i % num_q * c.block_q, end = begin + c.block_q < c.q_len ? begin + c.block_q : c.q_len;
        const auto q = head_of<In>(c.q, batch, head), g = head_of<In>(c.d_o, batch, head);
        const auto o = head_of<In>(c.o, batch, head);
        pack_contracted<F, NV>(q_rows(i / num_q, i % num_q), q, begin, end, c.width, block_rows());
        pack_contracted<F, NV>(g_rows(i / num_q, i % num_q), g, begin, end, c.v_width, block_rows());
        for (int64_t tile = 0; tile < c.block_q / LANES; ++tile) {
            const Tile t = tile_at(i / num_q, i % num_q, tile);
            pack_lanes<F, NV>(t.q_lanes, q, begin + tile * LANES, end, c.width);
            pack_lanes<F, NV>(t.g_lanes, g, begin + tile * LANES, end, c.v_width);
            for (int64_t lane = 0; lane < LANES; ++lane) {
                const int64_t row = begin + tile * LANES + lane, at = all_heads * c.q_len + row;
                const bool empty = row >= end || c.lse[at] == -__builtin_inff();
                t.lse[lane] = empty ? __builtin_inff() : c.lse[at] * LOG2E;
                t.delta[lane] = empty ? 0 : dot(g.row(row), o.row(row), c.v_width) - (c.d_lse ? c.d_lse[at] : 0);
            }
        }
    }

    static float dot(const In* a, const In* b, int64_t width) {
        Vec sum = zero();
        for (int64_t d = 0; d < width; d += W)
            sum = fma(load_first(a + d, width - d), load_first(b + d, width - d), sum);
        alignas(64) float parts[W];
        store(parts, sum);
        for (int64_t i = 1; i < W; ++i) parts[0] += parts[i];
        return parts[0];
    }

    int64_t list_of(int64_t batch, int64_t head) const {
        return ((c.list_batch > 1 ? batch : 0) * c.list_heads + (c.list_heads > 1 ? head : 0)) * num_k;
    }

    // The first key block of a range, such that ranges have equal numbers of query blocks
    int64_t range_start(int64_t batch, int64_t kv_head, int64_t split) const {
        int64_t all = 0, seen = 0, block = 0;
        const int64_t first = kv_head * group;
        for (int64_t head = first; head < first + group; ++head)
            all += lists.start[list_of(batch, head) + num_k] - lists.start[list_of(batch, head)];
        if (split == splits) return num_k;
        for (; block < num_k && seen * splits < all * split; ++block)
            for (int64_t head = first; head < first + group; ++head)
                seen += lists.start[list_of(batch, head) + block + 1] - lists.start[list_of(batch, head) + block];
        return split ? block : 0;
    }

    // i = (kv head of the wave, split)
    void range(int64_t i, int64_t worker) const {
        const int64_t local = i / splits, batch = (head0 + local) / c.kv_heads, kv_head = (head0 + local) % c.kv_heads;
        Scratch& s = scratch[worker];
        const int64_t end = range_start(batch, kv_head, i % splits + 1);
        for (int64_t block = range_start(batch, kv_head, i % splits); block < end; ++block) {
            const int64_t num = keys_in(c, block);
            load_keys(s, batch, kv_head, block, num);
            for (int64_t g = 0; g < group && num > 0; ++g) {
                const int64_t head = kv_head * group + g, list = list_of(batch, head) + block;
                log2_bias(s.bias, c, batch, head, block, num, s.k.padded);
                for (int64_t n = lists.start[list]; n < lists.start[list + 1]; ++n)
                    query_block(s, local * group + g, i % splits, lists.items[n]);
            }
            store_keys(s, batch, kv_head, block, num);
        }
    }

    void query_block(Scratch& s, int64_t head, int64_t split, int64_t block) const {
        const int64_t left = ceil_div(c.q_len - block * c.block_q, LANES), whole = c.block_q / LANES;
        const int64_t used = left < whole ? left : whole;
        for (int64_t tile = 0; tile < used; ++tile) {
            const int64_t at = slot(split, head, block * whole + tile);
            differentiate(s, tile_at(head, block, tile), tile * CONTRACTED);
            add_to_queries(s, sums + at * columns(c.width) * LANES, touched[at]);
            touched[at] = 1;
        }
        add_to_keys(s.d_v, s.p_rows, g_rows(head, block), c.v_width, s.k.padded, used * CONTRACTED);
        add_to_keys(s.d_k, s.ds_rows, q_rows(head, block), c.width, s.k.padded, used * CONTRACTED);
    }

    void load_keys(Scratch& s, int64_t batch, int64_t kv_head, int64_t block, int64_t num) const {
        const auto k = head_of<In>(c.k, batch, kv_head), v = head_of<In>(c.v, batch, kv_head);
        const int64_t begin = block * c.block_k;
        set_rows(s.k, s.k_copy, k, begin, num, c.width);
        set_rows(s.v, s.v_copy, v, begin, num, c.v_width);
        pack_columns<F>(s.k_columns, k, begin, begin + num, c.width, c.block_k / F::PACK);
        __builtin_memset(s.d_k, 0, s.k.padded * columns(c.width) * 4);
        __builtin_memset(s.d_v, 0, s.k.padded * columns(c.v_width) * 4);
    }

    static void set_rows(KeyRows<F>& rows, uint32_t* copy, Head<In> x, int64_t begin, int64_t num, int64_t width) {
        if (in_place<F, In>(width)) {
            const int64_t bytes = x.stride * static_cast<int64_t>(sizeof(In));
            return rows.set({reinterpret_cast<const char*>(x.row(begin)), bytes}, num, words_of<F>(width));
        }
        copy_rows<F>(copy, x, begin, begin + num, width);
        rows.set({reinterpret_cast<const char*>(copy), round_up(words_of<F>(width), W) * 4}, num, words_of<F>(width));
    }

    static void product(Vec (&sum)[ROWS][NV], const KeyRows<F>& rows, int64_t r0, const uint32_t* lanes,
                        int64_t words) {
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) sum[r][v] = zero();
        const Broadcast a = rows.group(r0);
        multiply<F, NV>(sum, static_cast<const char*>(a.data), a.row, 4, lanes, words);
    }

    // P = exp(S - lse) and dS = P (dP - delta) of one tile, into the columns from word `column` on
    void differentiate(Scratch& s, const Tile& t, int64_t column) const {
        for (int64_t begin = 0; begin < s.k.padded; begin += STRIP) {
            const int64_t end = begin + STRIP < s.k.padded ? begin + STRIP : s.k.padded;
            for (int64_t r0 = begin; r0 < end; r0 += ROWS)
                probabilities(s, t, r0, s.p + (r0 - begin) * LANES, s.p_rows + r0 * block_rows() + column);
            for (int64_t r0 = begin; r0 < end; r0 += ROWS)
                score_gradients(s, t, r0, s.p + (r0 - begin) * LANES, s.ds_rows + r0 * block_rows() + column);
        }
    }

    void probabilities(Scratch& s, const Tile& t, int64_t r0, float* p, uint32_t* rows) const {
        const Vec scale = all(c.scale * LOG2E);
        Vec x[ROWS][NV];
        product(x, s.k, r0, t.q_lanes, words_of<F>(c.width));
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            const Vec bias = all(s.bias[r0 + r]);
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) {
                x[r][v] = exp2<F::DEGREE>(sub(fma(x[r][v], scale, bias), load(t.lse + v * W)));
                store(p + r * LANES + v * W, x[r][v]);
            }
            F::store_along(rows + r * block_rows(), x[r]);
        }
    }

    void score_gradients(Scratch& s, const Tile& t, int64_t r0, const float* p, uint32_t* rows) const {
        Vec x[ROWS][NV];
        product(x, s.v, r0, t.g_lanes, words_of<F>(c.v_width));
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v)
                x[r][v] = mul(sub(x[r][v], load(t.delta + v * W)), load(p + r * LANES + v * W));
            F::store_along(rows + r * block_rows(), x[r]);
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r += F::PACK) {
            float* to = floats(s.ds) + (r0 + r) / F::PACK * LANES;
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) {
                if constexpr (F::PACK == 2)
                    store(to + v * W, F::pair(x[r][v], x[r + 1][v]));
                else
                    store(to + v * W, x[r][v]);
            }
        }
    }

    // sums [rows][columns] += weights [rows][queries] times the block's rows
    void add_to_keys(float* to, const uint32_t* weights, const uint32_t* rows, int64_t width, int64_t num,
                     int64_t words) const {
        each_group<NV>(width, [&](auto vectors, int64_t d) {
            const Broadcast a{weights, W * block_rows() * 4, block_rows() * 4, 4};
            accumulate<F, vectors.NUM, KEEP>(to + d, columns(width), num, a, rows + d * block_rows(), words);
        });
    }

    void add_to_queries(Scratch& s, float* to, bool started) const {
        const int64_t rows = round_up(c.width, ROWS), num = s.k.padded / F::PACK;
        const Broadcast k = columns_of(s.k_columns, c.block_k / F::PACK);
        if (started)
            accumulate<F, NV, KEEP>(to, LANES, rows, k, s.ds, num);
        else
            accumulate<F, NV, ZERO>(to, LANES, rows, k, s.ds, num);
    }

    void store_keys(const Scratch& s, int64_t batch, int64_t kv_head, int64_t block, int64_t num) const {
        const auto d_k = head_of<In>(c.d_k, batch, kv_head), d_v = head_of<In>(c.d_v, batch, kv_head);
        for (int64_t i = 0; i < c.block_k && block * c.block_k + i < c.kv_len; ++i) {
            const int64_t row = block * c.block_k + i;
            store_row(d_k.row(row), i < num ? s.d_k + i * columns(c.width) : nullptr, c.width, c.scale);
            store_row(d_v.row(row), i < num ? s.d_v + i * columns(c.v_width) : nullptr, c.v_width, 1);
        }
    }

    static void store_row(In* to, const float* sums, int64_t width, float factor) {
        for (int64_t d = 0; d < width; d += W)
            store_first(to + d, sums ? mul(load(sums + d), all(factor)) : zero(), width - d);
    }

    // i = (head of the wave, tile): d_q from the sums of all ranges
    void finish(int64_t i) const {
        const int64_t all_heads = head0 * group + i / tiles, begin = i % tiles * LANES;
        const int64_t num = begin + LANES < c.q_len ? LANES : c.q_len - begin, size = columns(c.width) * LANES;
        float* total = sums + slot(0, i / tiles, i % tiles) * size;
        if (!touched[slot(0, i / tiles, i % tiles)]) __builtin_memset(total, 0, size * 4);
        for (int64_t split = 1; split < splits; ++split) {
            const int64_t at = slot(split, i / tiles, i % tiles);
            for (int64_t n = 0; n < size && touched[at]; n += W)
                store(total + n, add(load(total + n), load(sums + at * size + n)));
        }
        alignas(64) float factor[LANES];
        for (int64_t lane = 0; lane < LANES; ++lane) factor[lane] = c.scale;
        const auto d_q = head_of<In>(c.d_q, all_heads / c.heads, all_heads % c.heads);
        unpack_lanes<NV>(Head<In>{d_q.row(begin), d_q.stride}, total, num, c.width, factor);
    }
};
