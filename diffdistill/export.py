"""From a run to a stock diffusers folder, verified in a process that does not have this package.

A Generator becomes a ConsistencyModelPipeline whose scheduler holds the student's own grid; a trained denoiser becomes
the model folder it was loaded from. Folders carry no code: `DiffusionPipeline.from_pretrained(dir)(**inputs, **call)`
with the keywords of call.json equals `generator.sample` on the same noise, or nothing is written.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from diffdistill import export_video
from diffdistill.adapter_file import attach
from diffdistill.denoiser import SignalMap
from diffdistill.errors import UserError
from diffdistill.evaluation import harness
from diffdistill.evaluation.protocol import Protocol
from diffdistill.generator import Generator, constant_inputs, fresh_from_t_min
from diffdistill.hashing import file_sha256
from diffdistill.moving_digits import prompts
from diffdistill.networks.diffusers import UNet2D
from diffdistill.networks.files import resolve
from diffdistill.networks.inputs import EmbeddingWithInputs, fold_inputs
from diffdistill.networks.mlp import Mlp
from diffdistill.networks.wan import Wan
from diffdistill.pipelines import CALL, SCHEMA, hashes
from diffdistill.solvers import Sampler

__all__ = ["attach", "grid_indices", "refusal", "stock_unet", "verify", "write"]

if TYPE_CHECKING:
    from diffdistill.recipe import Recipe

TOLERANCE = 1e-5  # largest absolute difference on [0, 1]
VIDEO_TOLERANCE = 1e-4  # behind a VAE that is the identity within 1e-5
NUM_LEVELS = 40  # of the scheduler's Karras grid
RHO = 7.0

# Runs alone: no import of this package, no environment, no current folder on the path.
_CHILD = """
import json, sys
sys.modules["diffdistill"] = None
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
folder, out, inputs = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
torch.set_num_threads(1)
pipeline = DiffusionPipeline.from_pretrained(folder)
pipeline.set_progress_bar_config(disable=True)
call = json.load(open(folder + "/call.json"))["call"]
made = pipeline(**inputs, **call, generator=torch.Generator().manual_seed(0), output_type="pt")
images = made.images if hasattr(made, "images") else made.frames
save_file({"images": torch.as_tensor(images).contiguous()}, out)
"""


def refusal(recipe: Recipe, sampler: Sampler | None = None) -> UserError | None:
    """Why this run cannot become a stock folder, or None. sampler: in place of its own generator."""
    generator = recipe.distiller.generator if sampler is None else sampler
    network = recipe.networks["student"].network
    if (reason := _varying(recipe, generator)) is not None:
        return reason
    if isinstance(network, Mlp) and not isinstance(generator, Generator):
        return None
    if isinstance(network, Wan):
        return export_video.refusal(recipe, generator)
    if recipe.networks.modes.get("student") == "adapter":
        fix = "format=adapter writes them as a file for any checkpoint of the base."
        return UserError("format", "pipeline needs a student without adapters of its own", "adapter", fix)
    if not isinstance(network, UNet2D):
        return UserError(
            "export", "needs a network with a diffusers class", type(network).__name__, "Train a diffusers teacher."
        )
    if not isinstance(generator, Generator):
        return None
    if len(generator.times) > 1 and generator.renoise is not fresh_from_t_min:
        return UserError(
            "distiller.renoise", "must be fresh_from_t_min, as CMStochasticIterativeScheduler re-noises",
            getattr(generator.renoise, "__name__", generator.renoise), "Set it, or use one step.",
        )  # fmt: skip
    if generator.prior_std not in (None, generator.times[0]):
        return UserError(
            "prior_std", "must be sigma of the first time", generator.prior_std, "No stock scheduler scales otherwise."
        )
    try:
        grid_indices(generator.times, network.process.t_min)
    except UserError as error:
        return error
    return None


def _varying(recipe: Recipe, generator: Sampler) -> UserError | None:
    """Refuse extra inputs that change from step to step: no stock model takes them, and only constants fold."""
    inputs = recipe.networks.roles["student"].inputs if "student" in recipe.networks.roles else ()
    left = sorted(set(inputs) - set(constant_inputs(generator)))
    if not left:
        return None
    fix = "Export a generator that holds them constant, for example one of one step."
    return UserError("export", "needs extra inputs that stay constant, which are folded into a bias", left, fix)


def _standalone(recipe: Recipe, generator: Sampler) -> Any:
    """The student's network alone, plain: adapters merged, constant inputs and times folded into biases."""
    network = recipe.networks.standalone("student")
    *path, leaf = network.embedding_name.split(".")
    parent = network.get_submodule(".".join(path))
    embedding = getattr(parent, leaf)
    if isinstance(embedding, EmbeddingWithInputs):
        constants, device = constant_inputs(generator), recipe.networks.device
        values = {name: torch.tensor([value], device=device) for name, value in constants.items()}
        if "s" in values:
            values["s"] = network.time(values["s"])
        setattr(parent, leaf, fold_inputs(embedding, "student", values))
    if isinstance(generator, Generator) and isinstance(generator.student, SignalMap):
        _fold_time(network)
    return network


