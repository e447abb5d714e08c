"""f-divergences as functions of the density ratio r = p_teacher / p_student of the noised marginals.

    D_f = E_student f(r),   h(r) = r^2 f''(r),   k(r) = h(r) - r h'(r)

grad D_f = -E h(r) <s_teacher - s_student, dx_t>  (Xu et al. 2025, arXiv:2502.15681, theorem 1).  Along the diffusion
D_f is the integral of E_student h(r) |s_teacher - s_student|^2 (Wang et al. 2025, arXiv:2505.20755), whose gradient
also needs k.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Name = Literal["rkl", "softened_rkl", "js", "hellinger", "fkl", "jeffreys", "neyman", "chi2"]
Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Divergence:
    """f, h and k of r > 0, elementwise.  mode_seeking: h falls with r, so modes the student lacks pull little.
    needs_ratio: whether h depends on r at all."""

    f: Function
    h: Function
    k: Function
    mode_seeking: bool = False
    needs_ratio: bool = True


DIVERGENCES: dict[str, Divergence] = {
    "rkl": Divergence(lambda r: -torch.log(r), torch.ones_like, torch.ones_like, mode_seeking=True, needs_ratio=False),
    "softened_rkl": Divergence(
        lambda r: (r + 1) * torch.log(0.5 + 0.5 / r),
        lambda r: 1 / (1 + r),
        lambda r: (1 + 2 * r) / (1 + r).square(),
        mode_seeking=True,
    ),
    "js": Divergence(
        lambda r: r * torch.log(r) - (r + 1) * torch.log((r + 1) / 2),
        lambda r: r / (1 + r),
        lambda r: (r / (1 + r)).square(),
    ),
    "hellinger": Divergence(lambda r: 1 - r.sqrt(), lambda r: r.sqrt() / 4, lambda r: r.sqrt() / 8),
    "fkl": Divergence(lambda r: r * torch.log(r), lambda r: r, torch.zeros_like),
    "jeffreys": Divergence(lambda r: (r - 1) * torch.log(r), lambda r: 1 + r, torch.ones_like),
    "neyman": Divergence(lambda r: 1 / r - 1, lambda r: 2 / r, lambda r: 4 / r, mode_seeking=True),
    "chi2": Divergence(lambda r: (r - 1).square(), lambda r: 2 * r.square(), lambda r: -2 * r.square()),
}
