"""The verb distill: from a pipeline and prompts to a training run, with the recipe that its method's paper gives.

It writes a `train` command line, says what it will cost, and runs it; every key of `train` may be given beside, and
wins.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from rich.console import Console

from diffdistill.config import build, call, compose, gathered, override
from diffdistill.errors import UserError
from diffdistill.launch import train
from diffdistill.networks.families.folder import family_of, whole_folder
from diffdistill.networks.families.stock import Stock
from diffdistill.networks.families.words import latent_factors
from diffdistill.process import VP, RectifiedFlow
from diffdistill.prompts import Prompts, read_prompts
from diffdistill.solvers import flow_shift, trailing

Method = Literal["dmd2", "vsd", "tdm", "sid_lsg"]
FEW = {"dmd2": 4, "vsd": 1, "tdm": 4, "sid_lsg": 1}  # steps, of each paper
SOURCES = {
    "dmd2": "arXiv:2405.14867 (SDXL, without its GAN)",
    "vsd": "SwiftBrush, arXiv:2312.05239 (SD 2.1)",
    "tdm": "arXiv:2503.06674 (PixArt)",
    "sid_lsg": "arXiv:2406.01561 (SD 1.5)",
}
OWN = ("model", "prompts", "method", "steps", "run_dir", "overrides", "dry_run")
SID_TIME = 625  # SiD-LSG's students start here, of 1,000
LARGE = 10**9  # parameters, above which student and critic are LoRAs of one backbone unless asked otherwise
LORA_RATE = 1e-4  # of such a student and its critic; no paper's


def distill(
    model: str,
    prompts: str,
    method: Method,
    steps: int | None,
    run_dir: str | None,
    overrides: tuple[str, ...],
    dry_run: bool,
) -> Any:
    """Distil the pipeline `model` (a folder or hub id) on the prompts of a file; returns the run's summary.

    steps: of the student; None is what the method's paper does.  overrides: of `train`; they win.
    """
    words = recipe(model, prompts, method, steps, overrides)
    settings = compose("train", [*words, *([] if run_dir is None else [override("run_dir", run_dir)])])
    with _told_as("data.path", "prompts"):
        read_prompts(str(settings["data"]["path"]), settings["data"].get("column"))
    console = Console()
    console.print(f"recipe: {method}, after {SOURCES[method]}", soft_wrap=True, highlight=False)
    console.print("as: diffdistill train " + " ".join(words), soft_wrap=True, highlight=False)
    for line in cost(settings):
        console.print(line, soft_wrap=True, highlight=False)
    settings.dry_run = dry_run
    return call(settings, train)


@contextmanager
def _told_as(key: str, name: str) -> Iterator[None]:
    """Within, mistakes in `key` are told as mistakes in this verb's `name`."""
    try:
        yield
    except UserError as error:
        if error.key != key:
            raise
        raise UserError(name, error.constraint, error.value, error.fix) from error


def recipe(model: str, prompts: str, method: Method, steps: int | None, overrides: Sequence[str]) -> list[str]:
    """The words of the `train` command line.

    Raises UserError if the pipeline's family is unknown or the method makes no student of so many steps.
    """
    if not model or not prompts:
        raise UserError("prompts" if model else "model", "must be given", "nothing", "Name a file, or a folder.")
    with _told_as("path", "model"):
        whole_folder(model, ("*/config.json", "*/scheduler_config.json", "model_index.json"))
        family = family_of(model)
    words = [f"experiment=t2i_{method}", f"networks={family}", override("networks.path", model)]
    words.append(override("data.path", prompts))
    settings = compose("train", [*words, *overrides, "run_dir=none"])
    with torch.device("meta"):
        network = build(settings["networks"])
        data = build(settings["data"])
    if not isinstance(network, Stock) or "text" not in network.needs or not isinstance(data, Prompts):
        raise UserError("model", "must be told in words", model, "Use train with data of its own.")
    shape, _ = network.latents(data.size, data.frames, *latent_factors(model))
    network.check(shape, 0)  # takes the shift that belongs to this size
    words += _steps(network, method, FEW[method] if steps is None else steps)
    if parameters(network) > LARGE:
        modes = ("student",) if method == "vsd" else ("student", "fake_score")
        words += [f"roles.{role}=lora" for role in modes] + ["lora.rank=64", "lora.alpha=64"]
        words += [override("trainer.optimizer.default.lr", LORA_RATE)] if method != "vsd" else []
        if method in ("vsd", "tdm"):
            words.append(override("trainer.optimizer.student.lr", LORA_RATE))
    return [*words, *overrides]


def _steps(network: Stock, method: Method, steps: int) -> list[str]:
    """The student's times, and how it goes on between them so that a stock pipeline steps it."""
    if steps < 1 or (steps > 1 and FEW[method] == 1):
        fix = "Use method=dmd2 or tdm for several." if steps > 1 else "1 is the least."
        raise UserError("steps", f"must be {'>= 1' if steps < 1 else 1} for {method}", steps, fix)
    process = network.process
    if isinstance(process, RectifiedFlow):
        times = list(flow_shift(process, steps)[:-1])
        renoise = [] if steps == 1 or method == "tdm" else ["distiller.renoise._target_=diffdistill.generator.ddim"]
        return [override("distiller.times", times), *renoise]
    if not isinstance(process, VP):
        raise UserError("model", "must have a variance preserving process or a flow", type(process).__name__,
                        "Use train, and choose its times.")  # fmt: skip
    times = list(trailing(process, steps)[:-1])
    if method == "sid_lsg":
        times = [float(SID_TIME * process.num_steps // 1000)]
    words = [override("distiller.times", times)]
    if method == "dmd2":  # as its code: unit noise at first, fresh noise in between
        words += ["distiller.renoise._target_=diffdistill.generator.fresh", "distiller.prior_std=1"]
    return words


def parameters(network: Any) -> int:
    """Of the pretrained model."""
    return sum(weight.numel() for weight in network.parameters())


def cost(settings: Mapping[str, Any]) -> list[str]:
    """What a run will take, in lines: samples drawn, parameters, bytes of weights and optimizers at the least."""
    from diffdistill.networks.lora import LoraSpec
    from diffdistill.networks.roles import Networks

    with torch.device("meta"):
        network = build(settings["networks"])
        part = build(settings["distiller"])
        lora: LoraSpec = build(settings["lora"])
        roles = part.func.roles(**part.keywords)
        base = parameters(network)
        networks = Networks(network, roles, (), {}, modes=dict(settings["roles"]), lora=lora)
        trained = {role: sum(w.numel() for w in networks.weights(role)) for role in networks.trainable}
    trainer = settings["trainer"]
    samples = int(trainer["steps"]) * int(trainer["batch_size"]) * int(trainer["accumulate"])
    # weights, gradients and two moments in float32; an average of the student; the frozen backbone once
    least = 4 * base + 16 * sum(trained.values()) + 4 * trained.get("student", 0)
    listed = ", ".join(f"{role} {count / 1e6:,.1f} M" for role, count in trained.items())
    return [
        f"teacher: {base / 1e6:,.1f} M parameters; trained: {listed}",
        f"cost: {trainer['steps']:,} steps of {samples // int(trainer['steps'])} samples, {samples:,} in all; at least "
        f"{least / 2**30:,.1f} GiB for weights, gradients and optimizers in float32, activations beside",
    ]


def arguments(words: Sequence[str]) -> list[str]:
    """The words of the command line as keys of this verb: MODEL first."""
    if words and "=" not in words[0] and not words[0].startswith("-"):
        words = [override("model", words[0]), *words[1:]]
    return gathered(words, OWN)
