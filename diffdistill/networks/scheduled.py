"""What a diffusers scheduler says of the network it was saved with: its noise process, what it predicts, the times it
is fed and the shift of its grids. Nothing else of a scheduler is used: steps and grids are this package's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffdistill.errors import UserError
from diffdistill.process import EDM, EPS, VELOCITY, VP, X0, F, Kind, NoiseProcess, RectifiedFlow, Trig, V

_VP_KINDS: dict[str, Kind] = {"epsilon": EPS, "v_prediction": V, "sample": X0}
_FLOW = ("flow_prediction", "flow")
_BETAS = ("linear", "scaled_linear")


@dataclass(frozen=True)
class Schedule:
    """process, kind: of the network.  time_scale: it is fed this times t; None: ln(t) / 4, as EDM's networks are.

    shift: of flow grids.  dynamic: where the shift depends on the number of tokens, the config that says how.
    """

    process: NoiseProcess
    kind: Kind
    time_scale: float | None
    shift: float = 1.0
    dynamic: Mapping[str, Any] | None = None

    def time(self, t: Tensor) -> Tensor:
        """What the network's time embedding is fed, [B]."""
        return torch.log(t) / 4 if self.time_scale is None else self.time_scale * t

    def scale(self, t: Tensor) -> Tensor:
        """What the state is multiplied by before the network sees it, [B]."""
        if isinstance(self.process, EDM) and isinstance(self.kind, F):
            return torch.rsqrt(t.square() + self.kind.sigma_data**2)
        return torch.ones_like(t)

    def shift_for(self, tokens: int) -> float:
        """The shift of a flow grid for a sample of this many tokens (Esser et al. 2024, arXiv:2403.03206, 5.3.2)."""
        if self.dynamic is None:
            return self.shift
        few, many = self.dynamic.get("base_image_seq_len", 256), self.dynamic.get("max_image_seq_len", 4096)
        low, high = self.dynamic.get("base_shift", 0.5), self.dynamic.get("max_shift", 1.15)
        mu = low + (high - low) * (tokens - few) / (many - few)
        return math.exp(mu) if self.dynamic.get("time_shift_type", "exponential") == "exponential" else mu


def schedule_of(config: Mapping[str, Any]) -> Schedule:
    """The schedule of a scheduler's config (scheduler_config.json), by its class name and fields.

    Raises UserError for a scheduler whose noise this package has no process for.
    """
    name = str(config.get("_class_name", ""))
    if name.startswith("FlowMatch") or config.get("prediction_type") in _FLOW or config.get("use_flow_sigmas"):
        if config.get("invert_sigmas"):
            raise UserError("scheduler.invert_sigmas", "must be false", True, "Flows that run from noise at 0 are not.")
        dynamic = config if config.get("use_dynamic_shifting") else None
        shift = config.get("shift") or config.get("flow_shift") or 1.0
        return Schedule(
            RectifiedFlow(), VELOCITY, float(config.get("num_train_timesteps", 1000)), float(shift), dynamic
        )
    if name == "CosineDPMSolverMultistepScheduler":
        return _angular(config)
    if name in ("EDMDPMSolverMultistepScheduler", "EDMEulerScheduler"):
        if (kind := config.get("prediction_type", "epsilon")) != "epsilon":
            raise UserError(
                "scheduler.prediction_type", "must be epsilon in an EDM scheduler", kind, "Mend its config."
            )
        process = EDM.between(float(config["sigma_min"]), float(config["sigma_max"]))
        return Schedule(process, F(float(config.get("sigma_data", 0.5))), None)
    if "beta_start" in config:
        return _variance_preserving(config)
    fix = "Give the pipeline the scheduler it was trained with: DDIM, DDPM or FlowMatchEuler, say."
    raise UserError("scheduler", "must tell betas or a flow", name or "no class", fix)


def _angular(config: Mapping[str, Any]) -> Schedule:
    """v-prediction by EDM's scalings at sigma_data: on the circle alpha = cos t, sigma = sigma_data sin t."""
    kind = config.get("prediction_type", "epsilon")
    sigma_data = float(config.get("sigma_data", 0.5))
    if kind != "v_prediction" or sigma_data != 1.0:
        found = f"{kind} at sigma_data {sigma_data:g}"
        raise UserError("scheduler", "must predict v at sigma_data 1", found, "No other cosine one is known here.")
    ends = math.atan(float(config["sigma_min"])), math.atan(float(config["sigma_max"]))
    return Schedule(Trig(*ends, sigma_data=1.0), V, 2 / math.pi)


def _variance_preserving(config: Mapping[str, Any]) -> Schedule:
    betas = config.get("beta_schedule", "linear")
    if betas not in _BETAS:
        raise UserError("scheduler.beta_schedule", f"must be one of {_BETAS}", betas, "No other one is known here.")
    if config.get("trained_betas") is not None:
        raise UserError("scheduler.trained_betas", "must be null", "a table", "Give beta_start and beta_end.")
    kind = config.get("prediction_type", "epsilon")
    if kind not in _VP_KINDS:
        raise UserError("scheduler.prediction_type", f"must be one of {sorted(_VP_KINDS)}", kind, "Mend its config.")
    num_steps = int(config.get("num_train_timesteps", 1000))
    process = VP(
        t_max=num_steps - 1.0,
        beta_start=float(config["beta_start"]),
        beta_end=float(config["beta_end"]),
        schedule=betas,
        num_steps=num_steps,
        zero_terminal_snr=bool(config.get("rescale_betas_zero_snr", False)),
        snr_shift=float(config.get("snr_shift_scale", 1.0)),
    )
    if process.zero_terminal_snr and kind == "epsilon":
        fix = "Set prediction_type=v_prediction if that is what it was trained with."
        raise UserError("scheduler.prediction_type", "must be v_prediction or sample at zero terminal SNR", kind, fix)
    return Schedule(process, _VP_KINDS[kind], 1.0)
