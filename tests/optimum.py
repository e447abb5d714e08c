"""Sets every role of a distiller on `networks=gauss` to its optimum, or away from it, by the student's type."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.config import build, compose
from diffdistill.denoiser import Denoiser, FlowMap, SignalMap
from diffdistill.distillers.base import Distiller
from diffdistill.distillers.guidance.scales import UniformScale
from diffdistill.generator import Generator
from diffdistill.networks.exact import Form
from diffdistill.pairs import PairSource, with_pairs
from diffdistill.recipe import Recipe, assemble
from diffdistill.solvers import OdeSampler
from diffdistill.trajectories import TrajectorySource, with_trajectories

MEAN, STD = "[[0.7,-0.4,0.1,0.0,-1.0,0.3]]", "[[1.3,0.8,1.0,0.6,0.9,1.1]]"

# One line per student type: what the student of such a generator has to compute.
FORMS: dict[str, Form] = {
    "ode sampler": "denoiser",
    "one-step denoiser": "generator",
    "consistency": "flow_map",
    "average": "average",
    "signal map": "signal",
}


def student_type(distiller: Distiller) -> str:
    """Which row of FORMS a distiller's student belongs to."""
    generator = distiller.generator
    if isinstance(generator, OdeSampler):
        return "ode sampler"
    assert isinstance(generator, Generator)
    student = generator.student
    if isinstance(student, FlowMap):
        return student.head
    if isinstance(student, SignalMap):
        return "signal map"
    assert isinstance(student, Denoiser)
    return "average" if "s" in dict(student.inputs) else "one-step denoiser"


def gauss_recipe(name: str, *overrides: str) -> Recipe:
    """A distiller config on the trainable Gaussian, its student computing what its type asks for."""
    # several coordinates: per-sample normalisers such as 1 / mean|x0 - D| have no variance in one dimension
    law = [f"{where}.{key}={value}" for where in ("networks", "data") for key, value in (("mean", MEAN), ("std", STD))]
    base = ["data=gauss", f"distiller={name}", "experiment=none", "evaluation=none", "run_dir=none", *law, *overrides]
    recipe = assemble(compose("train", [*base, *plain(base)]))  # type: ignore[arg-type]
    form = FORMS[student_type(recipe.distiller)]
    for role in recipe.networks.owned:
        if role.startswith("student"):  # its averages compute what it computes
            recipe.networks[role].network.form = form
    return joined(recipe, 4096)


def joined(recipe: Recipe, num: int) -> Recipe:
    """The recipe with the pairs or trajectories that its method needs."""
    if "pair" in recipe.needs:
        return with_pairs(recipe, PairSource(num, 0, num, None).make(recipe))
    if "trajectory" in recipe.needs:
        return with_trajectories(recipe, TrajectorySource(num, 8, UniformScale(1.0, 1.0), 0, num, None).make(recipe))
    return recipe


def plain(words: list[str]) -> list[str]:
    """Overrides that take away what moves a method's optimum or hides it: null conditions, which one Gaussian lacks,
    GANs, regressions on pairs of a solver, ramps, learned weights; that give it the exact ratio; and that train copies,
    which a Gaussian is."""
    node = compose("train", words).distiller
    parts = {f"distiller.parts.{name}": part for name, part in node.get("parts", {}).items()} or {"distiller": node}
    off = {
        "scales": "null",
        "warmup": 0,
        "points": 4,
        "adaptive": "false",
        "mismatched": "false",
        "null_share": 0,
        "gan_weight": 0,
        "critic_gan_weight": 0,
        "regression_weight": 0,
        "r1_weight": 0,
    }
    given = {word.split("=")[0] for word in words}
    found = [f"{p}.{k}={v}" for p, n in parts.items() for k, v in off.items() if k in n and f"{p}.{k}" not in given]
    if "known_ratio" in node:
        target = "{_target_: diffdistill.networks.exact.gaussian_log_ratio, _partial_: true}"
        found.append(f"distiller.known_ratio={target}")
    part = build(compose("train", [*words, *found]).distiller)
    roles = part.func.roles(**part.keywords)
    return [*found, *(f"roles.{name}=copy" for name, role in roles.items() if role.modes[0] != "copy")]


def place(recipe: Recipe, mean_off: float = 0.0, std_factor: float = 1.0) -> dict[str, Tensor]:
    """Put the student at (mean + mean_off, std * std_factor) and every critic at the optimum for that student.

    0 and 1 is the optimum. Returns the data's mean and std.
    """
    teacher = recipe.networks.teacher
    with torch.no_grad():
        for role in recipe.networks.owned:
            module: Any = recipe.networks[role]
            if isinstance(module, nn.Module):  # heads, scalars: no opinion
                for parameter in module.parameters():
                    parameter.zero_()
                continue
            follows = role == "student" or role.startswith(("fake_score", "student"))
            module.network.mean.copy_(teacher.mean + (mean_off if follows else 0.0))
            module.network.std.copy_(teacher.std * (std_factor if follows else 1.0))
    return {"mean": teacher.mean.detach().clone(), "std": teacher.std.detach().clone()}
