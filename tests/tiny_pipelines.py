"""Whole pipelines of diffusers at toy size, tokenizers and text encoders included, as a user's folder holds them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from tiny_families import LENGTH, TINY

from diffdistill.networks.files import quiet_libraries, seeded

WORDS = ("a", "red", "green", "blue", "circle", "square", "on", "black")


def tokenizer(end: str = "</s>") -> Any:
    """Words to ids; a prompt is padded to LENGTH tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {word: i for i, word in enumerate(("<pad>", end, "<unk>", *WORDS))}
    inner = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, ids[end])])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token=end, unk_token="<unk>", model_max_length=LENGTH
    )


def clip(projection: int | None = None) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(WORDS) + 3, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=LENGTH, eos_token_id=1, bos_token_id=2, pad_token_id=0, projection_dim=projection or 16,
    )  # fmt: skip
    with seeded(1):
        return (CLIPTextModel(config) if projection is None else CLIPTextModelWithProjection(config)).eval()


def t5() -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=len(WORDS) + 3, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0)
    with seeded(2):
        return T5EncoderModel(config).eval()


def vae() -> Any:
    """Four latent channels, two pixels per latent and side."""
    with seeded(3):
        return diffusers.AutoencoderKL(
            block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
            up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, shift_factor=0.1,
        ).eval()  # fmt: skip


def written(name: str, folder: Path) -> Path:
    """The pipeline of family `name` in `folder`."""
    model = TINY[name].model()
    scheduler = type(TINY[name].scheduler).from_config(TINY[name].scheduler.config)
    with quiet_libraries(), torch.no_grad():
        if name in ("sd15", "sd21"):
            pipeline: Any = diffusers.StableDiffusionPipeline(
                vae(), clip(), tokenizer(), model, scheduler, None, None, requires_safety_checker=False
            )
        elif name == "pixart":
            pipeline = diffusers.PixArtAlphaPipeline(tokenizer(), t5(), vae(), model, scheduler)
        elif name == "flux":
            pipeline = diffusers.FluxPipeline(scheduler, vae(), clip(), tokenizer(), t5(), tokenizer(), model)
        else:
            raise ValueError(name)
        pipeline.save_pretrained(folder)
    return folder
