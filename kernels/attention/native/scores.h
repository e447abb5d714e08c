// Scores between blocks: one task is 128 sampled queries of one head, whole blocks of them. Scores between tokens lie
// transposed as in forward.h. Of each block of keys a query keeps its largest score and the sum of exponentials
// relative to that; the query's own maximum and sum come at the end, exact, and nothing is rescaled on the way.
template <class F, class In, int NV>
struct BlockScores {
    static constexpr int64_t LANES = NV * W, QUERIES = MAX_BLOCK, TILES = QUERIES / LANES;

    struct Scratch {
        alignas(64) uint32_t q[TILES][(MAX_WIDTH + W) * LANES];
        alignas(64) uint32_t keys[MAX_BLOCK * (MAX_WIDTH + W)];
        alignas(64) float scores[MAX_BLOCK * LANES];
        alignas(64) float total[LANES];
    };

    const Scores& c;
    int64_t queries, keys, groups;  // sampled tokens of a head, and tasks
    Scratch* scratch;
    float* kept;  // for each worker [TILES][nK][2][LANES]: maximum, in units of log2, and sum; at the end the weight

    static Status run(const Scores& c) {
        BlockScores f{c, c.num_q * c.of_q, c.num_k * c.of_k, ceil_div(c.num_q * c.of_q, QUERIES), {}, {}};
        f.scratch = static_cast<Scratch*>(allocate(c.threads * sizeof(Scratch)));
        f.kept = static_cast<float*>(allocate(c.threads * f.kept_floats() * 4));
        const bool ready = f.scratch && f.kept;
        if (ready)
            run_parallel(c.batch * c.heads * f.groups, c.threads,
                         [](void* x, int64_t i, int64_t worker) { static_cast<BlockScores*>(x)->group(i, worker); }, &f);
        release(f.scratch), release(f.kept);
        return ready ? OK : NO_MEMORY;
    }

    int64_t kept_floats() const { return TILES * c.num_k * 2 * LANES; }

    // i = (batch, head, group); a block of keys stays in the second cache for all of the group's queries
    void group(int64_t i, int64_t worker) const {
        const int64_t begin = i % groups * QUERIES, head = i / groups % c.heads, batch = i / groups / c.heads;
        const int64_t end = begin + QUERIES < queries ? begin + QUERIES : queries, tiles = ceil_div(end - begin, LANES);
        const auto k = head_of<In>(c.k, batch, head / (c.heads / c.kv_heads));
        Scratch& s = scratch[worker];
        float* const mine = kept + worker * kept_floats();
        for (int64_t t = 0; t < tiles; ++t)
            pack_lanes<F, NV>(s.q[t], head_of<In>(c.q, batch, head), begin + t * LANES, end, c.width);
        const int64_t row = round_up(words_of<F>(c.width), W);
        for (int64_t first = 0; first < keys; first += MAX_BLOCK) {
            const int64_t num = first + MAX_BLOCK < keys ? MAX_BLOCK : keys - first, padded = round_up(num, ROWS);
            copy_rows<F>(s.keys, k, first, first + num, c.width);
            __builtin_memset(s.keys + num * row, 0, (padded - num) * row * 4);
            for (int64_t t = 0; t < tiles; ++t) {
                accumulate<F, NV, ZERO>(s.scores, LANES, padded, {s.keys, W * row * 4, row * 4, 4}, s.q[t],
                                        words_of<F>(c.width));
                for (int64_t j = 0; j < num / c.of_k; ++j)
                    reduce(s.scores + j * c.of_k * LANES, mine + (t * c.num_k + first / c.of_k + j) * 2 * LANES);
            }
        }
        for (int64_t t = 0; t < tiles; ++t) weigh(mine + t * c.num_k * 2 * LANES, s.total);
        float* const out = c.out + (batch * c.heads + head) * c.num_q * c.num_k;
        for (int64_t at = begin; at < end; at += c.of_q) pool(out + at / c.of_q * c.num_k, mine, at - begin);
    }

    // products of a block of keys, [of_k][LANES], to its maximum and sum
    void reduce(const float* scores, float* to) const {
        const Vec scale = all(c.scale * LOG2E);
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v, scores += W, to += W) {
            Vec top = load(scores), sum = zero();
            for (int64_t r = 1; r < c.of_k; ++r) top = max(load(scores + r * LANES), top);
            top = mul(top, scale);
            store(to, top);
            if (c.peak) continue;
            const Vec shift = sub(zero(), top);
            for (int64_t r = 0; r < c.of_k; ++r)
                sum = add(sum, exp2<F::DEGREE>(fma(load(scores + r * LANES), scale, shift)));
            store(to + LANES, sum);
        }
    }

    // maxima and sums of a tile's queries to weights: shares of the query's sum, or peaks relative to its maximum
    void weigh(float* tile, float* totals) const {
        for (int v = 0; v < NV; ++v, tile += W) {
            Vec top = load(tile), total = zero();
            for (int64_t j = 1; j < c.num_k; ++j) top = max(load(tile + j * 2 * LANES), top);
            for (int64_t j = 0; j < c.num_k; ++j) {
                float* const at = tile + j * 2 * LANES;
                Vec weight = exp2<F::DEGREE>(sub(load(at), top));
                if (!c.peak) weight = mul(weight, load(at + LANES));
                total = add(total, weight);
                store(at, weight);
            }
            if (c.peak) continue;
            store(totals, total);
            for (int64_t lane = 0; lane < W; ++lane) totals[lane] = 1 / totals[lane];
            for (int64_t j = 0; j < c.num_k; ++j)
                store(tile + j * 2 * LANES, mul(load(tile + j * 2 * LANES), load(totals)));
        }
    }

    // weights of a block's queries, the first at `from`, to one number for each block of keys
    void pool(float* out, const float* weights, int64_t from) const {
        for (int64_t j = 0; j < c.num_k; ++j) {
            float value = 0;
            for (int64_t i = from; i < from + c.of_q; ++i) {
                const float weight = weights[(i / LANES * c.num_k + j) * 2 * LANES + i % LANES];
                value = !c.peak ? value + weight : weight > value ? weight : value;
            }
            out[j] = c.peak ? value : value / static_cast<float>(c.of_q);
        }
    }
};
