// Entry points: check every argument, pick the instruction set, share out threads and memory.
#include "attention.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <ctime>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#ifndef SOURCE_HASH
#define SOURCE_HASH ""
#endif

#ifndef KEPT_BYTES
#define KEPT_BYTES (size_t{64} << 20)
#endif

// Working memory is kept for the next call, up to KEPT_BYTES: fresh pages cost as much as a sparse pass over them.
namespace {
struct alignas(64) Block {
    size_t bytes;
    Block* next;
};

struct Kept {
    std::mutex lock;
    Block* first = nullptr;
    size_t bytes = 0;
};

Kept& kept() {
    static Kept* const blocks = new Kept;  // outlives threads that end after main
    return *blocks;
}
}  // namespace

void* allocate(size_t bytes) {
    {
        Kept& k = kept();
        const std::lock_guard<std::mutex> held(k.lock);
        for (Block** at = &k.first; *at; at = &(*at)->next) {
            Block* const block = *at;
            if (block->bytes < bytes || block->bytes / 4 > bytes) continue;
            *at = block->next;
            k.bytes -= block->bytes;
            return block + 1;
        }
    }
    void* memory = nullptr;
    if (posix_memalign(&memory, alignof(Block), sizeof(Block) + bytes)) return nullptr;
    return new (memory) Block{bytes, nullptr} + 1;
}

void release(void* memory) {
    if (!memory) return;
    Block* const block = static_cast<Block*>(memory) - 1;
    Kept& k = kept();
    {
        const std::lock_guard<std::mutex> held(k.lock);
        if (k.bytes + block->bytes <= KEPT_BYTES) {
            block->next = k.first;
            k.first = block;
            k.bytes += block->bytes;
            return;
        }
    }
    free(block);
}

void run_parallel(int64_t num, int64_t threads, Task task, void* context) {
    std::atomic<int64_t> next{0};
    auto work = [&](int64_t worker) {
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < num;) task(context, i, worker);
    };
    std::vector<std::thread> others;
    for (int64_t worker = 1; worker < std::min(threads, num); ++worker) {
        try {
            others.emplace_back(work, worker);
        } catch (const std::exception&) {
            break;  // the system has no more threads: those there are do the work
        }
    }
    work(0);
    for (auto& thread : others) thread.join();
}

namespace {

const Variant* const VARIANTS[] = {&avx512_bf16, &avx512, &avx2};  // best first
constexpr int32_t NUM_VARIANTS = 3;

bool runs(int32_t variant) {
    __builtin_cpu_init();
    switch (variant) {
        case 0:
            return runs(1) && __builtin_cpu_supports("avx512bf16");
        case 1:
            return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
        case 2:
            return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    }
    return false;
}

bool within(int64_t value, int64_t least, int64_t most) { return value >= least && value <= most; }

Status check_sizes(const Call& c) {
    constexpr int64_t LONG = int64_t{1} << 31;
    if (c.dtype != FLOAT32 && c.dtype != BFLOAT16) return BAD_DTYPE;
    if (!within(c.variant, 0, NUM_VARIANTS - 1) || !runs(c.variant)) return BAD_VARIANT;
    if (c.block_q != 64 && c.block_q != 128) return BAD_BLOCK;
    if (c.block_k != 64 && c.block_k != 128) return BAD_BLOCK;
    if (!within(c.batch, 1, LONG) || !within(c.heads, 1, LONG) || !within(c.kv_heads, 1, c.heads)) return BAD_SIZE;
    if (c.heads % c.kv_heads || !within(c.width, 1, MAX_WIDTH) || !within(c.v_width, 1, MAX_WIDTH)) return BAD_SIZE;
    if (!within(c.q_len, 1, LONG) || !within(c.kv_len, 1, LONG)) return BAD_SIZE;
    if (!within(c.threads, 1, MAX_THREADS)) return BAD_SIZE;
    if (c.list_batch != 1 && c.list_batch != c.batch) return BAD_LIST;
    if (c.list_heads != 1 && c.list_heads != c.heads) return BAD_LIST;
    return within(c.list_max, 0, ceil_div(c.kv_len, c.block_k)) ? OK : BAD_LIST;
}

Status check_lists(const Call& c) {
    const int64_t num_q = ceil_div(c.q_len, c.block_q), num_k = ceil_div(c.kv_len, c.block_k);
    if (!c.kv_num || (!c.kv_idx && c.list_max)) return BAD_POINTER;
    for (int64_t row = 0; row < c.list_batch * c.list_heads * num_q; ++row) {
        if (!within(c.kv_num[row], 0, c.list_max)) return BAD_COUNT;
        int64_t last = -1;
        for (int64_t i = 0; i < c.kv_num[row]; ++i) {
            const int64_t block = c.kv_idx[row * c.list_max + i];
            if (block <= last || block >= num_k) return BAD_INDEX;
            last = block;
        }
    }
    for (int64_t block = 0; c.kv_valid && block < num_k; ++block)
        if (!within(c.kv_valid[block], 0, c.block_k)) return BAD_VALID;
    return OK;
}

Status check(const Call* c, bool backward) {
    if (!c) return BAD_POINTER;
    if (Status bad = check_sizes(*c)) return bad;
    if (!c->q.data || !c->k.data || !c->v.data || !c->o.data || !c->lse) return BAD_POINTER;
    if (backward && (!c->d_o.data || !c->d_q.data || !c->d_k.data || !c->d_v.data)) return BAD_POINTER;
    return check_lists(*c);
}

// The lists by key block, ascending in the query block: a counting sort.
struct Transposed {
    std::vector<int64_t> start;
    std::vector<int32_t> items;

