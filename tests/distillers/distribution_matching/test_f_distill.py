"""f-distill and Uni-Instruct: the ratio, its histogram, the discriminators behind it."""

from __future__ import annotations

import math

import pytest
import torch
from optimum import gauss_recipe
from quadrature import denoiser

from diffdistill.config import compose
from diffdistill.distillers.base import Batch
from diffdistill.distillers.distribution_matching import encoder_gan, sid
from diffdistill.distillers.distribution_matching.density_ratio import Clamp, RatioHistogram
from diffdistill.distillers.distribution_matching.divergences import DIVERGENCES
from diffdistill.distillers.distribution_matching.dmd2 import DMD2
from diffdistill.distillers.distribution_matching.weights import unit
from diffdistill.errors import UserError
from diffdistill.process import EDM
from diffdistill.recipe import Recipe, assemble
from diffdistill.rng import Rng
from diffdistill.times import KarrasIndex

PROCESS = EDM(0.002, 80.0)
GAN = ["distiller.gan_weight=0.1", "distiller.critic_gan_weight=0.1"]


def same(x: torch.Tensor) -> torch.Tensor:
    return x


def mlp_recipe(name: str, *overrides: str) -> Recipe:
    words = ["data=gmm2d", f"distiller={name}", "experiment=none", "evaluation=none", "run_dir=none", *overrides]
    return assemble(compose("train", words))  # type: ignore[arg-type]


def student_terms(recipe: Recipe, size: int = 64) -> dict[str, torch.Tensor]:
    batch: Batch = recipe.data.batch(Rng(0, 0, "data", range(size)), size, recipe.needs, recipe.networks.dtype)
    phase = next(p for p in recipe.distiller.phases(0) if p.name == "student")
    recipe.networks.train_only(phase.trains)
    return dict(phase.loss(batch, Rng(0, 0, "student", range(size))).terms)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("method", ["f_distill", "uni_instruct"])
def test_every_divergence_trains(method: str, name: str) -> None:
    """Official code: the reverse KL raises (f-distill in FastGen), or reads a ratio that was never assigned; JS and
    chi2 call backward on tensors of many elements (Uni-Instruct)."""
    recipe = mlp_recipe(method, f"distiller.divergence={name}", *GAN)
    with torch.no_grad():  # else the gap is 0
        for weight in recipe.networks.weights("fake_score"):
            weight.add_(0.02 * torch.randn_like(weight))
    total = sum(student_terms(recipe).values())
    total.backward()
    found = [weight.grad for weight in recipe.networks.weights("student") if weight.grad is not None]
    assert found and all(g.isfinite().all() for g in found) and any((g != 0).any() for g in found)


def test_the_reverse_kl_is_dmd2_with_the_same_draws() -> None:
    ours = mlp_recipe("f_distill", "distiller.divergence=rkl", *GAN)
    theirs = mlp_recipe("dmd2", *GAN)
    for recipe in (ours, theirs):  # the same fake score, away from the teacher
        torch.manual_seed(0)
        with torch.no_grad():
            for weight in recipe.networks.weights("fake_score"):
                weight.add_(0.02 * torch.randn_like(weight))
    ours.distiller.stream = theirs.distiller.stream  # type: ignore[method-assign]
    assert isinstance(ours.distiller, DMD2)
    assert torch.equal(student_terms(ours)["f"], student_terms(theirs)["dmd"])


def test_the_ratio_is_the_exponential_of_the_mean_logit() -> None:
    """Uni-Instruct's code takes it from the generator's adversarial loss, already divided and scaled: 1 within 1e-4."""
    features = torch.tensor([[[[1.0]], [[2.0]]], [[[-40.0]], [[-40.0]]]])  # [B, C, 1, 1]
    logits = encoder_gan.logits(features)
    assert logits[:, 0, 0].tolist() == [1.5, -10.0]
    log_ratio = encoder_gan.mean_log_ratio(logits)
    assert log_ratio.tolist() == [1.5, -10.0] and not log_ratio.requires_grad
    assert Clamp(0.1, 20.0)(log_ratio).tolist() == pytest.approx([4.4816890703, 0.1])


def test_an_optimal_discriminator_gives_the_exact_ratio() -> None:
    """The minimiser of both cross-entropies is log(p_real / p_fake): real must be 1, not 0."""
    from diffdistill.losses import gan_discriminator

    p_real, p_fake = 0.7, 0.2
    logit = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    for _ in range(400):
        real, fake = (
            p_real * gan_discriminator(logit, torch.tensor(-1e9)),
            p_fake * gan_discriminator(torch.tensor(1e9), logit),
        )
        (slope,) = torch.autograd.grad((real + fake).sum(), logit)
        logit = (logit - 2 * slope).detach().requires_grad_()
    assert Clamp(0.1, 20.0)(logit.detach()).item() == pytest.approx(p_real / p_fake, rel=1e-6)


def test_the_bins_are_even_in_the_noise_level_not_in_sigma() -> None:
    """Ten equal bins of sigma in [.002, 80] would put most draws into the first one."""
    t = KarrasIndex(0.02, 0.98)(Rng(0, 0, "t", range(4000)), PROCESS, torch.float64)
    counts = torch.bincount(RatioHistogram(10, 0.0).bins(t, PROCESS), minlength=10)
    assert (t < 8).double().mean() > 0.6
    assert counts.max() < 0.3 * counts.sum() and (counts > 0).sum() >= 9