@torch.no_grad()
def _fold_time(network: UNet2D) -> None:
    """Fed t_max, the time embedding answers as for t_min: BOOT's one step, whose input lies at t_max."""
    first, device = network.unet.time_embedding.linear_1, network.unet.device
    ends = torch.tensor([network.process.t_min, network.process.t_max], device=device)
    meant, fed = first(network.unet.time_proj(network.time(ends)).to(first.weight.dtype))
    first.bias += meant - fed


def grid_indices(times: tuple[float, ...], sigma_min: float) -> list[int]:
    """The times' indices on the exported scheduler's Karras grid from times[0] down to sigma_min, ascending.

    Raises UserError naming the nearest legal time if one lies off the grid.
    """
    high, low = times[0] ** (1 / RHO), sigma_min ** (1 / RHO)
    indices = []
    for time in times:
        place = (high - time ** (1 / RHO)) / (high - low) * (NUM_LEVELS - 1)
        nearest = (high + round(place) / (NUM_LEVELS - 1) * (low - high)) ** RHO
        if abs(nearest - time) > 1e-5 * time:
            raise UserError(
                "distiller.times",
                f"must lie on the {NUM_LEVELS}-level Karras grid of diffusers' CM scheduler",
                time,
                f"The nearest time on it is {nearest:.8g}.",
            )
        indices.append(round(place))
    return indices


def write(
    recipe: Recipe,
    out: Path,
    settings: Mapping[str, Any],
    summary: Mapping[str, Any],
    sampler: Sampler | None = None,
) -> Path:
    """Write the run's generator, or `sampler` in its place, into the new folder `out` and verify it.

    Weights are used as they are.

    Raises UserError if it cannot be expressed, if `out` exists, or if the folder read back differs.
    """
    if (reason := refusal(recipe, sampler)) is not None:
        raise reason
    if out.exists():
        raise UserError("out", "must not exist yet", str(out), "Name another folder.")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as aside:
        folder = Path(aside) / out.name
        generator = recipe.distiller.generator if sampler is None else sampler
        if isinstance(recipe.networks["student"].network, Wan):
            _write_video(recipe, generator, folder, settings, summary)
        elif isinstance(generator, Generator):
            _write_pipeline(recipe, generator, folder, settings, summary)
            verify(folder, recipe, generator)
        else:
            _write_model(recipe, generator, folder, settings, summary)
        folder.rename(out)
    return out


def verify(folder: Path, recipe: Recipe, generator: Generator) -> float:
    """Run the folder in a fresh process without this package and compare with `generator`; the largest difference.

    Raises UserError above 1e-5 (values in [0, 1]).
    """
    num = 8
    cond = {"label": torch.arange(num) % recipe.data.num_classes} if recipe.data.num_classes else {}
    inputs = {"batch_size": num, **({"class_labels": cond["label"].tolist()} if cond else {})}
    images = _made_alone(folder, inputs)
    ours = _same_draws(recipe, generator, cond, num)
    return _close(ours.clamp(-1, 1) / 2 + 0.5, images)


