// Eight floats: the vector type of the AVX2 variant. Included inside the variant's namespace.
using Vec = __m256;
constexpr int W = 8;

inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec all(float x) { return _mm256_set1_ps(x); }
inline Vec load(const float* p) { return _mm256_load_ps(p); }
inline void store(float* p, Vec x) { _mm256_store_ps(p, x); }
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec where_greater(Vec a, Vec b, Vec yes, Vec no) {
    return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_GT_OQ));
}
inline bool any_greater(Vec a, Vec b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)); }
// x - floor(x), and y * 2^floor(x) with 0 below the smallest exponent; 2^-inf = 0
inline Vec fraction(Vec x) {
    x = _mm256_max_ps(x, all(-200.f));  // -inf - -inf is not a number
    return _mm256_sub_ps(x, _mm256_floor_ps(x));
}
inline Vec times_two_to(Vec y, Vec x) {
    const Vec kept = _mm256_cmp_ps(x, all(-126.f), _CMP_NLT_UQ);
    const Vec bounded = _mm256_min_ps(_mm256_max_ps(x, all(-126.f)), all(127.f));
    const __m256i power = _mm256_cvtps_epi32(_mm256_floor_ps(bounded));
    const __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(power, _mm256_set1_epi32(127)), 23);
    return _mm256_and_ps(kept, _mm256_mul_ps(y, _mm256_castsi256_ps(bits)));
}

// The first num elements (at most W), as floats, then zeros; unaligned.
inline Vec load_first(const float* p, int64_t num) {
    if (num >= W) return _mm256_loadu_ps(p);
    alignas(32) float x[W] = {};
    for (int64_t i = 0; i < num; ++i) x[i] = p[i];
    return load(x);
}
inline Vec load_first(const uint16_t* p, int64_t num) {
    if (num >= W) {
        const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
    }
    alignas(32) uint32_t x[W] = {};
    for (int64_t i = 0; i < W && i < num; ++i) x[i] = uint32_t{p[i]} << 16;
    return load(reinterpret_cast<const float*>(x));
}
inline void store_first(float* p, Vec x, int64_t num) {
    if (num >= W) return _mm256_storeu_ps(p, x);
    alignas(32) float y[W];
    store(y, x);
    for (int64_t i = 0; i < num; ++i) p[i] = y[i];
}
inline void store_first(uint16_t* p, Vec x, int64_t num) {  // rounds to nearest even, keeps NaN
    alignas(32) uint32_t y[W];
    _mm256_store_si256(reinterpret_cast<__m256i*>(y), _mm256_castps_si256(x));
    for (int64_t i = 0; i < W && i < num; ++i) {
        const bool nan = (y[i] & 0x7fffffffu) > 0x7f800000u;
        p[i] = static_cast<uint16_t>(nan ? 0x7fc0 : (y[i] + 0x7fff + (y[i] >> 16 & 1)) >> 16);
    }
}

inline void transpose(Vec (&x)[W]) {
    alignas(32) float y[W][W];
    for (int i = 0; i < W; ++i) store(y[i], x[i]);
    for (int i = 0; i < W; ++i)
        x[i] = _mm256_setr_ps(y[0][i], y[1][i], y[2][i], y[3][i], y[4][i], y[5][i], y[6][i], y[7][i]);
}

inline Vec broadcast(const void* word) {
    float bits;
    __builtin_memcpy(&bits, word, 4);
    return _mm256_set1_ps(bits);
}
