"""Methods written plainly, as their papers' pseudocode has them: what the speed of a training step is held against.

Each role has a call of its own; nothing is shared, reused, fused or compiled, and networks lie in memory as they were
built. Hyperparameters, networks and data are those of the recipe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffdistill import losses
from diffdistill.distillers.adversarial.heads import logit
from diffdistill.distillers.base import Batch
from diffdistill.distillers.consistency.mean_flow import MeanFlow
from diffdistill.distillers.consistency.scm import SCM, held, normalised
from diffdistill.distillers.distribution_matching.divergences import DIVERGENCES
from diffdistill.distillers.distribution_matching.dmd2 import DMD2
from diffdistill.distillers.distribution_matching.f_distill import FDistill
from diffdistill.distillers.distribution_matching.sid import SiD
from diffdistill.distillers.guidance.agd import AGD
from diffdistill.losses import sample_mean
from diffdistill.process import VELOCITY, RectifiedFlow, expand, wide
from diffdistill.recipe import Recipe
from diffdistill.rng import Rng
from diffdistill.times import TimeLaw
from diffdistill.trainer import Trainer

# of train: networks as they were built
WORDS = ("channels_last=false", "onednn=false", "compile=false", "together=false")
TABLE = 4096  # times of a law, to draw from

Update = tuple[tuple[str, ...], Callable[[], Tensor]]  # roles, and the loss that trains them


class Draws:
    """Numbers of torch's own generator. dtype: of states."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.size, self.dtype, self.device = size, dtype, device
        self._tables: dict[int, Tensor] = {}

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, dtype=self.dtype, device=self.device)

    def uniform(self) -> Tensor:
        return torch.rand(self.size, dtype=self.dtype, device=self.device)

    def times(self, law: TimeLaw, process: Any) -> Tensor:
        """t [B], out of as many of the law as `TABLE`."""
        if id(law) not in self._tables:
            rng = Rng(0, 0, "table", range(TABLE), self.device)
            self._tables[id(law)] = law(rng, process, wide(self.dtype))
        return self._tables[id(law)][torch.randint(TABLE, (self.size,), device=self.device)]


# -- distribution matching ------------------------------------------------------------------------------------


def _sample(method: Any, batch: Batch, draws: Draws) -> Tensor:
    """x0 of a one-step student from fresh noise."""
    student, z = method.networks["student"], draws.normal(batch.shape)
    t = torch.full((len(z),), method.times[0], device=z.device)
    return student(expand(student.process.alpha_sigma(t)[1], z) * z, t, batch.cond)


