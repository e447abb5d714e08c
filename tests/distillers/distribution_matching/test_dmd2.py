"""DMD2 on the closed-form bench: Gaussian data N(m, S^2), student x0 = a z + b, both denoisers exact."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from diffdistill.config import build, compose
from diffdistill.denoiser import Denoiser
from diffdistill.distillers.distribution_matching.dmd2 import generator_loss, inverse_omega, unit
from diffdistill.networks.exact import Gaussian
from diffdistill.process import NoiseProcess
from diffdistill.rng import Rng

M, S, A, B, ALPHA, SIGMA = 0.7, 1.3, 0.9, -0.2, 0.8, 0.6


@dataclass(frozen=True)
class Fixed(NoiseProcess):
    """alpha = .8, sigma = .6 at every time."""

    t_min: float = 0.0
    t_max: float = 1.0

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full_like(t, ALPHA), torch.full_like(t, SIGMA)


def denoiser(mean: float, std: float) -> Denoiser:
    return Denoiser(Gaussian(Fixed(), [[mean]], [[std]]))


def nodes(count: int = 90) -> tuple[Tensor, Tensor, Tensor]:
    """Gauss-Hermite nodes over (z, eps), [count^2, 1] each, and their weights."""
    x, w = np.polynomial.hermite_e.hermegauss(count)
    x, w = torch.from_numpy(x), torch.from_numpy(w / w.sum())
    z, eps = (axis.reshape(-1, 1) for axis in torch.meshgrid(x, x, indexing="ij"))
    return z, eps, torch.outer(w, w).reshape(-1)


def gradient(
    weight: object = unit, fake: tuple[float, float] | None = None, teacher: tuple[float, float] = (M, S)
) -> list[float]:
    z, eps, w = nodes()
    a, b = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (A, B))
    t = torch.full((len(z),), 0.5, dtype=torch.float64)
    loss = generator_loss(denoiser(*teacher), denoiser(*(fake or (B, A))), a * z + b, eps, t, {}, weight=weight)
    return [float(g) for g in torch.autograd.grad((w * loss).sum(), (a, b))]


def test_the_gradient_in_scale_and_mean_is_the_closed_form() -> None:
    assert gradient() == pytest.approx([-0.14410218, -0.22475028], abs=1e-7)


def test_it_is_sigma2_over_alpha2_times_the_gradient_of_the_kl() -> None:
    def kl(a: Tensor, b: Tensor) -> Tensor:
        p, q = ALPHA**2 * a**2 + SIGMA**2, ALPHA**2 * S**2 + SIGMA**2
        return 0.5 * (p / q + (ALPHA * (b - M)) ** 2 / q - 1 - torch.log(p / q))

    a, b = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (A, B))
    expected = [float(g) * SIGMA**2 / ALPHA**2 for g in torch.autograd.grad(kl(a, b), (a, b))]
    assert gradient() == pytest.approx(expected, abs=1e-9)


def test_a_fake_score_equal_to_the_teacher_gives_exactly_nothing() -> None:
    assert gradient(fake=(M, S)) == [0.0, 0.0]


def test_the_normalised_direction_is_scale_free_and_of_unit_mean_for_sds() -> None:
    """With omega, multiplying data and student by k leaves the direction; D_fake = x0 makes mean|w g| one."""
    x0 = torch.randn(16, 3, 4, 4, dtype=torch.float64)
    d = torch.randn_like(x0)
    t = torch.full((16,), 0.5, dtype=torch.float64)
    w = inverse_omega(x0, d, t, Fixed())
    assert torch.allclose(inverse_omega(5 * x0, 5 * d, t, Fixed()) * 5, w)
    assert torch.allclose(
        (w.view(-1, 1, 1, 1) * (x0 - d)).abs().flatten(1).mean(1), torch.ones(16, dtype=torch.float64)
    )


def test_omega_is_floored_where_student_and_teacher_agree() -> None:
    x0 = torch.ones(2, 4)
    assert inverse_omega(x0, x0, torch.ones(2), Fixed()).tolist() == pytest.approx([1e5, 1e5])


def dmd2(*overrides: str):
    from optimum import gauss_recipe

    return gauss_recipe("dmd2", *overrides)


def test_critic_steps_always_and_student_every_fifth() -> None:
    distiller = dmd2("distiller.student_every=5").distiller
    names = [[phase.name for phase in distiller.phases(step)] for step in range(11)]
    assert sum(n.count("student") for n in names) == math.ceil(11 / 5)
    assert sum(n.count("critic") for n in names) == 11
    assert names[0] == ["student", "critic"]  # the student's samples serve the critic


def test_the_critic_reuses_the_students_samples_and_otherwise_draws_its_own() -> None:
    recipe = dmd2()
    student, critic = recipe.distiller.phases(0)
    batch = recipe.data.batch(Rng(0, 0, "data", range(8)), 8, recipe.needs, torch.float64)
    student.loss(batch, Rng(0, 0, "student", range(8)))
    shared = batch.memo["rollout"]
    critic.loss(batch, Rng(0, 0, "critic", range(8)))
    assert batch.memo["rollout"] is shared
    alone = recipe.data.batch(Rng(0, 0, "data", range(8)), 8, recipe.needs, torch.float64)
    critic.loss(alone, Rng(0, 0, "critic", range(8)))
    assert not alone.memo["rollout"].x0.requires_grad
    assert not torch.equal(alone.memo["rollout"].x0, shared.x0)


def test_without_gan_the_discriminator_does_not_exist_and_no_real_data_is_asked_for() -> None:
    recipe = dmd2()
    assert "discriminator" not in recipe.networks
    assert recipe.needs == frozenset()


def test_gan_gradient_reaches_the_student_through_frozen_features() -> None:
    recipe = dmd2("distiller.gan_weight=0.5", "distiller.critic_gan_weight=0.5")
    student = recipe.distiller.phases(0)[0]
    batch = recipe.data.batch(Rng(0, 0, "data", range(64)), 64, recipe.needs, torch.float64)
    recipe.networks.train_only(("student",))
    terms = student.loss(batch, Rng(0, 0, "student", range(64))).terms
    terms["gan"].backward()
    assert all(weight.grad is not None for weight in recipe.networks.weights("student"))
    assert all(
        weight.grad is None for role in ("fake_score", "discriminator") for weight in recipe.networks.weights(role)
    )


def test_an_undecided_discriminator_gives_ln2_and_no_gradient() -> None:
    from optimum import place

    recipe = dmd2("distiller.gan_weight=1.0", "distiller.critic_gan_weight=1.0")
    place(recipe)
    student = recipe.distiller.phases(0)[0]
    batch = recipe.data.batch(Rng(0, 0, "data", range(64)), 64, recipe.needs, torch.float64)
    recipe.networks.train_only(("student",))
    term = student.loss(batch, Rng(0, 0, "student", range(64))).terms["gan"]
    assert float(term.detach()) == pytest.approx(math.log(2))
    term.backward()
    assert all(weight.grad is None or not weight.grad.any() for weight in recipe.networks.weights("student"))


def test_weights_of_the_gan_must_be_set_together() -> None:
    part = build(compose("train", ["distiller=dmd2", "run_dir=none", "distiller.gan_weight=1.0"]).distiller)
    with pytest.raises(ValueError, match="both"):
        part.func.needs(**part.keywords)
