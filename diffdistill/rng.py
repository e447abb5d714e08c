"""Counter-based random draws keyed by global sample index.

The numbers a sample receives depend on (seed, step, phase, stream, number of the draw, its global index) and on nothing
else, so they are the same for any number of processes, any accumulation and after a resume. One Philox stream serves
one draw: sample g owns words [g K, (g + 1) K) with K rounded up to one Philox block pair, so a micro-batch is one
contiguous slice of it. Salmon et al. 2011 (Philox); normals by Box and Muller 1958.
"""

from __future__ import annotations

import functools
import hashlib
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

WORDS_PER_BLOCK = 8  # one Philox4x64 counter value gives 4 x 64 bits
_LOW = 2**64 - 1


class _Stream(threading.local):
    """A Philox generator of each thread, which is sent to where a draw lies: making one takes longer than drawing."""

    def __init__(self) -> None:
        self.generator = np.random.Philox(key=0)
        self.state = self.generator.state
        self.key, self.counter = self.state["state"]["key"], self.state["state"]["counter"]

    def raw(self, key: int, block: int, num: int) -> np.ndarray:
        """uint64 [num] of the stream of `key` (128 bits) from its block on."""
        self.key[0], self.key[1] = key & _LOW, key >> 64
        self.counter[0] = block
        self.generator.state = self.state  # its buffer is empty: what follows is made of the counter
        return self.generator.random_raw(num)


_STREAM = _Stream()


