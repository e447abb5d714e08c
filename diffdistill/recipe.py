"""From a checked configuration to the objects of a run: data, networks and the method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from omegaconf import OmegaConf

from diffdistill.compiling import checkpointed_block
from diffdistill.config import build
from diffdistill.config_check import check_keywords, is_node
from diffdistill.data import Data
from diffdistill.denoiser import Denoiser
from diffdistill.distillers.base import Distiller
from diffdistill.errors import UserError
from diffdistill.networks.attention import set_attention
from diffdistill.networks.codec import PIXELS
from diffdistill.networks.files import seeded
from diffdistill.networks.roles import Networks, Role
from diffdistill.rng import Rng
from diffdistill.solvers import OdeSampler

MADE = {"pair": "pairs", "trajectory": "trajectories"}  # what the teacher makes for a need, by its configuration key


@dataclass(frozen=True)
class Recipe:
    """What a configuration builds. needs: what the method asks of data and teacher. sampler: the teacher's."""

    data: Data
    networks: Networks
    distiller: Distiller
    needs: frozenset[str]
    sampler: OdeSampler


def assemble(
    settings: Mapping[str, Any], device: torch.device | str = "cpu", kept_on: torch.device | str | None = None
) -> Recipe:
    """Build data, networks and the method of a train configuration, and check that they fit each other.

    device: where networks compute.  kept_on: where they lie until they are sharded, None is there too.

    Raises UserError if the method needs what data or teacher lack.
    """
    data: Data = build(settings["data"])
    if torch.device(device).type == "meta":
        with torch.device("meta"):
            teacher = build(settings["networks"])
    else:
        teacher = build(settings["networks"]).to(device)
    return assemble_parts(settings, data, teacher, kept_on)


def assemble_parts(
    settings: Mapping[str, Any], data: Data, teacher: Any, kept_on: torch.device | str | None = None
) -> Recipe:
    """As `assemble`, with data and teacher made by the caller; `settings` says the rest."""
    if (told := getattr(data, "told", None)) is not None:  # text, which only the teacher's pipeline can embed
        data = told(teacher, settings["networks"].get("path"))
    if kept_on is not None:
        teacher.to(kept_on)  # copies are made there
    teacher.check(data.shape, data.num_classes)
    if (null := getattr(data, "null", None)) is not None:  # of text, the embedding of what no prompt is
        teacher.null = null
    if getattr(data, "unconditional", False) and teacher.null is None:
        fix = "Set it to false, or use a teacher with a null class."
        raise UserError("data.unconditional", "needs a network with a null condition", True, fix)
    if settings.get("checkpointing"):
        _checkpoint(teacher)
    part = build(settings["distiller"])
    needs, roles = _asked(part)
    scale, interval = _guidance(settings["guidance"])
    has = data.provides | ({"null"} if teacher.null is not None else set()) | {"jvp", "codec"}
    example = data.conditions(Rng(0, 0, "example", range(1)))
    has |= {"condition"} if example else set()
    # made by the teacher's sampler before the first step
    has |= {need for need, key in MADE.items() if settings.get(key) is not None}
    if missing := sorted(needs - has):
        given = f"data={data.name}, which provides {sorted(has)}"
        fix = "Change one."
        if missing == ["null"]:
            fix = "The network has no null condition: distiller.null_share=0 trains without one."
        elif len(missing) == 1 and missing[0] in MADE:
            key = MADE[missing[0]]
            fix = f"They are made where {key} is not null: {key}.num says how many."
        raise UserError("distiller", f"needs {', '.join(missing)}", given, fix)
    # heads and adapters are drawn from torch's own generator: the run's seed decides them too
    with seeded(Rng(int(settings["trainer"]["seed"]), phase="networks").torch_seed()):
        networks = Networks(
            teacher,
            roles,
            data.shape,
            example,
            modes=dict(settings["roles"]),
            lora=build(settings["lora"]),
            adapter=build(settings["adapter"]) if "adapter" in settings else None,
            guidance_scale=scale,
            guidance_interval=interval,
            codec=(getattr(data, "codec", None) or PIXELS) if "codec" in needs else PIXELS,
            together=bool(settings.get("together")),
        )
    networks.checkpointed = bool(settings.get("checkpointing"))
    if settings.get("channels_last"):
        networks.lay_channels_last()
    if settings.get("onednn"):
        networks.multiply_by_onednn()
    for role, node in (settings.get("attention") or {}).items():
        _attend(networks, str(role), node)
    distiller = build(settings["distiller"], networks=networks)
    sampler = build(settings["sampler"], denoiser=networks["teacher"])
    return Recipe(data, networks, distiller, needs, sampler)


