"""TDM in closed form: rectified flow on N(0, 1), where every denoiser is a slope.

One step of the student goes from t = 1, where x is z, to s = 1/2: G(z) = a z, so x_s = b z with b = (1 + a) / 2, and
the teacher's marginal there has standard deviation sqrt(1/2).
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from optimum import gauss_recipe, place
from scipy.integrate import quad
from scipy.optimize import brentq

from diffdistill.config import compose
from diffdistill.distillers.distribution_matching import diff_instruct, tdm
from diffdistill.distillers.distribution_matching.tdm import ElementHuber, Interval, published, unbiased
from diffdistill.distillers.distribution_matching.weights import unit
from diffdistill.errors import UserError
from diffdistill.generator import Rollout
from diffdistill.losses import squared
from diffdistill.process import EDM, VP, NoiseProcess, RectifiedFlow
from diffdistill.recipe import assemble
from diffdistill.rng import Rng

FLOW = RectifiedFlow()
S = 0.5
TEACHER = 0.5**0.5  # std of x_s under the teacher


def rollout(b: float, num: int) -> Rollout:
    z = Rng(1, 0, "z", range(num)).normal((num, 1), torch.float64)
    t, s = torch.ones(num, dtype=torch.float64), torch.full((num,), S, dtype=torch.float64)
    return Rollout(z, t, (2 * b - 1) * z, s, torch.zeros(num, dtype=torch.int64), lambda: b * z)


def slope_of(target: tdm.FakeTargetOf, b: float, tau: float, num: int = 400_000) -> float:
    """The regression slope of what a fake score learns on x_tau: its optimum, for all is Gaussian."""
    r = rollout(b, num)
    t = torch.full((num,), tau, dtype=torch.float64)
    eps = Rng(2, 0, "eps", range(num)).normal((num, 1), torch.float64)
    x_tau = FLOW.diffuse(r.x_out, r.s, t, eps)
    found = target(FLOW, r, r.x_out, r.s, x_tau, t, eps)
    w = found.weight[:, None]
    a = found.scale[:, None] * x_tau
    return float((w * a * found.y).sum() / (w * a * a).sum())


def teacher_slope(tau: float) -> float:
    return (1 - tau) / ((1 - tau) ** 2 + tau**2)


def test_the_published_target_is_biased_between_steps_and_the_other_is_not() -> None:
    """The card's numbers at tau = .7: .30 against the teacher's .52."""
    assert teacher_slope(0.7) == pytest.approx(0.517, abs=1e-3)
    assert slope_of(unbiased, TEACHER, 0.7) == pytest.approx(teacher_slope(0.7), abs=6e-3)
    r = 0.3 / 0.5
    g2 = 0.7**2 - (r * S) ** 2
    expected = (2 * TEACHER - 1) * r * TEACHER / ((r * TEACHER) ** 2 + g2)
    assert expected == pytest.approx(0.30, abs=5e-3)

    def unweighted(*args: object) -> tdm.FakeTarget:
        found = published(*args)  # type: ignore[arg-type]
        return tdm.FakeTarget(found.scale, found.y, torch.ones_like(found.weight))

    assert slope_of(unweighted, TEACHER, 0.7) == pytest.approx(expected, abs=6e-3)


def fixed_point(slope: str) -> float:
    """The std of x_s at which the student's gradient vanishes, tau uniform in (s, 1)."""

    def integrand(tau: float, b: float) -> float:
        r = (1 - tau) / S
        g2 = tau**2 - (r * S) ** 2
        variance = (r * b) ** 2 + g2
        a = 2 * b - 1
        if slope == "published":
            fake = a * r * b / variance
        elif slope == "published, full ratio":  # the denoiser of x0 noised from 0
            fake = (1 - tau) * a**2 / ((1 - tau) ** 2 * a**2 + tau**2)
        else:  # Tweedie's formula on the law of x_tau
            fake = (1 - tau**2 / variance) / (1 - tau)
        return (fake - teacher_slope(tau)) * r * b  # E[(D_fake - D_target) z]

    return float(brentq(lambda b: quad(integrand, S, 1 - 1e-9, args=(b,))[0], 0.55, 1.3))


