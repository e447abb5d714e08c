"""The stock scheduler that makes a sampler's steps, for models of diffusers' families.

Flows are stepped by FlowMatchEulerDiscreteScheduler at the sampler's own times. Of variance preserving processes there
are three: EulerDiscreteScheduler is DDIM from the noise that the process holds at the first time; LCMScheduler goes on
from the predicted x0 and new noise, TCDScheduler from the predicted x at t_min, both from unit noise. A model of many
steps keeps the scheduler of its pipeline.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from diffdistill.denoiser import Denoiser, FlowMap
from diffdistill.errors import UserError
from diffdistill.generator import Generator, ddim, fresh, fresh_from_t_min
from diffdistill.networks.families.folder import SCHEDULER, whole_folder
from diffdistill.networks.families.stock import Stock
from diffdistill.process import EPS, VP, X0, RectifiedFlow, V
from diffdistill.solvers import OdeSampler, Sampler
from diffdistill.solvers import ddim as ddim_step

TIME_TOLERANCE = 1e-5
LCM_SCALING = 1e4  # its boundary scalings mix the input in unless this is large
_KINDS = {EPS: "epsilon", V: "v_prediction", X0: "sample"}


@dataclass(frozen=True)
class Stepped:
    """scheduler, and call: keywords of the pipeline's call that make the steps. The pipeline's latents are `after`
    times the sampler's own, from noise that is `before` times it."""

    scheduler: Any
    call: dict[str, Any]
    before: float = 1.0
    after: float = 1.0


def stepped(network: Stock, sampler: Sampler, pipeline: str) -> Stepped:
    """How the pipeline of `network` (at `pipeline`, a folder or hub id) makes the sampler's steps.

    Raises UserError where no stock scheduler does.
    """
    if isinstance(sampler, OdeSampler):
        return _many(network, sampler, pipeline)
    if not isinstance(sampler, Generator):
        raise UserError("export", "needs a student of few steps", type(sampler).__name__, "Keep the run.")
    if not isinstance(sampler.student, Denoiser | FlowMap):
        found = type(sampler.student).__name__
        raise UserError("export", "needs a student that predicts as its teacher does", found, "Keep the run.")
    if isinstance(network.process, RectifiedFlow):
        _check_steps(sampler, "ddim")
        return _flow(network, sampler.times)
    return _variance_preserving(network, sampler)


def _check_steps(sampler: Generator, renoise: str) -> None:
    """Refuse several steps that re-noise otherwise, or of a map, and noise of another size."""
    several = len(sampler.times) > 1
    if several and not isinstance(sampler.student, Denoiser):
        found = type(sampler.student).__name__
        raise UserError("export", "needs one step of a student that is a map", found, "Keep the run.")
    if several and sampler.renoise is not ddim:
        name = str(getattr(sampler.renoise, "__name__", sampler.renoise))
        fix = f"Set {renoise}, or use one step."
        raise UserError("distiller.renoise", "must be one that stock schedulers know", name, fix)
    if sampler.prior_std is not None:
        fix = "The scheduler begins with the process's own noise."
        raise UserError("distiller.prior_std", "must be null", sampler.prior_std, fix)


def _flow(network: Stock, times: tuple[float, ...]) -> Stepped:
    from diffusers import FlowMatchEulerDiscreteScheduler

    call: dict[str, Any] = {"num_inference_steps": len(times)}
    if network.grid == "sigmas":
        return Stepped(FlowMatchEulerDiscreteScheduler(), {**call, "sigmas": list(times)})
    if network.grid != "":
        raise _no_grid(network)
    scheduler = flow_scheduler(times)
    scheduler.set_timesteps(len(times))
    for time, nearest in zip(times, scheduler.sigmas.tolist(), strict=False):
        if not abs(time - nearest) <= TIME_TOLERANCE * max(1.0, abs(nearest)):
            constraint = "must lie on a grid of FlowMatchEulerDiscreteScheduler"
            raise UserError("distiller.times", constraint, time, f"The nearest is {nearest:.8g}.")
    return Stepped(scheduler, call)


