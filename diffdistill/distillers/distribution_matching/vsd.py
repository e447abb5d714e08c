"""VSD / SwiftBrush: image-free score distillation with a LoRA of the teacher as fake score, both guided alike.

Paper: Nguyen & Tran 2023, SwiftBrush: One-Step Text-to-Image Diffusion Model with Variational Score Distillation,
arXiv:2312.05239.
Headline: SD2.1, COCO-30k FID 16.67 (v2: 8.14).

    L_student = E w <sg[D_fake^g(x_t, t) - D_target^g(x_t, t)], x0> + a(step) max(0, threshold - cos(x0, c))
    L_critic  = E v(t) |D_fake(x_t, t) - sg[x0]|^2,   c replaced by the null condition in a share of the batches

^g: classifier-free guidance of the same scale on both.  w = alpha sigma: sigma^2 on the difference of noise
predictions.  cos: similarity of image and text embeddings, v2's hinge (Dao et al. 2024, arXiv:2408.14176), its weight a
falling linearly to 0; off without an `alignment`.  The student steps first, the critic on the same samples.
v2's merge of two students' weights is `export run=A merge=B`, or `init.student=run:A+0.5*run:B`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from diffdistill import losses
from diffdistill.alignment import hinge
from diffdistill.condition import dropped
from diffdistill.denoiser import Cond, Denoiser
from diffdistill.distillers.base import Batch, Loss
from diffdistill.distillers.distribution_matching.diff_instruct import generator_loss
from diffdistill.distillers.distribution_matching.matching import DistributionMatching
from diffdistill.distillers.distribution_matching.weights import SampleWeight
from diffdistill.distillers.guidance.scales import UniformScale, guided_by
from diffdistill.errors import UserError, require_at_least
from diffdistill.generator import Renoise, Until
from diffdistill.networks.roles import Networks, Role
from diffdistill.process import wide
from diffdistill.rng import Rng
from diffdistill.times import TimeLaw

__all__ = ["VSD", "generator_loss"]

# (images [B, C, H, W] in [-1, 1], cond) -> cosine of image and text embeddings, [B]
Alignment = Callable[[Tensor, Cond], Tensor]


class VSD(DistributionMatching):
    """Beside DistributionMatching's: null_share: of the critic's batches without condition.  alignment: cos, None is
    off.  alignment_threshold, alignment_weight: of its hinge.  alignment_steps: when its weight has fallen to 0.
    scales: law of a guidance scale per sample, for both scores alike (SNOOPI, arXiv:2412.02687); None: the teacher's.
    """

    critic_first = False

    def __init__(
        self,
        networks: Networks,
        times: Sequence[float] | None,
        renoise: Renoise,
        until: Until,
        student_law: TimeLaw,
        critic_law: TimeLaw,
        weight: SampleWeight,
        critic_weight: losses.DenoisingWeight,
        null_share: float,
        alignment: Alignment | None,
        alignment_threshold: float,
        alignment_weight: float,
        alignment_steps: int,
        scales: UniformScale | None = None,
    ) -> None:
        super().__init__(networks, times, renoise, until, student_law, critic_law, weight, critic_weight)
        self.null_share, self.alignment = null_share, alignment
        self.alignment_threshold, self.alignment_weight = alignment_threshold, alignment_weight
        self.alignment_steps, self.scales = alignment_steps, scales

    @classmethod
    def needs(
        cls,
        null_share: float = 0.0,
        alignment_threshold: float = 0.0,
        alignment_weight: float = 0.0,
        alignment_steps: int = 1,
        alignment: Alignment | None = None,
        scales: UniformScale | None = None,
        **hyperparameters: Any,
    ) -> frozenset[str]:
        if not 0 <= null_share < 1:
            raise UserError("null_share", "must lie in [0, 1)", null_share, "SwiftBrush: 0.1.")
        if not -1 <= alignment_threshold <= 1:
            raise UserError("alignment_threshold", "must lie in [-1, 1], a cosine", alignment_threshold, "v2: 0.35.")
        require_at_least(0, alignment_weight=alignment_weight)
        require_at_least(1, alignment_steps=alignment_steps)
        null = {"null"} if null_share or scales is not None else set()
        return frozenset(null | ({"codec"} if alignment is not None else set()))

    @classmethod
    def roles(cls, **hyperparameters: Any) -> Mapping[str, Role]:
        return {**super().roles(), "fake_score": Role(modes=("lora", "copy"))}

    @property
    def fake_score(self) -> Denoiser:
        return self.networks["fake_score"].guided(self.target.guidance)

    def scores(self, rng: Rng) -> tuple[Denoiser, Denoiser]:
        """Teacher and fake score under one guidance."""
        if self.scales is None:
            return self.target, self.fake_score
        w = self.scales(rng.fork("scales"), wide(self.networks.dtype))
        return guided_by(self.networks, "target", w), guided_by(self.networks, "fake_score", w)

    def student_loss(self, batch: Batch, rng: Rng) -> Loss:
        weight = self.alignment_weight * max(0.0, 1 - rng.step / self.alignment_steps)
        rng = self.stream(rng)
        x0 = self.student_samples(batch, rng)
        t, eps = self.noise(self.student_law, x0, rng)
        target, fake_score = self.scores(rng)
        loss = generator_loss(target, fake_score, x0, eps, t, batch.cond, weight=self.weight)
        terms = {"vsd": loss.mean()}
        if self.alignment is not None and weight:
            cosine = self.alignment(self.networks.codec.decode(x0), batch.cond)
            terms["alignment"] = weight * hinge(cosine, self.alignment_threshold).mean()
        return Loss(terms)

    def critic_loss(self, batch: Batch, rng: Rng) -> Loss:
        rng = self.stream(rng)
        x0 = self.critic_samples(batch, rng)
        t, eps = self.noise(self.critic_law, x0, rng)
        cond = dropped(batch.cond, self.networks.teacher.null, self.null_share, rng, whole_batch=True)
        loss = losses.denoising(self.networks["fake_score"], x0, eps, t, cond, self.critic_weight)
        return Loss({"denoising": loss.mean()})