class Rng:
    """Draws for the samples `ids` of one phase of one step.

    seed, step: integers.  phase: name of the stream.  ids: [B] int64 global sample indices.  Every draw has
    shape[0] == len(ids) and advances the number of the draw, which views made by `take` share.
    """

    def __init__(
        self,
        seed: int,
        step: int = 0,
        phase: str = "",
        ids: np.ndarray | range | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.seed, self.step, self.phase, self.device = seed, step, phase, torch.device(device)
        ids = range(1) if ids is None else ids
        self._runs: list[np.ndarray] | None = None  # of contiguous ids; None is not known yet
        if isinstance(ids, range):
            self.ids = np.arange(ids.start, ids.stop, ids.step, dtype=np.int64)
            self._runs = [self.ids] if ids.step == 1 else None
        else:
            self.ids = np.asarray(ids, dtype=np.int64)
        self._draws = [0]  # a list: shared by reference with the views of `take`
        self._shared: Rng | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, index: Tensor | slice) -> Rng:
        """The same stream for part of the batch; draws of either advance both."""
        part = self.ids[index.cpu().numpy() if isinstance(index, Tensor) else index]
        view = Rng(self.seed, self.step, self.phase, part, self.device)
        view._draws, view._shared = self._draws, self.shared()
        return view

    def fork(self, name: str) -> Rng:
        """An independent stream with the same samples, starting at draw 0."""
        return self._again(self.step, f"{self.phase}/{name}", self.device)

    def on(self, device: torch.device | str) -> Rng:
        """The same stream from its first draw, its numbers on another device."""
        return self._again(self.step, self.phase, device)

    def at(self, step: int) -> Rng:
        """The stream of another step, from its first draw."""
        return self._again(step, self.phase, self.device)

    def shared(self) -> Rng:
        """A stream with one value per draw that is equal on every rank and in every micro-batch.

        The only legal source of rollout lengths, stages and curricula: ranks that disagree on them deadlock.
        """
        if self._shared is None:
            self._shared = Rng(self.seed, self.step, f"{self.phase}/shared", range(1), "cpu")
        return self._shared

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normals, [B, ...]."""
        numel = self._per_sample(shape)
        pairs = (numel + 1) // 2
        words = self._words(2 * pairs).reshape(len(self), pairs, 2)
        real = np.float64 if dtype == torch.float64 else np.float32
        # (w + 1/2) / 2^32 lies in (0, 1]: its logarithm is finite
        radius = np.sqrt(-2 * np.log((words[..., 0].astype(real) + real(0.5)) * real(2.0**-32)))
        turn = words[..., 1].astype(real) * real(2 * math.pi * 2.0**-32)
        values = np.empty((len(self), pairs, 2), real)
        np.multiply(radius, np.cos(turn), out=values[..., 0])
        np.multiply(radius, np.sin(turn), out=values[..., 1])
        return self._tensor(values.reshape(len(self), 2 * pairs)[:, :numel], shape, dtype)

    def uniform(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """Uniform in [0, 1), [B, ...], with 24 bits in float32 and 32 in float64."""
        words = self._words(self._per_sample(shape))
        if dtype == torch.float64:
            return self._tensor(words.astype(np.float64) * 2.0**-32, shape, dtype)
        return self._tensor((words >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24), shape, dtype)

    def integers(self, high: int, shape: tuple[int, ...]) -> Tensor:
        """Uniform integers in [0, high), int64 [B, ...]."""
        words = np.multiply(self._words(self._per_sample(shape)), np.uint64(high), dtype=np.uint64)
        return self._tensor((words >> np.uint64(32)).view(np.int64), shape, torch.int64)

    def permutation(self, n: int, name: str) -> np.ndarray:
        """A permutation of range(n), read-only, that depends on the seed and `name` only (epochs of a data set)."""
        return _permutation(self._key(name), n)

    def seed_torch(self) -> None:
        """Start torch's own generators at `torch_seed`, the CPU's and the device's: as torch.manual_seed, which asks
        every kind of device and formats the stack for those that are asleep, a tenth of a small step."""
        seed = self.torch_seed()
        if self.device.type not in ("cpu", "cuda", "meta"):
            torch.manual_seed(seed)
            return
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed_all(seed)

    def torch_seed(self) -> int:
        """A seed for torch's own generator (dropout), different per sample group."""
        return int(self._key(f"{self.phase}|torch|{self.step}|{self.ids[0]}")) & (2**63 - 1)

    @contextmanager
    def dropout(self) -> Iterator[None]:
        """Within the context torch's own generator starts at `torch_seed`: calls in two such contexts share their
        dropout masks. It is put back afterwards."""
        devices = [] if self.device.type == "cpu" else [self.device]
        with torch.random.fork_rng(devices, device_type="cuda" if self.device.type == "cpu" else self.device.type):
            self.seed_torch()
            yield

    def _again(self, step: int, phase: str, device: torch.device | str) -> Rng:
        other = Rng(self.seed, step, phase, self.ids, device)
        other._runs = self._runs
        return other

    def _per_sample(self, shape: tuple[int, ...]) -> int:
        if shape[0] != len(self):
            raise ValueError(f"a draw must have shape[0] == {len(self)} samples, got {tuple(shape)}.")
        return math.prod(shape[1:])

    def _key(self, name: str) -> int:
        digest = hashlib.blake2b(f"{self.seed}|{name}".encode(), digest_size=16).digest()
        return int.from_bytes(digest, "little")

    def _words(self, per_sample: int) -> np.ndarray:
        """uint32 [B, per_sample] of the next draw."""
        key = self._key(f"{self.step}|{self.phase}|{self._draws[0]}")
        self._draws[0] += 1
        blocks = -(-per_sample // WORDS_PER_BLOCK)
        if self._runs is None:
            self._runs = np.split(self.ids, np.flatnonzero(np.diff(self.ids) != 1) + 1)
        parts = []
        for run in self._runs:  # contiguous indices are one slice of the stream
            if len(run) == 0:
                continue
            raw = _STREAM.raw(key, int(run[0]) * blocks, len(run) * blocks * WORDS_PER_BLOCK // 2)
            parts.append(raw.view(np.uint32).reshape(len(run), blocks * WORDS_PER_BLOCK)[:, :per_sample])
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.empty((0, per_sample), np.uint32)

    def _tensor(self, values: np.ndarray, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device, dtype).view(shape)


@functools.lru_cache(maxsize=8)  # every step of an epoch asks for the same ones
def _permutation(key: int, n: int) -> np.ndarray:
    found = np.random.Generator(np.random.Philox(key=key)).permutation(n)
    found.setflags(write=False)
    return found
