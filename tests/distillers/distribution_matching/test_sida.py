"""SiDA: the discriminator that is the fake score's own encoder, and how its term joins the loss."""

from __future__ import annotations

import math

import pytest
import torch
from quadrature import denoiser

from diffdistill.config import compose
from diffdistill.distillers.base import Batch, Loss
from diffdistill.distillers.distribution_matching import encoder_gan, sid, sida
from diffdistill.distillers.distribution_matching.weights import inverse_omega
from diffdistill.errors import UserError
from diffdistill.networks.call import recorded_passes
from diffdistill.recipe import Recipe, assemble
from diffdistill.rng import Rng


def recipe_of(name: str, *overrides: str, data: str = "gmm2d") -> Recipe:
    words = [f"data={data}", f"distiller={name}", "experiment=none", "evaluation=none", "run_dir=none", *overrides]
    return assemble(compose("train", words))  # type: ignore[arg-type]


def loss_of(recipe: Recipe, phase: str, step: int = 0, size: int = 16) -> Loss:
    batch: Batch = recipe.data.batch(Rng(0, 0, "data", range(size)), size, recipe.needs, recipe.networks.dtype)
    found = next(p for p in recipe.distiller.phases(step) if p.name == phase)
    recipe.networks.train_only(found.trains)
    return found.loss(batch, Rng(0, step, phase, range(size)))


def disturb(recipe: Recipe) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in recipe.networks.weights("fake_score"):
            weight.add_(0.05 * torch.randn_like(weight))


def test_without_gan_it_is_sid_at_alpha_one() -> None:
    off = ["distiller.gan_weight=0", "distiller.critic_gan_weight=0"]
    ours, theirs = recipe_of("sida", *off), recipe_of("sid", "distiller.alpha=1.0")
    for recipe in (ours, theirs):
        disturb(recipe)
    assert ours.needs == frozenset()
    ours.distiller.stream = theirs.distiller.stream  # type: ignore[method-assign]
    assert float(loss_of(ours, "student").total.detach()) == float(loss_of(theirs, "student").total.detach())


def test_every_sample_shares_one_adversarial_mean_under_its_own_weight() -> None:
    rng = Rng(0, 0, "x", range(8))
    x0, eps = rng.normal((8, 1), torch.float64), rng.normal((8, 1), torch.float64)
    t = torch.full((8,), 0.5, dtype=torch.float64)
    target, fake = denoiser(0.7, 1.3), denoiser(-0.2, 0.9)
    scalar = torch.tensor(0.3, dtype=torch.float64)
    arguments = {"weight": inverse_omega, "alpha": 1.0}
    ours = sida.generator_loss(target, fake, x0, eps, t, {}, **arguments, adversarial=lambda: scalar)
    plain = sid.generator_loss(target, fake, x0, eps, t, {}, **arguments)
    d = target(target.process.add_noise(x0, eps, t), t, {})
    torch.testing.assert_close(ours - plain, 0.3 * inverse_omega(x0, d, t, target.process))


def test_logits_are_channel_means_of_the_bottleneck_of_the_very_pass_that_denoises() -> None:
    recipe = recipe_of("sida", data="digits")
    disturb(recipe)
    fake = recipe.networks["fake_score"]
    x, t, cond = torch.randn(4, 1, 8, 8), torch.full((4,), 0.5), {"label": torch.arange(4)}
    with fake.record(encoder_gan.bottleneck(fake)) as found:
        fake(x, t, cond)
    logits = encoder_gan.recorded(found)
    assert logits.shape == (4, 4, 4)  # the middle block's map
    torch.testing.assert_close(logits, encoder_gan.logits_at(fake, x, t, cond))
    with recorded_passes() as passes:
        loss_of(recipe, "student")
    assert [done.role for done in passes].count("fake_score") == 1


