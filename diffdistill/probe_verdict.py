"""What asking a teacher found: what a reading leaves, and whether the teacher is refused for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffdistill.errors import UserError
from diffdistill.readings import Reading

FITS = 1.1  # times the straight line's residual, at every level
STRAIN = 0.15  # of the logarithm of slopes, on samples of its own
TOLD = 0.1  # share of what it should be that an output must explain, on average; noise explains none


@dataclass(frozen=True)
class Finding:
    """What a reading leaves. residuals: [levels], relative to the best straight line's.  told: share of the output that
    is explained, mean over levels.  strain: largest |log| of a slope of x0 on the estimate."""

    reading: Reading
    residuals: tuple[float, ...]
    told: float
    strain: float

    @property
    def residual(self) -> float:
        """Geometric mean over the levels."""
        return math.exp(sum(math.log(max(r, 1e-12)) for r in self.residuals) / len(self.residuals))

    @property
    def fits(self) -> bool:
        """Whether it is a denoiser at all: no worse than a straight line anywhere, and more than silence."""
        return max(self.residuals) <= FITS and self.told >= TOLD

    @property
    def consistent(self) -> bool:
        """Whether samples drawn under it may be those of the law it denoises."""
        return self.fits and self.strain <= STRAIN


@dataclass(frozen=True)
class Verdict:
    """declared: the reading as configured.  better: one that leaves decisively less, if there is.

    own: whether they were measured on the teacher's own samples, for want of data.  levels: noise-to-signal ratios, in
    standard deviations of the data.  condition: the scale w at which D_null + w (D_c - D_null) leaves the least; None
    where there is no condition to leave out, or no data.  silent: why nothing was measured; "" if it was.  doubt: two
    standard errors of condition.
    """

    declared: Finding | None
    better: Finding | None
    own: bool
    levels: tuple[float, ...] = ()
    condition: float | None = None
    seconds: float = 0.0
    silent: str = ""
    doubt: float = 0.0

    def lines(self) -> list[str]:
        """For people, an accepted teacher's included."""
        if self.declared is None:
            return [f"probe: nothing was asked of the teacher: {self.silent}"]
        on = "its own samples" if self.own else "the data"
        found = (
            f"residual {self.declared.residual:.3g} of a straight line's at {len(self.levels)} noise levels of {on}, "
            f"{self.seconds:.1f} s"
        )
        if self.declared.consistent if self.own else self.declared.fits:
            lines = [f"probe: the teacher is read as it was trained: {found}"]
        else:
            lines = [
                f"probe: the teacher denoises under no reading that is known: {found}. Untrained weights look like "
                "this, and weights for other data."
            ]
        if self.condition is not None and math.isnan(self.condition):
            lines.append("probe: the teacher does not heed its condition: guidance does nothing")
        return lines

    def to_json(self) -> dict[str, Any]:
        """What the run folder keeps of it."""
        residuals = [] if self.declared is None else list(self.declared.residuals)
        return {"lines": self.lines(), "own": self.own, "levels": list(self.levels), "residuals": residuals}

    def _told(self, found: Finding) -> str:
        """A reading's figures."""
        text = f"{found.residual:.3g} of a straight line's residual"
        return f"{text} and slopes off by {math.expm1(found.strain):.0%}" if self.own else text

    def refuse(self, networks: Mapping[str, Any]) -> None:
        """Raise UserError if another reading is decisively better, with both and their residuals."""
        if self.better is not None:
            assert self.declared is not None
            raise UserError(
                "networks",
                "must read the teacher as it was trained",
                f"a reading that leaves {self._told(self.declared)}, while this one leaves {self._told(self.better)}: "
                f"{self.better.reading.what}",
                f"{_where(networks)} probe=null trains as it is.",
            )
        if self.condition is not None and self.condition + self.doubt < 0.5:
            raise UserError(
                "networks",
                "must denoise the data best with their condition, at w = 1 of D_null + w (D_c - D_null)",
                f"one that does at w = {self.condition:.2f}",
                "The conditions may belong to other samples, be numbered or embedded otherwise, or count as the null "
                "condition. probe=null trains as it is.",
            )


def _where(networks: Mapping[str, Any]) -> str:
    if ".families." in str(networks.get("_target_")) and networks.get("path"):
        return f"Mend {networks['path']}/scheduler/scheduler_config.json, or the model's own config."
    return "Mend the keys of networks."
