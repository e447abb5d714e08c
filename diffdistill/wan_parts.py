"""The parts beside the transformer that make a WanPipeline of the moving digits: a small tokenizer and text encoder, a
VAE that is the identity, a scheduler.

Built for the purpose and never trained: the text encoder's random answers tell the prompts apart, which is all that a
transformer trained on them needs. `python -m diffdistill.wan_parts --out DIR` writes them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from diffdistill.export_schedulers import flow_scheduler
from diffdistill.moving_digits import prompts
from diffdistill.networks.files import quiet_libraries, seeded
from diffdistill.networks.wan import PROMPTS

TEXT_WIDTH = 32
TOKENS = 8  # of the longest prompt, its end included: the pipeline's max_sequence_length
SPECIAL = ("<pad>", "</s>", "<unk>")
LIFT = 1e3  # of the VAE's constant channel over pixels: its norm then feels the pixels by 1e-6


def tokenizer() -> Any:
    """Words to ids for the prompts' words, an end token behind."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = sorted({word for prompt in prompts() for word in prompt.split()})
    ids = {word: index for index, word in enumerate((*SPECIAL, *words))}
    inner = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", ids["</s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=TOKENS
    )


def text_encoder(vocabulary: int) -> Any:
    """A UMT5EncoderModel of one layer with random weights, the same at every call."""
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=vocabulary, d_model=TEXT_WIDTH, d_kv=16, d_ff=64, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    with seeded(0):
        return UMT5EncoderModel(config).eval()


@torch.no_grad()
def identity_vae() -> Any:
    """An AutoencoderKLWan that returns its latents, one grey channel as three, within 1e-5.

    Every residual branch is zero. The last norm divides by a constant channel far above the pixels, so it scales all
    by one number, and x = silu(x) - silu(-x) undoes the last activation.
    """
    from diffusers import AutoencoderKLWan

    width = 4  # one channel each for x and -x, one constant, one idle
    vae = AutoencoderKLWan(
        base_dim=width, z_dim=1, dim_mult=[1], num_res_blocks=1, attn_scales=[], temperal_downsample=[],
        latents_mean=[0.0], latents_std=[1.0], scale_factor_temporal=1, scale_factor_spatial=1,
    )  # fmt: skip
    for half, out in ((vae.encoder, 2), (vae.decoder, 3)):
        for name, parameter in half.named_parameters():
            if not name.endswith("gamma"):
                parameter.zero_()
        _centre(half.conv_in)[0, 0], _centre(half.conv_in)[1, 0] = 1.0, -1.0
        half.conv_in.bias[2] = LIFT
        # the norm gives sqrt(width) x / LIFT; three times the input's channels are equal, one is read
        gain = LIFT / width**0.5
        for channel in range(1 if half is vae.encoder else out):
            _centre(half.conv_out)[channel, 0], _centre(half.conv_out)[channel, 1] = gain, -gain
    vae.encoder.conv_out.bias[1] = -30.0  # log variance of the posterior
    for conv in (vae.quant_conv, vae.post_quant_conv):
        conv.weight.zero_()
        conv.bias.zero_()
        for channel in range(conv.weight.shape[0]):
            _centre(conv)[channel, channel] = 1.0
    return vae.eval()


def _centre(conv: nn.Module) -> Tensor:
    """Weights [out, in] of a causal convolution's tap on the pixel itself: the last in time, the middle in space."""
    weight: Tensor = conv.weight  # type: ignore[assignment]
    return weight[:, :, -1, weight.shape[3] // 2, weight.shape[4] // 2]


@torch.no_grad()
def embedded(told: list[str]) -> Tensor:
    """What WanPipeline feeds its transformer for prompts, [n, 8, 32]: padding is 0."""
    words = tokenizer()
    found = words(told, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    states = text_encoder(len(words))(found.input_ids, found.attention_mask).last_hidden_state
    return states * found.attention_mask[..., None]


def pipeline(transformer: Any, times: Sequence[float]) -> Any:
    """The WanPipeline around a transformer, for calls of as many steps as there are times."""
    from diffusers import WanPipeline

    words = tokenizer()
    with quiet_libraries():
        return WanPipeline(
            tokenizer=words,
            text_encoder=text_encoder(len(words)),
            vae=identity_vae(),
            scheduler=flow_scheduler(times),
            transformer=transformer,
        )


def write_prompts(folder: Path) -> None:
    """The table of prompts' embeddings that training reads."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"prompts": embedded(prompts()).contiguous()}, folder / PROMPTS)


def main() -> None:
    """Write the table into the folder --out."""
    parser = argparse.ArgumentParser(prog="python -m diffdistill.wan_parts", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    write_prompts(parser.parse_args().out)


if __name__ == "__main__":
    main()