def verify_video(folder: Path, recipe: Recipe, generator: Generator, settings: Mapping[str, Any]) -> float:
    """As `verify`, for a WanPipeline: alone against the student with stock attention, and, where the student has masks,
    with them against the student itself.

    Raises UserError where either differs by more than 1e-4 on [0, 1].
    """
    labels = torch.arange(2) * 41 % recipe.data.num_classes
    inputs, cond = export_video.inputs_of(labels), {"label": labels}
    dense = export_video.dense_generator(_standalone(recipe, generator), generator)
    frames = _made_alone(folder, inputs).transpose(1, 2)  # [B, C, T, H, W], its three channels equal
    found = _close(_same_draws(recipe, dense, cond, 2).clamp(-1, 1) / 2 + 0.5, frames[:, :1], VIDEO_TOLERANCE)
    if export_video.attention_of(settings) is not None:
        pipeline = export_video.masked(settings, folder)
        call = json.loads((folder / CALL).read_text())["call"]
        made = pipeline(**inputs, **call, generator=torch.Generator().manual_seed(0), output_type="pt").frames
        ours = _same_draws(recipe, generator, cond, 2).clamp(-1, 1) / 2 + 0.5
        found = max(found, _close(ours, torch.as_tensor(made).transpose(1, 2)[:, :1], VIDEO_TOLERANCE))
    return found


