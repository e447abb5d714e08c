"""CLIP score: how well images fit their prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from diffdistill.config_errors import first_line
from diffdistill.errors import UserError
from diffdistill.networks.files import quiet_libraries

from .spaces import AT_ONCE, pictures_of, plain_embedding, require_library, weights_sha256


class ClipScore:
    """100 max(cos(image, prompt), 0) per image, with the embeddings of a CLIP model.

    prepare: PIL images -> input.  image, text: input -> [B, d].  tokens: prompts -> (tokens, how many were cut).
    The factor is torchmetrics' 100; Hessel et al. have 2.5.  Source: Hessel et al. 2021, arXiv:2104.08718.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        prepare: Callable[[Sequence[Image.Image]], Tensor],
        image: Callable[[Tensor], Tensor],
        tokens: Callable[[Sequence[str]], tuple[Any, int]],
        text: Callable[[Any], Tensor],
    ) -> None:
        self._model = model.eval().requires_grad_(False)
        self._prepare, self._image, self._tokens, self._text = prepare, image, tokens, text
        self.sha256 = weights_sha256(model)
        self.cut = 0

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [B] in 0..100 of images [B, C, H, W] in [-1, 1]; `cut` counts prompts longer than the model reads."""
        device = next(self._model.parameters()).device
        found = []
        for start in range(0, len(images), AT_ONCE):
            pictures = [Image.fromarray(p) for p in pictures_of(images[start : start + AT_ONCE])]
            tokens, cut = self._tokens(prompts[start : start + AT_ONCE])
            self.cut += cut
            seen = self._image(self._prepare(pictures).to(device))
            told = self._text(tokens.to(device))
            found.append(100 * torch.cosine_similarity(seen, told).clamp(min=0).double().cpu())
        return torch.cat(found)

    def tell_cut(self) -> None:
        """Say how many prompts were longer than the model reads, if any."""
        if self.cut:
            text = f"clip_score: {self.cut} prompts are longer than the model reads; it saw their beginnings"
            Console(stderr=True).print(text, soft_wrap=True, highlight=False)


def load_clip(spec: str, device: torch.device | str = "cpu", key: str = "clip") -> ClipScore:
    """`transformers:NAME-OR-FOLDER` or `open_clip:NAME@PRETRAINED`. Raises UserError if it cannot be had."""
    kind, _, rest = spec.partition(":")
    if kind not in ("transformers", "open_clip") or not rest:
        raise UserError(key, "must be transformers:NAME or open_clip:NAME@PRETRAINED", repr(spec),
                        "Write for example transformers:openai/clip-vit-base-patch16.")  # fmt: skip
    require_library(kind, key)
    try:
        with quiet_libraries():
            return (_transformers if kind == "transformers" else _open_clip)(rest, device)
    except Exception as error:  # each library has its own ways to say that there is no such network
        fix = f"{first_line(error)} Give a name that {kind} knows, or the path of a folder or file."
        raise UserError(key, f"must name a CLIP model that {kind} can load", repr(spec), fix) from error


def _transformers(name: str, device: torch.device | str) -> ClipScore:
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    model = CLIPModel.from_pretrained(name, use_safetensors=True).to(device)
    processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    longest = model.config.text_config.max_position_embeddings

    def tokens(prompts: Sequence[str]) -> tuple[Any, int]:
        whole = tokenizer(list(prompts))["input_ids"]
        made = tokenizer(list(prompts), padding=True, truncation=True, max_length=longest, return_tensors="pt")
        return made, sum(len(ids) > longest for ids in whole)

    return ClipScore(
        model,
        lambda pictures: processor(images=list(pictures), return_tensors="pt")["pixel_values"],
        lambda x: plain_embedding(model.get_image_features(pixel_values=x)),
        tokens,
        lambda made: plain_embedding(
            model.get_text_features(input_ids=made["input_ids"], attention_mask=made["attention_mask"])
        ),
    )


def _open_clip(rest: str, device: torch.device | str) -> ClipScore:
    import open_clip

    name, _, weights = rest.partition("@")
    if not weights:
        raise ValueError("open_clip needs @ and a tag of its pretrained weights, or a file.")
    model, _, transform = open_clip.create_model_and_transforms(name, pretrained=weights)
    tokenizer = open_clip.get_tokenizer(name)

    def tokens(prompts: Sequence[str]) -> tuple[Any, int]:
        wide = tokenizer(list(prompts), context_length=4 * model.context_length)
        cut = int((wide[:, model.context_length :] != 0).any(1).sum())
        return tokenizer(list(prompts), context_length=model.context_length), cut

    return ClipScore(
        model.to(device),
        lambda pictures: torch.stack([transform(picture) for picture in pictures]),
        model.encode_image,
        tokens,
        model.encode_text,
    )
