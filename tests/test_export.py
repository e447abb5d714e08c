"""Exports: stock folders, verified in a process without this package."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from config_keys import run
from safetensors.torch import load_file

from diffdistill.config import compose
from diffdistill.errors import UserError
from diffdistill.export import grid_indices, refusal, verify, write
from diffdistill.generator import Generator
from diffdistill.recipe import Recipe, assemble
from diffdistill.saved_run import load_merged, load_run

TINY = "{sample_size:8,in_channels:1,out_channels:1,layers_per_block:1,block_out_channels:[8,16],\
down_block_types:[DownBlock2D,DownBlock2D],up_block_types:[UpBlock2D,UpBlock2D],norm_num_groups:4,num_class_embeds:11}"


def tiny(distiller: str = "dmd2", *overrides: str) -> tuple[Recipe, dict]:
    """A run on a small random UNet of the real class, its student moved away from the teacher."""
    words = [
        "data=digits",
        "networks=digits_scratch",
        f"networks.config={TINY}",
        f"distiller={distiller}",
        "run_dir=none",
    ]
    settings = compose("train", [*words, *overrides])
    recipe = assemble(settings)  # type: ignore[arg-type]
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in recipe.networks.weights("student"):
            weight.add_(0.05 * torch.randn_like(weight))
    return recipe, settings


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recipe]:
    recipe, settings = tiny()
    return write(recipe, tmp_path_factory.mktemp("export") / "pipeline", settings, {}), recipe


def test_the_folder_is_a_stock_pipeline_with_its_call_and_card(exported: tuple[Path, Recipe]) -> None:
    folder, recipe = exported
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "ConsistencyModelPipeline"
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["sigma_min"], scheduler["sigma_max"], scheduler["sigma_data"]) == (0.002, 20.0, 0.5)
    unet = json.loads((folder / "unet" / "config.json").read_text())
    assert unet["num_class_embeds"] == 10  # the null row stays behind
    assert json.loads((folder / "call.json").read_text())["call"] == {}  # the plain call is one step
    assert "DiffusionPipeline.from_pretrained" in (folder / "README.md").read_text()
    assert not list(folder.rglob("*.py"))


def test_it_loads_and_runs_where_this_package_cannot_be_imported(exported: tuple[Path, Recipe]) -> None:
    code = (
        "import sys; sys.modules['diffdistill'] = None\n"
        "from diffusers import DiffusionPipeline\n"
        f"pipeline = DiffusionPipeline.from_pretrained({str(exported[0])!r})\n"
        "images = pipeline(batch_size=4, class_labels=[0, 1, 2, 3]).images\n"
        "assert len(images) == 4 and images[0].size == (8, 8)"
    )
    subprocess.run([sys.executable, "-I", "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize(("key", "value"), [("sigma_max", 10.0), ("sigma_data", 0.6)])
def test_a_tampered_scheduler_config_is_refused(
    exported: tuple[Path, Recipe], tmp_path: Path, key: str, value: float
) -> None:
    folder, recipe = exported
    copy = tmp_path / "tampered"
    shutil.copytree(folder, copy)
    path = copy / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    generator = recipe.distiller.generator
    assert isinstance(generator, Generator)
    with pytest.raises(UserError, match="must equal the run's own samples"):
        verify(copy, recipe, generator)


CHANGES = {
    "a flipped byte of the weights": ("unet/diffusion_pytorch_model.safetensors", "flip"),
    "truncated weights": ("unet/diffusion_pytorch_model.safetensors", "cut"),
    "no weights": ("unet/diffusion_pytorch_model.safetensors", "remove"),
    "no scheduler": ("scheduler/scheduler_config.json", "remove"),
    "no unet configuration": ("unet/config.json", "remove"),
    "a flipped byte of the index": ("model_index.json", "flip"),
    "a cut index": ("model_index.json", "cut"),
    "a cut scheduler configuration": ("scheduler/scheduler_config.json", "cut"),
    "a cut unet configuration": ("unet/config.json", "cut"),
    "an edited unet configuration": ("unet/config.json", {"num_class_embeds": 3}),
    "an edited scheduler configuration": ("scheduler/scheduler_config.json", {"sigma_max": 3.0}),
    "another class": ("model_index.json", {"_class_name": "Nowhere"}),
    "a list as index": ("model_index.json", []),
    "a cut call": ("call.json", "cut"),
    "another schema": ("call.json", {"schema": 99}),
    "an unknown keyword": ("call.json", {"call": {"num_steps": 3}}),
    "a call that is no mapping": ("call.json", {"call": [3]}),
    "steps that are text": ("call.json", {"nfe": "one"}),
    "no steps": ("call.json", {"nfe": 0}),
    "hashes that are no mapping": ("call.json", {"sha256": 3}),
    "a keyword of a wrong type": ("call.json", {"call": {"timesteps": "three"}}),
}


def change(path: Path, how: str | dict | list) -> None:
    """Damage or edit one file."""
    content = path.read_bytes()
    if how == "flip":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "remove":
        path.unlink()
    else:
        path.write_text(json.dumps(how if isinstance(how, list) else {**json.loads(content), **how}))


@pytest.mark.parametrize("listed", [True, False], ids=["with hashes", "without"])
def test_a_damaged_or_edited_folder_is_refused_by_the_name_of_the_file(
    exported: tuple[Path, Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    listed: bool,
) -> None:
    monkeypatch.chdir(tmp_path)
    legal_without_hashes = ("a flipped byte of the weights", "an edited scheduler configuration")
    (tmp_path / "cases").mkdir()
    for name, (file, how) in CHANGES.items():
        folder = tmp_path / "cases" / name.replace(" ", "-")
        shutil.copytree(exported[0], folder)
        if not listed:
            contract = json.loads((folder / "call.json").read_text())
            del contract["sha256"]
            (folder / "call.json").write_text(json.dumps(contract))
        change(folder / file, how)
        if not listed and name in legal_without_hashes:
            continue
        for words in (["sample", "num=2"], ["evaluate", "num_samples=70", "metrics=[fd_pixel]"]):
            outcome = run([words[0], f"pipeline={folder}", "data=digits", *words[1:]])
            assert outcome.status == 2, (name, outcome)
            assert not outcome.fault, (name, outcome)
            assert Path(file).name in outcome.err or (not listed and "diffusers" in outcome.err), (name, outcome.err)
    assert [path.name for path in tmp_path.iterdir()] == ["cases"]


def test_a_meant_change_is_accepted_once_the_hashes_are_deleted(exported: tuple[Path, Recipe], tmp_path: Path) -> None:
    folder = tmp_path / "edited"
    shutil.copytree(exported[0], folder)
    change(folder / "scheduler" / "scheduler_config.json", {"sigma_max": 3.0})
    words = ["sample", f"pipeline={folder}", "data=digits", "num=2", f"out={tmp_path / 'grid.png'}"]
    outcome = run(words)
    assert "delete sha256 from call.json" in outcome.err
    contract = json.loads((folder / "call.json").read_text())
    assert set(contract.pop("sha256")) == {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    }
    (folder / "call.json").write_text(json.dumps(contract))
    assert run(words).status == 0


@pytest.mark.parametrize("word", ["steps=0", "steps=-3", "steps=100000", "data=gmm2d", "data=gauss"])
def test_what_does_not_fit_a_pipeline_is_told_in_one_message(
    exported: tuple[Path, Recipe], tmp_path: Path, word: str
) -> None:
    out = tmp_path / "grid.png"
    outcome = run(["sample", f"pipeline={exported[0]}", "data=digits", "num=2", f"out={out}", word])
    assert (outcome.status, outcome.fault) == (2, "")
    assert not out.exists()


def test_a_few_step_student_on_the_grid_round_trips(tmp_path: Path) -> None:
    high, low = 20.0 ** (1 / 7), 0.002 ** (1 / 7)
    time = (high + 12 / 39 * (low - high)) ** 7
    recipe, settings = tiny("dmd2", f"distiller.times=[20.0,{time!r}]")
    folder = write(recipe, tmp_path / "two", settings, {})
    assert json.loads((folder / "call.json").read_text())["call"] == {"timesteps": [12, 0]}


def test_a_lora_student_is_merged(tmp_path: Path) -> None:
    recipe, settings = tiny("dmd2", "roles.student=lora", "lora.rank=2")
    before = recipe.networks.teacher.unet.conv_in.base.weight.clone()
    folder = write(recipe, tmp_path / "lora", settings, {})  # verified against the adapter's own samples
    assert torch.equal(before, recipe.networks.teacher.unet.conv_in.base.weight)
    assert not any("lora" in name.name or "adapter" in name.name for name in folder.rglob("*"))


def test_a_trained_denoiser_becomes_the_model_folder_it_came_from(tmp_path: Path) -> None:
    from diffusers import UNet2DModel

    recipe, settings = tiny("denoising")
    folder = write(recipe, tmp_path / "unet", settings, {})
    unet = UNet2DModel.from_pretrained(folder)
    x, t, labels = torch.randn(2, 1, 8, 8), torch.tensor([0.3, 4.0]), torch.tensor([1, 10])
    network = recipe.networks["student"].network
    ours = network(x, network.time(t), {"label": labels})
    assert torch.allclose(unet(x, network.time(t), class_labels=labels).sample, ours, atol=1e-6)


@pytest.mark.parametrize(
    ("distiller", "words"),
    [
        ("mean_flow", ["distiller.times=[20.0,0.18492117]"]),  # s = t_min at both steps
        ("boot", []),  # fed t_max, answers as for t_min
        ("lcm", ["distiller.scale=7"]),
    ],
)
def test_constant_inputs_and_times_are_folded_into_the_time_embedding(
    tmp_path: Path, distiller: str, words: list[str]
) -> None:
    """`write` compares the folder with the run's own samples, in a process without this package."""
    recipe, settings = tiny(distiller, *words)
    for inputs in getattr(recipe.networks["student"].network.unet.time_embedding, "roles", {}).values():
        for embedder in inputs.values():
            torch.nn.init.normal_(embedder.last.weight, std=0.3)
    folder = write(recipe, tmp_path / "pipeline", settings, {})
    unet = json.loads((folder / "unet" / "config.json").read_text())
    names = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors").keys()
    assert unet["_class_name"] == "UNet2DModel" and not any("roles" in name or "base" in name for name in names)


