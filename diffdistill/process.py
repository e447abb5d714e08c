"""Noise processes, prediction kinds and change of process: the only place that computes alpha x0 + sigma eps.

x_t = alpha(t) x0 + sigma(t) eps with eps ~ N(0, I). Every prediction a network can make is a row (a, b) with
pred = a x0 + b eps; together with x_t = alpha x0 + sigma eps that is a 2x2 system, and every conversion solves it.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from diffdistill.autodiff import jvp, transforms
from diffdistill.errors import UserError, require_positive


def wide(dtype: torch.dtype) -> torch.dtype:
    """What times, scales and losses of states of `dtype` are computed in: float32 at least."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def expand(t: Tensor, x: Tensor) -> Tensor:
    """Per-sample values t [B] shaped to broadcast over x [B, ...], in x's dtype but at least float32."""
    own, shape = t.shape, x.shape
    if len(own) != 1 or own[0] != shape[0]:
        raise ValueError(f"per-sample values must have shape [{shape[0]}], got {tuple(own)}.")
    return t.to(wide(x.dtype)).view(-1, *[1] * (len(shape) - 1))


def _held(t: Tensor, low: float, high: float) -> Tensor:
    """t held within [low, high]; its derivative passes, for rounding beyond an end must not stop a tangent there."""
    inside = t.clamp(low, high)
    return inside.detach() + (t - t.detach()) if t.requires_grad or transforms() else inside