def _made_alone(folder: Path, inputs: Mapping[str, Any]) -> Tensor:
    """What the folder's pipeline makes of `inputs` in a process without this package."""
    with tempfile.TemporaryDirectory() as aside:
        result = Path(aside) / "images.safetensors"
        command = [sys.executable, "-I", "-c", _CHILD, str(folder), str(result), json.dumps(inputs)]
        child = subprocess.run(command, capture_output=True, text=True, check=False)
        if child.returncode:
            last = (child.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError("export", "must load in diffusers alone", str(folder), f"diffusers said: {last}")
        return load_file(result)["images"]


def _same_draws(recipe: Recipe, generator: Generator, cond: Mapping[str, Tensor], num: int) -> Tensor:
    """The generator's samples from the noise that a pipeline draws with seed 0."""
    device = recipe.networks.device
    draws = _TorchDraws(0, device)
    z = draws.normal((num, *recipe.data.shape), torch.float32)
    cond = {key: value.to(device) for key, value in cond.items()}
    return generator.sample(z, cond, draws).cpu()  # type: ignore[arg-type]


def _close(ours: Tensor, theirs: Tensor, tolerance: float = TOLERANCE) -> float:
    """The largest difference, refused above the tolerance."""
    difference = float((ours - theirs).abs().max())
    if not difference <= tolerance:
        constraint = f"must equal the run's own samples within {tolerance:g}"
        raise UserError("export", constraint, f"{difference:.3g}", "Nothing was written.")
    return difference


class _TorchDraws:
    """Our generator's draws taken from torch's, in the order the stock pipeline takes them."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.source, self.device = torch.Generator().manual_seed(seed), device

    def fork(self, name: str) -> _TorchDraws:
        return self

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=self.source, dtype=dtype).to(self.device)


def stock_unet(network: UNet2D, drop_null: bool) -> Any:
    """A plain UNet2DModel with the network's weights; drop_null leaves out the null class, which a label-free call
    would otherwise draw."""
    from diffusers import UNet2DModel

    config, state = dict(network.unet.config), network.unet.state_dict()
    if drop_null and network.null is not None:
        config["num_class_embeds"] -= 1
        state["class_embedding.weight"] = state["class_embedding.weight"][: config["num_class_embeds"]]
    unet = UNet2DModel.from_config(config)
    unet.load_state_dict(state)
    return unet


def _write_pipeline(
    recipe: Recipe, generator: Generator, folder: Path, settings: Mapping[str, Any], summary: Mapping[str, Any]
) -> None:
    from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline

    network = _standalone(recipe, generator)
    scheduler = CMStochasticIterativeScheduler(
        num_train_timesteps=NUM_LEVELS,
        sigma_min=network.process.t_min,
        sigma_max=generator.times[0],
        sigma_data=network.kind.sigma_data,
        rho=RHO,
        clip_denoised=False,
    )
    ConsistencyModelPipeline(unet=stock_unet(network, drop_null=True), scheduler=scheduler).save_pretrained(folder)
    indices = grid_indices(generator.times, network.process.t_min)
    call: dict[str, Any] = {} if len(indices) == 1 else {"timesteps": indices[::-1]}
    (folder / "README.md").write_text(_readme(recipe, generator, call, settings, summary))
    contract = {
        "schema": SCHEMA,
        "call": call,
        "nfe": generator.nfe,
        "times": list(generator.times),
        "sha256": hashes(folder),
    }
    (folder / CALL).write_text(json.dumps(contract, indent=1) + "\n")


def _write_model(
    recipe: Recipe, generator: Sampler, folder: Path, settings: Mapping[str, Any], summary: Mapping[str, Any]
) -> None:
    network = _standalone(recipe, generator)
    if isinstance(network, Mlp):
        network.save(folder)
        description = _MLP_DESCRIPTION
    else:
        stock_unet(network, drop_null=False).save_pretrained(folder)
        description = _unet_description(network)
    (folder / "README.md").write_text(_model_readme(recipe, description, settings, summary))
    _write_card(folder, next(folder.glob("*.safetensors")), settings, summary)


def _write_video(
    recipe: Recipe, sampler: Sampler, folder: Path, settings: Mapping[str, Any], summary: Mapping[str, Any]
) -> None:
    export_video.write_parts(_standalone(recipe, sampler), recipe, sampler, folder, settings)
    call = export_video.call_of(recipe, sampler)
    (folder / "README.md").write_text(_video_readme(recipe, sampler, call, settings, summary))
    contract = {
        "schema": SCHEMA,
        "call": call,
        "nfe": sampler.nfe,
        "times": list(export_video.sampler_times(sampler)),
        "prompts": prompts(),
        "attention": export_video.attention_of(settings),
        "sha256": hashes(folder),
    }
    (folder / CALL).write_text(json.dumps(contract, indent=1) + "\n")
    if isinstance(sampler, Generator):
        verify_video(folder, recipe, sampler, settings)
    _write_card(folder, next((folder / "transformer").glob("*.safetensors")), settings, summary)


def _video_readme(
    recipe: Recipe, sampler: Sampler, call: Mapping[str, Any], settings: Mapping[str, Any], summary: Mapping[str, Any]
) -> str:
    teacher = settings["networks"].get("path")
    method = type(recipe.distiller).__name__
    licence = recipe.data.source.licence if teacher is None else _licence(str(teacher))
    base = "" if teacher is None else f"base_model: {teacher}\n"
    keywords = "".join(f", {key}={value}" for key, value in call.items())
    what = f"{method} student of {teacher}" if teacher else f"Denoiser of {recipe.data.name}"
    return f"""---
license: {licence}
{base}library_name: diffusers
tags: [diffdistill, {method.lower()}, text-to-video]
---
# {what}

{sampler.nfe} network evaluations per clip, no guidance. Load it with diffusers alone:

```python
from diffusers import WanPipeline

pipeline = WanPipeline.from_pretrained("this folder")
frames = pipeline("digit 3 moving up and right"{keywords}).frames
```

The VAE is the identity and the text encoder random: both were built for these prompts, which `call.json` lists with
the keyword arguments of the call. `prompts.safetensors` holds their embeddings for training.

{export_video.attention_lines(settings)}
Made by `{_command(settings)}`. Training data: {recipe.data.source.description}.

{_figures(summary)}"""


def _write_card(folder: Path, weights: Path, settings: Mapping[str, Any], summary: Mapping[str, Any]) -> None:
    """metrics.json, where figures were measured."""
    if summary.get("student"):
        figures, protocol = dict(summary["student"]), Protocol.from_json(summary["protocol"])
        harness.write_card(folder / "metrics.json", figures, protocol, file_sha256(weights), _command(settings))


def _readme(
    recipe: Recipe,
    generator: Generator,
    call: Mapping[str, Any],
    settings: Mapping[str, Any],
    summary: Mapping[str, Any],
) -> str:
    teacher = str(settings["networks"].get("path", settings["networks"]["_target_"]))
    method = type(recipe.distiller).__name__
    labels = ", class_labels=[0, 1, 2, 3]" if recipe.data.num_classes else ""
    keywords = "".join(f", {key}={value}" for key, value in call.items())
    return f"""---
license: {_licence(teacher)}
base_model: {teacher}
library_name: diffusers
tags: [diffdistill, {method.lower()}, few-step]
---
# {method} student of {teacher}

{generator.nfe} network evaluation(s) per sample, no guidance. Load it with diffusers alone:

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("this folder")
images = pipeline(batch_size=4{labels}{keywords}).images
```

`call.json` holds the keyword arguments of that call and the hashes of the files. The folder was verified when it was
written: a fresh process without diffdistill gave the training code's samples within {TOLERANCE:g}.

{_figures(summary)}
Licence of the teacher: {_licence(teacher)}. The student is derived from it.
"""


def _model_readme(recipe: Recipe, description: str, settings: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    source = recipe.data.source
    return f"""---
license: {source.licence}
---
# Denoiser of {recipe.data.name}

{description}

Made by `{_command(settings)}`. Training data: {source.description}.

{_figures(summary)}"""


_MLP_DESCRIPTION = """An MLP of this package (`diffdistill.networks.mlp.mlp(path)`): config.json holds its shape, the
process is EDM, the raw output F: x0 = c_skip x + c_out F(x / sqrt(sigma^2 + sigma_data^2), ln(sigma) / 4)."""


def _unet_description(network: UNet2D) -> str:
    process, kind = network.process, network.kind
    null = f" Class row {network.num_classes - 1} is the null condition (label dropout)." if network.null else ""
    return f"""A stock `diffusers.UNet2DModel` under the process and scalings of `CMStochasticIterativeScheduler`
with sigma_min {process.t_min}, sigma_max {process.t_max}, sigma_data {kind.sigma_data}:
x0 = c_skip x + c_out F(x / sqrt(sigma^2 + sigma_data^2), 250 ln sigma). Pixels lie in [-1, 1].{null}"""


def _figures(summary: Mapping[str, Any]) -> str:
    student = summary.get("student") or {}
    if merged := summary.get("merged"):
        share = merged["weight"]
        return (
            f"The weights are merged: {1 - share:g} of this run's student and {share:g} of that of `{merged['run']}`."
            " No figures were measured.\n"
        )
    if not student:
        return "No figures were measured in this run.\n"
    lines = [
        f"| {key} | {value if isinstance(value, int | list) else format(value, '.4g')} |"
        for key, value in student.items()
    ]
    protocol = summary["protocol"]
    return (
        "| figure | value |\n|---|---|\n" + "\n".join(lines)
        + f"\n\nMeasured on {protocol['num_samples']} samples against {protocol['reference_size']} of"
        + f" {protocol['reference']}, seed {protocol['seed']}; intervals: {protocol['interval']}.\n"
    )  # fmt: skip


def _command(settings: Mapping[str, Any]) -> str:
    return f"diffdistill train {settings['command']}".rstrip()


def _licence(teacher: str) -> str:
    """The licence in the front matter of the teacher's README, or `unknown`."""
    card = Path(resolve(teacher)) / "README.md"
    lines = card.read_text().splitlines() if card.is_file() else []
    return next((line.removeprefix("license:").strip() for line in lines if line.startswith("license:")), "unknown")
