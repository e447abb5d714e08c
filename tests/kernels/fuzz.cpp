// Random calls of the attention library's C interface, built with -fsanitize=address,undefined (make fuzz-kernel).
// Valid calls must succeed on exactly as much memory as they name; malformed ones must be refused, nothing read.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "attention.h"

extern "C" {
int32_t attention_forward(const Call*);
int32_t attention_backward(const Call*);
int32_t attention_block_scores(const Scores*);
int32_t attention_runs(int32_t);
}

namespace {
struct Xorshift {  // the standard's generators are slow under a sanitizer
    using result_type = uint64_t;
    uint64_t state = 88172645463325252ULL;
    static constexpr uint64_t min() { return 0; }
    static constexpr uint64_t max() { return ~uint64_t{0}; }
    uint64_t operator()() {
        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        return state;
    }
} rng;

int64_t draw(int64_t least, int64_t most) { return std::uniform_int_distribution<int64_t>(least, most)(rng); }
bool chance(double p) { return std::bernoulli_distribution(p)(rng); }
int64_t one_of(std::vector<int64_t> values) { return values[draw(0, static_cast<int64_t>(values.size()) - 1)]; }

// Memory of exactly the bytes that a tensor spans, so that the sanitizer sees one byte too far.
struct Memory {
    std::vector<std::unique_ptr<char[]>> blocks;

    template <class T>
    T* take(int64_t num) {
        blocks.emplace_back(new char[num * sizeof(T)]);
        return reinterpret_cast<T*>(blocks.back().get());
    }

