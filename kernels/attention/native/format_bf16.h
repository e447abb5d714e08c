// bf16 arithmetic: a word is a pair of neighbours along the contracted axis. Included inside the variant's namespace.
struct BF16 {
    using Element = uint16_t;
    static constexpr int PACK = 2;
    static constexpr int DEGREE = 3;  // exp2 to 8e-5, a twentieth of bf16's rounding

    static Vec multiply_add(Vec word, Vec x, Vec sum) {
        return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_castps_si512(word), (__m512bh)_mm512_castps_si512(x));
    }

    static Vec along(const uint16_t* row, int64_t from, int64_t width) {
        const int64_t num = width - from;
        const __mmask32 kept = num >= 32 ? ~__mmask32{0} : num <= 0 ? 0 : (__mmask32{1} << num) - 1;
        return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(kept, row + from));
    }

    // words (a, b) of two rows for W columns; b null: zeros
    static Vec across(const uint16_t* a, const uint16_t* b, int64_t from, int64_t width) {
        const __mmask16 kept = first(width - from);
        const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(kept, a + from));
        if (!b) return _mm512_castsi512_ps(low);
        const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(kept, b + from));
        return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }

    // words (a, b) of two rows held as floats: one convert, one permute
    static Vec pair(Vec a, Vec b) {
        const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(b, a);
        return _mm512_castsi512_ps(_mm512_permutexvar_epi16(interleave(), halves));
    }

    template <int NV>
    static void store_along(uint32_t* to, const Vec (&x)[NV]) {
        static_assert(NV % 2 == 0);
#pragma GCC unroll 8
        for (int v = 0; v < NV; v += 2)
            _mm512_store_si512(to + v / 2 * W, (__m512i)_mm512_cvtne2ps_pbh(x[v + 1], x[v]));
    }

    static __m512i interleave() {
        alignas(64) static constexpr uint16_t ORDER[32] = {
            0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
            8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
        return _mm512_load_si512(ORDER);
    }
};