def test_where_each_target_leaves_the_student() -> None:
    """.71, the teacher's; .87 and 1.0: the bias of the published target moves the fixed point."""
    assert fixed_point("unbiased") == pytest.approx(TEACHER, abs=1e-6)
    assert fixed_point("published") == pytest.approx(0.87, abs=0.01)
    assert fixed_point("published, full ratio") == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("process", [FLOW, VP(t_max=990.0), EDM(0.002, 20.0)], ids=["flow", "vp", "edm"])
def test_the_unbiased_target_is_the_denoiser_for_every_pair_of_times(process: NoiseProcess) -> None:
    num = 300_000
    for low, high in ((0.05, 0.4), (0.3, 0.35), (0.2, 0.9)):
        span = process.t_max - process.t_min
        s, t = (torch.full((num,), process.t_min + x * span, dtype=torch.float64) for x in (low, high))
        std = 1.3
        x0, e0, eps = (Rng(n, 0, "draw", range(num)).normal((num, 1), torch.float64) for n in (3, 4, 5))
        x_s = process.add_noise(std * x0, e0, s)
        x_t = process.diffuse(x_s, s, t, eps)
        g, y = process.denoising_target(x_s, s, t, eps)
        alpha, sigma = (float(v[0]) for v in process.alpha_sigma(t))
        slope = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
        residual = y - g[:, None] * slope * x_t
        error = (residual * x_t).mean(), (residual * x_t).std() / num**0.5
        assert abs(error[0]) < 4 * error[1], (low, high, error)


def test_the_unbiased_target_from_a_clean_sample_is_that_sample() -> None:
    x0, eps = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    zero, t = torch.zeros(5, dtype=torch.float64), torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    g, y = FLOW.denoising_target(x0, zero, t, eps)
    assert torch.allclose(y, g[:, None] * x0) and torch.allclose(g, t)


def test_the_mixed_noise_of_the_published_weight() -> None:
    """e_mix = (alpha_ratio sigma_s eps_hat + g eps) / sigma_tau, and the ratio is 1 where it equals eps."""
    r = rollout(TEACHER, 1000)
    tau, eps = torch.full((1000,), 0.8, dtype=torch.float64), torch.randn(1000, 1, dtype=torch.float64)
    x_tau = FLOW.diffuse(r.x_out, r.s, tau, eps)
    weight = published(FLOW, r, r.x_out, r.s, x_tau, tau, eps).weight
    ratio, g = 0.2 / S, (0.8**2 - (0.2 / S * S) ** 2) ** 0.5
    eps_hat = (r.x_out - 0.5 * r.x0) / 0.5
    mixed = (ratio * S * eps_hat + g * eps) / 0.8
    assert torch.allclose(weight, torch.exp((eps**2 - mixed**2) / 2)[:, 0])


def test_tau_lies_in_the_interval_of_its_step() -> None:
    rng = Rng(0, 0, "tau", range(1000))
    t, s = torch.full((1000,), 0.9), torch.full((1000,), 0.6)
    own = Interval(0.02, 0.01).draw(rng, FLOW, t, s)
    assert 0.6 <= float(own.min()) < 0.603 and 0.887 < float(own.max()) <= 0.89
    shared = Interval(0.02, 0.01, shared=True).draw(rng, FLOW, t, s)
    assert float(shared.min()) >= 0.6 and 0.98 < float(shared.max()) <= 0.99
    last = Interval(0.02, 0.01).draw(rng, FLOW, s, torch.zeros(1000))
    assert 0.02 <= float(last.min()) < 0.03


def test_the_huber_distance() -> None:
    a, b = torch.tensor([[3.0, 0.0]], dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)
    assert float(ElementHuber(4.0)(a, b)) == pytest.approx(0.5)
    small = ElementHuber(1e3)(a, b) * 2e3  # a square far below h
    assert float(small) == pytest.approx(4.5, rel=1e-3)


def few_step(*overrides: str) -> list[str]:
    return ["distiller.times=[20.0,4.0]", *overrides]


