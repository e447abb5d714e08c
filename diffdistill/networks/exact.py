"""Closed-form networks: Gaussian and mixture denoisers, and the Gaussian's flow map, generator and signal map.

For x0 ~ N(mu, s^2) per coordinate the denoiser is affine and the PF-ODE map closed:
x_s = alpha(s) mu + (x_t - alpha(t) mu) q(s) / q(t), q(t)^2 = alpha(t)^2 s^2 + sigma(t)^2.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from diffdistill.denoiser import Cond, Denoiser
from diffdistill.errors import UserError, require_positive
from diffdistill.networks.call import current_call
from diffdistill.process import VELOCITY, X0, X0_AT_T_MIN, BoundaryF, F, Kind, NoiseProcess, expand

MAX_MODES = 1000
Form = Literal["denoiser", "flow_map", "flow_map_f", "average", "generator", "signal"]


def check_points(dim: int, classes: int, shape: tuple[int, ...], num_classes: int) -> None:
    """Refuse data that a network of points [dim] with `classes` classes cannot take; 0 classes take no labels."""
    if tuple(shape) != (dim,):
        fix = "Choose data and networks that belong together."
        raise UserError("networks", f"must denoise samples of the data's shape {list(shape)}", f"one for {[dim]}", fix)
    if classes and classes != num_classes:
        fix = "Choose data and networks that belong together."
        raise UserError("networks", f"must have the data's number of classes, {num_classes}", classes, fix)


class _Analytic(nn.Module):
    """What exact networks share: state and time are fed as they are."""

    process: NoiseProcess
    kind: Kind
    null: Cond | None
    dim: int
    num_classes: int  # without the null condition; 0 is unconditional
    embedding_name = ""  # extra inputs are read off the call, nothing is added

    def check(self, shape: tuple[int, ...], num_classes: int) -> None:
        """Raise UserError unless it denoises samples of `shape` with labels 0 to num_classes - 1."""
        check_points(self.dim, self.num_classes, shape, num_classes)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return [self]

    def scale(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def time(self, t: Tensor) -> Tensor:
        return t


class Gaussian(_Analytic):
    """Data N(mean, std^2) per class and coordinate, and every map of it that a student may have to learn.

    mean, std: [rows][dim]; one row is unconditional, more rows are classes, the last of them the null condition.
    trainable: the two are parameters, so copies of the network are legal students; else they are fixed and copies are
    refused.  form: denoiser E[x0|x_t]; flow_map to t_min as an x0 prediction; flow_map_f the same as raw F output;
    average velocity over [s, t]; generator mean + std z with z = x_t / sigma_t; signal map of the trajectory from z.
    """

    def __init__(
        self,
        process: NoiseProcess,
        mean: Sequence[Sequence[float]],
        std: Sequence[Sequence[float]],
        trainable: bool = False,
        form: Form = "denoiser",
        dtype: Literal["float32", "float64"] = "float64",
    ) -> None:
        super().__init__()
        check_rows(mean, std)
        means = torch.tensor([list(row) for row in mean], dtype=getattr(torch, dtype))
        stds = torch.tensor([list(row) for row in std], dtype=getattr(torch, dtype))
        self.process, self.closed_form, self.form = process, not trainable, form
        self.mean, self.std = nn.Parameter(means, trainable), nn.Parameter(stds, trainable)
        rows = means.shape[0]
        self.null = {"label": torch.tensor([rows - 1])} if rows > 1 else None
        self.dim, self.num_classes = means.shape[1], rows - 1

    @property
    def kind(self) -> Kind:  # type: ignore[override]
        kinds = {"flow_map": X0_AT_T_MIN, "flow_map_f": self._boundary, "average": VELOCITY}
        return kinds.get(self.form, X0)

    @property
    def _boundary(self) -> Kind:
        alpha, sigma = self.process.alpha_sigma(torch.tensor([self.process.t_min], dtype=torch.float64))
        ratio = float(sigma / alpha)
        return BoundaryF(sigma_data=0.5, sigma_min=ratio) if ratio > 0 else F(sigma_data=0.5)

    def seen_as(self, form: Form) -> Gaussian:
        """A copy (sharing nothing) that computes another map of the same law."""
        twin = copy.deepcopy(self)
        twin.form = form
        return twin

    def forward(self, x: Tensor, t_net: Tensor, cond: Cond) -> Tensor:
        mean, std = self._law(x, cond)
        t_min = torch.full_like(t_net, self.process.t_min)
        if self.form == "generator":
            return mean + std * x / expand(self.process.alpha_sigma(t_net)[1], x)
        if self.form == "signal":
            return self._signal(x, t_net, mean, std)
        if self.form == "flow_map":
            return self._moved(x, t_net, t_min, mean, std)
        if self.form == "flow_map_f":
            c_x, c_pred = (expand(value, x) for value in self.kind.x0_from(self.process, t_net))
            gap = self._moved(x, t_net, t_min, mean, std) - c_x * x
            return torch.where(c_pred == 0, torch.zeros_like(x), gap / c_pred)  # the boundary does not read F
        if self.form == "average":
            call = current_call()  # has s in times of this process, whatever the view's
            s = cond["s"] if call is None or call.s is None else call.s
            return self._average(x, t_net, s.to(t_net.dtype), mean, std)
        return self._denoised(x, t_net, mean, std)

    def _law(self, x: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        row = cond["label"] if self.mean.shape[0] > 1 else torch.zeros(x.shape[0], dtype=torch.long, device=x.device)
        return self.mean[row].to(x.dtype).view(x.shape), self.std[row].to(x.dtype).view(x.shape)

    def _denoised(self, x: Tensor, t: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        alpha, sigma = (expand(value, x) for value in self.process.alpha_sigma(t))
        gain = alpha * std.square() / (alpha.square() * std.square() + sigma.square())
        return mean + gain * (x - alpha * mean)

    def _moved(self, x: Tensor, t: Tensor, s: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        alpha_t, sigma_t = (expand(value, x) for value in self.process.alpha_sigma(t))
        alpha_s, sigma_s = (expand(value, x) for value in self.process.alpha_sigma(s))
        ratio = torch.hypot(alpha_s * std, sigma_s) / torch.hypot(alpha_t * std, sigma_t)
        return ratio * x + (alpha_s - alpha_t * ratio) * mean  # x itself, bit for bit, at s == t

    def _average(self, x: Tensor, t: Tensor, s: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        still = (t == s).view(-1, *[1] * (x.ndim - 1))
        span = expand(torch.where(t == s, torch.ones_like(t), t - s), x)
        velocity = self.process.convert(self._denoised(x, t, mean, std), x, t, X0, VELOCITY)
        return torch.where(still, velocity, (x - self._moved(x, t, s, mean, std)) / span)

    def _signal(self, x: Tensor, t: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        t_max = torch.full_like(t, self.process.t_max)
        alpha_p, sigma_p = (expand(value, x) for value in self.process.alpha_sigma(t_max))
        alpha, sigma = (expand(value, x) for value in self.process.alpha_sigma(t))
        z, q_p, q = x / sigma_p, torch.hypot(alpha_p * std, sigma_p), torch.hypot(alpha * std, sigma)
        # (x_t - sigma z) / alpha without its cancellation, so that a prior without signal gives D at t_max
        silent = alpha_p.abs() < 1e-6  # cos(pi/2) is not 0 in floating point
        rest = torch.where(
            silent, torch.zeros_like(alpha), alpha_p / torch.where(silent, torch.ones_like(alpha), alpha)
        )
        gain = (
            std.square()
            * (alpha * sigma_p.square() - rest * alpha_p * sigma.square())
            / (q_p * (q * sigma_p + sigma * q_p))
        )
        return mean * (1 - rest * q / q_p) + gain * z


def gaussian_log_ratio(target: Denoiser, fake_score: Denoiser, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """log(p_target / p_fake) of the marginals at t for two views of `Gaussian`, [B], without gradient."""
    with torch.no_grad():
        return _log_density(target, x_t, t, cond) - _log_density(fake_score, x_t, t, cond)


def _log_density(denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
    network = denoiser.network
    if not isinstance(network, Gaussian) or denoiser.guidance is not None:
        fix = "Use networks=gauss without guidance, or a ratio from the discriminator."
        raise UserError("known_ratio", "needs Gaussian networks", type(network).__name__, fix)
    mean, std = network._law(x_t, cond)
    alpha, sigma = (expand(value, x_t) for value in network.process.alpha_sigma(t))
    spread = torch.hypot(alpha * std, sigma)
    return (-0.5 * ((x_t - alpha * mean) / spread).square() - spread.log()).flatten(1).sum(1)


def check_rows(mean: Sequence[Sequence[float]], std: Sequence[Sequence[float]]) -> None:
    """Refuse means and standard deviations that are not lists of rows [rows][dim] of one shape, std positive."""
    if not mean or not mean[0] or any(len(row) != len(mean[0]) for row in mean):
        raise UserError("mean", "must hold rows of equal length >= 1", list(mean), "Write it as [[A,B],[C,D]].")
    if [len(row) for row in std] != [len(row) for row in mean] or not all(value > 0 for row in std for value in row):
        raise UserError("std", "must be positive and shaped like mean", list(std), "Mend the lists.")


class Mixture(_Analytic):
    """Equal-weight isotropic Gaussians; a class is one of them, the null condition the whole mixture.

    centres: [modes][dim]; std: of each mode.
    """

    closed_form = True
    centres: Tensor

    def __init__(self, process: NoiseProcess, centres: Sequence[Sequence[float]], std: float) -> None:
        super().__init__()
        require_positive(std=std)
        self.process, self.kind = process, X0
        self.register_buffer("centres", torch.tensor([list(row) for row in centres], dtype=torch.float64))
        self.std, self.dim, self.num_classes = std, len(centres[0]), len(centres)
        self.null: Cond | None = {"label": torch.tensor([len(centres)])}

    def forward(self, x: Tensor, t_net: Tensor, cond: Cond) -> Tensor:
        """D(x, t, cond), [B, dim]; label == number of modes is the null condition."""
        alpha, sigma = (expand(value, x) for value in self.process.alpha_sigma(t_net))
        centres = self.centres.to(x.dtype)
        spread = (alpha * self.std).square() + sigma.square()
        offsets = x[:, None] - alpha[..., None] * centres  # [B, modes, dim]
        logits = -offsets.square().sum(-1) / (2 * spread)
        number = torch.arange(len(centres), device=x.device)
        excluded = (cond["label"][:, None] != number) & (cond["label"][:, None] < len(centres))
        weights = torch.softmax(logits.masked_fill(excluded, float("-inf")), -1)
        means = centres + (alpha * self.std**2 / spread)[..., None] * offsets
        return (weights[..., None] * means).sum(1)


def circle(num_modes: int = 8, radius: float = 1.0) -> list[list[float]]:
    """Centres of equal modes on a circle; UserError for more modes than anyone draws, or fewer than one."""
    if not 1 <= num_modes <= MAX_MODES:
        raise UserError("num_modes", f"must lie in 1..{MAX_MODES}", num_modes, "8 is a good number.")
    require_positive(radius=radius)
    angles = torch.arange(num_modes, dtype=torch.float64, device="cpu") * (2 * torch.pi / num_modes)
    return torch.stack([radius * angles.cos(), radius * angles.sin()], -1).tolist()


def mixture_on_circle(process: NoiseProcess, num_modes: int, radius: float, std: float) -> Mixture:
    """The exact denoiser of data=gmm2d."""
    return Mixture(process, circle(num_modes, radius), std)