def _checkpoint(teacher: Any) -> None:
    """Let the blocks of the teacher, and of copies made of it, repeat their forward pass in the backward one."""
    backbone: Any = getattr(teacher, "backbone", None)
    if not getattr(backbone, "_supports_gradient_checkpointing", False):
        found = type(teacher).__name__
        raise UserError("checkpointing", "needs a diffusers model that supports it", found, "Set it to false.")
    backbone.enable_gradient_checkpointing(checkpointed_block)


def _attend(networks: Networks, role: str, node: Any) -> None:
    """Compute the attention of one role's network by what `node` builds."""
    key = f"attention.{role}"
    if role not in networks or not isinstance(networks[role], Denoiser):
        legal = ", ".join(name for name in networks.roles if isinstance(networks[name], Denoiser))
        raise UserError(key, "must name a role with a network", role, f"This method has {legal}.")
    plain = OmegaConf.to_container(node) if OmegaConf.is_config(node) else node
    if plain is None:  # as diffusers does it
        return
    if not is_node(plain):
        fix = "Write {_target_: diffdistill.networks.attention.BlockSparse, mask: ...}."
        raise UserError(key, "must have a _target_ that builds an attention", repr(plain), fix)
    network = networks[role].network
    if not hasattr(network, "backbone"):
        raise UserError(key, "needs a diffusers network", type(network).__name__, "Leave it out.")
    try:
        set_attention(network.backbone, build(node), roles=(role,))
    except UserError as error:
        raise UserError(f"{key}.{error.key}", error.constraint, error.value, error.fix) from error


def _asked(part: Any) -> tuple[frozenset[str], Mapping[str, Role]]:
    """What the method needs and its roles; mistakes in its hyperparameters are told by their dotted key."""
    try:
        return part.func.needs(**part.keywords), part.func.roles(**part.keywords)
    except UserError as error:
        if error.key.startswith("distiller."):
            raise
        key = ", ".join(f"distiller.{name}" for name in error.key.split(", "))
        raise UserError(key, error.constraint, error.value, error.fix) from error


def _guidance(node: Any) -> tuple[float, tuple[float, float] | None]:
    """The scale and interval of a `guidance` node."""
    plain = OmegaConf.to_container(node) if OmegaConf.is_config(node) else dict(node)
    check_keywords(plain, _limits, "guidance")  # type: ignore[arg-type]
    return _limits(**{str(key): value for key, value in plain.items()})  # type: ignore[union-attr]


# what a scale of one's own is called by: how much is added to it for w, which is 1 without guidance
CONVENTIONS = {"full": 0.0, "added": 1.0}


def _limits(
    scale: float,
    interval: tuple[float, float] | None = None,
    convention: Literal["full", "added"] = "full",
) -> tuple[float, tuple[float, float] | None]:
    scale = scale + CONVENTIONS[convention]
    if interval is None:
        return float(scale), None
    low, high = (float(time) for time in interval)
    if not 0 <= low < high:
        fix = "Give two times of the teacher's process, the lower first."
        raise UserError("guidance.interval", "must be [low, high] with 0 <= low < high", [low, high], fix)
    return float(scale), (low, high)
