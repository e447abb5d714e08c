// fp32 arithmetic: a word, the unit that is broadcast, is one float. Included inside the variant's namespace.
struct F32 {
    using Element = float;
    static constexpr int PACK = 1;    // elements of a word
    static constexpr int DEGREE = 5;  // of the polynomial for exp2: relative error 8e-8

    static Vec multiply_add(Vec word, Vec x, Vec sum) { return fma(word, x, sum); }

    // W words of one row from element `from` on: zeros past `width`
    template <class In>
    static Vec along(const In* row, int64_t from, int64_t width) {
        return load_first(row + from, width - from);
    }

    // words that pair two rows (here: hold one), for W columns
    template <class In>
    static Vec across(const In* row, const In*, int64_t from, int64_t width) {
        return load_first(row + from, width - from);
    }

    // a row of NV vectors as words along the row
    template <int NV>
    static void store_along(uint32_t* to, const Vec (&x)[NV]) {
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) store(reinterpret_cast<float*>(to) + v * W, x[v]);
    }
};
