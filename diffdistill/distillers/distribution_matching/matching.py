"""What distribution-matching methods share: sampling, noising, the critic and the order of the two phases."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffdistill import losses
from diffdistill.denoiser import Denoiser
from diffdistill.distillers.base import Batch, Distiller, Loss, Phase, student_times
from diffdistill.distillers.distribution_matching.weights import SampleWeight
from diffdistill.errors import UserError
from diffdistill.generator import Generator, Renoise, Rollout, Until
from diffdistill.networks.roles import Networks, Role
from diffdistill.process import wide
from diffdistill.rng import Rng
from diffdistill.times import TimeLaw


class DistributionMatching(Distiller):
    """A student, a fake score that denoises its samples, and the target both are held against.

    times: the student's grid, None is one step from t_max.  renoise, until: of its rollout.  student_law, critic_law:
    laws of t, None where a method draws t itself.  weight: of one sample in the student's loss.  critic_weight: on the
    critic's x0 error.

    critic_first: the critic steps before the student, each on samples of its own (Diff-Instruct, SiD); else after it,
    on the very samples the student was trained with (DMD, SwiftBrush).
    """

    critic_first: ClassVar[bool] = True

    def __init__(
        self,
        networks: Networks,
        times: Sequence[float] | None,
        renoise: Renoise,
        until: Until,
        student_law: TimeLaw | None,
        critic_law: TimeLaw | None,
        weight: SampleWeight,
        critic_weight: losses.DenoisingWeight,
    ) -> None:
        self.networks, self.times, self.renoise, self.until = networks, student_times(networks, times), renoise, until
        self.student_law, self.critic_law = student_law, critic_law
        self.weight, self.critic_weight = weight, critic_weight
        networks["student"].process.check_times("distiller.times", self.times)

    @classmethod
    def roles(cls, **hyperparameters: Any) -> Mapping[str, Role]:
        return {"target": Role(trainable=False), "student": Role(), "fake_score": Role()}

    @property
    def critics(self) -> tuple[str, ...]:
        """The roles that the critic's phase trains."""
        return ("fake_score",)

    @property
    def target(self) -> Denoiser:
        """The teacher, guided if asked."""
        return self.networks["target"]

    @property
    def fake_score(self) -> Denoiser:
        """The critic: denoiser of the student's own samples."""
        return self.networks["fake_score"]

    def student_is_due(self, step: int) -> bool:
        """Whether the student is updated at this step."""
        return True

    def phases(self, step: int) -> Sequence[Phase]:
        critic = Phase("critic", self.critics, self.critic_loss)
        if not self.student_is_due(step):
            return [critic]
        student = Phase("student", ("student",), self.student_loss)
        return [critic, student] if self.critic_first else [student, critic]

    @property
    def generator(self) -> Generator:
        return Generator(self.networks["student"], self.times, self.renoise)

    @abstractmethod
    def student_loss(self, batch: Batch, rng: Rng) -> Loss:
        """The loss of the student's phase."""

    def critic_loss(self, batch: Batch, rng: Rng) -> Loss:
        """Denoising of the student's samples."""
        rng = self.stream(rng)
        x0 = self.critic_samples(batch, rng)
        t, eps = self.noise(self.critic_law, x0, rng)
        loss = losses.denoising(self.fake_score, x0, eps, t, batch.cond, self.critic_weight)
        return Loss({"denoising": loss.mean()})

    # -- pieces -----------------------------------------------------------------------------------------------

    def stream(self, rng: Rng) -> Rng:
        """The draws of this method, apart from those of another part of a Composite."""
        return rng.fork(type(self).__name__)

    def student_samples(self, batch: Batch, rng: Rng) -> Tensor:
        """Samples x0 [B, *shape] that carry the student's gradient."""
        rollout = batch.memo["rollout"] = self._rollout(batch, rng)
        return rollout.x0

    def critic_samples(self, batch: Batch, rng: Rng) -> Tensor:
        """Samples x0 [B, *shape] without gradient, for the critic."""
        if "rollout" not in batch.memo:  # the student has not stepped yet, or does not step
            with torch.no_grad():
                batch.memo["rollout"] = self._rollout(batch, rng)
        rollout: Rollout = batch.memo["rollout"]
        return rollout.x0.detach()

    def noise(self, law: TimeLaw | None, x0: Tensor, rng: Rng) -> tuple[Tensor, Tensor]:
        """t [B] from `law` and unit noise shaped like x0."""
        assert law is not None
        t = law(rng, self.target.process, wide(x0.dtype))
        return t, rng.normal(tuple(x0.shape), x0.dtype)

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t of x0, [B, *shape]."""
        return self.target.process.add_noise(x0, eps, t)

    def _rollout(self, batch: Batch, rng: Rng) -> Rollout:
        z = rng.normal(batch.shape, self.networks.dtype)

        def until(rng: Rng, num_steps: int, size: int) -> int | Tensor:
            # both phases of a step train at one step of the sampler: the critic must know the mixture the student sees
            if "until" not in batch.memo:
                batch.memo["until"] = self.until(rng, num_steps, size)
            return batch.memo["until"]

        return self.generator.rollout(z, batch.cond, rng, until)


def check_gan_weights(gan_weight: float, critic_gan_weight: float, examples: tuple[object, object]) -> None:
    """Refuse a GAN of which one half is on and the other off."""
    if min(gan_weight, critic_gan_weight) < 0 or (gan_weight > 0) != (critic_gan_weight > 0):
        raise UserError(
            "gan_weight, critic_gan_weight",
            "must both be > 0 (GAN) or both 0 (no GAN)",
            (gan_weight, critic_gan_weight),
            f"The paper uses {examples[0]} and {examples[1]}.",
        )
