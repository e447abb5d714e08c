"""What one core can do at most: multiply-adds on registers alone, and bytes read from memory."""

from __future__ import annotations

import torch

from diffdistill.errors import UserError
from diffdistill.kernels.attention import cpu

READ_BYTES = 1 << 28  # well past any cache that one core fills


def register_rate(dtype: str, seconds: float = 0.2) -> float:
    """Floating-point operations per second of one thread, by its own CPU clock, with all operands in registers.

    dtype: "fp32", or "bf16" where the processor multiplies pairs of bf16. Raises UserError elsewhere.
    """
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16}
    if dtype not in kinds:
        raise UserError("dtype", f"must be one of {list(kinds)}", dtype, "Name one of them.")
    chosen = cpu.VARIANTS.index(cpu.variant())
    rate = cpu.library().attention_register_rate(chosen, cpu.DTYPES[kinds[dtype]], seconds)
    if not rate:
        raise UserError(
            "dtype", "must be one that the kernel multiplies here", f"{dtype} with {cpu.variant()}", "Use fp32."
        )
    return rate


def bandwidth() -> float:
    """Bytes per second that one thread reads from memory, by its own CPU clock: the best of three passes."""
    data = torch.ones(READ_BYTES // 4)
    chosen = cpu.VARIANTS.index(cpu.variant())
    return max(cpu.library().attention_read_rate(chosen, data.data_ptr(), data.numel()) for _ in range(3))
