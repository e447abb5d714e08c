// AVX2, fp32 arithmetic for bf16 tensors as well. Compiled with the flags that build.py lists for this file.
#include <immintrin.h>
#include <math.h>

#include "attention.h"

namespace with_avx2 {
namespace {
#include "lanes_avx2.h"
#include "format_f32.h"
#include "tile.h"
#include "pack.h"
#include "forward.h"
#include "backward.h"
#include "scores.h"
#include "probe.h"

Status forward(const Call& c) {
    return c.dtype == BFLOAT16 ? Forward<F32, uint16_t, 2>::run(c) : Forward<F32, float, 2>::run(c);
}

Status backward(const Call& c, const QueryLists& lists) {
    return c.dtype == BFLOAT16 ? Backward<F32, uint16_t, 2>::run(c, lists) : Backward<F32, float, 2>::run(c, lists);
}

Status block_scores(const Scores& c) {
    return c.dtype == BFLOAT16 ? BlockScores<F32, uint16_t, 2>::run(c) : BlockScores<F32, float, 2>::run(c);
}

double multiply_adds(int32_t, int64_t rounds) { return register_multiply_adds<F32>(rounds); }

int64_t register_flops(int32_t dtype) { return dtype == FLOAT32 ? flops_of_round<F32>() : 0; }
}  // namespace
}  // namespace with_avx2

const Variant avx2{"avx2", with_avx2::forward, with_avx2::backward, with_avx2::block_scores, with_avx2::multiply_adds,
                   with_avx2::register_flops, with_avx2::read_all};