    Rows rows(int64_t batch, int64_t heads, int64_t len, int64_t width, int32_t dtype) {
        const int64_t row = width + one_of({0, 0, 1, 3, 8});
        Rows x{nullptr, 0, 0, row};
        const bool interleaved = chance(0.5);  // [B, S, H, D] as well as [B, H, S, D]
        if (interleaved) x.row = row * heads, x.head = row, x.batch = x.row * len;
        else x.head = row * len, x.batch = x.head * heads;
        const int64_t span = (batch - 1) * x.batch + (heads - 1) * x.head + (len - 1) * x.row + width;
        const auto number = [](auto& random) { return static_cast<float>(random() >> 40) * 0x1p-22f - 2; };
        const auto size = static_cast<float>(one_of({0, 1, 1, 1, 30}));
        if (dtype == FLOAT32) {
            float* p = take<float>(span);
            for (int64_t i = 0; i < span; ++i) p[i] = size * number(rng);
            x.data = p;
        } else {
            uint16_t* p = take<uint16_t>(span);
            for (int64_t i = 0; i < span; ++i) {
                const float value = size * number(rng);
                uint32_t bits;
                std::memcpy(&bits, &value, 4);
                p[i] = static_cast<uint16_t>(bits >> 16);
            }
            x.data = p;
        }
        return x;
    }
};

void fill_lists(Call& c, Memory& m) {
    const int64_t num_q = ceil_div(c.q_len, c.block_q), num_k = ceil_div(c.kv_len, c.block_k);
    const int64_t lists = c.list_batch * c.list_heads * num_q;
    c.list_max = draw(0, num_k);
    int32_t* num = m.take<int32_t>(lists);
    int32_t* idx = m.take<int32_t>(lists * c.list_max);
    for (int64_t row = 0; row < lists; ++row) {
        num[row] = 0;
        for (int64_t block = 0; block < num_k && num[row] < c.list_max; ++block)
            if (chance(0.6)) idx[row * c.list_max + num[row]++] = static_cast<int32_t>(block);
        for (int64_t i = num[row]; i < c.list_max; ++i)
            idx[row * c.list_max + i] = static_cast<int32_t>(draw(-1000000000, 1000000000));
    }
    c.kv_num = num, c.kv_idx = idx;
    if (chance(0.5)) {
        int32_t* valid = m.take<int32_t>(num_k);
        for (int64_t block = 0; block < num_k; ++block) valid[block] = static_cast<int32_t>(draw(0, c.block_k));
        c.kv_valid = valid;
    }
}

Call random_call(Memory& m) {
    Call c{};
    c.dtype = static_cast<int32_t>(draw(0, 1));
    do c.variant = static_cast<int32_t>(draw(0, 2)); while (!attention_runs(c.variant));
    c.threads = static_cast<int32_t>(draw(1, 3));
    c.batch = draw(1, 2), c.kv_heads = draw(1, 2), c.heads = c.kv_heads * draw(1, 2);
    c.q_len = draw(1, chance(0.3) ? 300 : 80), c.kv_len = draw(1, 300);
    c.width = chance(0.5) ? one_of({64, 128}) : draw(1, MAX_WIDTH);
    c.v_width = chance(0.5) ? c.width : draw(1, MAX_WIDTH);
    c.block_q = one_of({64, 128}), c.block_k = one_of({64, 128});
    c.list_batch = one_of({1, c.batch}), c.list_heads = one_of({1, c.heads});
    c.scale = std::normal_distribution<float>()(rng);
    c.q = m.rows(c.batch, c.heads, c.q_len, c.width, c.dtype);
    c.d_q = m.rows(c.batch, c.heads, c.q_len, c.width, c.dtype);
    c.o = m.rows(c.batch, c.heads, c.q_len, c.v_width, c.dtype);
    c.d_o = m.rows(c.batch, c.heads, c.q_len, c.v_width, c.dtype);
    c.k = m.rows(c.batch, c.kv_heads, c.kv_len, c.width, c.dtype);
    c.d_k = m.rows(c.batch, c.kv_heads, c.kv_len, c.width, c.dtype);
    c.v = m.rows(c.batch, c.kv_heads, c.kv_len, c.v_width, c.dtype);
    c.d_v = m.rows(c.batch, c.kv_heads, c.kv_len, c.v_width, c.dtype);
    c.lse = m.take<float>(c.batch * c.heads * c.q_len);
    if (chance(0.5)) {
        const int64_t num = c.batch * c.heads * c.q_len;
        float* d_lse = m.take<float>(num);
        for (int64_t i = 0; i < num; ++i) d_lse[i] = static_cast<float>(draw(-3, 3));
        c.d_lse = d_lse;
    }
    if (chance(0.5)) {
        const bool batch = chance(0.5), head = chance(0.5);
        c.bias_head = head ? c.kv_len : 0, c.bias_batch = batch ? (head ? c.heads : 1) * c.kv_len : 0;
        const int64_t num = (batch ? c.batch : 1) * (head ? c.heads : 1) * c.kv_len;
        float* bias = m.take<float>(num);
        for (int64_t i = 0; i < num; ++i) bias[i] = chance(0.1) ? -__builtin_inff() : static_cast<float>(draw(-3, 3));
        c.bias = bias;
    }
    fill_lists(c, m);
    return c;
}

// One mistake; false where this call offers no place for it.
bool spoil(Call& c) {
    const int64_t num_q = ceil_div(c.q_len, c.block_q), num_k = ceil_div(c.kv_len, c.block_k);
    auto* num = const_cast<int32_t*>(c.kv_num);
    auto* idx = const_cast<int32_t*>(c.kv_idx);
    const int64_t row = draw(0, c.list_batch * c.list_heads * num_q - 1);
    const int32_t far = static_cast<int32_t>(one_of({-1, -2147483648LL, num_k, 2147483647LL}));
    switch (draw(0, 11)) {
        case 0: num[row] = static_cast<int32_t>(one_of({-1, c.list_max + 1, 2147483647LL, -2147483648LL})); return true;
        case 1: if (!num[row]) return false; idx[row * c.list_max + draw(0, num[row] - 1)] = far; return true;
        case 2: if (num[row] < 2) return false;
            std::swap(idx[row * c.list_max], idx[row * c.list_max + 1]);
            return true;
        case 3: if (num[row] < 2) return false; idx[row * c.list_max + 1] = idx[row * c.list_max]; return true;
        case 4: if (!c.kv_valid) return false;
            const_cast<int32_t*>(c.kv_valid)[draw(0, num_k - 1)] =
                static_cast<int32_t>(one_of({-1, c.block_k + 1, 2147483647LL}));
            return true;
        case 5: (chance(0.5) ? c.block_q : c.block_k) = one_of({0, -64, 1, 32, 63, 192, 256}); return true;
        case 6: (chance(0.5) ? c.width : c.v_width) = one_of({0, -1, 257, int64_t{1} << 62}); return true;
        case 7: c.kv_heads = c.heads + 1; return true;
        case 8: (chance(0.5) ? c.list_batch : c.list_heads) = one_of({0, -1, 3, 5}); return true;
        case 9: c.variant = static_cast<int32_t>(one_of({-1, 3, 1 << 30})); return true;
        case 10: (chance(0.5) ? c.q.data : c.v.data) = nullptr; return true;
        default: (chance(0.5) ? c.q_len : c.kv_len) = one_of({0, -5, int64_t{1} << 40}); return true;
    }
}
Scores random_scores(Memory& m) {
    Scores c{};
    c.dtype = static_cast<int32_t>(draw(0, 1));
    do c.variant = static_cast<int32_t>(draw(0, 2)); while (!attention_runs(c.variant));
    c.threads = static_cast<int32_t>(draw(1, 3)), c.peak = static_cast<int32_t>(draw(0, 1));
    c.batch = draw(1, 2), c.kv_heads = draw(1, 2), c.heads = c.kv_heads * draw(1, 2);
    c.of_q = int64_t{1} << draw(0, 7), c.of_k = int64_t{1} << draw(0, 7);
    c.num_q = draw(1, 300 / c.of_q + 1), c.num_k = draw(1, 300 / c.of_k + 1);
    c.width = chance(0.5) ? one_of({64, 128}) : draw(1, MAX_WIDTH);
    c.scale = static_cast<float>(draw(1, 9)) / 4;
    c.q = m.rows(c.batch, c.heads, c.num_q * c.of_q, c.width, c.dtype);
    c.k = m.rows(c.batch, c.kv_heads, c.num_k * c.of_k, c.width, c.dtype);
    c.out = m.take<float>(c.batch * c.heads * c.num_q * c.num_k);
    return c;
}

void spoil(Scores& c) {
    switch (draw(0, 8)) {
        case 0: (chance(0.5) ? c.of_q : c.of_k) = one_of({0, -1, 3, 48, 256, int64_t{1} << 62}); return;
        case 1: (chance(0.5) ? c.num_q : c.num_k) = one_of({0, -7, int64_t{1} << 40}); return;
        case 2: c.width = one_of({0, -1, 257, int64_t{1} << 62}); return;
        case 3: c.kv_heads = c.heads + 1; return;
        case 4: c.variant = static_cast<int32_t>(one_of({-1, 3, 1 << 30})); return;
        case 5: c.dtype = static_cast<int32_t>(one_of({-1, 2})); return;
        case 6: c.threads = static_cast<int32_t>(one_of({0, -1, 1 << 20})); return;
        case 7: c.scale = chance(0.5) ? -1.f : __builtin_nanf(""); return;
        default: (chance(0.5) ? c.q.data : c.k.data) = nullptr; return;
    }
}

// One call of the scores: 0 refused, 1 valid; rows of shares must sum to 1.
int32_t try_scores() {
    Memory memory;
    Scores c = random_scores(memory);
    if (chance(0.3)) {
        spoil(c);
        if (!attention_block_scores(&c)) std::puts("malformed scores were accepted"), std::exit(1);
        return 0;
    }
    if (attention_block_scores(&c)) std::puts("valid scores were refused"), std::exit(1);
    for (int64_t row = 0; !c.peak && row < c.batch * c.heads * c.num_q; ++row) {
        float sum = 0;
        for (int64_t j = 0; j < c.num_k; ++j) sum += c.out[row * c.num_k + j];
        if (!(sum > 0.999f && sum < 1.001f)) std::printf("a row sums to %g\n", sum), std::exit(1);
    }
    return 1;
}
}  // namespace

int main(int argc, char** argv) {
    const double seconds = argc > 1 ? std::atof(argv[1]) : 60;
    if (argc > 2) rng.state ^= std::strtoull(argv[2], nullptr, 10) << 20;
    const auto start = std::chrono::steady_clock::now();
    int64_t valid = 0, refused = 0;
    while (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds) {
        if (chance(0.3)) {
            ++(try_scores() ? valid : refused);
            continue;
        }
        Memory memory;
        Call c = random_call(memory);
        if (chance(0.3) && spoil(c)) {
            if (!attention_forward(&c) || !attention_backward(&c)) return std::puts("a malformed call was accepted"), 1;
            ++refused;
            continue;
        }
        int32_t status = attention_forward(&c);
        if (!status) status = attention_backward(&c);
        if (status) return std::printf("a valid call was refused: %d\n", status), 1;
        ++valid;
    }
    std::printf("%ld valid calls, %ld malformed ones refused\n", static_cast<long>(valid), static_cast<long>(refused));
    return 0;
}
