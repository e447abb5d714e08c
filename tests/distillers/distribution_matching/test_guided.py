"""VSD, SiD-LSG and few-step SiD: guidance of teacher and fake score, null conditions, the mixture of steps."""

from __future__ import annotations

import pytest
import torch
from quadrature import ALPHA, SIGMA, Fixed, denoiser

from diffdistill.config import compose
from diffdistill.denoiser import Denoiser, Guidance
from diffdistill.distillers.base import Batch, Loss
from diffdistill.distillers.distribution_matching import sid, sid_lsg, vsd
from diffdistill.distillers.distribution_matching.sid_few_step import linear_times
from diffdistill.distillers.distribution_matching.weights import unit
from diffdistill.distillers.guidance.scales import UniformScale
from diffdistill.errors import UserError
from diffdistill.losses import denoising, unit_weight
from diffdistill.networks.call import recorded_passes
from diffdistill.networks.exact import Gaussian
from diffdistill.recipe import Recipe, assemble
from diffdistill.rng import Rng


def mlp_recipe(name: str, *overrides: str) -> Recipe:
    words = ["data=gmm2d", f"distiller={name}", "experiment=none", "evaluation=none", "run_dir=none", *overrides]
    return assemble(compose("train", words))  # type: ignore[arg-type]


def batch_of(recipe: Recipe, size: int = 32) -> Batch:
    return recipe.data.batch(Rng(0, 0, "data", range(size)), size, recipe.needs, recipe.networks.dtype)


def loss_of(recipe: Recipe, phase: str, step: int = 0) -> Loss:
    found = next(p for p in recipe.distiller.phases(step) if p.name == phase)
    recipe.networks.train_only(found.trains)
    return found.loss(batch_of(recipe), Rng(0, step, phase, range(32)))


def disturb(recipe: Recipe, role: str = "fake_score") -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in recipe.networks.weights(role):
            weight.add_(0.05 * torch.randn_like(weight))


def student_gradient(recipe: Recipe) -> torch.Tensor:
    loss_of(recipe, "student").total.backward()
    found = torch.cat([(torch.zeros_like(w) if w.grad is None else w.grad).flatten()
                       for w in recipe.networks.weights("student")])  # fmt: skip
    recipe.networks.zero_grad()
    return found


@pytest.mark.parametrize("scale", [1.0, 4.5, 0.0])
def test_a_fresh_lora_fake_score_gives_no_gradient_at_any_guidance_and_a_trained_one_does(scale: float) -> None:
    """SwiftBrush's code disables the adapters for the teacher: forgotten to be enabled again, the gap stays 0."""
    recipe = mlp_recipe("vsd", f"guidance.scale={scale}")
    assert recipe.networks.modes["fake_score"] == "lora"
    assert not student_gradient(recipe).any()
    disturb(recipe)
    assert student_gradient(recipe).any()


def test_both_scores_of_vsd_are_guided_alike() -> None:
    """Unlike DMD2, whose fake score is plain."""
    recipe = mlp_recipe("vsd", "guidance.scale=4.5")
    with recorded_passes() as passes:
        loss_of(recipe, "student")
    roles = [done.role for done in passes]
    assert roles.count("target") == 2 and roles.count("fake_score") == 2
    plain = mlp_recipe("dmd2", "guidance.scale=4.5")
    with recorded_passes() as passes:
        loss_of(plain, "student")
    assert [done.role for done in passes].count("fake_score") == 1


