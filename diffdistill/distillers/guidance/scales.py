"""Guidance scales as a network input: laws of w, and the teacher guided by one w per sample."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffdistill.denoiser import Denoiser, Guidance
from diffdistill.errors import UserError
from diffdistill.networks.roles import Networks
from diffdistill.rng import Rng


@dataclass(frozen=True)
class UniformScale:
    """w uniform in [low, high]; w is the full scale, 1 is the conditional model."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high < float("inf"):
            raise UserError("low, high", "must satisfy 0 <= low <= high", (self.low, self.high), "1 is no guidance.")

    def __call__(self, rng: Rng, dtype: torch.dtype) -> Tensor:
        """[B]."""
        return self.low + (self.high - self.low) * rng.uniform((len(rng),), dtype)

    def check(self, key: str, scale: float) -> None:
        """Refuse a scale that was never trained."""
        if not self.low <= scale <= self.high:
            fix = "Widen the law, or sample within it."
            raise UserError(key, f"must lie in the trained range [{self.low:g}, {self.high:g}]", scale, fix)


def check_scale(scales: UniformScale | None, scale: float) -> None:
    """Refuse a scale of the samples that was never trained; 1 where the student takes none."""
    if scales is not None:
        scales.check("scale", scale)
    elif scale != 1:
        raise UserError("scale", "must be 1 where scales is null", scale, "Give scales, a law of w.")


def sampled(student: Denoiser, scales: UniformScale | None, scale: float) -> Denoiser:
    """The student as its sampler calls it: at w = scale where it takes one."""
    return student if scales is None else student.given(w=scale)


def guided_by(networks: Networks, role: str, w: Tensor) -> Denoiser:
    """The view of `role` under guidance of w [B]; needs a null condition."""
    null = networks.teacher.null
    return networks[role].guided(Guidance(w, {key: value.to(w.device) for key, value in null.items()}))