def test_a_student_that_takes_w_becomes_a_model_folder_at_its_scale(tmp_path: Path) -> None:
    from diffusers import UNet2DModel

    recipe, settings = tiny("guidance_distillation", "distiller.scale=2")
    student = recipe.networks["student"]
    for embedder in student.network.unet.time_embedding.roles["student"].values():
        torch.nn.init.normal_(embedder.last.weight, std=0.3)
    unet = UNet2DModel.from_pretrained(write(recipe, tmp_path / "unet", settings, {}))
    x, t, labels = torch.randn(2, 1, 8, 8), torch.tensor([0.3, 4.0]), torch.tensor([1, 2])
    network = student.network
    raw = unet(network.scale(t).view(-1, 1, 1, 1) * x, network.time(t), class_labels=labels).sample
    c_x, c_raw = (c.view(-1, 1, 1, 1) for c in network.kind.x0_from(network.process, t))
    for w, same in ((2.0, True), (4.0, False)):
        ours = student.given(w=w)(x, t, {"label": labels})
        assert torch.allclose(c_x * x + c_raw * raw, ours, atol=1e-5) == same


def test_an_input_that_changes_from_step_to_step_is_refused() -> None:
    recipe, _ = tiny("mean_flow")
    generator = recipe.distiller.generator
    assert isinstance(generator, Generator)
    free = Generator(recipe.networks["student"], generator.times)  # its sampler does not say what s is
    assert "extra inputs that stay constant" in str(refusal(recipe, free))