def test_a_scale_of_each_sample_guides_both_scores_of_vsd() -> None:
    """SNOOPI: equal ends are that scale for all; else each sample's loss is that under its own w."""
    law = "{_target_: diffdistill.distillers.guidance.scales.UniformScale, low: %s, high: %s}"
    fixed, equal = mlp_recipe("vsd", "guidance.scale=3"), mlp_recipe("vsd", "distiller.scales=" + law % (3, 3))
    several = mlp_recipe("vsd", "distiller.scales=" + law % (0.5, 4))
    for recipe in (fixed, equal, several):
        disturb(recipe)
    torch.testing.assert_close(student_gradient(equal), student_gradient(fixed))
    method = several.distiller
    assert isinstance(method, vsd.VSD)
    rng = method.stream(Rng(0, 0, "student", range(32)))
    rng.normal((32, 2), torch.float32), rng.uniform((32,), torch.float32)
    target, fake_score = method.scores(rng)
    assert target.guidance is not None and fake_score.guidance is not None
    w = target.guidance.scale
    assert isinstance(w, torch.Tensor) and torch.equal(w, fake_score.guidance.scale)  # type: ignore[arg-type]
    assert len(set(w.tolist())) == 32 and w.min() >= 0.5 and w.max() <= 4 and w.max() - w.min() > 2
    x, t = torch.randn(32, 2), torch.full((32,), 0.7)
    cond = batch_of(several).cond
    for i in (0, 9):
        alone = several.networks["target"].guided(Guidance(float(w[i]), several.networks.teacher.null))
        torch.testing.assert_close(target(x, t, cond)[i], alone(x, t, cond)[i])
    assert "null" in vsd.VSD.needs(scales=UniformScale(1, 2)) and "null" not in vsd.VSD.needs()
    assert "codec" in vsd.VSD.needs(alignment=lambda x, cond: x)


def test_scales_of_other_conventions_are_converted() -> None:
    """D_c + s (D_c - D_null) is w = s + 1: LCM's script, and papers that write (1 + s) D_c - s D_null."""
    recipe = mlp_recipe("vsd", "guidance.scale=3.5", "guidance.convention=added")
    guidance = recipe.networks["target"].guidance
    assert guidance is not None and guidance.scale == 4.5
    x, t, cond = torch.randn(32, 2), torch.full((32,), 0.7), batch_of(recipe).cond
    plain = recipe.networks["target"].guided(None)
    null = plain(x, t, {**cond, **{k: v.expand(32, *v.shape[1:]) for k, v in recipe.networks.teacher.null.items()}})
    conditional = plain(x, t, cond)
    torch.testing.assert_close(recipe.networks["target"](x, t, cond), conditional + 3.5 * (conditional - null))
    assert mlp_recipe("vsd", "guidance.scale=0", "guidance.convention=added").networks["target"].guidance is None


def test_vsd_drops_the_condition_of_whole_batches() -> None:
    recipe = mlp_recipe("vsd", "distiller.null_share=0.3")
    null, seen, dropped = 8, [], []
    network = recipe.networks["fake_score"].network
    handle = network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[2]["label"] == null))
    for step in range(40):
        loss_of(recipe, "critic", step)
        assert bool(seen[-1].all()) == bool(seen[-1].any())  # all of them or none
        dropped.append(bool(seen[-1].all()))
    handle.remove()
    assert 4 <= sum(dropped) <= 22


@pytest.mark.parametrize("name", ["vsd", "sid_lsg"])
def test_without_null_share_and_guidance_the_null_condition_has_no_influence(name: str) -> None:
    recipe = mlp_recipe(name, "distiller.null_share=0")
    disturb(recipe)
    before = {phase: float(loss_of(recipe, phase).total.detach()) for phase in ("student", "critic")}
    with torch.no_grad():
        recipe.networks.teacher.class_embedding.weight[8] += 100.0
        fake = recipe.networks["fake_score"].network
        if fake is not recipe.networks.teacher:
            fake.class_embedding.weight[8] += 100.0
    assert before == {phase: float(loss_of(recipe, phase).total.detach()) for phase in before}


def test_the_hinge_pulls_below_its_threshold_only_and_fades() -> None:
    recipe = mlp_recipe("vsd", "distiller.alignment_steps=10")
    cosine = torch.tensor(0.2)
    recipe.distiller.alignment = lambda images, cond: cosine.expand(len(images)) + 0 * images.sum(1)  # type: ignore[attr-defined]
    terms = loss_of(recipe, "student").terms
    assert float(terms["alignment"].detach()) == pytest.approx(0.1 * (0.35 - 0.2))
    assert float(loss_of(recipe, "student", 5).terms["alignment"].detach()) == pytest.approx(0.05 * 0.15)
    assert "alignment" not in loss_of(recipe, "student", 10).terms
    cosine.fill_(0.36)
    assert float(loss_of(recipe, "student").terms["alignment"].detach()) == 0.0


