"""torch.compile in training: the losses of eager training, few forms of each network, and every recompile is counted.

Graphs are traced as ever and then run by torch as they are: what is compiled, and how often, is the same.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from diffdistill import cli, compiling
from diffdistill.bench import Pair, _words
from diffdistill.compiling import SETTLED, Compilations, compile_network
from diffdistill.config import build
from diffdistill.launch import accelerator_of
from diffdistill.recipe import assemble


@pytest.fixture(autouse=True)
def eager_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    monkeypatch.setattr(compiling, "options", lambda chosen: {"backend": "eager"})


def trained(words: tuple[str, ...], compiled: bool) -> tuple[list[dict[str, float]], Compilations, list[int]]:
    """Figures of eight steps of a recipe, what was compiled, and how many graphs there were after each step.

    From a student that is not its teacher: else gradients may be rounding alone.
    """
    settings = Pair("", "", words).settings()
    accelerator = accelerator_of("fp32", cpu=True)
    recipe = assemble(settings, accelerator.device)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in recipe.networks.weights("student"):
            weight += 0.02 * torch.randn_like(weight)
    trainer = build(settings["trainer"])
    trainer.log_every = 1
    state = trainer.start(recipe.distiller, recipe.networks)
    if compiled:
        recipe.networks.compile()
    counted = Compilations()
    found, graphs = [], []
    for _ in range(8):
        figures = trainer.advance(state, recipe.data, recipe.needs, accelerator)
        found.append({k: v for k, v in figures.items() if not k.startswith(("time", "lr"))})
        graphs.append(counted.look().graphs)
    return found, counted, graphs


def of(name: str, networks: str, *overrides: str) -> tuple[str, ...]:
    return tuple(_words(name, networks, 4, overrides))


@pytest.mark.parametrize(
    ("words", "forms"),
    [
        (of("dmd2", "gmm2d"), 2),  # with and without a graph
        (of("dmd2", "gmm2d", "roles.student=lora", "roles.fake_score=lora"), 5),  # and those of each role
        (of("lcm", "gmm2d"), 3),  # and the student, which takes w; not one more for the null condition
        (of("scm", "gmm2d"), 2),
        (of("mean_flow", "gmm2d"), 2),
    ],
    ids=["dmd2", "lora", "lcm", "scm", "mean_flow"],
)
def test_compiled_training_has_the_figures_of_eager_training_and_few_forms(words: tuple[str, ...], forms: int) -> None:
    eager, none, _ = trained(words, compiled=False)
    compiled, counted, graphs = trained(words, compiled=True)
    for one, other in zip(eager, compiled, strict=True):
        assert other == pytest.approx(one, rel=1e-3, abs=1e-5)
    assert (none.graphs, none.recompiles) == (0, 0)
    assert 1 <= counted.graphs <= forms and counted.recompiles <= forms - 1
    assert (counted.graph_breaks, counted.left_eager) == (0, 0)
    assert counted.seconds > 0 and graphs[2] == graphs[-1] > 0  # every phase came in the first steps


def test_compiled_blocks_are_repeated_in_the_backward_pass_and_give_the_same_gradients() -> None:
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), attention_head_dim=None,
    ).train()  # fmt: skip
    x, gradients = torch.randn(2, 1, 8, 8), []
    for ways in ("plain", "checkpointed", "compiled"):
        if ways == "checkpointed":
            unet.enable_gradient_checkpointing(compiling.checkpointed_block)
        if ways == "compiled":
            compile_network(unet, True)
        unet.zero_grad()
        unet(x, 3.0, return_dict=False)[0].square().sum().backward()
        gradients.append([weight.grad.clone() for weight in unet.parameters() if weight.grad is not None])
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-4, atol=1e-6)


def test_beside_training_networks_run_as_they_are_written() -> None:
    linear = torch.nn.Linear(2, 2)
    compile_network(linear, True)
    counted = Compilations()
    with compiling.uncompiled():
        linear(torch.zeros(3, 2))
    assert counted.look().graphs == 0
    linear(torch.zeros(3, 2))
    assert counted.look().graphs == 1


def test_graphs_recompiles_and_breaks_are_counted_since_the_beginning() -> None:
    def plain(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    def broken(x: torch.Tensor) -> torch.Tensor:
        y = x + 1
        torch._dynamo.graph_break()
        return y * 3

    def compiled(function: Any) -> Any:
        return torch.compile(function, backend="eager", dynamic=False)

    compiled(plain)(torch.zeros(7))
    counted = Compilations()
    assert (counted.look().graphs, counted.recompiles, counted.reasons) == (0, 0, {})
    run = compiled(plain)
    torch.compiler.reset()
    for size in (2, 3, 4, 3):
        run(torch.zeros(size))
        counted.look()
    assert (counted.graphs, counted.recompiles, counted.graph_breaks) == (3, 2, 0)
    assert sum(counted.reasons.values()) == 2 and any("size" in reason for reason in counted.reasons)
    compiled(broken)(torch.zeros(2))
    assert (counted.look().graphs, counted.recompiles, counted.graph_breaks) == (5, 2, 1)
    assert counted.to_json()["graph_breaks"] == 1
    assert counted.figures() == {"time/recompiles": 2.0, "time/compile_seconds": counted.seconds}


def test_what_is_compiled_again_late_is_told_once_and_then_at_every_doubling(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Compilations()
    counted.recompiles, counted.reasons = 5, {"grad_mode": 5}
    assert [counted.alarm(step) for step in range(1, SETTLED + 5)] == [None] * (SETTLED + 4)
    told = []
    for step in range(SETTLED + 5, SETTLED + 15):
        counted.recompiles += 1
        counted.reasons = {"grad_mode": 5, "size": counted.recompiles - 5}
        told.append(counted.alarm(step))
    assert [index + 1 for index, text in enumerate(told) if text] == [1, 2, 4, 8]
    assert told[3] == (
        f"torch.compile compiled again after step {SETTLED}, 4 time(s) up to step {SETTLED + 8}; the last: size"
    )


def test_a_run_compiles_its_steps_alone_and_tells_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures and health have other batch sizes, and health goes back twice through one graph."""
    monkeypatch.setattr(compiling, "options", lambda chosen: {"backend": "aot_eager"})
    folder = tmp_path / "run"
    words = ("experiment=gmm2d_dmd2", "trainer.steps=14", "trainer.log_every=7", "trainer.batch_size=4", "compile=true")
    assert cli.main(["train", *words, "health.every=7", "evaluation=none", "probe=null", f"run_dir={folder}"]) == 0
    told = json.loads((folder / "summary.json").read_text())["compile"]
    assert (told["graphs"], told["recompiles"], told["graph_breaks"], told["left_eager"]) == (2, 1, 0, 0)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "time/recompiles" in line]
    assert [line["time/recompiles"] for line in steps] == [1, 1] and steps[0]["time/compile_seconds"] > 0


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_a_mode_of_cuda_graphs_is_refused_on_a_cpu(
    mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = ("experiment=gmm2d_dmd2", f"compile={mode}", "dry_run=true", f"run_dir={tmp_path / 'run'}")
    assert cli.main(["train", *words]) == 2
    assert f"compile {mode} needs a GPU" in capsys.readouterr().err


def test_a_mode_reaches_torch_and_an_unknown_one_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.undo()
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **given: _compiled(self, given, seen))
    recipe = assemble(Pair("", "", of("dmd2", "gmm2d")).settings(), "cpu")
    recipe.networks.compile("max-autotune-no-cudagraphs")
    assert len(seen) == 3 and all(given == {"mode": "max-autotune-no-cudagraphs"} for given in seen)
    seen.clear()
    recipe.networks.compile(True)
    assert seen == [{}] * 3
    assert cli.main(["train", "experiment=gmm2d_dmd2", "compile=fast", f"run_dir={tmp_path / 'run'}"]) == 2
    assert capsys.readouterr().err.startswith("error: compile must be")


def _compiled(network: torch.nn.Module, given: dict[str, Any], seen: list[dict[str, Any]]) -> None:
    seen.append(given)
    network._compiled_call_impl = network._call_impl