def test_the_histogram_takes_a_constant_factor_out_of_every_bin() -> None:
    histogram = RatioHistogram(4, 0.0)
    t = torch.tensor([0.003, 0.003, 1.0, 1.0], dtype=torch.float64)
    r = torch.tensor([1.0, 3.0, 10.0, 30.0], dtype=torch.float64)
    found = histogram.normalised(r, t, PROCESS, same)
    assert found.tolist() == pytest.approx([0.5, 1.5, 0.5, 1.5])
    again = RatioHistogram(4, 0.0).normalised(7 * r, t, PROCESS, same)
    assert again.tolist() == pytest.approx(found.tolist())


def test_the_histogram_moves_at_its_rate_and_keeps_bins_nobody_fell_in() -> None:
    histogram = RatioHistogram(4, 0.5)
    t = torch.tensor([0.003, 1.0], dtype=torch.float64)
    histogram.normalised(torch.tensor([2.0, 4.0]), t, PROCESS, same)
    histogram.normalised(torch.tensor([6.0]), t[:1], PROCESS, same)
    first, second = (int(histogram.bins(t[i : i + 1], PROCESS)) for i in (0, 1))
    assert float(histogram.means[first]) == pytest.approx(4.0) and float(histogram.means[second]) == pytest.approx(4.0)


def test_the_histogram_sees_all_ranks() -> None:
    """A rank whose samples all fell into one bin uses the mean over both ranks."""

    def over_two(x: torch.Tensor) -> torch.Tensor:
        other = torch.zeros_like(x)
        other[:, 0] = torch.tensor([9.0, 1.0])
        return (x + other) / 2

    histogram = RatioHistogram(1, 0.0)
    found = histogram.normalised(torch.tensor([3.0]), torch.tensor([1.0]), PROCESS, over_two)
    assert found.tolist() == pytest.approx([0.5])


def test_the_weights_have_mean_one_over_the_batch() -> None:
    """Uni-Instruct's variance reduction divides by the batch's sum, which is 1/B too small."""
    recipe = gauss_recipe("f_distill", "distiller.divergence=js")
    h = DIVERGENCES["js"].h(torch.tensor([0.2, 1.0, 5.0]))
    assert float((h / recipe.distiller._mean(h)).mean()) == pytest.approx(1.0)  # type: ignore[attr-defined]


def test_the_histogram_is_saved_and_restored() -> None:
    first, second = mlp_recipe("f_distill").distiller, mlp_recipe("f_distill").distiller
    first.ratio.histogram.means[3] = 2.5  # type: ignore[attr-defined]
    second.load_state_dict(first.state_dict())
    assert float(second.ratio.histogram.means[3]) == 2.5  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", ["f_distill", "uni_instruct"])
def test_a_ratio_without_a_gan_is_refused_except_where_none_is_needed(method: str) -> None:
    off = ["distiller.gan_weight=0", "distiller.critic_gan_weight=0"]
    with pytest.raises(UserError, match=r"distiller\.divergence.*discriminator"):
        mlp_recipe(method, "distiller.divergence=js", *off)
    assert student_terms(mlp_recipe(method, "distiller.divergence=rkl", *off))


def test_no_gradient_reaches_the_discriminator_or_the_student_through_the_weight() -> None:
    recipe = mlp_recipe("f_distill", *GAN, "distiller.divergence=fkl")
    terms = student_terms(recipe)
    (terms["f"] + terms["gan"]).backward()
    for role in ("discriminator", "fake_score"):
        assert all(weight.grad is None for weight in recipe.networks.weights(role))


def test_r1_looks_at_the_same_noised_input_and_vanishes_with_its_noise() -> None:
    """FastGen compares noised data with data that was not noised: that does not vanish."""
    found = []
    for std in (0.1, 1e-6):
        recipe = mlp_recipe("f_distill", f"distiller.r1_std={std}")
        batch = recipe.data.batch(Rng(0, 0, "data", range(64)), 64, recipe.needs, recipe.networks.dtype)
        phase = next(p for p in recipe.distiller.phases(0) if p.name == "critic")
        recipe.networks.train_only(phase.trains)
        found.append(float(phase.loss(batch, Rng(0, 0, "critic", range(64))).terms["r1"].detach()))
    assert found[0] > 0 and found[1] < 1e-6 * found[0]


@pytest.mark.parametrize("method", ["f_distill", "uni_instruct"])
def test_what_the_discriminator_takes_for_real_has_the_larger_ratio(method: str) -> None:
    recipe = mlp_recipe(method, *GAN)
    x_t, t = torch.zeros(2, 2), torch.ones(2)
    log_ratio = torch.tensor([1.0, -1.0], requires_grad=True)
    ratio = recipe.distiller.ratio.at(recipe.networks, x_t, t, {}, log_ratio)  # type: ignore[attr-defined]
    assert float(ratio[0] / ratio[1]) == pytest.approx(math.exp(2)) and not ratio.requires_grad


def test_a_ratio_or_weight_with_a_graph_gives_the_loss_no_gradient_through_it() -> None:
    x0 = torch.tensor([[0.5], [1.5]], dtype=torch.float64, requires_grad=True)
    eps, t = torch.zeros(2, 1, dtype=torch.float64), torch.full((2,), 0.5, dtype=torch.float64)
    views = denoiser(0.7, 1.3), denoiser(-0.2, 0.9)

    def gradient(held: bool) -> torch.Tensor:
        def ratio(x_t: torch.Tensor, t: torch.Tensor, cond: object) -> torch.Tensor:
            r = x_t[:, 0].exp()
            return r.detach() if held else r

        loss = sid.generator_loss(*views, x0, eps, t, {}, weight=unit, alpha=1.0, ratio=ratio)
        return torch.autograd.grad(loss.sum(), x0)[0]

    assert torch.equal(gradient(False), gradient(True))