def test_lsg_without_guidance_is_sid_on_the_same_law() -> None:
    law = "{_target_: diffdistill.times.KarrasUniform, low: 0.0, high: 0.8}"
    lsg = mlp_recipe("sid_lsg", "distiller.null_share=0", f"distiller.student_law={law}")
    plain = mlp_recipe("sid", "distiller.alpha=1.0")
    for recipe in (lsg, plain):
        disturb(recipe)
    lsg.distiller.stream = plain.distiller.stream  # type: ignore[method-assign]
    assert float(loss_of(lsg, "student").total.detach()) == float(loss_of(plain, "student").total.detach())


@pytest.mark.parametrize("scale", [0.0, 1.0, 1.5, 4.5])
def test_a_fake_equal_to_the_teacher_gives_no_loss_at_equal_scales(scale: float) -> None:
    found = student_gradient(mlp_recipe("sid_lsg", f"guidance.scale={scale}"))
    assert float(found.abs().max()) < 1e-6  # two equal networks, differentiated apart: rounding is left


def test_the_critics_null_branch_gets_one_minus_k_over_k_of_the_conditional_ones_gradient() -> None:
    """The loss sits on the guided prediction, as in SiD-LSG's critic: both branches learn from one residual."""
    k, network = 3.0, Gaussian(Fixed(), [[0.3], [0.1]], [[1.0], [1.0]], trainable=True)
    view = Denoiser(network, "fake_score").guided(Guidance(k, {"label": torch.tensor([1])}))
    rng = Rng(0, 0, "critic", range(16))
    x0, eps = rng.normal((16, 1), torch.float64), rng.normal((16, 1), torch.float64)
    cond, t = {"label": torch.zeros(16, dtype=torch.int64)}, torch.full((16,), 0.5, dtype=torch.float64)
    denoising(view, x0, eps, t, cond, unit_weight).mean().backward()
    conditional, null = network.mean.grad[:, 0].tolist()  # type: ignore[index]
    assert conditional != 0 and null == pytest.approx((1 - k) / k * conditional)
    lsg = mlp_recipe("sid_lsg", "guidance.scale=3.0").distiller.fake(None)  # type: ignore[attr-defined]
    assert lsg.guidance is not None and lsg.guidance.scale == k


def test_four_scales_reach_the_views_they_are_for() -> None:
    recipe = mlp_recipe(
        "sid_lsg", "guidance.scale=4.0", "distiller.critic_scale=1.0", "distiller.gap_scale=2.0",
        "distiller.projection_scale=3.0",
    )  # fmt: skip
    with recorded_passes() as passes:
        loss_of(recipe, "student")
    roles = [done.role for done in passes]
    assert (roles.count("target"), roles.count("fake_score")) == (2, 4)  # k2 and k3 differ: two guided passes
    with recorded_passes() as passes:
        loss_of(recipe, "critic")
    assert [done.role for done in passes].count("fake_score") == 1  # k1 = 1 costs one


def test_the_projection_may_have_a_scale_of_its_own() -> None:
    """w [<D_target - D_k2, D_k3 - x0>]: the gap from one view, the projection from the other."""
    rng = Rng(0, 0, "x", range(16))
    x0, eps = rng.normal((16, 1), torch.float64), rng.normal((16, 1), torch.float64)
    t = torch.full((16,), 0.5, dtype=torch.float64)
    target, gap, projected = denoiser(0.7, 1.3), denoiser(-0.2, 0.9), denoiser(0.5, 0.4)
    ours = sid_lsg.generator_loss(target, gap, x0, eps, t, {}, weight=unit, alpha=1.0, projected=projected)
    x_t = ALPHA * x0 + SIGMA * eps
    by_hand = ((target(x_t, t, {}) - gap(x_t, t, {})) * (projected(x_t, t, {}) - x0))[:, 0]
    torch.testing.assert_close(ours, by_hand)
    assert not torch.allclose(ours, sid.generator_loss(target, gap, x0, eps, t, {}, weight=unit, alpha=1.0))


def test_zero_cfg_is_implicit_guidance_of_unit_strength() -> None:
    """With fake = teacher the gap is D(c) - D(null), not zero."""
    zero = [f"distiller.{key}=0.0" for key in ("critic_scale", "gap_scale", "projection_scale")]
    recipe = mlp_recipe("sid_few_step", *zero)
    assert student_gradient(recipe).any()
    x, t = torch.randn(8, 2), torch.full((8,), 0.5)
    cond = {"label": torch.arange(8)}
    null = {"label": torch.full((8,), 8)}
    fake = recipe.distiller.fake(0.0)  # type: ignore[attr-defined]
    expected = recipe.networks["teacher"](x, t, null)
    with recorded_passes() as passes:
        torch.testing.assert_close(fake(x, t, cond), expected)
    assert len(passes) == 1  # no second pass for a condition of weight 0