def flow_scheduler(times: Sequence[float]) -> Any:
    """FlowMatchEulerDiscreteScheduler whose grid for len(times) steps is `times`, decreasing from 1, then 0.

    Two of its numbers bend its equal steps: shift, and shift_terminal, where it stretches the last time to. Together
    they give every grid that a fractional linear map makes of equal steps, `solvers.flow_shift`'s among them; for
    others the scheduler's grid differs, which the caller has to look at.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler
    from scipy.optimize import brentq  # a tenth of what importing `train` takes

    if len(times) == 1:
        return FlowMatchEulerDiscreteScheduler()
    first, last = times[1], times[-1]
    step, rest = 1 / (len(times) - 1), (1 - first) / (1 - last)
    bend = 0.0 if len(times) == 2 else (step - rest) / (step * (1 - rest))

    def gap(shift: float) -> float:
        lowest = 0.001 * shift / (1 + (shift - 1) * 0.001)  # of the scheduler's own 1,000 times, shifted once already
        return (shift - 1) * (1 - lowest) / shift - bend

    most = 31.0  # beyond it the second shift of `lowest` bends the grid back
    shift = brentq(gap, 1e-3, most) if gap(1e-3) < 0 < gap(most) else 1.0
    return FlowMatchEulerDiscreteScheduler(shift=shift, shift_terminal=last)


def _variance_preserving(network: Stock, sampler: Generator) -> Stepped:
    from diffusers import EulerDiscreteScheduler, LCMScheduler, TCDScheduler

    process, times = network.process, sampler.times
    if network.grid != "timesteps":
        raise _no_grid(network)
    if not isinstance(process, VP) or process.snr_shift != 1:
        raise UserError(
            "export", "needs a noise process that stock schedulers step here", process, "Its run holds the weights."
        )
    if not all(float(time).is_integer() for time in times):
        raise UserError("distiller.times", "must be whole timesteps, which the pipeline is told", times, "Round them.")
    call = {"num_inference_steps": len(times), "timesteps": [int(time) for time in times]}
    config = _config(network, process)
    is_map = isinstance(sampler.student, FlowMap)
    again = fresh_from_t_min if is_map else fresh
    if sampler.prior_std == 1.0 and (len(times) == 1 or sampler.renoise is again):
        every = {"original_inference_steps": process.num_steps, "clip_sample": False, "set_alpha_to_one": False}
        if is_map:
            return Stepped(TCDScheduler(**config, **every), {**call, "eta": 1.0})
        return Stepped(LCMScheduler(**config, **every, timestep_scaling=LCM_SCALING), call)
    renoise = f"{again.__name__} with distiller.prior_std=1" + ("" if is_map else ", or ddim with null")
    _check_steps(sampler, renoise)
    if process.zero_terminal_snr:
        fix = "Set distiller.prior_std=1."
        raise UserError("export", "needs a noise process that EulerDiscreteScheduler steps", process, fix)
    if is_map:  # it ends at t_min, which this scheduler counts in units of alpha
        alpha = process.alpha_sigma(torch.tensor([process.t_min], dtype=torch.float64))[0]
        return Stepped(EulerDiscreteScheduler(**config, final_sigmas_type="sigma_min"), call, after=1 / float(alpha))
    return Stepped(EulerDiscreteScheduler(**config), call)


def _config(network: Stock, process: VP) -> dict[str, Any]:
    return {
        "num_train_timesteps": process.num_steps,
        "beta_start": process.beta_start,
        "beta_end": process.beta_end,
        "beta_schedule": process.schedule,
        "prediction_type": _KINDS[network.kind],
        "timestep_spacing": "trailing",
        "rescale_betas_zero_snr": process.zero_terminal_snr,
    }


def _no_grid(network: Stock) -> UserError:
    fix = "Its run holds the weights; sample it with run=DIR."
    return UserError("export", "needs a pipeline whose call takes the student's grid", network.model_class, fix)


def _many(network: Stock, sampler: OdeSampler, pipeline: str) -> Stepped:
    """Steps of the pipeline's own scheduler, which begins from unit noise."""
    import diffusers

    if sampler.solver is not ddim_step or sampler.denoiser.guidance is not None:
        found = "guidance" if sampler.denoiser.guidance is not None else getattr(sampler.solver, "__name__", "another")
        raise UserError("sampler.solver", "must be ddim, without guidance, for a pipeline", found, "Set it.")
    if isinstance(network.process, RectifiedFlow):
        return _flow(network, sampler.times[:-1])
    config = json.loads((whole_folder(pipeline, (SCHEDULER, "model_index.json")) / SCHEDULER).read_text())
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    scheduler.set_timesteps(len(sampler.times) - 1)
    wanted = [float(time) for time in scheduler.timesteps]
    ends = config["_class_name"] == "DDIMScheduler" and not config.get("set_alpha_to_one", True)
    if not ends or list(sampler.times[:-1]) != wanted:
        fix = "Give it a DDIMScheduler with timestep_spacing trailing and set_alpha_to_one false, and use that grid."
        raise UserError("sampler.grid", "must be that of the pipeline's own DDIMScheduler", config["_class_name"], fix)
    first = torch.tensor([sampler.times[0]], dtype=torch.float64)
    return Stepped(
        scheduler, {"num_inference_steps": len(wanted)}, before=1 / float(network.process.alpha_sigma(first)[1])
    )
