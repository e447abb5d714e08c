"""The shipped digits teacher: its card, its size, its tamed time embedding."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import diffdistill
from diffdistill.autodiff import jvp
from diffdistill.data import digit_scans
from diffdistill.denoiser import Denoiser
from diffdistill.networks.diffusers import unet2d
from diffdistill.process import VELOCITY, Trig
from diffdistill.rng import Rng

ASSET = Path(diffdistill.__file__).parent / "assets" / "digits"


def teacher() -> Denoiser:
    return Denoiser(unet2d("asset:digits", 0.5, 0.002, 20.0, has_null=True, tame=True).eval())


def test_the_card_belongs_to_the_weights_and_holds_the_promised_quality() -> None:
    card = json.loads((ASSET / "metrics.json").read_text())
    weights = (ASSET / "diffusion_pytorch_model.safetensors").read_bytes()
    assert card["weights_sha256"] == hashlib.sha256(weights).hexdigest()
    figures = card["figures"]
    assert card["protocol"]["num_samples"] == 10_000
    assert figures["nfe"] == 35
    assert figures["fd_pixel"] <= 0.06
    assert figures["label_agreement"] >= 0.98
    assert figures["coverage"] >= 0.95
    assert figures["precision"] >= 0.95
    assert figures["memorised"] <= 0.55


def test_the_folder_is_small_and_stock() -> None:
    names = {path.name for path in ASSET.iterdir()}
    assert names == {"config.json", "diffusion_pytorch_model.safetensors", "README.md", "metrics.json"}
    assert sum(path.stat().st_size for path in ASSET.iterdir()) <= 4e6
    assert json.loads((ASSET / "config.json").read_text())["_class_name"] == "UNet2DModel"


def tangent_parts(t_value: float, count: int = 256) -> tuple[float, float]:
    """Mean L2 norms of the time part and the state part of sin t cos t dF/dt along the PF-ODE, under TrigFlow."""
    view = teacher().under(Trig(sigma_data=0.5))
    rng = Rng(0, 0, "tangent", range(count))
    images, labels = digit_scans()
    x0, cond = images[:count], {"label": labels[:count]}
    t = torch.full((count,), t_value)
    x_t = view.process.add_noise(x0, rng.normal(tuple(x0.shape)), t)
    with torch.no_grad():
        velocity = view.predict(x_t, t, cond, VELOCITY)

    def raw(x: Tensor, time: Tensor) -> Tensor:
        return view.predict(x, time, cond, view.network.kind)

    still, rest = torch.zeros_like(x_t), torch.zeros_like(t)
    factor = torch.sin(t) * torch.cos(t)
    scale = factor.view(-1, 1, 1, 1)
    _, of_time = jvp(raw, (x_t, t), (still, factor))
    _, of_state = jvp(raw, (x_t, t), (scale * velocity, rest))
    return float(of_time.flatten(1).norm(dim=1).mean()), float(of_state.flatten(1).norm(dim=1).mean())


@pytest.mark.parametrize("t", [0.1, 0.5, 1.0, 1.3])
def test_the_time_part_of_the_tangent_is_of_the_size_of_the_state_part(t: float) -> None:
    time, state = tangent_parts(t)
    assert time <= 3 * state


@pytest.mark.parametrize("t", [1.4, 1.45, 1.5, 1.54])
def test_near_pure_noise_the_time_part_stays_at_what_an_accurate_network_needs(t: float) -> None:
    """F holds the noise with weight cos t, up to the sign, so d/dt moves it by sin t cos t |eps|, |eps| = 8 here: an
    accurate network cannot be tamer. (The exact denoiser of the scans themselves has 2.17, 1.64, 1.01, .44 here.)"""
    time, _ = tangent_parts(t)
    assert time <= max(1.0, 1.1 * 8 * math.cos(t))


if __name__ == "__main__":
    for t in (0.05, 0.1, 0.3, 0.5, 1.0, 1.3, 1.4, 1.5, 1.54):
        print(t, *tangent_parts(t))
