// AVX-512 with bf16 dot products. Compiled with the flags that build.py lists for this file.
#include <immintrin.h>
#include <math.h>

#include "attention.h"

namespace with_avx512_bf16 {
namespace {
#include "lanes_avx512.h"
#include "format_f32.h"
#include "format_bf16.h"
#include "tile.h"
#include "pack.h"
#include "forward.h"
#include "backward.h"
#include "scores.h"
#include "probe.h"

Status forward(const Call& c) {
    return c.dtype == BFLOAT16 ? Forward<BF16, uint16_t, 4>::run(c) : Forward<F32, float, 4>::run(c);
}

Status backward(const Call& c, const QueryLists& lists) {
    return c.dtype == BFLOAT16 ? Backward<BF16, uint16_t, 4>::run(c, lists) : Backward<F32, float, 4>::run(c, lists);
}

Status block_scores(const Scores& c) {
    return c.dtype == BFLOAT16 ? BlockScores<BF16, uint16_t, 4>::run(c) : BlockScores<F32, float, 4>::run(c);
}

double multiply_adds(int32_t dtype, int64_t rounds) {
    return dtype == BFLOAT16 ? register_multiply_adds<BF16>(rounds) : register_multiply_adds<F32>(rounds);
}

int64_t register_flops(int32_t dtype) { return dtype == BFLOAT16 ? flops_of_round<BF16>() : flops_of_round<F32>(); }
}  // namespace
}  // namespace with_avx512_bf16

const Variant avx512_bf16{"avx512_bf16", with_avx512_bf16::forward, with_avx512_bf16::backward, with_avx512_bf16::block_scores, with_avx512_bf16::multiply_adds,
                          with_avx512_bf16::register_flops, with_avx512_bf16::read_all};
