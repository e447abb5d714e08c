"""The parts around the shapes' UNet: a VAE, a tokenizer and a CLIP text encoder, trained here, as a pipeline folder.

`python -m diffdistill.shapes_pipeline --out DIR` writes a StableDiffusionPipeline whose UNet is random; then
`diffdistill train experiment=shapes_t2i_teacher networks.path=DIR` trains that.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffdistill.networks.files import quiet_libraries, seeded
from diffdistill.rng import Rng
from diffdistill.shapes import COUNTS, attributes, captions, render

LENGTH = 12  # tokens of a prompt
VAE_STEPS = 3000
VAE_BATCH = 32
VAE_LR = 3e-3
KL_WEIGHT = 1e-6  # per value, beside the errors
TEXT_STEPS = 300
BEGIN, END, PAD, UNKNOWN = "<|startoftext|>", "<|endoftext|>", "<pad>", "<unk>"
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "set_alpha_to_one": False,
    "clip_sample": False,
    "steps_offset": 1,  # not of trailing timesteps; pipelines warn without
}
UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "cross_attention_dim": 64,
    "attention_head_dim": 4,  # diffusers reads it as the number of heads
    "norm_num_groups": 8,
}


def tokenizer() -> Any:
    """Words of the captions to ids; a prompt is padded to 12 tokens."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = sorted({word for caption in captions() for word in caption.split()})
    ids = {word: i for i, word in enumerate((PAD, BEGIN, END, UNKNOWN, *words))}
    inner = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A {END}", special_tokens=[(BEGIN, ids[BEGIN]), (END, ids[END])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=BEGIN, eos_token=END, pad_token=PAD, unk_token=UNKNOWN,
        model_max_length=LENGTH,
    )  # fmt: skip


def trained_text_encoder(tokens: Any) -> Any:
    """A CLIPTextModel of two layers that learned to tell a caption's colour, shape and place at its last token."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=LENGTH, pad_token_id=tokens.pad_token_id, bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id, projection_dim=64,
    )  # fmt: skip
    encoder = CLIPTextModel(config)
    heads = nn.ModuleList(nn.Linear(64, count) for count in COUNTS)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *heads.parameters()], lr=1e-3)
    ids = tokens(captions(), padding="max_length", return_tensors="pt").input_ids
    wanted = attributes(torch.arange(len(ids)))
    for _ in range(TEXT_STEPS):
        pooled = encoder(ids).pooler_output
        loss = torch.stack([F.cross_entropy(head(pooled), w) for head, w in zip(heads, wanted, strict=True)]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return encoder.eval().requires_grad_(False)


def _pictures(step: int, num: int, phase: str = "vae") -> Tensor:
    rng = Rng(0, step, phase, range(num))
    return render(rng, rng.integers(math.prod(COUNTS), (num,)))


def trained_vae() -> Any:
    """An AutoencoderKL with 4 x 8 x 8 latents, whose scaling_factor makes their standard deviation 1."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 32), down_block_types=("DownEncoderBlock2D",) * 3, layers_per_block=1,
        up_block_types=("UpDecoderBlock2D",) * 3, latent_channels=4, norm_num_groups=2, sample_size=32,
        mid_block_add_attention=False,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(vae.parameters(), lr=VAE_LR, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, VAE_LR, total_steps=VAE_STEPS)
    for step in range(VAE_STEPS):
        x = _pictures(step, VAE_BATCH)
        law = vae.encode(x).latent_dist
        wrong = vae.decode(law.sample()).sample - x
        # the absolute error alone is content with grey shapes, few pixels as they are
        loss = wrong.abs().mean() + 4 * wrong.square().mean() + KL_WEIGHT * law.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 500 == 499:
            print(f"VAE step {step + 1}: loss {loss.item():.4f}", flush=True)
    vae = vae.eval().requires_grad_(False)
    z = vae.encode(_pictures(0, 1000, "scale")).latent_dist.mode()
    vae.register_to_config(scaling_factor=float(1 / z.std()))  # this pipeline knows no shift
    return vae


def error(vae: Any) -> float:
    """Root mean squared error of a pixel in [-1, 1], on pictures of its own."""
    x = _pictures(0, 1000, "error")
    return float((vae.decode(vae.encode(x).latent_dist.mode()).sample - x).square().mean().sqrt())


def main() -> None:
    """Train the parts and write the folder."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    parser = argparse.ArgumentParser(prog="python -m diffdistill.shapes_pipeline", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    out: Path = parser.parse_args().out
    tokens, vae = tokenizer(), trained_vae()
    with torch.no_grad():
        print(f"VAE: root mean squared error {error(vae):.4f} of [-1, 1], scaling {vae.config.scaling_factor:.4f}")
    with seeded(0):
        unet = UNet2DConditionModel.from_config(UNET)
    with quiet_libraries():
        StableDiffusionPipeline(
            vae, trained_text_encoder(tokens), tokens, unet, DDIMScheduler.from_config(SCHEDULER), None, None,
            requires_safety_checker=False,
        ).save_pretrained(out)  # fmt: skip
    print(f"wrote {out}; its UNet is random")


if __name__ == "__main__":
    main()