def test_times_off_the_grid_are_refused_with_the_nearest() -> None:
    assert grid_indices((20.0,), 0.002) == [0]
    with pytest.raises(UserError, match="The nearest time on it is"):
        grid_indices((20.0, 3.0), 0.002)


def test_points_have_no_pipeline_and_the_reason_is_given() -> None:
    recipe = assemble(compose("train", ["data=gmm2d", "distiller=dmd2", "run_dir=none"]))  # type: ignore[arg-type]
    assert "diffusers class" in str(refusal(recipe))


def test_an_existing_folder_is_never_overwritten(exported: tuple[Path, Recipe]) -> None:
    folder, recipe = exported
    with pytest.raises(UserError, match="must not exist yet"):
        write(recipe, folder, {}, {})


# --- the weights of two runs


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs of one teacher, the second one's student an adapter; the first one was evaluated."""
    folder = tmp_path_factory.mktemp("pair")
    words = [
        "train", "data=digits", "networks=digits_scratch", f"networks.config={TINY}", "trainer.batch_size=4",
        "trainer.ema={}",
    ]  # fmt: skip
    judged = [
        "evaluation.num_samples=70",
        "evaluation.replicates=2",
        "evaluation.teacher=none",
        "evaluation.metrics=[fd_pixel]",
    ]
    first = [
        "distiller=dmd2",
        "trainer.steps=1",
        "trainer.optimizer.default.lr=1e-2",
        *judged,
        f"run_dir={folder / 'a'}",
    ]
    lora = ["roles.student=lora", "lora.rank=2", "trainer.steps=10", "trainer.optimizer.default.lr=0.1"]
    second = ["distiller=vsd", *lora, "evaluation=none", f"run_dir={folder / 'b'}"]
    for own in (first, second):
        assert run([*words, *own]).status == 0
    return folder / "a", folder / "b"


