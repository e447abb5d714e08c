"""LCM: consistency distillation of the guided teacher, with the scale as an input, over skipping steps.

Paper: Luo et al. 2023, Latent Consistency Models, arXiv:2310.04378.
Headline: 768 x 768 in 2 to 4 steps after 32 A100 hours.

The loss is that of `consistency`, with x_r one step of the teacher guided by w, drawn for every sample, and both maps
given w.  Pairs are neighbours on a coarse grid: a step skips k of the teacher's 1,000.  LCM-LoRA (arXiv:2311.05556):
roles.student=lora, scales=null, and the teacher under a fixed guidance.scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from diffdistill.denoiser import Cond, Denoiser
from diffdistill.distillers.base import Batch
from diffdistill.distillers.consistency.consistency import Consistency
from diffdistill.distillers.consistency.pairs import PairLaw, PairWeight
from diffdistill.distillers.guidance.scales import UniformScale, guided_by, sampled
from diffdistill.generator import Renoise
from diffdistill.losses import Distance
from diffdistill.networks.roles import Networks, Role
from diffdistill.process import wide
from diffdistill.rng import Rng
from diffdistill.solvers import Grid, Solver


class LCM(Consistency):
    """As Consistency.  scales: law of w, None takes the teacher as it is.  scale: w of the samples."""

    def __init__(
        self,
        networks: Networks,
        times: Sequence[float] | None,
        renoise: Renoise,
        few_steps: Grid,
        pairs: PairLaw,
        solver: Solver,
        distance: Distance,
        weight: PairWeight,
        target_decay: float | None,
        scales: UniformScale | None,
        scale: float,
        prior_std: float | None = None,
    ) -> None:
        super().__init__(networks, times, renoise, few_steps, pairs, solver, distance, weight, target_decay, prior_std)
        self.scales, self.scale = scales, scale

    @classmethod
    def needs(cls, scales: UniformScale | None = None, scale: float = 1.0, **hyperparameters: Any) -> frozenset[str]:
        if scales is None:
            return frozenset({"x0"})
        scales.check("scale", scale)
        return frozenset({"x0", "null"})

    @classmethod
    def roles(cls, *args: Any, scales: UniformScale | None = None, **hyperparameters: Any) -> Mapping[str, Role]:
        roles = super().roles(*args, **hyperparameters)
        if scales is None:
            return roles
        takes_w = {name: replace(role, inputs=("w",)) for name, role in roles.items() if name.startswith("student")}
        return {**roles, **takes_w}

    def teacher(self, batch: Batch, rng: Rng) -> tuple[Denoiser, Cond]:
        if self.scales is None:
            return super().teacher(batch, rng)
        w = self.scales(rng, wide(self.networks.dtype))
        return guided_by(self.networks, "target", w), {**batch.cond, "w": w}

    def sampled(self, student: Denoiser) -> Denoiser:
        return sampled(student, self.scales, self.scale)
