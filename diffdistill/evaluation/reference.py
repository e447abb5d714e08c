"""What samples are measured against: a data set held in memory, or what is known of one that is not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from . import planar, tracking


class Described(Protocol):
    """A set of samples from outside. name: of the set.  shape: of one sample.  size: how many.  labelled: whether it
    has classes."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def size(self) -> int: ...
    @property
    def labelled(self) -> bool: ...


class Known(Described, Protocol):
    """What is known of a reference before a metric is measured against it.

    law: the density of points, where it is known.  motion: the law of clips, where it is.
    """

    @property
    def law(self) -> planar.Law | None: ...
    @property
    def motion(self) -> tracking.Motion | None: ...


@dataclass(frozen=True)
class Reference:
    """A fixed data set that samples are measured against.

    data: images [n, C, H, W] or clips [n, C, T, H, W] in [-1, 1], or points [n, d].  labels: [n] int64, None where the
    data has no classes.  law: the density of points, where it is known.  motion: the law of clips, where it is.
    """

    name: str
    data: Tensor
    labels: Tensor | None
    law: planar.Law | None = None
    motion: tracking.Motion | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.data.shape[1:])

    @property
    def size(self) -> int:
        return len(self.data)

    @property
    def labelled(self) -> bool:
        return self.labels is not None
