"""From a checked configuration to the objects of a run: data, networks and the method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from diffdistill.config import build
from diffdistill.data import Data
from diffdistill.distillers.base import Distiller
from diffdistill.errors import UserError
from diffdistill.networks.diffusers import UNet2D
from diffdistill.networks.roles import Networks
from diffdistill.rng import Rng
from diffdistill.solvers import OdeSampler


@dataclass(frozen=True)
class Recipe:
    """What a configuration builds. needs: what the method asks of data and teacher. sampler: the teacher's."""

    data: Data
    networks: Networks
    distiller: Distiller
    needs: frozenset[str]
    sampler: OdeSampler


def assemble(settings: Mapping[str, Any], device: torch.device | str = "cpu") -> Recipe:
    """Build data, networks and the method of a train configuration, and check that they fit each other.

    Raises UserError if the method needs what data or teacher lack.
    """
    data: Data = build(settings["data"])
    if torch.device(device).type == "meta":
        with torch.device("meta"):
            teacher = build(settings["networks"])
    else:
        teacher = build(settings["networks"]).to(device)
    if isinstance(teacher, UNet2D):
        teacher.check(data.shape, data.num_classes)
    part = build(settings["distiller"])
    needs, roles = part.func.needs(**part.keywords), part.func.roles(**part.keywords)
    has = data.provides | ({"null"} if teacher.null is not None else set()) | {"jvp"}
    if missing := sorted(needs - has):
        given = f"data={data.name}, which provides {sorted(has)}"
        fix = "Change one."
        if missing == ["null"]:
            fix = "The network has no null condition: distiller.null_share=0 trains without one."
        raise UserError("distiller", f"needs {', '.join(missing)}", given, fix)
    guidance = settings["guidance"]
    interval = guidance.get("interval")
    example = {"label": torch.zeros(1, dtype=torch.int64, device=device)} if data.num_classes else {}
    with torch.random.fork_rng(devices=[]):
        # heads and adapters are drawn from torch's own generator: the run's seed decides them too
        torch.manual_seed(Rng(int(settings["trainer"]["seed"]), phase="networks").torch_seed())
        networks = Networks(
            teacher,
            roles,
            data.shape,
            example,
            modes=dict(settings["roles"]),
            lora=build(settings["lora"]),
            guidance_scale=float(guidance["scale"]),
            guidance_interval=None if interval is None else (float(interval[0]), float(interval[1])),
        )
    distiller = build(settings["distiller"], networks=networks)
    sampler = build(settings["sampler"])(networks["teacher"])
    return Recipe(data, networks, distiller, needs, sampler)
