"""Peak of live tensor bytes of real training steps beside what a plan of them says: `python tests/planned.py`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table

from diffdistill.config import build, compose
from diffdistill.recipe import assemble_parts
from diffdistill.rehearsal import rehearse
from diffdistill.shapes_only import ACTIVATIONS
from diffdistill.stand_in import StandIn
from diffdistill.trainer import Progress, Trainer

LORA = ("roles.student=lora", "roles.fake_score=lora")
UNET = {
    "sample_size": 32, "in_channels": 3, "out_channels": 3, "block_out_channels": [64, 128, 256],
    "layers_per_block": 2, "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"], "norm_num_groups": 32,
    "attention_head_dim": 32,
}  # fmt: skip
WAN = {
    "patch_size": [1, 2, 2], "num_attention_heads": 4, "attention_head_dim": 64, "in_channels": 4, "out_channels": 4,
    "text_dim": 64, "freq_dim": 64, "ffn_dim": 1024, "num_layers": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """words: of train.  network: a network to take the configuration's place, with data of its shapes."""

    name: str
    words: tuple[str, ...]
    network: str | None = None


def cases() -> list[Case]:
    found = []
    for mode, more in (("copy", ()), ("lora", LORA)):
        for name in ("digits", "gmm2d", "shapes_t2i"):
            words = (f"data={name}", "experiment=none", "distiller=dmd2", *more)
            found.append(Case(f"{name} dmd2 {mode}", words))
        for name in ("unet", "transformer"):
            found.append(Case(f"{name} dmd2 {mode}", ("data=gmm2d", "experiment=none", "distiller=dmd2", *more), name))
        checkpointed = ("data=gmm2d", "experiment=none", "distiller=dmd2", "checkpointing=true", *more)
        found.append(Case(f"transformer checkpointed dmd2 {mode}", checkpointed, "transformer"))
    for method in ("sid", "scm", "consistency", "f_distill", "mean_flow"):
        found.append(Case(f"digits {method}", ("data=digits", "experiment=none", f"distiller={method}")))
    return found


def parts(case: Case, settings: Any) -> tuple[Any, Any]:
    """Data and network on the default device."""
    if case.network is None:
        return build(settings.data), build(settings.networks)
    if case.network == "unet":
        from diffusers import UNet2DModel

        from diffdistill.networks.diffusers import UNet2D

        return StandIn((3, 32, 32), {}), UNet2D(UNet2DModel(**UNET), 0.5, 0.002, 80.0, has_null=False)
    from diffusers import WanTransformer3DModel

    from diffdistill.networks.families.video import WanVideo
    from diffdistill.networks.scheduled import Schedule
    from diffdistill.process import VELOCITY, RectifiedFlow

    schedule = Schedule(RectifiedFlow(), VELOCITY, 1000.0)
    network = WanVideo(WanTransformer3DModel(**WAN), schedule)
    return StandIn((4, 2, 32, 32), network.asked()), network


def settings_of(case: Case) -> Any:
    words = [*case.words, "evaluation=none", "run_dir=none", "trainer.batch_size=4", "precision=fp32"]
    if case.network == "transformer":  # a flow's ratio of noise to signal has no bound
        law = "{_target_: diffdistill.times.UniformTime, low: 0.02, high: 0.98}"
        words += ["networks=wan", "networks.path=none"]
        words += [f"distiller.{name}_law={law}" for name in ("student", "critic", "gan")]
    return compose("train", words)


def measured(case: Case) -> int:
    """Peak of live tensor bytes of a real step."""
    settings = settings_of(case)
    recipe = assemble_parts(settings, *parts(case, settings))
    trainer: Trainer = build(settings.trainer)
    trainer.steps = 100
    state = trainer.start(recipe.distiller, recipe.networks)
    fullest = trainer.measured(recipe.distiller)
    for step in (0, fullest):  # optimizers hold their state after the first
        state.step = step
        once = Progress(lambda *_: None, lambda _: None, lambda _: None, lambda: True)
        trainer.fit(state, recipe.data, recipe.needs, Accelerator(cpu=True), once)
    return state.peak_bytes


def predicted(case: Case) -> tuple[float, float]:
    """The same as planned, and of it what weights and optimizers take."""
    settings = settings_of(case)
    with torch.device("meta"):
        network = parts(case, settings)[1]
    data = parts(case, settings)[0] if case.network is None else StandIn(*_shapes(case, settings))
    found = rehearse(settings, data, network, devices=1, lowered=False)
    return found.bytes, found.bytes - found.peak[ACTIVATIONS]


def _shapes(case: Case, settings: Any) -> tuple[Any, Any]:
    with torch.device("meta"):
        data = parts(case, settings)[0]
    return data.shape, data.sizes


def main(names: Sequence[str]) -> None:
    table = Table("case", "measured MiB", "planned MiB", "planned / measured", "held, not activations")
    for case in cases():
        if names and not any(name in case.name for name in names):
            continue
        real, (plan, held) = measured(case), predicted(case)
        row = (f"{real / 2**20:.2f}", f"{plan / 2**20:.2f}", f"{plan / real:.3f}", f"{held / plan:.0%}")
        table.add_row(case.name, *row)
    Console().print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