@dataclass(frozen=True)
class NoiseProcess(ABC):
    """x_t = alpha(t) x0 + sigma(t) eps for t in [t_min, t_max]; the angle atan2(sigma, alpha) increases with t.

    A subclass writes `alpha_sigma`; closed `rates` and `time_at` are welcome, autodiff and bisection the default.
    """

    t_min: float
    t_max: float

    def __post_init__(self) -> None:
        if not 0 <= self.t_min < self.t_max < float("inf"):
            raise UserError(
                "t_min, t_max", "must satisfy 0 <= t_min < t_max", (self.t_min, self.t_max), "Set t_min below t_max."
            )

    @abstractmethod
    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and noise scale at t [B]; two tensors [B] in t's dtype."""

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Time derivatives alpha'(t), sigma'(t), each [B]."""
        return jvp(self.alpha_sigma, (t,), (torch.ones_like(t),))[1]

    def angle(self, t: Tensor) -> Tensor:
        """phi = atan2(sigma, alpha) in [0, pi/2], [B]: what two processes of one ODE share."""
        alpha, sigma = self.alpha_sigma(t)
        return torch.atan2(sigma, alpha)

    def time_at(self, phi: Tensor) -> Tensor:
        """The t in [t_min, t_max] whose angle is phi [B]; angles outside the range give its ends.

        Found in float64, then one Newton step that carries phi's derivative.
        """
        with torch.no_grad():
            t0 = self._near(phi.detach().double())
            slope = self.angle_rate(t0).to(phi.dtype)
            residual_free = self.angle(t0).to(phi.dtype)
        return _held(t0.to(phi.dtype) + (phi - residual_free) / slope, self.t_min, self.t_max)

    def angle_rate(self, t: Tensor) -> Tensor:
        """The angle's time derivative, [B]."""
        (alpha, sigma), (d_alpha, d_sigma) = self.alpha_sigma(t), self.rates(t)
        return (alpha * d_sigma - sigma * d_alpha) / (alpha.square() + sigma.square())

    def _near(self, phi: Tensor) -> Tensor:
        """The time of an angle in float64, without its derivative, by bisection."""
        low, high = torch.full_like(phi, self.t_min), torch.full_like(phi, self.t_max)
        for _ in range(60):
            middle = (low + high) / 2
            above = self.angle(middle) > phi
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        return (low + high) / 2

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha(t) x0 + sigma(t) eps, [B, ...]."""
        alpha, sigma = self.alpha_sigma(t)
        return expand(alpha, x0) * x0 + expand(sigma, x0) * eps

    def diffuse(self, x_s: Tensor, s: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Noise x_s from s to t >= s: mean (alpha_t/alpha_s) x_s, variance sigma_t^2 - (alpha_t sigma_s/alpha_s)^2.

        x_s, eps: [B, ...]; s, t: [B]. alpha_s must not be 0.
        """
        alpha_s, sigma_s = self.alpha_sigma(s)
        alpha_t, sigma_t = self.alpha_sigma(t)
        ratio = alpha_t / alpha_s
        spread = (sigma_t.square() - (ratio * sigma_s).square()).clamp(min=0).sqrt()
        return expand(ratio, x_s) * x_s + expand(spread, x_s) * eps

    def denoising_target(self, x_s: Tensor, s: Tensor, t: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """g and g y for x_t = diffuse(x_s, s, t, eps), where E[y | x_t] = E[x0 | x_t] whatever the law of x_s.

        y = x_s/alpha_s - (alpha_t sigma_s^2 / (alpha_s^2 g)) eps, g = the std of the added noise, [B]; g y [B, ...]
        stays finite as t nears s. At s with sigma_s = 0, y is x_s/alpha_s. By Tweedie's formula through p(x_t | x_s):
        Phased DMD, arXiv:2510.27684.
        """
        alpha_s, sigma_s = self.alpha_sigma(s)
        alpha_t, sigma_t = self.alpha_sigma(t)
        ratio = alpha_t / alpha_s
        spread = (sigma_t.square() - (ratio * sigma_s).square()).clamp(min=0).sqrt()
        kept = ratio * sigma_s.square() / alpha_s
        return spread, expand(spread / alpha_s, x_s) * x_s - expand(kept, x_s) * eps

    def jump(self, x_t: Tensor, x0: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The point at s with the same x0 and eps: (sigma_s/sigma_t) x_t + (alpha_s - alpha_t sigma_s/sigma_t) x0.

        Exact along the PF-ODE while the prediction x0 is constant (DDIM). s == t gives x_t.
        """
        alpha_t, sigma_t = self.alpha_sigma(t)
        alpha_s, sigma_s = self.alpha_sigma(s)
        ratio = torch.where(t == s, torch.ones_like(sigma_t), sigma_s / sigma_t)  # 0 / 0 where both are clean
        return expand(ratio, x_t) * x_t + expand(alpha_s - alpha_t * ratio, x_t) * x0

    def convert(self, pred: Tensor, x_t: Tensor, t: Tensor, source: Kind, target: Kind) -> Tensor:
        """Prediction `pred` of kind `source` at (x_t, t), expressed as kind `target`.

        pred, x_t: [B, ...]; t: [B]. Computed in float32 at least, in float64 if x_t is.
        """
        dtype = wide(x_t.dtype)
        pred, x_t, t = pred.to(dtype), x_t.to(dtype), t.to(dtype)
        if source == target:
            return pred
        if target == X0:
            c_x, c_pred = source.x0_from(self, t)
            return expand(c_x, x_t) * x_t + expand(c_pred, x_t) * pred
        alpha, sigma = self.alpha_sigma(t)
        a, b = source.row(self, t)
        a_out, b_out = target.row(self, t)
        det = alpha * b - sigma * a
        # a_out x0 + b_out eps with both unknowns replaced by their 2x2 solution
        from_x = (a_out * b - b_out * a) / det
        from_pred = (b_out * alpha - a_out * sigma) / det
        return expand(from_x, x_t) * x_t + expand(from_pred, x_t) * pred

    def match(self, other: NoiseProcess, t: Tensor) -> tuple[Tensor, Tensor]:
        """Where this process's (x_t, t) lies in `other`: its time [B] and the factor [B] on the state.

        The same (x0, eps) direction has the same angle in both; the state scales with sqrt(alpha^2 + sigma^2).
        """
        alpha, sigma = self.alpha_sigma(t)
        t_other = other.time_at(torch.atan2(sigma, alpha))
        alpha_o, sigma_o = other.alpha_sigma(t_other)
        return t_other, torch.hypot(alpha_o, sigma_o) / torch.hypot(alpha, sigma)

    def clipped_to(self, other: NoiseProcess) -> NoiseProcess:
        """This process restricted to the noise levels that `other` covers."""
        ends = torch.tensor([other.t_min, other.t_max], dtype=torch.float64)
        low, high = self.time_at(other.angle(ends)).tolist()
        return replace(self, t_min=max(low, self.t_min), t_max=min(high, self.t_max))

    def check_times(self, key: str, times: tuple[float, ...]) -> None:
        """Refuse a grid that does not decrease strictly within (t_min, t_max]."""
        inside = all(self.t_min < t <= self.t_max for t in times)
        if not times or not inside or any(a <= b for a, b in itertools.pairwise(times)):
            raise UserError(
                key,
                f"must decrease within (t_min, t_max] = ({self.t_min:g}, {self.t_max:g}]",
                tuple(times),
                "Give times of the teacher's process, largest first.",
            )


@dataclass(frozen=True)
class EDM(NoiseProcess):
    """Variance exploding: alpha = 1, sigma = t. Karras et al. 2022, arXiv:2206.00364."""

    t_min: float = 0.002
    t_max: float = 80.0

    @classmethod
    def between(cls, sigma_min: float, sigma_max: float) -> EDM:
        """The process of a network that was trained on noise levels sigma_min to sigma_max."""
        if not 0 < sigma_min < sigma_max < float("inf"):
            raise UserError(
                "sigma_min, sigma_max", "must satisfy 0 < sigma_min < sigma_max", (sigma_min, sigma_max), "Mend them."
            )
        return cls(sigma_min, sigma_max)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), t

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(t), torch.ones_like(t)

    def time_at(self, phi: Tensor) -> Tensor:
        # cos(pi/2) in floating point may be negative, and a tangent would come back as t_min
        return _held(torch.sin(phi) / torch.cos(phi).clamp(min=1e-9), self.t_min, self.t_max)


@dataclass(frozen=True)
class RectifiedFlow(NoiseProcess):
    """alpha = 1 - t, sigma = t on [0, 1]. Liu et al. 2022, arXiv:2209.03003.

    shift: of the grids its network was made for (`solvers.flow_shift`); the process itself does not depend on it.
    """

    t_min: float = 0.0
    t_max: float = 1.0
    shift: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(shift=self.shift)
        if self.t_max > 1:
            raise UserError("t_max", "must be <= 1", self.t_max, "There alpha is 0.")

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, t

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return -torch.ones_like(t), torch.ones_like(t)

    def time_at(self, phi: Tensor) -> Tensor:
        sin, cos = torch.sin(phi), torch.cos(phi)
        return _held(sin / (sin + cos), self.t_min, self.t_max)


@dataclass(frozen=True)
class Trig(NoiseProcess):
    """TrigFlow: alpha = cos t, sigma = sigma_data sin t on [0, pi/2]. Lu & Song 2024, arXiv:2410.11081."""

    t_min: float = 0.0
    t_max: float = float(np.pi / 2)
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(sigma_data=self.sigma_data)
        if self.t_max > float(np.pi / 2):
            raise UserError("t_max", "must be <= pi/2", self.t_max, "There alpha is 0.")

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cos(t), self.sigma_data * torch.sin(t)

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return -torch.sin(t), self.sigma_data * torch.cos(t)

    def time_at(self, phi: Tensor) -> Tensor:
        return _held(torch.atan2(torch.sin(phi), self.sigma_data * torch.cos(phi)), self.t_min, self.t_max)


@dataclass(frozen=True)
class VP(NoiseProcess):
    """Variance preserving with DDPM's betas; t is the (real-valued) index 0 .. num_steps - 1.

    log(alpha_bar) is interpolated by a cubic through the table, so integers give exactly DDPM's values and the
    derivative is continuous. Ho et al. 2020, arXiv:2006.11239.

    snr_shift: the signal-to-noise ratio alpha^2 / sigma^2 is divided by it (CogVideoX, arXiv:2408.06072).
    zero_terminal_snr: then alpha is moved and stretched to end at 0 and begin where it did (Lin et al. 2024,
    arXiv:2305.08891, algorithm 1).
    """

    t_min: float = 0.0
    t_max: float = 999.0
    beta_start: float = 0.0001
    beta_end: float = 0.02
    schedule: Literal["linear", "scaled_linear"] = "linear"
    num_steps: int = 1000
    zero_terminal_snr: bool = False
    snr_shift: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(snr_shift=self.snr_shift)
        if not 0 < self.beta_start <= self.beta_end < 1:
            betas = (self.beta_start, self.beta_end)
            raise UserError("beta_start, beta_end", "must satisfy 0 < beta_start <= beta_end < 1", betas, "Mend them.")
        if not self.t_max <= self.num_steps - 1:
            raise UserError("t_max", f"must be <= num_steps - 1 = {self.num_steps - 1}", self.t_max, "Lower it.")

    @cached_property
    def log_alpha_bar(self) -> Tensor:
        """[num_steps + 2] float64: the table with one extrapolated value at each end."""
        power = {"linear": 1.0, "scaled_linear": 0.5}[self.schedule]
        betas = np.linspace(self.beta_start**power, self.beta_end**power, self.num_steps) ** (1 / power)
        table = np.cumsum(np.log1p(-betas))
        ends = 2 * table[0] - table[1], 2 * table[-1] - table[-2]
        return torch.from_numpy(np.concatenate([ends[:1], table, ends[1:]]))

    @cached_property
    def _angles(self) -> Tensor:
        """phi at 0 .. num_steps - 1, float64."""
        return self.angle(torch.arange(self.num_steps, dtype=torch.float64))

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_bar = self._log_bar(t)[0]
        if self.snr_shift == 1 and not self.zero_terminal_snr:
            return torch.exp(log_bar / 2).to(t.dtype), torch.sqrt(-torch.expm1(log_bar)).to(t.dtype)
        alpha = self._stretched(self._shifted(log_bar)[0])
        return alpha.to(t.dtype), torch.sqrt((1 - alpha) * (1 + alpha)).to(t.dtype)

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_bar, slope = self._log_bar(t)
        shifted, share = self._shifted(log_bar)
        first, last = self._ends
        stretch = first / (first - last) if self.zero_terminal_snr else 1.0
        alpha, sigma = self.alpha_sigma(t.double())
        d_alpha = stretch * shifted * share * slope
        return d_alpha.to(t.dtype), (-alpha * d_alpha / sigma).to(t.dtype)

    def _log_bar(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """log(alpha_bar) and its time derivative, each [B] float64."""
        table = self.log_alpha_bar.to(t.device)
        index = t.detach().floor().clamp(0, self.num_steps - 2).long()
        u = t.double() - index
        p0, p1, p2, p3 = (table[index + k] for k in range(4))
        slope1, slope2 = (p2 - p0) / 2, (p3 - p1) / 2
        cubic = 2 * (p1 - p2) + slope1 + slope2
        square = 3 * (p2 - p1) - 2 * slope1 - slope2
        return ((cubic * u + square) * u + slope1) * u + p1, (3 * cubic * u + 2 * square) * u + slope1

    def _shifted(self, log_bar: Tensor) -> tuple[Tensor, Tensor]:
        """alpha where the signal-to-noise ratio of alpha_bar is divided by snr_shift, and d log alpha / d log_bar."""
        bar = torch.exp(log_bar)
        rest = self.snr_shift + (1 - self.snr_shift) * bar
        return torch.sqrt(bar / rest), self.snr_shift / (2 * rest)

    @cached_property
    def _ends(self) -> tuple[float, float]:
        """alpha at the ends of the table, before it is stretched."""
        first, last = self._shifted(self.log_alpha_bar[[1, self.num_steps]])[0].tolist()
        return first, last

    def _stretched(self, alpha: Tensor) -> Tensor:
        """alpha so moved and scaled that it ends at 0 and begins where it did, where zero_terminal_snr asks for it."""
        if not self.zero_terminal_snr:
            return alpha
        first, last = self._ends
        return (alpha - last) * first / (first - last)

    def _near(self, phi: Tensor) -> Tensor:
        """By Newton's steps, held between the two steps of the table whose angles are nearest."""
        angles = self._angles.to(phi.device)
        below = (torch.searchsorted(angles, phi) - 1).clamp(0, self.num_steps - 2)
        low, high = (end.double().clamp(self.t_min, self.t_max) for end in (below, below + 1))
        t = below + (phi - angles[below]) / (angles[below + 1] - angles[below])
        for _ in range(5):
            t = torch.clamp(t, low, high)
            t = t + (phi - self.angle(t)) / self.angle_rate(t)
        return torch.clamp(t, low, high)


class Kind(ABC):
    """What a network predicts: pred = a x0 + b eps, with (a, b) depending on process and time."""

    ends_at_t_min: bool = False  # True: the x0 it implies at t_min is the input itself, bit for bit

    @abstractmethod
    def row(self, process: NoiseProcess, t: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b), each [B]."""

    def x0_from(self, process: NoiseProcess, t: Tensor) -> tuple[Tensor, Tensor]:
        """(c_x, c_pred), each [B], with x0 = c_x x_t + c_pred pred."""
        alpha, sigma = process.alpha_sigma(t)
        a, b = self.row(process, t)
        det = alpha * b - sigma * a
        return b / det, -sigma / det


@dataclass(frozen=True)
class _X0(Kind):
    ends_at_t_min: bool = False

    def row(self, process: NoiseProcess, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), torch.zeros_like(t)

    def x0_from(self, process: NoiseProcess, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(t), torch.ones_like(t)


@dataclass(frozen=True)
class _Eps(Kind):
    def row(self, process: NoiseProcess, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(t), torch.ones_like(t)


@dataclass(frozen=True)
class _V(Kind):
    def row(self, process: NoiseProcess, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = process.alpha_sigma(t)
        return -sigma, alpha


@dataclass(frozen=True)
class _Velocity(Kind):
    def row(self, process: NoiseProcess, t: Tensor) -> tuple[Tensor, Tensor]:
        return process.rates(t)


@dataclass(frozen=True)
class _Score(Kind):
    def row(self, process: NoiseProcess, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(t), -1 / process.alpha_sigma(t)[1]


X0: Kind = _X0()
X0_AT_T_MIN: Kind = _X0(ends_at_t_min=True)  # an x0 prediction that is the flow map to t_min
EPS: Kind = _Eps()
V: Kind = _V()  # v-prediction, Salimans & Ho 2022: alpha eps - sigma x0
VELOCITY: Kind = _Velocity()  # PF-ODE drift alpha' x0 + sigma' eps; diffusers' flow prediction
SCORE: Kind = _Score()


@dataclass(frozen=True)
class F(Kind):
    """EDM's raw network output: x0 = c_skip x_t + c_out F with unit-variance targets for data of std sigma_data."""

    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        require_positive(sigma_data=self.sigma_data)

    def row(self, process: NoiseProcess, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = process.alpha_sigma(t)
        q = torch.hypot(alpha * self.sigma_data, sigma)
        return sigma / (self.sigma_data * q), -alpha * self.sigma_data / q

    def x0_from(self, process: NoiseProcess, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = process.alpha_sigma(t)
        q = torch.hypot(alpha * self.sigma_data, sigma)
        return alpha * (self.sigma_data / q).square(), sigma * self.sigma_data / q


@dataclass(frozen=True)
class Negated(Kind):
    """Another kind with its sign turned: what a flow predicts whose time runs from noise to data."""

    kind: Kind

    def row(self, process: NoiseProcess, t: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.kind.row(process, t)
        return -a, -b


@dataclass(frozen=True)
class BoundaryF(Kind):
    """F with the scalings of diffusers' CMStochasticIterativeScheduler: the implied x0 at noise level sigma_min is x_t.

    Song et al. 2023, arXiv:2303.01469, appendix C. sigma_min is the noise-to-signal ratio sigma/alpha of the boundary.
    """

    sigma_data: float = 0.5
    sigma_min: float = 0.002
    ends_at_t_min: bool = True

    def __post_init__(self) -> None:
        require_positive(sigma_data=self.sigma_data, sigma_min=self.sigma_min)

    def row(self, process: NoiseProcess, t: Tensor) -> tuple[Tensor, Tensor]:
        level, above, square = self._levels(process, t)
        norm = torch.hypot(level, torch.full_like(level, self.sigma_data)) / square
        return above * norm / self.sigma_data, -self.sigma_data * level * norm / above

    def x0_from(self, process: NoiseProcess, t: Tensor) -> tuple[Tensor, Tensor]:
        level, above, _ = self._levels(process, t)
        c_out = above * self.sigma_data / torch.hypot(level, torch.full_like(level, self.sigma_data))
        # of this form c_skip is exactly 1 at the boundary, also where sigma_data^2 is not exact
        c_skip = 1 / (1 + (above / self.sigma_data).square())
        return c_skip / process.alpha_sigma(t)[0], c_out

    def _levels(self, process: NoiseProcess, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        alpha, sigma = process.alpha_sigma(t)
        level = sigma / alpha
        above = level - self.sigma_min
        return level, above, above.square() + self.sigma_data**2
