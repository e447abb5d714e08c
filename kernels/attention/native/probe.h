// The ceiling: multiply-adds on registers alone, and reading from memory.
template <class F>
double register_multiply_adds(int64_t rounds) {
    Vec sum[16], word = all(0.f), x = all(0.f);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) sum[i] = all(static_cast<float>(i));
    asm("" : "+v"(word), "+v"(x));
#pragma GCC unroll 1
    for (int64_t n = 0; n < rounds; ++n) {
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) sum[i] = F::multiply_add(word, x, sum[i]);
        asm volatile("");
    }
    alignas(64) float kept[W];
    for (int i = 1; i < 16; ++i) sum[0] = add(sum[0], sum[i]);
    store(kept, sum[0]);
    return kept[0];
}

template <class F>
constexpr int64_t flops_of_round() {
    return int64_t{16} * W * F::PACK * 2;
}

inline double read_all(const float* data, int64_t num) {
    Vec sum[8];
    for (int i = 0; i < 8; ++i) sum[i] = zero();
    for (int64_t n = 0; n < num; n += 8 * W)
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) sum[i] = add(sum[i], load_first(data + n + i * W, W));
    alignas(64) float kept[W];
    for (int i = 1; i < 8; ++i) sum[0] = add(sum[0], sum[i]);
    store(kept, sum[0]);
    return kept[0];
}
