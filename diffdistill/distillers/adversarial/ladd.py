"""LADD: a discriminator on the frozen teacher's features tells the student's noised samples from noised data.

Paper: Sauer et al. 2024, Fast High-Resolution Image Synthesis with Latent Adversarial Diffusion Distillation,
arXiv:2403.12015; the form here is SANA-Sprint's (arXiv:2503.09641), where it stands beside sCM (`scm_ladd`).

    L_student = E -l(x_s),   x_s = f(x_t, t) noised to s
    L_critic  = E max(0, 1 - l(real_s)) + max(0, 1 + l(x_s)) + max(0, 1 + l(real_s, c'))

f: the student's map to t_min.  (x_t, t): noised data, t = t_max for a share of the samples, which is what one step
sees.  l: logit of heads on blocks of the teacher, which stays as it is.  c': the condition of another sample, where
it is another one; the last term is SANA-Sprint's and optional.  The student steps first, the critic on its samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import relu

from diffdistill.denoiser import Cond, FlowMap
from diffdistill.distillers.adversarial.heads import logit
from diffdistill.distillers.base import Batch, Distiller, Loss, Phase, student_times
from diffdistill.distillers.guidance.scales import UniformScale, check_scale, sampled
from diffdistill.errors import UserError
from diffdistill.generator import Generator, Renoise
from diffdistill.networks.roles import Networks, Role
from diffdistill.process import wide
from diffdistill.rng import Rng
from diffdistill.times import TimeLaw


class LADD(Distiller):
    """times, renoise: of the student's sampler.  law: of t.  at_start: share of samples at t_max.  gan_law: of s.
    layers: blocks of the teacher that heads read, empty is the middle one.  mismatched: whether data under the
    condition of the next sample of the micro-batch are fakes too.  scales: law of w where the student takes it as an
    input, None where it does not.  scale: w of the samples.
    """

    def __init__(
        self,
        networks: Networks,
        times: Sequence[float] | None,
        renoise: Renoise,
        law: TimeLaw,
        at_start: float,
        gan_law: TimeLaw,
        layers: Sequence[int],
        mismatched: bool,
        scales: UniformScale | None,
        scale: float,
    ) -> None:
        self.networks, self.times, self.renoise = networks, student_times(networks, times), renoise
        self.law, self.at_start, self.gan_law, self.mismatched = law, at_start, gan_law, mismatched
        self.scales, self.scale = scales, scale
        networks["student"].process.check_times("distiller.times", self.times)

    @classmethod
    def needs(
        cls,
        at_start: float = 0.0,
        mismatched: bool = False,
        scales: UniformScale | None = None,
        scale: float = 1.0,
        **hyperparameters: Any,
    ) -> frozenset[str]:
        check_scale(scales, scale)
        if not 0 <= at_start <= 1:
            raise UserError("at_start", "must lie in [0, 1]", at_start, "SANA-Sprint uses 0.5.")
        return frozenset({"x0", "condition"}) if mismatched else frozenset({"x0"})

    @classmethod
    def roles(
        cls, layers: Sequence[int] = (), scales: UniformScale | None = None, **hyperparameters: Any
    ) -> Mapping[str, Role]:
        heads = Role(init=None, build="heads", reads="target", layers=tuple(layers))
        student = Role(inputs=() if scales is None else ("w",))
        return {"target": Role(trainable=False), "student": student, "discriminator": heads}

    def phases(self, step: int) -> Sequence[Phase]:
        student = Phase("student", ("student",), self.student_loss)
        return [student, Phase("critic", ("discriminator",), self.critic_loss)]

    @property
    def generator(self) -> Generator:
        student = sampled(self.networks["student"], self.scales, self.scale)
        return Generator(FlowMap(student, "consistency"), self.times, self.renoise)

    def student_loss(self, batch: Batch, rng: Rng) -> Loss:
        rng = rng.fork("LADD")
        x0 = batch.memo["x0"] = self._samples(batch, rng)
        return Loss({"gan": -self._logit(x0, batch.cond, rng).mean()})

    def critic_loss(self, batch: Batch, rng: Rng) -> Loss:
        assert batch.x0 is not None
        rng = rng.fork("LADD")
        if "x0" not in batch.memo:  # the student does not step
            with torch.no_grad():
                batch.memo["x0"] = self._samples(batch, rng)
        fake = self._logit(batch.memo["x0"].detach(), batch.cond, rng)
        real = self._logit(batch.x0, batch.cond, rng)
        terms = {"hinge": (relu(1 - real) + relu(1 + fake)).mean()}
        if self.mismatched:
            others = {key: value.roll(1, 0) for key, value in batch.cond.items()}
            changes = [(batch.cond[key] != other).reshape(len(other), -1).any(1) for key, other in others.items()]
            differ = torch.stack(changes).any(0)
            terms["mismatched"] = (relu(1 + self._logit(batch.x0, others, rng)) * differ).mean()
        return Loss(terms, {"logit_gap": (real - fake).mean().detach()})

    def _samples(self, batch: Batch, rng: Rng) -> Tensor:
        """f(x_t, t) of noised data, with gradient, [B, *shape]."""
        assert batch.x0 is not None
        process, x0 = self.networks["student"].process, batch.x0
        dtype = wide(x0.dtype)
        t = self.law(rng, process, dtype)
        first = rng.uniform((len(rng),), dtype) < self.at_start
        t = torch.where(first, torch.full_like(t, process.t_max), t)
        x_t = process.add_noise(x0, rng.normal(batch.shape, x0.dtype), t)
        cond = batch.cond if self.scales is None else {**batch.cond, "w": self.scales(rng.fork("scale"), dtype)}
        return FlowMap(self.networks["student"], "consistency").x0(x_t, t, cond)

    def _logit(self, x0: Tensor, cond: Cond, rng: Rng) -> Tensor:
        """Logit [B] of x0 noised to a fresh time."""
        view = self.networks["target"]
        s = self.gan_law(rng, view.process, wide(x0.dtype))
        x_s = view.process.add_noise(x0, rng.normal(tuple(x0.shape), x0.dtype), s)
        return logit(self.networks["discriminator"], view, x_s, s, cond)
