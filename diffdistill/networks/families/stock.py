"""What the families share: a diffusers model with the schedule of its pipeline, and conditions by name."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from diffdistill.denoiser import Cond
from diffdistill.errors import UserError, require_positive
from diffdistill.networks.scheduled import Schedule
from diffdistill.process import Kind, NoiseProcess, RectifiedFlow

DIMS = {2: "[channels, length]", 3: "[channels, height, width]", 4: "[channels, frames, height, width]"}


def as_called(pipeline: Any) -> dict[str, Any]:
    """Defaults of a pipeline's call that its encode_prompt does not share: how many tokens, which instruction."""
    call = inspect.signature(type(pipeline).__call__).parameters
    encode = inspect.signature(pipeline.encode_prompt).parameters
    names = ("max_sequence_length", "complex_human_instruction")
    return {name: call[name].default for name in names if name in call and name in encode}


class Stock(nn.Module, ABC):
    """A diffusers model as a network. Subclasses say what it is called with.

    Conditions, batch first: text [B, L, D], its mask [B, L] (1: token), pooled [B, P], time_ids [B, 6], label [B]; and
    concat [B, c, *sizes], channels put behind the state (inpainting masks, first frames). null: set by what made the
    embeddings, batch 1.
    """

    closed_form = False
    part: ClassVar[str] = "transformer"  # its folder in a pipeline
    model_class: ClassVar[str]  # in diffusers
    dims: ClassVar[int] = 3  # of a sample
    needs: ClassVar[tuple[str, ...]] = ("text",)
    embedding: ClassVar[str | None]  # the module that embeds time; None where there is one per block

    # what its pipeline's call is told a student's times by; "": its scheduler alone; None: no student of it is exported
    grid: ClassVar[Literal["sigmas", "timesteps", ""] | None] = None

    def __init__(self, model: Any, schedule: Schedule) -> None:
        super().__init__()
        self.model = model
        self.schedule = schedule
        self.process: NoiseProcess = schedule.process
        self.kind: Kind = schedule.kind
        self.num_classes = 0
        self.null: Cond | None = None
        self.embedding_name = None if self.embedding is None else f"model.{self.embedding}"
        self.embedding_width = 0
        if self.embedding is not None:
            linears = [m for m in model.get_submodule(self.embedding).modules() if isinstance(m, nn.Linear)]
            self.embedding_width = linears[-1].out_features

    @property
    def backbone(self) -> Any:
        """The stock module, by whose names adapters find their places."""
        return self.model

    @property
    @abstractmethod
    def blocks(self) -> Sequence[nn.Module]: ...

    @property
    def channels(self) -> int:
        """Of a sample."""
        return int(self.model.config.in_channels)

    def tokens(self, shape: tuple[int, ...]) -> int:
        """Of a sample of this shape: what a dynamic shift depends on."""
        patch = self.model.config.get("patch_size") or 1
        height, width = shape[-2:]
        return (height // patch) * (width // patch)

    def latents(
        self, size: tuple[int, int] | None, frames: int, in_space: int, in_time: int
    ) -> tuple[tuple[int, ...], tuple[int, int]]:
        """Shape of a sample that shows `size` (height, width; None is the model's own) in pixels, and those pixels.

        in_space, in_time: pixels and frames per latent of the pipeline's VAE; the first frame has a latent of its own.
        """
        if size is None:
            own = self.model.config.get("sample_size")
            if own is None:
                raise UserError("data.size", "must be given for this model", None, "Write [480, 832], say.")
            size = (in_space * own, in_space * own) if isinstance(own, int) else tuple(in_space * side for side in own)
        if size[0] % in_space or size[1] % in_space:
            raise UserError("data.size", f"must be multiples of {in_space}, a latent's pixels", list(size), "Mend it.")
        sides = size[0] // in_space, size[1] // in_space
        if self.dims == 3:
            return (self.channels, *sides), size
        if (frames - 1) % in_time:
            raise UserError("data.frames", f"must be 1 more than a multiple of {in_time}", frames, "81, say.")
        return (self.channels, 1 + (frames - 1) // in_time, *sides), size

    def scale(self, t: Tensor) -> Tensor:
        return self.schedule.scale(t)

    def time(self, t: Tensor) -> Tensor:
        return self.schedule.time(t)

    def check(self, shape: tuple[int, ...], num_classes: int) -> None:
        """Raise UserError unless it denoises samples of `shape`; takes the grid's shift that belongs to their size."""
        if len(shape) != self.dims or shape[0] != self.channels:
            wanted = f"must denoise samples of the data's shape {list(shape)}"
            found = f"a {self.model_class} for {self.channels} channels, {DIMS[self.dims]}"
            raise UserError("networks", wanted, found, "Change data or networks.")
        if isinstance(self.process, RectifiedFlow):
            self.process = replace(self.process, shift=self.schedule.shift_for(self.tokens(shape)))

    def given(self, cond: Cond, name: str) -> Tensor:
        """A condition that the model cannot do without."""
        if name not in cond:
            found = ", ".join(sorted(cond)) or "none"
            fix = f"{self.model_class} needs {', '.join(self.needs)}."
            raise UserError("data", f"must give the condition {name}", found, fix)
        return cond[name]

    @property
    def reads_more(self) -> bool:
        """Whether the model reads channels beside the state, cond["concat"]."""
        return self.channels < int(self.model.config.in_channels)

    def with_more(self, x: Tensor, cond: Cond) -> Tensor:
        """The state with the channels put behind it that the model reads beside."""
        return torch.cat([x, self.given(cond, "concat").to(x.dtype)], 1) if self.reads_more else x

    def words(self, pipeline: Any, texts: list[str]) -> dict[str, Tensor]:
        """Conditions [B, ...] of prompts, as the pipeline's own encoders embed them."""
        found = pipeline.encode_prompt(
            texts, device=pipeline.device, do_classifier_free_guidance=False, **as_called(pipeline)
        )
        return dict(zip(self.needs, found, strict=False))

    def no_words(self, pipeline: Any, negative: str | None) -> dict[str, Tensor]:
        """Conditions [1, ...] of the absence of a prompt, or of a negative one."""
        return self.words(pipeline, [negative or ""])

    def sized(self, height: int, width: int) -> dict[str, Tensor]:
        """Conditions [1, ...] that tell the size in pixels, of models that are told."""
        return {}

    @abstractmethod
    def asked(self) -> dict[str, tuple[int, ...]]:
        """Sizes of the conditions of one sample, by name, for prompts as long as its pipeline pads them to."""

    def unguided(self) -> dict[str, Any]:
        """Keywords that switch the guidance of its pipeline's call off."""
        return {"guidance_scale": 1.0}

    def own_layout(self, latents: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Latents as its pipeline returns them, as samples [B, *shape]."""
        return latents

    @abstractmethod
    def forward(self, x: Tensor, t_net: Tensor, cond: Cond) -> Tensor:
        """The raw prediction, [B, *sample]."""


class TwoStreams(Stock):
    """A transformer whose blocks return a stream for text and one for the picture."""

    embedding = "time_text_embed.timestep_embedder"
    grid = "sigmas"

    @staticmethod
    def hidden(output: Any) -> Tensor:
        """A block's picture stream; text comes first."""
        return output[1] if isinstance(output, tuple) else output


class ReadsScale(Stock):
    """A model distilled with guidance, which is fed its scale: cond["w"], or `guidance` where that is not given."""

    def __init__(self, model: Any, schedule: Schedule, guidance: float) -> None:
        super().__init__(model, schedule)
        require_positive(guidance=guidance)
        self.guidance = guidance

    def fed_scale(self, t_net: Tensor, cond: Cond) -> Tensor:
        """[B]."""
        return cond["w"] if "w" in cond else torch.full_like(t_net, self.guidance)
