"""Prompts: read from files, embedded as the pipeline's own call embeds them, trained on."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from tiny_pipelines import written

from diffdistill import export_lora, export_stock
from diffdistill.config import compose
from diffdistill.denoiser import Denoiser, Guidance
from diffdistill.errors import UserError
from diffdistill.export import refusal, write
from diffdistill.export_check import made_alone, same_draws
from diffdistill.networks.families.words import factors_of
from diffdistill.networks.files import quiet_libraries
from diffdistill.prompts import Prompts, ToldPrompts, read_prompts
from diffdistill.recipe import Recipe, assemble
from diffdistill.rng import Rng
from diffdistill.solvers import ddim, sample

TEXTS = ["a red circle", "a blue square on black", "green"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(TEXTS) + "\n\n")
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("pipelines")
    return {name: written(name, place / name) for name in ("sd15", "pixart", "flux")}


def settings(name: str, folder: Path, file: Path, *words: str) -> Any:
    base = ["data=prompts", f"data.path={file}", f"networks={name}", f"networks.path={folder}", "experiment=none"]
    return compose("train", [*base, "evaluation=none", "run_dir=none", "precision=fp32", *words])


def test_files(tmp_path: Path, file: Path) -> None:
    assert read_prompts(str(file), None) == TEXTS
    with pytest.raises(UserError, match="data.column must be null for a text file"):
        read_prompts(str(file), "prompt")
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"caption": "one", "other": "two"}\n\n{"caption": "three", "other": ""}\n')
    assert read_prompts(str(lines), None) == ["one", "three"] and read_prompts(str(lines), "other") == ["two"]
    with pytest.raises(UserError, match=r"data.column must be a column of .*jsonl:1, got .*words.* caption, other"):
        read_prompts(str(lines), "words")
    for text, message in (("[1]\n", "mapping on every line"), ("{\n", "JSON on every line")):
        lines.write_text(text)
        with pytest.raises(UserError, match=f"{message}.*a.jsonl:1"):
            read_prompts(str(lines), None)
    lines.write_text('\n{"prompt": "a"}\n{"other": "b"}\n')
    with pytest.raises(UserError, match="column of .*a.jsonl:3"):
        read_prompts(str(lines), None)
    lines.write_text('{"prompt": "a"}\n{"prompt": 3}\n')
    with pytest.raises(UserError, match="must hold texts, got 3"):  # and does not leave it out
        read_prompts(str(lines), None)
    lines.write_bytes(b"\xff\n")
    with pytest.raises(UserError, match="UTF-8"):
        read_prompts(str(lines), None)
    file.write_text("\n \n")
    with pytest.raises(UserError, match="must hold a prompt"):
        read_prompts(str(file), None)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="UTF-8"):
        read_prompts(str(file), None)
    with pytest.raises(UserError, match="must be a file of prompts"):
        read_prompts("no such file", None)


@pytest.mark.parametrize("name", ["sd15", "pixart", "flux"])
def test_prompts_are_embedded_as_the_pipeline_s_call_does(name: str, folders: dict[str, Path], file: Path) -> None:
    recipe = assemble(settings(name, folders[name], file, "data.size=[16,16]"))
    data: Any = recipe.data
    assert isinstance(data, ToldPrompts) and data.shape == (4, 8, 8)
    with quiet_libraries():
        stock = diffusers.DiffusionPipeline.from_pretrained(folders[name])
    stock.set_progress_bar_config(disable=True)
    z = torch.randn(3, *data.shape, generator=torch.Generator().manual_seed(0))
    network = recipe.networks.teacher
    start = network.process.alpha_sigma(torch.tensor([network.process.t_max], dtype=torch.float64))[1].float()
    call: dict[str, Any] = {"prompt": TEXTS, "num_inference_steps": 2, "height": 16, "width": 16}
    if name == "flux":
        from diffdistill.networks.families.packing import pack, unpack

        theirs = unpack(stock(**call, latents=pack(z), guidance_scale=3.5, output_type="latent").images, 8, 8)
        guidance = None
    else:
        call |= {"use_resolution_binning": False, "clean_caption": False} if name == "pixart" else {}
        theirs = stock(**call, latents=start * z, guidance_scale=3.0, output_type="latent").images
        guidance = Guidance(3.0, data.null)
    scheduler = stock.scheduler
    times = tuple(scheduler.sigmas.tolist()) if name == "flux" else (*map(float, scheduler.timesteps.tolist()), 0.0)
    with torch.no_grad():
        ours = sample(Denoiser(network).guided(guidance), ddim, times, z, data.cond)
    assert float((ours - theirs).abs().max()) <= 2e-5 * float(theirs.abs().max())


def test_a_data_free_method_trains_on_prompts(folders: dict[str, Path], file: Path) -> None:
    recipe: Recipe = assemble(settings("sd15", folders["sd15"], file, "distiller=vsd", "guidance.scale=3"))
    rng = Rng(0, 0, "data", range(4))
    batch = recipe.data.batch(rng, 4, recipe.needs, torch.float32)
    assert batch.cond["text"].shape == (4, 6, 16) and batch.x0 is None
    for phase in recipe.distiller.phases(0):
        recipe.networks.train_only(phase.trains)
        phase.loss(batch, Rng(0, 0, phase.name, range(4))).total.backward()
    # at the start the fake score is the teacher, and the student's gradient is 0
    assert any(w.grad is not None and w.grad.any() for w in recipe.networks.weights("fake_score"))


# each is verified twice, in processes of its own; test_export_schedulers holds Flux's steps against its pipeline
@pytest.mark.parametrize("name", ["sd15", *(pytest.param(name, marks=pytest.mark.slow) for name in ("flux", "pixart"))])
def test_a_student_becomes_its_teacher_s_pipeline(
    name: str, folders: dict[str, Path], file: Path, tmp_path: Path
) -> None:
    """Verified by `write` itself: a fresh process without this package gives the same latents."""
    words = ["distiller=dmd", "distiller.regression_weight=0", "roles.student=lora", "data.size=[16,16]"]
    chosen = settings(name, folders[name], file, *words)
    recipe = assemble(chosen)
    with torch.no_grad():
        for weight in recipe.networks.weights("student"):
            weight.add_(0.05 * torch.randn_like(weight))
    folder = write(recipe, tmp_path / "pipeline", {**chosen, "command": "test"}, {})
    contract = json.loads((folder / "call.json").read_text())
    assert contract["nfe"] == 1 and contract["call"]["num_inference_steps"] == 1
    assert "base_model" in (folder / "README.md").read_text()
    with quiet_libraries():
        stock = diffusers.DiffusionPipeline.from_pretrained(folder)
    stock.set_progress_bar_config(disable=True)
    assert stock(TEXTS[0], **contract["call"], output_type="np").images.shape == (1, 16, 16, 3)
    with torch.no_grad():  # a student that is not what was written is seen
        recipe.networks.weights("student")[0].add_(0.5)
    with pytest.raises(UserError, match="must equal the run's own samples"):
        export_stock.verify(folder, recipe.networks["student"].network, recipe, recipe.distiller.generator)


@pytest.mark.parametrize("name", ["sd15", pytest.param("flux", marks=pytest.mark.slow)])
def test_a_lora_loads_into_its_base(name: str, folders: dict[str, Path], file: Path, tmp_path: Path) -> None:
    """Verified by `write` itself: a fresh process loads the base, the LoRA and the scheduler, and gives the same."""
    base = ["distiller=dmd", "distiller.regression_weight=0", "data.size=[16,16]"]
    chosen = settings(name, folders[name], file, *base, "roles.student=lora", "lora.alpha=4", "lora.rank=2")
    recipe = assemble(chosen)
    with torch.no_grad():
        for weight in recipe.networks.weights("student"):
            weight.add_(0.2 * torch.randn_like(weight))
    folder = export_lora.write(recipe, tmp_path / "lora", chosen, {}, recipe.distiller.generator)
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md", "call.json", "pytorch_lora_weights.safetensors", "scheduler"
    ]  # fmt: skip
    whole = settings(name, folders[name], file, *base)
    reason = export_lora.refusal(assemble(whole), recipe.distiller.generator)
    assert reason is not None and "trained as one" in reason.constraint
    with torch.no_grad():  # what is not in the file is seen
        recipe.networks.weights("student")[0].add_(5.0)
    texts, cond = export_stock.examples_of(recipe)
    network: Any = recipe.networks["student"].network
    theirs = network.own_layout(made_alone(folder, {"prompt": texts}, "latent", str(folders[name])), recipe.data.shape)
    ours = same_draws(recipe, recipe.distiller.generator, cond, 2)  # type: ignore[arg-type]
    assert float((ours - theirs).abs().max()) > 1e-3


def test_what_cannot_be_exported_is_told_before_training(folders: dict[str, Path], file: Path) -> None:
    recipe = assemble(settings("sd15", folders["sd15"], file, "distiller=dmd", "distiller.regression_weight=0"))
    generator: Any = recipe.distiller.generator
    assert refusal(recipe) is None
    for other, key in (
        (replace(generator, times=(700.5,)), "distiller.times"),
        (replace(generator, times=(999.0, 500.0)), "distiller.renoise"),
        (replace(generator, prior_std=2.0), "distiller.prior_std"),
    ):
        reason = refusal(recipe, other)
        assert reason is not None and reason.key == key
    network: Any = recipe.networks["student"].network
    network.process = replace(network.process, zero_terminal_snr=True)
    reason = refusal(recipe)
    assert reason is not None and "noise process" in reason.constraint
    assert refusal(recipe, replace(generator, prior_std=1.0)) is None


def test_mistakes_are_told(folders: dict[str, Path], file: Path) -> None:
    with pytest.raises(UserError, match="needs x0"):
        assemble(settings("sd15", folders["sd15"], file, "distiller=scm"))
    with pytest.raises(UserError, match=r"data.size must be multiples of 2"):
        assemble(settings("sd15", folders["sd15"], file, "data.size=[15,16]"))
    with pytest.raises(UserError, match=r"data.size must be given"):
        assemble(settings("flux", folders["flux"], file, "distiller=vsd", "data.size=null"))
    with pytest.raises(UserError, match="prompts need a network that reads text, got Mlp"):
        assemble(compose("train", ["data=prompts", f"data.path={file}", "networks=gmm2d", "experiment=none",
                                   "evaluation=none", "run_dir=none"]))  # type: ignore[arg-type]  # fmt: skip
    told = Prompts(str(file)).told(assemble(settings("sd15", folders["sd15"], file)).networks.teacher,
                                   str(folders["sd15"]))  # fmt: skip
    with pytest.raises(UserError, match="evaluation must be none for prompts"):
        told.reference()


def test_a_pipeline_without_text_encoder_is_refused(tmp_path: Path, folders: dict[str, Path], file: Path) -> None:
    folder = shutil.copytree(folders["sd15"], tmp_path / "bare")
    index = json.loads((folder / "model_index.json").read_text())
    index["text_encoder"] = [None, None]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="must hold a text encoder"):
        assemble(settings("sd15", folder, file))


def test_factors_of_the_vaes_of_diffusers() -> None:
    assert factors_of(dict(diffusers.AutoencoderKL().config)) == (1, 1)
    assert factors_of({"block_out_channels": [128, 256, 512, 512]}) == (8, 1)
    assert factors_of({"block_out_channels": [128, 256, 256, 512], "temporal_compression_ratio": 4}) == (8, 4)
    assert factors_of({"encoder_block_out_channels": [1] * 6}) == (32, 1)
    assert factors_of({"spatial_compression_ratio": 32, "temporal_compression_ratio": 8}) == (32, 8)
    assert factors_of({"scale_factor_spatial": 8, "scale_factor_temporal": 4}) == (8, 4)
    assert factors_of({"temperal_downsample": [False, True, True]}) == (8, 4)
