"""What was made cheaper in a training step gives what the plain way gives, under a fixed seed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from diffdistill import times
from diffdistill.config import build, compose
from diffdistill.distillers.base import Loss
from diffdistill.generator import Generator, ddim, last_step
from diffdistill.networks.roles import Networks
from diffdistill.process import EDM
from diffdistill.recipe import Recipe, assemble
from diffdistill.rng import Rng
from diffdistill.shards import norm, norm_in_float64
from diffdistill.solvers import karras
from diffdistill.stand_in import Made
from diffdistill.trainer import Trainer


def recipe_of(name: str) -> tuple[Recipe, Trainer]:
    settings = compose("train", [f"distiller={name}", "data=gmm2d", "run_dir=none", "trainer.batch_size=4"])
    return assemble(settings), build(settings.trainer)


class Plain(Trainer):
    """The update as it was: torch's own seeding and train(), gradients of all forgotten, a norm in float64."""

    def update(self, phase: Any, batches: Any, step: int, networks: Networks, optimizers: Any, accelerator: Any) -> Any:
        for name in networks.owned:
            networks.module(name).requires_grad_(name in phase.trains)
            networks.module(name).train(name in phase.trains)
        losses = []
        for index, batch in enumerate(batches):
            rng = self.rng(step, phase.name, index, networks.device)
            torch.manual_seed(rng.torch_seed())
            loss = phase.loss(batch, Rng(rng.seed, rng.step, rng.phase, rng.ids.copy()))
            (loss.total / len(batches)).backward()
            losses.append(Loss({k: v.detach() for k, v in loss.terms.items()}, loss.stats))
        norms = {}
        for role in phase.trains:
            weights = [weight for weight in networks.weights(role) if weight.grad is not None]
            norms[role] = torch.cat([weight.grad.double().flatten() for weight in weights]).norm().float()
            for weight in weights:
                weight.grad *= (self.clip["default"] / (norms[role] + 1e-6)).clamp(max=1.0)
            for group in optimizers[role].param_groups:
                group["lr"] = group["initial_lr"] * self._of(self.lr, role)(step, self.steps)
            optimizers[role].step()
        networks.update_ema(phase.trains)
        for role in networks.owned:
            networks.module(role).zero_grad()
        return losses, norms


@pytest.mark.parametrize("name", ["dmd2", "sida", "tdm", "scm", "vsd", "f_distill"])
def test_losses_and_weights_are_those_of_the_plain_update(name: str) -> None:
    found = []
    for kind in (Trainer, Plain):
        recipe, made = recipe_of(name)
        made.__class__ = kind
        made.log_every = 1
        state = made.start(recipe.distiller, recipe.networks)
        figures = [made.advance(state, Made(recipe.data), recipe.needs, Accelerator()) for _ in range(4)]
        weights = torch.cat([w.flatten() for role in recipe.networks.owned for w in recipe.networks.weights(role)])
        found.append((figures, weights.detach()))
    (ours, weights), (plain, wanted) = found
    for one, other in zip(ours, plain, strict=True):
        for key in (key for key in one if not key.startswith("time/")):
            assert one[key] == (pytest.approx(other[key], rel=1e-6) if key.startswith("grad_norm") else other[key]), key
    assert torch.equal(weights, wanted)


def test_a_norm_is_right_to_float32_and_the_same_however_rows_are_shared_out() -> None:
    torch.manual_seed(0)
    shapes = [(640, 320, 3, 3), (96, 96), (7,), (20_000,), (1, 40_000), (3, 2**16), (300, 41)]
    tensors = [torch.randn(shape) * 10.0**power for power, shape in enumerate(shapes, -3)]
    exact = torch.cat([t.double().flatten() for t in tensors]).norm()
    assert float(norm(tensors)) == pytest.approx(float(exact), rel=1e-7)
    assert float(norm_in_float64(tensors)) == pytest.approx(float(exact), rel=1e-7)
    large = tensors[0]
    whole = torch.linalg.vector_norm(large.flatten(1), dim=1)
    cut = [torch.linalg.vector_norm(part.flatten(1), dim=1) for part in large.split([1, 213, 426])]
    assert torch.equal(whole, torch.cat(cut))
    assert norm([]) == 0 and norm([torch.zeros(0, 9)]) == 0
    assert norm([torch.ones(2, 2, dtype=torch.float64)]).dtype == torch.float64


def test_a_norm_too_large_for_squares_in_float32_is_known_in_float64() -> None:
    huge = torch.full((128, 128), 1e30)
    assert not torch.isfinite(norm([huge])) and float(norm_in_float64([huge])) == pytest.approx(1.28e32, rel=1e-6)


def test_a_norm_does_not_ask_in_which_order_channels_lie() -> None:
    torch.manual_seed(0)
    kernels = [torch.randn(64, 32, 3, 3), torch.randn(32, 64, 1, 1), torch.randn(16, 5, 7)]
    laid = [w.to(memory_format=torch.channels_last) if w.ndim == 4 else w for w in kernels]
    assert not laid[0].is_contiguous()
    assert float(norm(laid)) == pytest.approx(float(norm(kernels)), rel=1e-7)


