// The tile: R x NV vectors of sums in registers. Rows are broadcast words, lanes are vector words. Included inside the
// variant's namespace, like pack.h, forward.h and backward.h.
constexpr int ROWS = 4;  // broadcast rows of a tile; with 4 vectors of lanes 16 sums, enough to hide the latency

inline int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }
inline float* floats(uint32_t* words) { return reinterpret_cast<float*>(words); }
inline const float* floats(const uint32_t* words) { return reinterpret_cast<const float*>(words); }

// 2^x by a polynomial in x - floor(x) that is minimax in relative error
template <int DEGREE>
inline Vec exp2(Vec x) {
    const Vec f = fraction(x);
    Vec y;
    if constexpr (DEGREE == 3) {
        y = fma(fma(fma(all(0.0780245228f), f, all(0.226067156f)), f, all(0.69583354f)), f, all(0.999925219f));
    } else {
        y = fma(fma(all(0.00187757668f), f, all(0.0089893401f)), f, all(0.0558263180f));
        y = fma(fma(fma(y, f, all(0.240153617f)), f, all(0.693153073f)), f, all(0.999999925f));
    }
    return times_two_to(y, x);
}

// Where the words of broadcast rows lie, in bytes: word p of row r at data + r / W * panel + r % W * row + p * step
struct Broadcast {
    const void* data;
    int64_t panel, row, step;

    const char* at(int64_t r) const { return static_cast<const char*>(data) + r / W * panel + r % W * row; }
};

// sum[r][v] += sum over p < num of a[r][p] * b[p][v]; b: [num][NV * W] words
template <class F, int NV>
[[gnu::always_inline]] inline void multiply(Vec (&sum)[ROWS][NV], const char* a, int64_t row, int64_t step,
                                            const uint32_t* b, int64_t num) {
#pragma GCC unroll 1
    for (int64_t p = 0; p < num; ++p, a += step, b += NV * W) {
        Vec x[NV];
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) x[v] = load(floats(b) + v * W);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            const Vec word = broadcast(a + r * row);
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) sum[r][v] = F::multiply_add(word, x[v], sum[r][v]);
        }
    }
}

// Bring memory that the next step reads towards the second cache: sparse blocks are no stream that hardware foresees.
// A hint: an address past the end of a tensor is never touched.
inline void prefetch(const void* data, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(data) + i, 0, 2);
}

// What the sums are before: nothing, themselves, themselves times a factor per lane
enum Start { ZERO, KEEP, RESCALE };

// c += a b for `rows` rows, a multiple of ROWS; c: rows of `width` floats, of which NV * W are written
template <class F, int NV, Start START>
inline void accumulate(float* c, int64_t width, int64_t rows, const Broadcast& a, const uint32_t* b, int64_t num,
                       const float* factor = nullptr) {
    for (int64_t r0 = 0; r0 < rows; r0 += ROWS, c += ROWS * width) {
        Vec sum[ROWS][NV];
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) {
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; ++r) {
                sum[r][v] = START == ZERO ? zero() : load(c + r * width + v * W);
                if constexpr (START == RESCALE) sum[r][v] = mul(sum[r][v], load(factor + v * W));
            }
        }
        multiply<F, NV>(sum, a.at(r0), a.row, a.step, b, num);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) store(c + r * width + v * W, sum[r][v]);
    }
}