@pytest.mark.parametrize("shared", ["false", "true"])
@pytest.mark.parametrize("random_s", ["false", "true"])
def test_a_step_ends_where_the_next_begins_and_both_phases_noise_from_there(shared: str, random_s: str) -> None:
    """x_tau is diffused from x_s: noised from x0, as DMD2 does, its law would not be the marginal's."""
    words = few_step(f"distiller.interval.shared={shared}", f"distiller.random_s={random_s}")
    recipe = gauss_recipe("tdm", *words)
    place(recipe, 0.2, 1.1)
    distiller, process = recipe.distiller, recipe.networks.teacher.process
    assert isinstance(distiller, tdm.TDM)
    seen: dict[str, list[torch.Tensor]] = {"target": [], "fake_score": []}
    for role, found in seen.items():
        network = recipe.networks[role].network
        # scaled by c_in on the way in
        network.register_forward_hook(lambda m, i, o, found=found: found.append(i[0] / m.scale(i[1])[:, None]))
    batch = recipe.data.batch(Rng(0, 0, "data", range(512)), 512, recipe.needs, recipe.networks.dtype)
    rng = Rng(0, 0, "phase", range(512))
    distiller.student_loss(batch, rng)
    distiller.critic_loss(batch, rng)
    r = batch.memo["rollout"]
    assert set(r.s.tolist()) == {4.0, 0.002}
    first = r.s == 4.0
    assert torch.equal(r.x_out[first], process.jump(r.x_in, r.x0, r.t, r.s)[first])
    assert torch.equal(r.x_out[~first], r.x0[~first])
    for phase, inputs in (("student", seen["target"][0]), ("critic", seen["fake_score"][-1])):
        x_s, s, tau, eps = distiller.noised_point(r, distiller.stream(rng).fork(phase))
        assert torch.allclose(x_s, process.jump(r.x_in, r.x0, r.t, s)) or random_s == "false"
        assert (random_s == "true") or (torch.equal(x_s, r.x_out) and torch.equal(s, r.s))
        assert bool((s >= r.s).all() and (s < tau).all())
        assert torch.allclose(inputs, process.diffuse(x_s, s, tau, eps))


@pytest.mark.parametrize("word", ["distiller.interval.margin=0.9", "distiller.interval.lowest=0.3"])
def test_an_empty_interval_is_refused(word: str) -> None:
    with pytest.raises(UserError, match="room for tau"):
        gauss_recipe("tdm", *few_step(word))


def test_the_fake_score_is_told_the_step() -> None:
    recipe = gauss_recipe("tdm", *few_step())
    steps: list[torch.Tensor] = []
    original = type(recipe.networks["fake_score"]).__call__

    def spy(self: object, x: torch.Tensor, t: torch.Tensor, cond: dict[str, torch.Tensor]) -> torch.Tensor:
        steps.append(cond["step"])
        return original(self, x, t, cond)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(recipe.networks["fake_score"]), "__call__", spy)
        batch = recipe.data.batch(Rng(0, 0, "data", range(64)), 64, recipe.needs, recipe.networks.dtype)
        for phase in recipe.distiller.phases(0):
            phase.loss(batch, Rng(0, 0, phase.name, range(64)))
    assert np.unique(torch.cat(steps).numpy()).tolist() == [0, 1]


def test_from_a_clean_sample_with_squares_it_is_twice_the_plain_pull() -> None:
    recipe = gauss_recipe("tdm")
    place(recipe, 0.3, 1.2)
    target, fake = recipe.networks["target"], recipe.networks["fake_score"]
    x0 = torch.randn(64, 6, dtype=torch.float64, requires_grad=True)
    eps, t = torch.randn(64, 6, dtype=torch.float64), torch.linspace(0.1, 15, 64, dtype=torch.float64)
    ours = tdm.generator_loss(target, fake, x0, eps, t, {}, weight=unit, distance=squared).sum()
    plain = diff_instruct.generator_loss(target, fake, x0, eps, t, {}, weight=unit).sum()
    assert torch.allclose(torch.autograd.grad(ours, x0)[0], 2 * torch.autograd.grad(plain, x0)[0])


def test_the_fake_score_reads_the_step_and_the_student_does_not() -> None:
    words = ["data=gmm2d", "distiller=tdm", "experiment=none", "evaluation=none", "run_dir=none"]
    networks = assemble(compose("train", words)).networks  # type: ignore[arg-type]
    x, t, cond = torch.randn(4, 2), torch.full((4,), 0.5), {"label": torch.arange(4)}
    for role, reads in (("fake_score", True), ("student", False)):
        with torch.no_grad():
            for weight in networks.weights(role):  # the embedder's last layer is 0 at first
                weight.add_(0.05 * torch.randn_like(weight))
            first, second = (networks[role](x, t, {**cond, "step": torch.full((4,), k)}) for k in (0, 1))
        assert torch.equal(first, second) != reads