    explicit Transposed(const Call& c) {
        const int64_t num_q = ceil_div(c.q_len, c.block_q), num_k = ceil_div(c.kv_len, c.block_k);
        const int64_t lists = c.list_batch * c.list_heads;
        start.assign(lists * num_k + 1, 0);
        auto each = [&](auto visit) {
            for (int64_t row = 0; row < lists * num_q; ++row)
                for (int64_t i = 0; i < c.kv_num[row]; ++i)
                    visit(row / num_q * num_k + c.kv_idx[row * c.list_max + i], row % num_q);
        };
        each([&](int64_t slot, int64_t) { ++start[slot + 1]; });
        for (size_t i = 1; i < start.size(); ++i) start[i] += start[i - 1];
        items.resize(start.back());
        std::vector<int64_t> end(start.begin(), start.end() - 1);
        each([&](int64_t slot, int64_t block) { items[end[slot]++] = static_cast<int32_t>(block); });
    }
};

bool is_sample(int64_t tokens) { return within(tokens, 1, MAX_BLOCK) && !(tokens & (tokens - 1)); }

Status check(const Scores* c) {
    constexpr int64_t MANY = (int64_t{1} << 31) / MAX_BLOCK;
    if (!c) return BAD_POINTER;
    if (c->dtype != FLOAT32 && c->dtype != BFLOAT16) return BAD_DTYPE;
    if (!within(c->variant, 0, NUM_VARIANTS - 1) || !runs(c->variant)) return BAD_VARIANT;
    if (!is_sample(c->of_q) || !is_sample(c->of_k) || !(c->scale > 0)) return BAD_SIZE;
    if (!within(c->batch, 1, MANY) || !within(c->heads, 1, MANY) || !within(c->kv_heads, 1, c->heads)) return BAD_SIZE;
    if (c->heads % c->kv_heads || !within(c->width, 1, MAX_WIDTH)) return BAD_SIZE;
    if (!within(c->num_q, 1, MANY) || !within(c->num_k, 1, MANY) || !within(c->threads, 1, MAX_THREADS)) return BAD_SIZE;
    return c->q.data && c->k.data && c->out ? OK : BAD_POINTER;
}

double thread_seconds() {
    timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

}  // namespace

extern "C" {

const char* attention_source_hash() { return SOURCE_HASH; }

// The instruction sets, best first; null past the end.
const char* attention_variant(int32_t variant) {
    return within(variant, 0, NUM_VARIANTS - 1) ? VARIANTS[variant]->name : nullptr;
}

int32_t attention_runs(int32_t variant) { return runs(variant); }

int64_t attention_call_size() { return sizeof(Call); }

int32_t attention_forward(const Call* call) {
    const Status bad = check(call, false);
    return bad ? bad : VARIANTS[call->variant]->forward(*call);
}

int32_t attention_backward(const Call* call) {
    if (Status bad = check(call, true)) return bad;
    try {
        const Transposed lists(*call);
        return VARIANTS[call->variant]->backward(*call, {lists.start.data(), lists.items.data()});
    } catch (const std::bad_alloc&) {
        return NO_MEMORY;
    }
}

int64_t attention_scores_size() { return sizeof(Scores); }

int32_t attention_block_scores(const Scores* scores) {
    const Status bad = check(scores);
    return bad ? bad : VARIANTS[scores->variant]->block_scores(*scores);
}

// Multiply-adds on registers alone for about `seconds` of this thread's time: operations per second; 0 if not run.
double attention_register_rate(int32_t variant, int32_t dtype, double seconds) {
    if (!within(variant, 0, NUM_VARIANTS - 1) || !runs(variant) || !within(dtype, 0, 1)) return 0;
    const Variant& chosen = *VARIANTS[variant];
    constexpr int64_t ROUNDS = 100000;
    volatile double kept = 0;
    int64_t calls = 0;
    const double start = thread_seconds();
    double spent = 0;
    while (spent < seconds && chosen.register_flops(dtype)) {
        kept = kept + chosen.multiply_adds(dtype, ROUNDS);
        ++calls;
        spent = thread_seconds() - start;
    }
    return calls ? static_cast<double>(calls * ROUNDS * chosen.register_flops(dtype)) / spent : 0;
}

// One pass over num floats (a multiple of 1024) from memory: bytes per second of this thread's time; 0 if not run.
double attention_read_rate(int32_t variant, const float* data, int64_t num) {
    if (!within(variant, 0, NUM_VARIANTS - 1) || !runs(variant) || !data || num < 1024 || num % 1024) return 0;
    const double start = thread_seconds();
    volatile double kept = VARIANTS[variant]->read(data, num);
    (void)kept;
    return 4.0 * static_cast<double>(num) / (thread_seconds() - start);
}

}  // extern "C"
