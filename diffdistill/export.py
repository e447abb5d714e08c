"""From a run to a stock diffusers folder, verified in a process that does not have this package.

A Generator becomes a ConsistencyModelPipeline whose scheduler holds the student's own grid; a trained denoiser becomes
the model folder it was loaded from. Folders carry no code: `DiffusionPipeline.from_pretrained(dir)(**inputs, **call)`
with the keywords of call.json equals `generator.sample` on the same noise, or nothing is written.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from diffdistill import export_stock, export_video
from diffdistill.adapter_file import attach
from diffdistill.denoiser import SignalMap
from diffdistill.errors import UserError
from diffdistill.export_cards import MLP_DESCRIPTION, model_readme, pipeline_readme, unet_description, write_card
from diffdistill.export_check import TOLERANCE, check_close, made_alone, same_draws
from diffdistill.generator import Generator, constant_inputs, fresh_from_t_min
from diffdistill.networks.diffusers import UNet2D
from diffdistill.networks.families.stock import Stock
from diffdistill.networks.inputs import EmbeddingWithInputs, fold_inputs
from diffdistill.networks.mlp import Mlp
from diffdistill.networks.wan import Wan
from diffdistill.pipelines import write_contract
from diffdistill.solvers import OdeSampler, Sampler

__all__ = ["attach", "grid_indices", "refusal", "stock_unet", "verify", "write"]

if TYPE_CHECKING:
    from diffdistill.recipe import Recipe

NUM_LEVELS = 40  # of the scheduler's Karras grid
RHO = 7.0


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
    if isinstance(network, Stock):
        return export_stock.refusal(recipe, generator)
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


def standalone(recipe: Recipe, generator: Sampler) -> Any:
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
        network = recipe.networks["student"].network
        if isinstance(network, Stock):
            assert isinstance(generator, Generator | OdeSampler)
            export_stock.write(standalone(recipe, generator), recipe, generator, folder, settings, summary)
        elif isinstance(network, Wan):
            export_video.write(standalone(recipe, generator), recipe, generator, folder, settings, summary)
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
    images = made_alone(folder, inputs)
    ours = same_draws(recipe, generator, cond, num)
    return check_close(ours.clamp(-1, 1) / 2 + 0.5, images, TOLERANCE)


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

    network = standalone(recipe, generator)
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
    (folder / "README.md").write_text(pipeline_readme(recipe, generator, call, settings, summary))
    write_contract(folder, call, generator.nfe, generator.times)


def _write_model(
    recipe: Recipe, generator: Sampler, folder: Path, settings: Mapping[str, Any], summary: Mapping[str, Any]
) -> None:
    network = standalone(recipe, generator)
    if isinstance(network, Mlp):
        network.save(folder)
        description = MLP_DESCRIPTION
    else:
        stock_unet(network, drop_null=False).save_pretrained(folder)
        description = unet_description(network)
    (folder / "README.md").write_text(model_readme(recipe, description, settings, summary))
    write_card(folder, next(folder.glob("*.safetensors")), settings, summary)
