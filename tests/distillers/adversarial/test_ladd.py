"""LADD and the composites it stands in: hinge losses, the teacher's features, weight 0 as if a part were not there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import relu

from diffdistill.config import compose
from diffdistill.distillers.adversarial.ladd import LADD
from diffdistill.errors import UserError
from diffdistill.generator import constant_inputs
from diffdistill.recipe import Recipe, assemble
from diffdistill.rng import Rng

BASE = ("data=gmm2d", "experiment=none", "evaluation=none", "run_dir=none")


def recipe_of(name: str, *words: str) -> Recipe:
    return assemble(compose("train", [*BASE, f"distiller={name}", *words]))  # type: ignore[arg-type]


def batch_of(recipe: Recipe, size: int = 64) -> Any:
    return recipe.data.batch(Rng(1, 0, "data", range(size)), size, recipe.needs, torch.float32)


def disturbed(recipe: Recipe) -> Recipe:
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for role in recipe.networks.owned:
            for weight in recipe.networks.weights(role):
                weight.add_(0.05 * torch.randn(weight.shape, generator=draw))
    return recipe


def test_both_losses_by_hand() -> None:
    recipe = disturbed(recipe_of("ladd", "distiller.at_start=1"))
    method = recipe.distiller
    assert isinstance(method, LADD)
    batch = batch_of(recipe)
    student = method.student_loss(batch, Rng(1, 0, "student", range(64))).terms["gan"]
    fake = batch.memo["x0"]
    rng = Rng(1, 0, "student", range(64)).fork("LADD")
    process = recipe.networks["student"].process
    method.law(rng, process, torch.float32), rng.uniform((64,))
    x_t = batch.x0 + process.t_max * rng.normal(batch.shape)
    torch.testing.assert_close(fake, method.generator.student.x0(x_t, torch.full((64,), process.t_max), batch.cond))

    def logit(x0: Tensor, rng: Rng) -> Tensor:
        s = method.gan_law(rng, process, torch.float32)
        x_s = x0 + s[:, None] * rng.normal(batch.shape)
        heads = recipe.networks["discriminator"]
        features = recipe.networks["target"].features(x_s, s, batch.cond, heads.layers)
        return heads(dict(zip(heads.layers, features, strict=True)))

    torch.testing.assert_close(student, -logit(fake, rng).mean())
    critic = method.critic_loss(batch, Rng(1, 0, "critic", range(64))).terms["hinge"]
    rng = Rng(1, 0, "critic", range(64)).fork("LADD")
    on_fake, on_real = logit(fake, rng), logit(batch.x0, rng)
    torch.testing.assert_close(critic, (relu(1 - on_real) + relu(1 + on_fake)).mean())


def test_the_student_climbs_the_logit_and_the_teacher_stays() -> None:
    recipe = disturbed(recipe_of("ladd"))
    method: Any = recipe.distiller
    teacher = {name: value.clone() for name, value in recipe.networks.teacher.state_dict().items()}
    recipe.networks.train_only(("student",))
    batch = batch_of(recipe)
    before = method.student_loss(batch, Rng(1, 0, "s", range(64))).total
    before.backward()
    assert all(weight.grad is None for weight in recipe.networks.teacher.parameters())
    with torch.no_grad():
        for weight in recipe.networks.weights("student"):
            if weight.grad is not None:
                weight -= 1e-3 * weight.grad
    assert method.student_loss(batch, Rng(1, 0, "s", range(64))).total < before
    assert all(torch.equal(value, teacher[name]) for name, value in recipe.networks.teacher.state_dict().items())


def test_a_share_of_the_samples_starts_at_t_max() -> None:
    recipe = recipe_of("ladd", "distiller.at_start=0.5")
    method: Any = recipe.distiller
    seen = []
    student = recipe.networks["student"].network
    handle = student.register_forward_hook(lambda module, inputs, output: seen.append(inputs[1]))
    method._samples(batch_of(recipe, 4000), Rng(1, 0, "s", range(4000)))
    handle.remove()
    t_max = student.time(torch.tensor([method.networks["student"].process.t_max]))
    assert float((seen[0] == t_max).float().mean()) == pytest.approx(0.5, abs=0.05)


def test_an_unknown_share_is_refused() -> None:
    with pytest.raises(UserError, match=r"distiller.at_start must lie in \[0, 1\]"):
        recipe_of("ladd", "distiller.at_start=1.5")


def student_gradients(recipe: Recipe) -> list[Tensor]:
    recipe.networks.train_only(("student",))
    phase = next(phase for phase in recipe.distiller.phases(0) if phase.name == "student")
    phase.loss(batch_of(recipe), Rng(1, 0, "student", range(64))).total.backward()
    found = [torch.zeros_like(w) if w.grad is None else w.grad for w in recipe.networks.weights("student")]
    recipe.networks.zero_grad()
    return found


@pytest.mark.parametrize(
    ("name", "parts"),
    [("scm_ladd", ("scm", "ladd")), ("dmd2_consistency", ("dmd2", "consistency"))],
)
def test_weight_zero_is_bit_equal_to_the_other_part_alone(name: str, parts: tuple[str, str]) -> None:
    for kept, dropped in (parts, parts[::-1]):
        both = disturbed_student(recipe_of(name, f"distiller.weights.{dropped}=0", f"distiller.weights.{kept}=1"))
        words = ["distiller.law.mean=0.2", "distiller.law.std=1.6", "distiller.warmup=4000"] if kept == "scm" else []
        alone = disturbed_student(recipe_of(kept, *words))
        assert all(torch.equal(a, b) for a, b in zip(student_gradients(both), student_gradients(alone), strict=True))


def disturbed_student(recipe: Recipe) -> Recipe:
    """Away from the teacher, the same way whatever other roles there are; heads by their own fixed draw."""
    for role in ("student", "discriminator", "fake_score"):
        draw = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in recipe.networks.weights(role) if role in recipe.networks else ():
                if role == "discriminator":
                    weight.copy_(0.3 * torch.randn(weight.shape, generator=draw))
                else:
                    weight.add_(0.02 * torch.randn(weight.shape, generator=draw))
    return recipe


def test_the_parts_of_a_composite_share_one_student_and_one_backward() -> None:
    recipe = disturbed_student(recipe_of("scm_ladd", "distiller.weights.ladd=0.5"))
    both = student_gradients(recipe)
    found = {}
    for kept, dropped in (("scm", "ladd"), ("ladd", "scm")):
        words = [f"distiller.weights.{dropped}=0", f"distiller.weights.{kept}=1"]
        found[kept] = student_gradients(disturbed_student(recipe_of("scm_ladd", *words)))
    for whole, scm, ladd in zip(both, found["scm"], found["ladd"], strict=True):
        torch.testing.assert_close(whole, scm + 0.5 * ladd, rtol=1e-4, atol=1e-6)
    assert {phase.name for phase in recipe.distiller.phases(0)} == {"student", "critic"}
    assert recipe.distiller.phases(0)[0].trains == ("student", "weight")


def test_data_under_the_next_samples_condition_are_fakes_where_it_is_another_one() -> None:
    recipe = disturbed(recipe_of("ladd", "distiller.mismatched=true"))
    method, batch = recipe.distiller, batch_of(recipe)
    assert isinstance(method, LADD)
    terms = method.critic_loss(batch, Rng(1, 0, "critic", range(64))).terms
    alone = disturbed(recipe_of("ladd")).distiller
    assert isinstance(alone, LADD)
    torch.testing.assert_close(
        terms["hinge"], alone.critic_loss(batch_of(recipe), Rng(1, 0, "critic", range(64))).terms["hinge"]
    )
    label = batch.cond["label"]
    differ = label != label.roll(1)
    assert 0 < differ.sum() < 64
    seen: list[Tensor] = []
    real = method._logit

    def logit(x0: Tensor, cond: Any, rng: Rng) -> Tensor:
        seen.append(cond["label"])
        return real(x0, cond, rng) if len(seen) < 3 else torch.ones(64)

    method._logit = logit  # type: ignore[method-assign]
    constant = method.critic_loss(batch, Rng(1, 0, "critic", range(64))).terms["mismatched"]
    assert torch.equal(seen[2], label.roll(1))
    torch.testing.assert_close(constant, 2.0 * differ.float().mean())


def test_mismatched_pairs_need_conditions_and_the_sampler_reads_w() -> None:
    with pytest.raises(UserError, match="needs condition"):
        assemble(compose("train", [*BASE[1:], "data=gauss", "distiller=ladd", "distiller.mismatched=true"]))
    scales = "{_target_:diffdistill.distillers.guidance.scales.UniformScale,low:1.0,high:4.0}"
    both = [f"distiller.parts.{part}.{key}" for part in ("scm", "ladd") for key in (f"scales={scales}", "scale=3.0")]
    recipe = recipe_of("scm_ladd", *both)
    batch = batch_of(recipe)
    for phase in recipe.distiller.phases(0):
        assert torch.isfinite(phase.loss(batch, Rng(1, 0, phase.name, range(64))).total)
    assert constant_inputs(recipe.distiller.generator)["w"] == 3.0
