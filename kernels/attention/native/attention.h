// The C interface of the block-sparse attention library, and what its translation units share. No torch, no STL types.
#pragma once
#include <cstddef>
#include <cstdint>

constexpr int64_t MAX_WIDTH = 256;  // of a head: D and Dv
constexpr int64_t MAX_BLOCK = 128;  // rows of a query or key block
constexpr int64_t MAX_THREADS = 1024;

enum Status : int32_t {
    OK = 0,
    NO_MEMORY = 1,
    BAD_SIZE = 2,      // a length, width or head count out of range, or Hq not a multiple of Hkv
    BAD_POINTER = 3,   // a tensor that the call needs is null
    BAD_BLOCK = 4,     // block_q or block_k not 64 or 128
    BAD_COUNT = 5,     // kv_num outside [0, list_max]
    BAD_INDEX = 6,     // kv_idx outside [0, nK), or not ascending
    BAD_VALID = 7,     // kv_valid outside [0, block_k]
    BAD_LIST = 8,      // the lists' batch or heads neither 1 nor the queries'
    BAD_VARIANT = 9,   // this processor does not run it
    BAD_DTYPE = 10,
};

enum Dtype : int32_t { FLOAT32 = 0, BFLOAT16 = 1 };

// [B, H, S, width] with unit last stride; strides count elements.
struct Rows {
    void* data;
    int64_t batch, head, row;
};

// One call. Sizes are the queries'; o, d_q, ... like the tensors they are named after. cpu.py mirrors this struct.
struct Call {
    int64_t batch, heads, kv_heads, q_len, kv_len, width, v_width;
    Rows q, k, v, o, d_o, d_q, d_k, d_v;
    float* lse;          // [B, Hq, Sq] contiguous, natural logarithm
    const float* d_lse;  // the same, or null
    const float* bias;   // [.., Skv] or null, added to the logits
    int64_t bias_batch, bias_head;  // strides, 0 where broadcast
    const int32_t* kv_num;          // [list_batch, list_heads, nQ]
    const int32_t* kv_idx;          // [list_batch, list_heads, nQ, list_max]
    const int32_t* kv_valid;        // [nK] or null
    int64_t block_q, block_k, list_batch, list_heads, list_max;
    int32_t dtype, variant, threads;
    float scale;
};

// Scores between blocks of queries and blocks of keys, from the same number of tokens of each. cpu_scores.py mirrors it.
struct Scores {
    int64_t batch, heads, kv_heads, num_q, num_k;  // blocks
    int64_t of_q, of_k, width;                     // tokens of a block: powers of two up to MAX_BLOCK
    Rows q, k;
    float* out;  // [B, Hq, nQ, nK] contiguous
    int32_t dtype, variant, threads;
    int32_t peak;  // 0: mean over queries of the share of attention; else the largest exp(score - query's maximum)
    float scale;   // > 0
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Runs task(context, i, worker) for i in [0, num) on up to `threads` threads; returns when all are done.
using Task = void (*)(void* context, int64_t i, int64_t worker);
void run_parallel(int64_t num, int64_t threads, Task task, void* context);

// The query blocks of every key block: the transposed lists, [list_batch, list_heads, nK], as offsets into `items`.
struct QueryLists {
    const int64_t* start;  // [list_batch * list_heads * nK + 1]
    const int32_t* items;
};

void* allocate(size_t bytes);  // aligned to 64 bytes, or null
void release(void* memory);

// What a translation unit compiled for one instruction set gives.
struct Variant {
    const char* name;
    Status (*forward)(const Call&);
    Status (*backward)(const Call&, const QueryLists&);
    Status (*block_scores)(const Scores&);
    double (*multiply_adds)(int32_t dtype, int64_t rounds);  // a checksum; rounds * register_flops(dtype) operations
    int64_t (*register_flops)(int32_t dtype);                // 0 where it has no instruction of its own for dtype
    double (*read)(const float* data, int64_t num);          // a checksum; num a multiple of 1024
};

extern const Variant avx512_bf16, avx512, avx2;