def weights(recipe: Recipe) -> dict[str, torch.Tensor]:
    """The student's, its adapter merged."""
    return dict(recipe.networks.standalone("student").state_dict())


def test_the_ends_of_a_merge_are_the_runs_themselves_bit_for_bit(pair: tuple[Path, Path]) -> None:
    first, second = (str(path) for path in pair)
    a, b = (weights(load_run(path)[0]) for path in (first, second))
    assert max(float((a[name] - b[name]).abs().max()) for name in a) > 1e-3
    for run_, other in ((first, second), (second, first)):  # either may be the adapter
        for share, path in ((0.0, run_), (1.0, other)):
            found, wanted = weights(load_merged(run_, other, share)[0]), a if path == first else b
            assert all(found[name].numpy().tobytes() == wanted[name].numpy().tobytes() for name in wanted)
    found = weights(load_merged(second, first, 0.25)[0])
    for name in a:
        torch.testing.assert_close(found[name], 0.25 * a[name] + 0.75 * b[name], rtol=1e-6, atol=1e-8)


def test_two_runs_are_exported_as_one(pair: tuple[Path, Path], tmp_path: Path) -> None:
    outcome = run(["export", f"run={pair[0]}", f"merge={pair[1]}", f"out={tmp_path / 'mean'}"])
    assert (outcome.status, outcome.err) == (0, "")
    found = load_file(tmp_path / "mean" / "unet" / "diffusion_pytorch_model.safetensors")
    a, b = (weights(load_run(str(path))[0])["unet.conv_in.weight"] for path in pair)
    torch.testing.assert_close(found["conv_in.weight"], (a + b) / 2, rtol=1e-6, atol=1e-8)
    card = (tmp_path / "mean" / "README.md").read_text()
    assert f"0.5 of this run's student and 0.5 of that of `{pair[1]}`" in card
    assert "fd_pixel" in (pair[0] / "pipeline" / "README.md").read_text() and "fd_pixel" not in card


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("merge=nowhere", "merge must be a folder that `diffdistill train` wrote, got nowhere"),
        ("merge={b} merge_weight=1.5", "merge_weight must lie in [0, 1]"),
        ("merge={b} merge_weight=-1", "merge_weight must lie in [0, 1]"),
        ("merge={b} merge_weight=nan", "merge_weight must"),
        ("merge={b} checkpoint=1", "checkpoint must be one of the steps"),
        ("merge={c}", "merge must mix two runs of one teacher"),
    ],
)
def test_a_merge_that_cannot_be_is_one_message_and_writes_nothing(
    words: str, message: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    given = ["train", "data=gmm2d", "distiller=dmd2", "trainer.steps=1", "trainer.batch_size=4", "evaluation=none"]
    if "{c}" in words:
        assert run([*given, f"run_dir={tmp_path / 'c'}"]).status == 0
    named = words.format(b=pair[1], c=tmp_path / "c").split()
    outcome = run(["export", f"run={pair[0]}", f"out={tmp_path / 'out'}", *named])
    assert (outcome.status, outcome.fault) == (2, "")
    assert message in outcome.err
    assert not (tmp_path / "out").exists()
