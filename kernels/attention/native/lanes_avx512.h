// Sixteen floats: the vector type of the AVX-512 variants. Included inside the variant's namespace.
using Vec = __m512;
constexpr int W = 16;

inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec all(float x) { return _mm512_set1_ps(x); }
inline Vec load(const float* p) { return _mm512_load_ps(p); }
inline void store(float* p, Vec x) { _mm512_store_ps(p, x); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec where_greater(Vec a, Vec b, Vec yes, Vec no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), no, yes);
}
inline bool any_greater(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
// x - floor(x), and y * 2^floor(x); 2^-inf = 0
inline Vec fraction(Vec x) { return _mm512_reduce_ps(x, 1); }
inline Vec times_two_to(Vec y, Vec x) { return _mm512_scalef_ps(y, x); }

inline __mmask16 first(int64_t num) { return static_cast<__mmask16>(num >= W ? 0xffff : (1u << num) - 1); }
inline Vec from_bf16(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }

// The first num elements (at most W), as floats, then zeros; unaligned.
inline Vec load_first(const float* p, int64_t num) { return _mm512_maskz_loadu_ps(first(num), p); }
inline Vec load_first(const uint16_t* p, int64_t num) {
    return from_bf16(_mm256_maskz_loadu_epi16(first(num), p));
}
inline void store_first(float* p, Vec x, int64_t num) { _mm512_mask_storeu_ps(p, first(num), x); }
inline void store_first(uint16_t* p, Vec x, int64_t num) {  // rounds to nearest even, keeps NaN
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const __m512i kept = _mm512_mask_blend_epi32(nan, up, _mm512_set1_epi32(0x7fc00000));
    _mm256_mask_storeu_epi16(p, first(num), _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16)));
}

inline void transpose(Vec (&x)[W]) {
    Vec y[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; i += 2) {
        y[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; i += 4) {
        x[i] = _mm512_shuffle_ps(y[i], y[i + 2], 0x44);
        x[i + 1] = _mm512_shuffle_ps(y[i], y[i + 2], 0xee);
        x[i + 2] = _mm512_shuffle_ps(y[i + 1], y[i + 3], 0x44);
        x[i + 3] = _mm512_shuffle_ps(y[i + 1], y[i + 3], 0xee);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 4; ++i) {
        const Vec a = _mm512_shuffle_f32x4(x[i], x[i + 4], 0x88), b = _mm512_shuffle_f32x4(x[i + 8], x[i + 12], 0x88);
        const Vec c = _mm512_shuffle_f32x4(x[i], x[i + 4], 0xdd), d = _mm512_shuffle_f32x4(x[i + 8], x[i + 12], 0xdd);
        y[i] = _mm512_shuffle_f32x4(a, b, 0x88);
        y[i + 8] = _mm512_shuffle_f32x4(a, b, 0xdd);
        y[i + 4] = _mm512_shuffle_f32x4(c, d, 0x88);
        y[i + 12] = _mm512_shuffle_f32x4(c, d, 0xdd);
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) x[i] = y[i];
}

// In a register, or the compiler folds the broadcast into each multiply-add as a memory operand: four times the loads.
inline Vec broadcast(const void* word) {
    int32_t bits;
    __builtin_memcpy(&bits, word, 4);
    Vec x = _mm512_castsi512_ps(_mm512_set1_epi32(bits));
    asm("" : "+v"(x));
    return x;
}