def test_negative_scales_lead_away_from_the_condition() -> None:
    recipe = mlp_recipe("sid_few_step", "distiller.gap_scale=-1.0")
    fake = recipe.distiller.fake(-1.0)  # type: ignore[attr-defined]
    x, t, cond = torch.randn(8, 2), torch.full((8,), 0.5), {"label": torch.arange(8)}
    null = recipe.networks["teacher"](x, t, {"label": torch.full((8,), 8)})
    torch.testing.assert_close(fake(x, t, cond), 2 * null - recipe.networks["teacher"](x, t, cond))


@pytest.mark.parametrize("interval", [None, (0.1, 5.0)])
def test_weight_zero_with_an_interval_is_still_the_condition_outside_it(interval: tuple[float, float] | None) -> None:
    recipe = mlp_recipe("sid")
    teacher = recipe.networks["teacher"]
    guided = teacher.guided(Guidance(0.0, recipe.networks.teacher.null, interval))
    x, cond = torch.randn(4, 2), {"label": torch.arange(4)}
    late = torch.full((4,), 10.0)
    null = {"label": torch.full((4,), 8)}
    torch.testing.assert_close(guided(x, late, cond), teacher(x, late, cond if interval else null))


@pytest.mark.parametrize("name", ["sid_lsg", "sid_few_step", "vsd"])
def test_scales_and_null_shares_need_a_null_condition(name: str) -> None:
    part = {"vsd": "null_share=0.1"}.get(name, "gap_scale=2.0")
    words = ["data=gauss", f"distiller={name}", "experiment=none", "evaluation=none", "run_dir=none",
             f"distiller.{part}", "roles.fake_score=copy"]  # fmt: skip
    with pytest.raises(UserError, match="needs null"):
        assemble(compose("train", words))  # type: ignore[arg-type]


def test_the_linear_grid_uses_the_full_number_of_steps() -> None:
    assert linear_times(1.0, 4) == (1.0, 0.75, 0.5, 0.25)
    assert linear_times(0.625, 1) == (0.625,)
    generator = mlp_recipe("sid_few_step", "distiller.t_init=8.0").distiller.generator
    assert generator.times == (8.0, 6.0, 4.0, 2.0)  # type: ignore[union-attr]


def test_the_mixture_of_two_steps_has_one_exact_critic() -> None:
    """sum_k resp_k D_k: what one fake score has to learn from the uniform mixture of all steps' outputs."""
    x_t, t = torch.tensor([[0.37]], dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)
    steps = [(-0.2, 0.9), (0.6, 0.5)]  # (b, a)
    spread = [ALPHA**2 * a**2 + SIGMA**2 for _, a in steps]
    density = torch.tensor([
        torch.exp(torch.tensor(-((0.37 - ALPHA * b) ** 2) / (2 * s))) / s**0.5
        for (b, _), s in zip(steps, spread, strict=True)
    ], dtype=torch.float64)  # fmt: skip
    share = density / density.sum()
    mixed = sum(w * denoiser(b, a)(x_t, t, {}) for w, (b, a) in zip(share, steps, strict=True))
    assert float(mixed) == pytest.approx(0.4114424929, abs=2e-9)
    # the denoising loss on the mixture is smallest there: a constant offset raises it
    rng = Rng(0, 0, "mixture", range(400_000))
    k = rng.integers(2, (400_000,))
    b, a = torch.tensor([s[0] for s in steps]), torch.tensor([s[1] for s in steps])
    x0 = b[k].double() + a[k].double() * rng.normal((400_000,), torch.float64)
    noisy = ALPHA * x0 + SIGMA * rng.normal((400_000,), torch.float64)
    near = (noisy - 0.37).abs() < 0.02
    assert float(x0[near].mean()) == pytest.approx(
        0.4114424929, abs=4 * float(x0[near].std()) / float(near.sum()) ** 0.5
    )
