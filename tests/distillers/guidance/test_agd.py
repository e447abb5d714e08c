"""AGD: adapters begin as nothing, learn on stored guided states, leave the base as it was, and travel as two files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

import diffdistill
from diffdistill.adapter_file import DESCRIPTION, WEIGHTS, write_adapters
from diffdistill.config import build, compose
from diffdistill.denoiser import Guidance
from diffdistill.distillers.guidance.agd import AGD
from diffdistill.errors import UserError
from diffdistill.export import attach, stock_unet
from diffdistill.networks.adapter import Adapters, AdapterSpec, adapters_for
from diffdistill.recipe import Recipe, assemble
from diffdistill.rng import Rng
from diffdistill.trainer import Progress
from diffdistill.trajectories import Trajectories, TrajectorySource, with_trajectories

TINY = (
    "{sample_size: 8, in_channels: 1, out_channels: 1, block_out_channels: [8, 16], layers_per_block: 1,"
    " norm_num_groups: 4, down_block_types: [DownBlock2D, DownBlock2D], up_block_types: [UpBlock2D, UpBlock2D],"
    " num_class_embeds: 11}"
)
WORDS = (
    "data=digits", "networks=digits_scratch", f"networks.config={TINY}", "distiller=agd", "experiment=none",
    "evaluation=none", "trajectories.num=6", "trajectories.num_steps=5", "distiller.num_steps=5",
    "adapter.width=8", "trainer.batch_size=16",
)  # fmt: skip


def recipe_of(*words: str) -> tuple[Recipe, Trajectories]:
    settings = compose("train", [*WORDS, "run_dir=none", *words])
    recipe = assemble(settings)  # type: ignore[arg-type]
    source: TrajectorySource = build(settings.trajectories)
    found = source.make(recipe)
    return with_trajectories(recipe, found), found


def state(recipe: Recipe, size: int = 4) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    x = torch.randn(size, *recipe.data.shape, generator=torch.Generator().manual_seed(0))
    return x, torch.logspace(-1, 1, size), {"label": torch.arange(size)}


def trained(recipe: Recipe, *words: str) -> Recipe:
    trainer = build(compose("train", [*WORDS, "run_dir=none", "trainer.steps=8", "trainer.ema={}", *words]).trainer)
    quiet = Progress(lambda step, figures: None, lambda step: None, lambda step: None)
    started = trainer.start(recipe.distiller, recipe.networks)
    trainer.fit(started, recipe.data, recipe.needs, Accelerator(), quiet)
    return recipe


def disturbed(recipe: Recipe) -> Recipe:
    """Adapters that do something."""
    with torch.no_grad():
        for weight in recipe.networks.weights("student"):
            weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    return recipe


@pytest.mark.parametrize("kind", ["cross", "offset"])
def test_at_first_the_student_is_the_teacher_bit_for_bit(kind: str) -> None:
    recipe, _ = recipe_of(f"adapter.kind={kind}")
    x, t, cond = state(recipe)
    teacher = recipe.networks["teacher"](x, t, cond)
    for w in (1.0, 4.0):
        assert torch.equal(recipe.networks["student"].given(w=w)(x, t, cond), teacher)
    disturbed(recipe)
    assert torch.equal(recipe.networks["teacher"](x, t, cond), teacher)  # its calls see no adapter
    ours = [recipe.networks["student"].given(w=w)(x, t, cond) for w in (1.0, 4.0)]
    assert not torch.allclose(ours[0], teacher) and not torch.allclose(*ours)


def test_stored_states_follow_ddim_and_targets_are_the_guided_teachers() -> None:
    recipe, found = recipe_of()
    teacher, null = recipe.networks["teacher"], recipe.networks.teacher.null
    for run in (0, 5):
        cond = {"label": found.cond["label"][run : run + 1]}
        guided = teacher.guided(Guidance(float(found.w[run]), null))
        for step in range(5):
            t = found.t[step : step + 1]
            x = found.x_t[run, step][None]
            torch.testing.assert_close(guided(x, t, cond)[0], found.target[run, step], rtol=1e-4, atol=1e-5)
            if step < 4:
                s = found.t[step + 1 : step + 2]
                moved = teacher.process.jump(x, found.target[run, step][None], t, s)
                torch.testing.assert_close(moved[0], found.x_t[run, step + 1], rtol=1e-4, atol=1e-5)
    assert (found.w >= 1).all() and (found.w <= 6).all() and found.w.std() > 0


def test_without_guidance_the_target_is_the_conditional_teacher() -> None:
    recipe, found = recipe_of("trajectories.scales.low=1", "trajectories.scales.high=1")
    cond = {"label": found.cond["label"]}
    plain = recipe.networks["teacher"](found.x_t[:, 2], found.t[2].expand(6), cond)
    torch.testing.assert_close(plain, found.target[:, 2], rtol=1e-4, atol=1e-5)


def test_trajectories_do_not_depend_on_their_batches() -> None:
    _, whole = recipe_of()
    _, parts = recipe_of("trajectories.batch_size=4")
    torch.testing.assert_close(whole.x_t, parts.x_t, rtol=1e-4, atol=1e-5)
    assert torch.equal(whole.w, parts.w)


def test_an_epoch_holds_every_stored_state_once() -> None:
    recipe, found = recipe_of()
    seen = []
    for step in range(3):
        batch = recipe.data.batch(Rng(0, step, "data", range(10)), 10, recipe.needs, torch.float32)
        assert batch.trajectory is not None
        seen.append(batch.trajectory.x_t)
    flat = torch.cat(seen).flatten(1)
    wanted = found.x_t.flatten(0, 1).flatten(1)
    assert torch.equal(flat[flat[:, 0].argsort()], wanted[wanted[:, 0].argsort()])


def test_the_loss_by_hand() -> None:
    recipe, _ = recipe_of()
    method = disturbed(recipe).distiller
    assert isinstance(method, AGD)
    batch = recipe.data.batch(Rng(0, 0, "data", range(10)), 10, recipe.needs, torch.float32)
    seen = batch.trajectory
    assert seen is not None
    ours = recipe.networks["student"](seen.x_t, seen.t, {**seen.cond, "w": seen.w})
    process = recipe.networks.teacher.process
    eps, goal = ((seen.x_t - d) / seen.t.view(-1, 1, 1, 1) for d in (ours, seen.target))
    assert process.alpha_sigma(seen.t)[0].eq(1).all()
    torch.testing.assert_close(method.student_loss(batch, Rng(0)).total, (eps - goal).square().mean())


def test_training_moves_the_adapters_alone() -> None:
    recipe, _ = recipe_of()
    before = {name: value.clone() for name, value in recipe.networks.teacher.state_dict().items()}
    start = [weight.detach().clone() for weight in recipe.networks.weights("student")]
    trained(recipe)
    assert all(torch.equal(value, before[name]) for name, value in recipe.networks.teacher.state_dict().items())
    assert all(not w.requires_grad for w in recipe.networks.teacher.parameters())
    moved = [not torch.equal(a, b) for a, b in zip(start, recipe.networks.weights("student"), strict=True)]
    assert sum(moved) >= len(moved) - 1  # the key's bias shifts all logits of a row and has no gradient


def test_the_files_on_a_stock_network_equal_the_student_and_leave_it_as_it_was(tmp_path: Path) -> None:
    recipe, _ = recipe_of()
    disturbed(recipe)
    settings = compose("train", [*WORDS, "run_dir=none"])
    folder = write_adapters(recipe, tmp_path / "adapters", settings)  # type: ignore[arg-type]
    network = recipe.networks.bare()
    unet = stock_unet(network, drop_null=False).eval()
    modules, weights = [id(m) for m in unet.modules()], {k: v.clone() for k, v in unet.state_dict().items()}
    x, t, cond = state(recipe)

    def stock() -> torch.Tensor:
        with torch.no_grad():
            scaled = network.scale(t).view(-1, 1, 1, 1) * x
            raw = unet(scaled, network.time(t), class_labels=cond["label"]).sample
            c_x, c_raw = network.kind.x0_from(network.process, t)
            return c_x.view(-1, 1, 1, 1) * x + c_raw.view(-1, 1, 1, 1) * raw

    plain = stock()
    attached = attach(type("Pipeline", (), {"unet": unet})(), folder)
    assert attached.scale == 3.0
    for w in (3.0, 5.0):
        attached.scale = w
        torch.testing.assert_close(stock(), recipe.networks["student"].given(w=w)(x, t, cond), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(stock(), plain)
    attached.detach()
    assert torch.equal(stock(), plain)
    assert [id(m) for m in unet.modules()] == modules
    assert unet.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in unet.state_dict().items())


def test_the_random_frequencies_are_in_the_file(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    recipe, _ = recipe_of()
    folder = write_adapters(recipe, tmp_path / "a", compose("train", [*WORDS, "run_dir=none"]))  # type: ignore[arg-type]
    names = load_file(folder / WEIGHTS).keys()
    assert any(name.endswith("frequency") for name in names) and any(name.endswith("phase") for name in names)


def test_a_run_by_the_command_line_and_its_export(tmp_path: Path) -> None:
    run, out = str(tmp_path / "run"), str(tmp_path / "out")
    summary = diffdistill.train(*WORDS, "trainer.steps=2", run_dir=run)
    assert summary["trajectories"]["num"] == 6 and not (tmp_path / "run" / "pipeline").exists()
    with pytest.raises(UserError, match="format=adapter writes them"):
        diffdistill.export(run=run, out=out)
    diffdistill.export(run=run, out=out, format="adapter")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["README.md", DESCRIPTION, WEIGHTS]
    pipeline = type("Pipeline", (), {"unet": stock_unet(recipe_of()[0].networks.bare(), drop_null=False)})()
    attached = diffdistill.export.attach(pipeline, out, scale=2.0)  # type: ignore[attr-defined]
    assert attached.scale == 2.0


def broken(folder: Path, **changes: Any) -> None:
    file = folder / DESCRIPTION
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    recipe, _ = recipe_of()
    settings: Any = compose("train", [*WORDS, "run_dir=none"])
    folder = write_adapters(recipe, tmp_path / "a", settings)
    unet = stock_unet(recipe.networks.bare(), drop_null=False)
    with pytest.raises(UserError, match=r"scale must lie in the trained range \[1, 6\], got 9"):
        attach(unet, folder, scale=9)
    with pytest.raises(UserError, match="pipeline must have the modules that the adapters act on"):
        attach(torch.nn.Linear(2, 2), folder)
    with pytest.raises(UserError, match="pipeline must have a unet or a transformer"):
        attach(object(), folder)
    broken(folder, schema=99)
    with pytest.raises(UserError, match="path must be of schema 1, got 99"):
        attach(unet, folder)
    broken(folder, schema=1, width=16)
    with pytest.raises(UserError, match="path must hold whole adapters"):
        attach(unet, folder)
    with pytest.raises(UserError, match="out must not exist yet"):
        write_adapters(recipe, folder, settings)
    copied, _ = recipe_of("roles.student=copy")
    with pytest.raises(UserError, match="format adapter needs a student made of adapters"):
        write_adapters(copied, tmp_path / "b", settings)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("adapter.kind=lateral", "adapter.kind must be"),
        ("adapter.width=7", "adapter.width must be even"),
        ("adapter.sites=['(']", "adapter.sites must be regular expressions"),
        ("adapter.sites=[nowhere]", "adapter.sites must match a module"),
        ("trajectories=null", "distiller needs trajectory"),
        ("trajectories.num=0", "trajectories.num must be >= 1"),
        ("trajectories.scales.high=0.5", "trajectories.scales.low, trajectories.scales.high must"),
    ],
)
def test_settings_that_cannot_be_are_refused(word: str, message: str) -> None:
    with pytest.raises(UserError) as refusal:
        recipe_of(word)
    assert str(refusal.value).startswith(message)


def test_prompts_are_read_off_the_cross_attention() -> None:
    """A text-to-image UNet: the adapter's condition is the prompt's tokens, found by a call."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        norm_num_groups=4, cross_attention_dim=12, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip
    x, t, prompt = torch.randn(2, 4, 8, 8), torch.tensor([10, 500]), torch.randn(2, 5, 12)

    def call() -> torch.Tensor:
        with torch.no_grad():
            return unet(x, t, encoder_hidden_states=prompt).sample

    plain = call()
    adapters = adapters_for(unet, AdapterSpec(width=8, sites=(r".*\.attn2",)), call)
    assert isinstance(adapters, Adapters)
    sites = [name for name, _ in unet.named_modules() if name.endswith(".attn2")]
    assert sorted(adapters.shapes) == sorted(sites)  # by name: none is left out
    assert {shape.condition for shape in adapters.shapes.values()} == {12}
    hooks = adapters.hang(unet, lambda: torch.tensor([4.0]))
    assert torch.equal(call(), plain)
    for adapter in adapters.sites.values():
        torch.nn.init.normal_(adapter.out.weight, std=0.1)  # type: ignore[union-attr, arg-type]
    moved = call()
    assert not torch.allclose(moved, plain)
    prompt = prompt.flip(0)
    assert not torch.allclose(call(), moved)
    hooks.remove()
    prompt = prompt.flip(0)
    assert torch.equal(call(), plain)