def test_seeding_is_torch_s_without_asking_every_kind_of_device(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = Rng(3, 5, "phase", range(4))
    torch.manual_seed(rng.torch_seed())
    wanted = torch.randn(8)
    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("every device was asked"))
    rng.seed_torch()
    assert torch.equal(torch.randn(8), wanted)
    before = torch.get_rng_state()
    with rng.dropout():
        assert torch.equal(torch.randn(8), wanted)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("ids", [range(3, 9), range(0, 12, 3), range(5)])
def test_draws_do_not_depend_on_how_ids_are_given(ids: range) -> None:
    import numpy as np

    one, other = Rng(1, 2, "x", ids), Rng(1, 2, "x", np.array(list(ids)))
    for kind in ("normal", "uniform"):
        assert torch.equal(getattr(one, kind)((len(ids), 5)), getattr(other, kind)((len(ids), 5)))
    assert torch.equal(one.fork("a").normal((len(ids), 3)), other.fork("a").normal((len(ids), 3)))
    index = torch.tensor([0, 2])
    assert torch.equal(one.take(index).normal((2, 3)), other.take(index).normal((2, 3)))


def test_training_mode_is_set_as_torch_sets_it_and_by_modules_of_their_own_way() -> None:
    class Stubborn(nn.Module):
        def train(self, mode: bool = True) -> Stubborn:
            return super().train(False)

    recipe, _ = recipe_of("dmd2")
    networks, student = recipe.networks, recipe.networks.module("student")
    networks.train_only(("student",))
    assert all(inner.training for inner in student.modules())
    assert not any(inner.training for inner in networks.module("fake_score").modules())
    networks.train_only(("fake_score",))
    assert not any(inner.training for inner in student.modules())
    student.add_module("own", Stubborn())
    networks.train_only(("student",))
    assert student.training and not student.own.training


def test_gradients_of_those_that_train_are_forgotten() -> None:
    recipe, _ = recipe_of("dmd2")
    networks = recipe.networks
    networks.train_only(("student", "fake_score"))
    owned = [*networks.weights("student"), *networks.weights("fake_score")]
    for weight in owned:
        weight.grad = torch.ones_like(weight)
    networks.zero_grad()
    assert all(weight.grad is None for weight in owned)


def test_a_grid_of_times_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    process, law = EDM(0.002, 20.0), times.KarrasIndex(0.1, 0.9, num_times=37)
    grid = torch.tensor(karras(process, 36, 7.0)[::-1])
    index = 4 + Rng(0, 0, "t", range(64)).integers(32 - 4 + 1, (64,))
    assert torch.equal(law(Rng(0, 0, "t", range(64)), process, torch.float32), grid[index])
    monkeypatch.setattr(times, "karras", lambda *arguments: pytest.fail("made again"))
    law(Rng(0, 1, "t", range(64)), process, torch.float32)
    with pytest.raises(pytest.fail.Exception):
        law(Rng(0, 1, "t", range(64)), EDM(0.002, 21.0), torch.float32)


def test_the_next_input_of_a_rollout_is_made_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, _ = recipe_of("dmd2")
    calls = []

    def renoise(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        return ddim(*arguments)

    generator = Generator(recipe.networks["student"], (5.0, 1.0), renoise)
    z, cond = torch.randn(4, 2), {"label": torch.zeros(4, dtype=torch.long)}
    rollout = generator.rollout(z, cond, Rng(0, 0, "r", range(4)), last_step)
    made = len(calls)
    assert torch.equal(rollout.x_out, rollout.x0) and len(calls) == made + 1
    assert rollout.x_out is rollout.x_out and len(calls) == made + 1


def test_parts_of_plain_tensors_share_their_storage() -> None:
    from diffdistill.shards import parts

    weight = nn.Parameter(torch.zeros(3))
    (part,) = parts([weight])
    part += 1
    assert not part.requires_grad and weight.sum().item() == 3


def test_the_order_of_an_epoch_is_drawn_once() -> None:
    import numpy as np

    from diffdistill import data, rng

    rng._permutation.cache_clear()
    steps = [data.epoch_indices(Rng(91, step, "data", range(8)), 8, 20) for step in range(5)]
    assert rng._permutation.cache_info().misses == 2
    for epoch in range(2):
        found = [int(index) for step in steps for index in step][20 * epoch : 20 * (epoch + 1)]
        key = np.random.Philox(key=Rng(91)._key(f"epoch {epoch}"))
        assert found == list(np.random.Generator(key).permutation(20))
    assert data.epoch_indices(Rng(92, 0, "data", range(8)), 8, 20).tolist() != steps[0].tolist()
    with pytest.raises(ValueError, match="read-only"):
        Rng(91).permutation(20, "epoch 0")[0] = 3