def test_real_and_fake_share_time_and_noise() -> None:
    recipe = recipe_of("sida")
    seen = []
    network = recipe.networks["fake_score"].network
    handle = network.register_forward_pre_hook(lambda module, inputs: seen.append((inputs[0], inputs[1])))
    x0 = torch.randn(6, 2)
    eps, t = torch.randn(6, 2), torch.full((6,), 2.0)
    cond = {"label": torch.arange(6)}
    loss, gap = encoder_gan.discriminator(recipe.networks["fake_score"], x0, x0, t, eps, cond)
    handle.remove()
    x, time = seen[-1]
    assert torch.equal(x[:6], x[6:]) and torch.equal(time[:6], time[6:])
    assert not gap.any()  # the same samples: no gap, and the cross-entropies are those of an undecided one
    assert loss.shape == (6,)


def test_an_undecided_discriminator_costs_ln2_and_real_is_positive() -> None:
    zero = torch.zeros(3, 4, 2, 2)
    assert encoder_gan.logits(zero).shape == (3, 2, 2)
    from diffdistill.losses import gan_discriminator, gan_generator

    assert float(0.5 * gan_discriminator(torch.tensor(0.0), torch.tensor(0.0))) == pytest.approx(math.log(2))
    assert float(gan_generator(torch.tensor(3.0))) < float(gan_generator(torch.tensor(-3.0)))


def test_the_student_waits_and_the_gan_joins_when_told() -> None:
    recipe = recipe_of("sida", "distiller.student_from=2", "distiller.gan_from=4", "distiller.gan_weight=0.5")
    names = [[phase.name for phase in recipe.distiller.phases(step)] for step in range(4)]
    assert names == [["critic"], ["critic"], ["critic", "student"], ["critic", "student"]]
    disturb(recipe)
    before = float(loss_of(recipe, "student", 3).total.detach())
    recipe.distiller.gan_from = 3  # type: ignore[attr-defined]
    assert float(loss_of(recipe, "student", 3).total.detach()) > before


def test_the_critics_gan_term_has_the_weight_of_its_denoising() -> None:
    """v(t) on both; the denoising loss is a mean over coordinates, so 1 / (number of them) is the paper's lsd = 1."""
    recipe = recipe_of("sida")
    recipe.distiller.critic_weight = lambda t, process: torch.full_like(t, 2.0)  # type: ignore[attr-defined]
    twice = loss_of(recipe, "critic").terms
    recipe.distiller.critic_weight = lambda t, process: torch.full_like(t, 1.0)  # type: ignore[attr-defined]
    once = loss_of(recipe, "critic").terms
    for name in ("denoising", "gan"):
        assert float(twice[name].detach()) == pytest.approx(2 * float(once[name].detach()), rel=1e-5)


@pytest.mark.parametrize("name", ["sida", "uni_instruct", "sid_few_step", "dmd2", "f_distill"])
def test_half_a_gan_is_refused_and_a_whole_one_asks_for_data(name: str) -> None:
    with pytest.raises(UserError, match=r"distiller\.gan_weight, distiller\.critic_gan_weight must both"):
        recipe_of(name, "distiller.gan_weight=1.0", "distiller.critic_gan_weight=0")
    assert recipe_of(name, "distiller.gan_weight=1.0", "distiller.critic_gan_weight=1.0").needs == {"x0"}


def test_a_step_of_the_discriminator_parts_real_from_fake_the_right_way() -> None:
    """Its gradient raises logits of real and lowers those of fake samples."""
    recipe = recipe_of("sida")
    fake = recipe.networks["fake_score"]
    recipe.networks.train_only(("fake_score",))
    real, x0, eps, t = torch.ones(32, 2), -torch.ones(32, 2), torch.zeros(32, 2), torch.full((32,), 0.5)
    cond = {"label": torch.zeros(32, dtype=torch.int64)}
    loss, before = encoder_gan.discriminator(fake, real, x0, t, eps, cond)
    loss.mean().backward()
    with torch.no_grad():
        for weight in recipe.networks.weights("fake_score"):
            if weight.grad is not None:
                weight -= 1e-2 * weight.grad
    after = encoder_gan.discriminator(fake, real, x0, t, eps, cond)[1]
    assert float(after.mean()) > float(before.mean())
