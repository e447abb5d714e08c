"""BOOT: from fixed noise, the signal part of the teacher's trajectory at every time, bootstrapped from a noisier one.

Paper: Gu et al. 2023, BOOT: Data-free Distillation of Denoising Diffusion Models with Bootstrapping, arXiv:2306.05544.

    L = E |y(z, s) - sg[y + kappa (D_target(alpha_t y + sigma_t z, t) - y)]|^2 / kappa^p,   y = y(z, t),  s < t
      + boundary_weight E |y(z, t_max) - D_target(sigma(t_max) z, t_max)|^2

y: the student's signal map, x_t = alpha_t y(z, t) + sigma_t z; its image input is always the prior, t only feeds the
time embedding.  kappa = 1 - sigma_s alpha_t / (sigma_t alpha_s): the bracket is one DDIM step in y.  p: 2, or the
gradient falls with the step.  (t, s): neighbours on a grid.  The sample is y(z, t_min).  No data.  Where
alpha(t_max) > 0 the boundary means a trajectory that starts at alpha D + sigma z in place of sigma z, which is nearer
to the teacher's marginal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffdistill.denoiser import SignalMap
from diffdistill.distillers.base import Batch, Distiller, Loss, Phase
from diffdistill.distillers.consistency.pairs import PairLaw
from diffdistill.errors import require_at_least
from diffdistill.generator import Generator
from diffdistill.losses import sample_mean
from diffdistill.networks.roles import Networks, Role
from diffdistill.process import NoiseProcess, expand, wide
from diffdistill.rng import Rng


def signal_step(process: NoiseProcess, t: Tensor, s: Tensor) -> Tensor:
    """kappa: the share of the way from y_t to D that a DDIM step from t to s < t goes, [B]."""
    alpha_t, sigma_t = process.alpha_sigma(t)
    alpha_s, sigma_s = process.alpha_sigma(s)
    return 1 - sigma_s * alpha_t / (sigma_t * alpha_s)


class Boot(Distiller):
    """pairs: law of (t, s).  power: p.  boundary_weight: of the second term, which is drawn for every sample."""

    def __init__(self, networks: Networks, pairs: PairLaw, power: float, boundary_weight: float) -> None:
        self.networks, self.pairs, self.power, self.boundary_weight = networks, pairs, power, boundary_weight

    @classmethod
    def needs(cls, power: float = 0.0, boundary_weight: float = 0.0, **hyperparameters: Any) -> frozenset[str]:
        require_at_least(0, power=power, boundary_weight=boundary_weight)
        return frozenset()

    @classmethod
    def roles(cls, **hyperparameters: Any) -> Mapping[str, Role]:
        return {"target": Role(trainable=False), "student": Role()}

    def phases(self, step: int) -> Sequence[Phase]:
        return [Phase("student", ("student",), self.student_loss)]

    @property
    def generator(self) -> Generator:
        return Generator(self._map, (self._map.process.t_max,))

    def student_loss(self, batch: Batch, rng: Rng) -> Loss:
        rng = rng.fork("Boot")
        process, target = self._map.process, self.networks["target"]
        t64, s64 = self.pairs(rng, process)
        z = rng.normal(batch.shape, self.networks.dtype)
        dtype = wide(z.dtype)
        t, s, kappa = (value.to(dtype) for value in (t64, s64, signal_step(process, t64, s64)))
        with torch.no_grad():
            with rng.dropout():
                y = self._map(z, t, batch.cond)
            step = target(process.add_noise(y, z, t), t, batch.cond) - y
        with rng.dropout():
            ours = self._map(z, s, batch.cond)
        error = sample_mean((ours - y - expand(kappa, z) * step).square())
        terms = {"bootstrap": (error / kappa**self.power).mean()}
        if self.boundary_weight:
            terms["boundary"] = self.boundary_weight * self._boundary(z, t, batch, rng).mean()
        return Loss(terms)

    def _boundary(self, z: Tensor, t: Tensor, batch: Batch, rng: Rng) -> Tensor:
        """|y(z, t_max) - D(sigma z, t_max)|^2, mean over coordinates, [B]."""
        process = self._map.process
        t_max = torch.full_like(t, process.t_max)
        with torch.no_grad():
            prior = process.add_noise(torch.zeros_like(z), z, t_max)
            goal = self.networks["target"](prior, t_max, batch.cond)
        with rng.dropout():
            return sample_mean((self._map(z, t_max, batch.cond) - goal).square())

    @property
    def _map(self) -> SignalMap:
        return SignalMap(self.networks["student"])
