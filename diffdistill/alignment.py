"""How well an image fits its text: the cosine of their CLIP embeddings, differentiable in the image.

Radford et al. 2021, arXiv:2103.00020. SwiftBrush v2 (Dao et al. 2024, arXiv:2408.14176) pulls it up to a threshold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as pictures

from diffdistill.config_types import short, show
from diffdistill.denoiser import Cond
from diffdistill.errors import UserError
from diffdistill.networks.files import quiet_libraries

# CLIP's published constants, for folders that say nothing
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
_PREPROCESSING = ("preprocessor_config.json", "processor_config.json")
_TOKENS = ("tokenizer.json", "vocab.json")


def hinge(cosine: Tensor, threshold: float) -> Tensor:
    """max(0, threshold - cosine), [B]: no gradient once an image fits. SwiftBrush v2, with threshold .35."""
    return (threshold - cosine).relu()


class ClipAlignment:
    """(images [B, 1 or 3, H, W] in [-1, 1], cond) -> cosine of image and text, [B] float32 in [-1, 1].

    path: folder or hub id of a transformers CLIP model (safetensors) with its tokenizer; it is frozen, belongs to no
    role, and moves to the images' device.  prompts: a text for each class, which cond["label"] [B] picks; None: the
    texts come as cond["text_ids"] [B, L], as `tokens` gives them.
    Raises UserError if the model cannot be loaded, or a text is longer than it reads.
    """

    def __init__(self, path: str, prompts: tuple[str, ...] | None) -> None:
        self._clip = _load(path)
        self._texts: Tensor | None = None  # [classes, width]
        if prompts is not None:
            if not prompts:
                raise UserError("prompts", "must hold a text for each class", "[]", "Or set it to null.")
            self._texts = self._clip.of_texts(self.tokens(prompts))

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """Token ids [n, L] of texts, on the CPU; UserError for one that the model would cut short."""
        lengths = [len(ids) for ids in self._clip.tokenizer(list(texts))["input_ids"]]
        longest = max(range(len(lengths)), key=lengths.__getitem__)
        if lengths[longest] > self._clip.max_tokens:
            constraint = f"must have at most {self._clip.max_tokens} tokens, has {lengths[longest]}"
            raise UserError(f"prompts[{longest}]", constraint, show(texts[longest]), "Shorten it.")
        padded = self._clip.tokenizer(list(texts), padding="max_length", max_length=self._clip.max_tokens)
        return torch.tensor(padded["input_ids"])

    def __call__(self, images: Tensor, cond: Cond) -> Tensor:
        """Raises UserError for what is no image, and for a condition without a text."""
        self._clip.model.to(images.device)
        return (self._clip.of_images(images) * self._wanted(cond, images.device)).sum(-1)

    def _wanted(self, cond: Cond, device: torch.device) -> Tensor:
        """Unit embeddings of the texts that `cond` asks for, [B, width]."""
        name = "text_ids" if self._texts is None else "label"
        if name not in cond:
            fix = "Use data with classes and give prompts." if self._texts is None else "Use data with classes."
            raise UserError("alignment", f"needs conditions with {name}", f"{sorted(cond)}", fix)
        if self._texts is None:
            return self._clip.of_texts(cond["text_ids"].to(device))
        label = cond["label"]
        if outside := [int(number) for number in label.unique() if not 0 <= number < len(self._texts)]:
            fix = "Give as many as the data has classes, in their order."
            constraint = f"must hold a text for label {outside[0]}"
            raise UserError("alignment.prompts", constraint, f"{len(self._texts)} texts", fix)
        self._texts = self._texts.to(device)
        return self._texts[label.to(device)]


@dataclass(frozen=True)
class _Clip:
    """A frozen CLIPModel.  mean, std: of the pixels in [0, 1] it was trained on, by channel."""

    model: Any
    tokenizer: Any
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def max_tokens(self) -> int:
        return int(self.model.config.text_config.max_position_embeddings)

    def of_images(self, images: Tensor) -> Tensor:
        """Unit embeddings [B, width] of images [B, 1 or 3, H, W] in [-1, 1], sized and normalised as CLIP does."""
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            shape = tuple(images.shape)
            raise UserError("alignment", "needs images [B, 1 or 3, H, W]", f"{shape}", "Leave it out for this data.")
        x = images.to(self.model.dtype).expand(-1, 3, -1, -1) / 2 + 0.5
        size = self.model.config.vision_config.image_size
        # the shorter side becomes the model's, the middle of the longer one stays
        x = pictures.resize(x, size, InterpolationMode.BICUBIC, antialias=True)
        x = pictures.normalize(pictures.center_crop(x, [size, size]), list(self.mean), list(self.std))
        features = self.model.visual_projection(self.model.vision_model(pixel_values=x).pooler_output)
        return normalize(features.float(), dim=-1)

    @torch.no_grad()
    def of_texts(self, ids: Tensor) -> Tensor:
        """Unit embeddings [n, width] of token ids [n, L]. No mask: what follows a text's end token is never seen."""
        features = self.model.text_projection(self.model.text_model(input_ids=ids.to(self.model.device)).pooler_output)
        return normalize(features.float(), dim=-1)


@lru_cache(maxsize=1)  # a configuration is built more than once
def _load(path: str) -> _Clip:
    try:
        from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel
        from transformers.utils import cached_file
    except ImportError as error:
        fix = 'Install it: pip install "diffdistill[clip]".'
        raise UserError("alignment", "needs the package transformers", "none", fix) from error

    def has(*names: str) -> bool:
        return any(cached_file(path, name, _raise_exceptions_for_missing_entries=False) for name in names)

    fix = "Name a folder that holds a CLIP model and its tokenizer, or a hub id."
    try:
        with quiet_libraries():
            model, report = CLIPModel.from_pretrained(path, use_safetensors=True, output_loading_info=True)
            if not has(*_TOKENS):  # transformers would go on with a vocabulary of three words
                raise OSError("it holds no tokenizer")
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
            processor = CLIPImageProcessor.from_pretrained(path) if has(*_PREPROCESSING) else None
    except Exception as error:  # of many classes: of the hub, safetensors, torch and transformers
        reason = short(" ".join(str(error).split()))
        raise UserError("path", f"must hold a CLIP model: {reason}", show(path), fix) from error
    if missing := sorted(report["missing_keys"]):  # else they would be random
        raise UserError("path", f"must hold every weight: {missing[0]} is missing", show(path), fix)
    mean, std = (MEAN, STD) if processor is None else (processor.image_mean, processor.image_std)
    return _Clip(model.eval().requires_grad_(False), tokenizer, tuple(mean), tuple(std))