def _noised(method: Any, law: TimeLaw, x0: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
    process = method.networks["target"].process
    t, eps = draws.times(law, process), draws.normal(tuple(x0.shape))
    return process.add_noise(x0, eps, t), t


def _denoising(method: Any, x0: Tensor, batch: Batch, draws: Draws) -> Tensor:
    x_t, t = _noised(method, method.critic_law, x0, draws)
    fake = method.networks["fake_score"]
    return (method.critic_weight(t, fake.process) * sample_mean((fake(x_t, t, batch.cond) - x0).square())).mean()


def _weight(method: Any, x0: Tensor, d_target: Tensor, t: Tensor) -> Tensor:
    found: Tensor = method.weight(x0, d_target, t, method.networks["target"].process).detach()
    return found


def dmd2(method: Any, batch: Batch, draws: Draws, step: int) -> Iterator[Update]:
    """Without GAN: the student on its score difference, then the critic on samples of its own."""
    target, fake = method.networks["target"], method.networks["fake_score"]

    def student() -> Tensor:
        x0 = _sample(method, batch, draws)
        x_t, t = _noised(method, method.student_law, x0, draws)
        with torch.no_grad():
            d_target, d_fake = target(x_t, t, batch.cond), fake(x_t, t, batch.cond)
        return (_weight(method, x0, d_target, t) * sample_mean((d_fake - d_target) * x0)).mean()

    def critic() -> Tensor:
        with torch.no_grad():
            x0 = _sample(method, batch, draws)
        return _denoising(method, x0, batch, draws)

    if step % method.student_every == 0:
        yield ("student",), student
    yield ("fake_score",), critic


def sid(method: Any, batch: Batch, draws: Draws, step: int) -> Iterator[Update]:
    """The critic, then the student through the inputs of both networks."""
    target, fake = method.networks["target"], method.networks["fake_score"]

    def critic() -> Tensor:
        with torch.no_grad():
            x0 = _sample(method, batch, draws)
        return _denoising(method, x0, batch, draws)

    def student() -> Tensor:
        x0 = _sample(method, batch, draws)
        x_t, t = _noised(method, method.student_law, x0, draws)
        d_target, d_fake = target(x_t, t, batch.cond), fake(x_t, t, batch.cond)
        gap = d_target - d_fake
        loss = sample_mean(gap * (d_fake - x0)) + (1 - method.alpha) * sample_mean(gap.square())
        return (_weight(method, x0, d_target, t) * loss).mean()

    yield ("fake_score",), critic
    yield ("student",), student


def f_distill(method: Any, batch: Batch, draws: Draws, step: int) -> Iterator[Update]:
    """As DMD2 with its GAN, the density ratio read off the discriminator, which is kept smooth on real data."""
    target, fake, heads = (method.networks[name] for name in ("target", "fake_score", "discriminator"))
    read = method.networks[method.gan_features]

    def logits(x0: Tensor, t: Tensor, x_t: Tensor) -> Tensor:
        return logit(heads, read, x_t, t, batch.cond)

    def student() -> Tensor:
        x0 = _sample(method, batch, draws)
        x_t, t = _noised(method, method.student_law, x0, draws)
        with torch.no_grad():
            d_target, d_fake = target(x_t, t, batch.cond), fake(x_t, t, batch.cond)
        found = logits(x0, t, x_t)
        r = method.ratio.at(method.networks, x_t, t, batch.cond, found)
        h = DIVERGENCES[method.divergence].h(r)
        pulled = _weight(method, x0, d_target, t) * h / h.mean() * sample_mean((d_fake - d_target) * x0)
        return pulled.mean() + method.gan_weight * losses.gan_generator(found).mean()

    def critic() -> Tensor:
        assert batch.x0 is not None
        with torch.no_grad():
            x0 = _sample(method, batch, draws)
        loss = _denoising(method, x0, batch, draws)
        told = []
        for x in (x0, batch.x0):
            x_t, t = _noised(method, method.gan_law, x, draws)
            told.append(logits(x, t, x_t))
        loss = loss + method.critic_gan_weight * losses.gan_discriminator(told[1], told[0]).mean()
        if method.r1_weight:
            x_t, t = _noised(method, method.gan_law, batch.x0, draws)
            near = x_t + method.r1_std * draws.normal(tuple(x_t.shape))
            change = logits(batch.x0, t, x_t) - logits(batch.x0, t, near)
            loss = loss + method.r1_weight * change.square().mean()
        return loss

    if step % method.student_every == 0:
        yield ("student",), student
    yield ("fake_score", "discriminator"), critic


# -- consistency ----------------------------------------------------------------------------------------------


def _jvp(function: Callable[..., Tensor], primals: Any, tangents: Any) -> tuple[Tensor, Tensor]:
    """By torch alone."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        value, tangent = torch.func.jvp(function, primals, tangents)[:2]
    return value, tangent


def scm(method: Any, batch: Batch, draws: Draws, step: int) -> Iterator[Update]:
    """The teacher's velocity, the tangent along it, and a pass for the gradient."""
    assert batch.x0 is not None
    x0, student = batch.x0, method.student

    def loss() -> Tensor:
        teacher, process = method.networks["target"].under(student.process), student.process
        t = held(draws.times(method.law, process), process, method.room)
        x_t = process.add_noise(x0, draws.normal(batch.shape), t)
        cos, sin = expand(torch.cos(t), x0), expand(torch.sin(t), x0)
        with torch.no_grad():
            velocity = teacher.predict(x_t, t, batch.cond, VELOCITY)

        def predict(x: Tensor, time: Tensor) -> Tensor:
            return student.predict(x, time, batch.cond, VELOCITY)

        ours, along = _jvp(predict, (x_t, t), (cos * sin * velocity, torch.cos(t) * torch.sin(t)))
        ramp = min(1.0, step / method.warmup) if method.warmup else 1.0
        g = -cos.square() * (ours - velocity) - ramp * (cos * sin * x_t + along)
        gap = (predict(x_t, t) - ours) / method.sigma_data - normalised(g, method.normalise)
        error = sample_mean(gap.square())
        if method.adaptive:
            log_variance = method.networks["weight"](student.network.time(t))
            error = torch.exp(-log_variance) * error + log_variance
        return error.mean()

    yield ("student", "weight") if method.adaptive else ("student",), loss


def mean_flow(method: Any, batch: Batch, draws: Draws, step: int) -> Iterator[Update]:
    """The teacher's velocity, the derivative of the average one along it, and a pass for the gradient."""
    assert batch.x0 is not None
    x0, flow = batch.x0, RectifiedFlow()
    target, student = method.networks["target"].under(flow), method.networks["student"].under(flow)

    def average(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        found: Tensor = student.predict(x, t, {**batch.cond, "s": s}, VELOCITY)
        return found

    def loss() -> Tensor:
        process = student.process
        one, other = draws.times(method.law, process), draws.times(method.law, process)
        t, s = held(torch.maximum(one, other), process, method.tangent.reach), torch.minimum(one, other)
        s = torch.where(draws.uniform() < method.to_end, torch.full_like(s, process.t_min), torch.minimum(s, t))
        x_t = process.add_noise(x0, draws.normal(batch.shape), t)
        with torch.no_grad():
            velocity = target.predict(x_t, t, batch.cond, VELOCITY)
        tangents = (velocity, torch.ones_like(t), torch.zeros_like(s))
        along = _jvp(average, (x_t, t, s), tangents)[1]
        goal = velocity - expand(t - s, x_t) * along
        error = (average(x_t, t, s) - goal).flatten(1).square().sum(1)
        return ((error.detach() + method.c) ** -method.power * error).mean()

    yield ("student",), loss


# -- guidance -------------------------------------------------------------------------------------------------


def agd(method: Any, batch: Batch, draws: Draws, step: int) -> Iterator[Update]:
    """One pass of the teacher with adapters, on what its sampler visited."""
    seen, student = batch.trajectory, method.networks["student"]
    assert seen is not None

    def loss() -> Tensor:
        error = sample_mean((student(seen.x_t, seen.t, {**seen.cond, "w": seen.w}) - seen.target).square())
        return (method.weight(seen.t, student.process) * error).mean()

    yield ("student",), loss


PLAINLY: Mapping[type, Callable[[Any, Batch, Draws, int], Iterator[Update]]] = {
    DMD2: dmd2, SiD: sid, FDistill: f_distill, SCM: scm, MeanFlow: mean_flow, AGD: agd,
}  # fmt: skip


def why_not(method: Any, trainer: Trainer) -> str | None:
    """Why there is no plain loop of this method, or None."""
    if trainer.accumulate > 1:
        return "only whole batches are"
    if type(method) not in PLAINLY:
        return f"{type(method).__name__} is not written plainly"
    several = isinstance(method, DMD2 | SiD) and len(method.times) > 1
    gan = (type(method) is DMD2 and method.gan_weight) or (isinstance(method, FDistill) and not method.gan_weight)
    if several or gan or getattr(method, "prior_std", None) is not None:
        return "only one step is, DMD2 without GAN and f-distill with one"
    if isinstance(method, SCM) and (method.velocity == "data" or method.scales is not None):
        return "only sCM with the teacher's velocity and a fixed scale is"
    return None


class PlainLoop:
    """Steps of a recipe, built with `WORDS`, by its plain loss, torch's own optimizers, clipping and averages."""

    def __init__(self, recipe: Recipe, trainer: Trainer, accelerator: Accelerator) -> None:
        self.recipe, self.trainer, self.accelerator = recipe, trainer, accelerator
        self.networks, self.method = recipe.networks, recipe.distiller
        roles = self.networks.trainable
        self.weights = {role: [*self.networks.weights(role)] for role in roles}
        self.optimizers = {role: _plain(trainer._of(trainer.optimizer, role))(self.weights[role]) for role in roles}
        self.averages = {role: [w.detach().clone() for w in self.weights[role]] for role in trainer.ema}
        self.draws = Draws(trainer.batch_size, self.networks.dtype, self.networks.device)

    def step(self, step: int) -> None:
        (batch,) = self.trainer.batches(self.recipe.data, self.recipe.needs, self.networks, step)
        for roles, loss in PLAINLY[type(self.method)](self.method, batch, self.draws, step):
            self.networks.train_only(roles)
            with self.accelerator.autocast():
                total = loss()
            total.backward()
            for role in roles:
                self._update(role, step)

    def _update(self, role: str, step: int) -> None:
        limit = self.trainer.clip.get(role, self.trainer.clip.get("default"))
        if limit is not None:
            torch.nn.utils.clip_grad_norm_(self.weights[role], limit)
        optimizer = self.optimizers[role]
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for average, weight in zip(self.averages.get(role, ()), self.weights[role], strict=False):
                average.lerp_(weight, 1 - self.trainer.ema[role](step + 1))


def _plain(optimizer: partial[torch.optim.Optimizer]) -> partial[torch.optim.Optimizer]:
    """As torch makes it when nothing is asked, and still: learning rates of 0 leave all as it is."""
    kept = {key: value for key, value in optimizer.keywords.items() if key not in ("fused", "foreach")}
    return partial(optimizer.func, **{**kept, "lr": 0.0})
